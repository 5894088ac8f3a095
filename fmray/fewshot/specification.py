"""Meta-Dataset's `dataset_spec.json`: classes of a data set, their splits, and groups of classes.

Reads all three kinds of specification: flat, Omniglot's two levels, and ILSVRC's WordNet graph
(Triantafillou et al. 2020, section 3 and appendix). Splits are called train, val and test here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SPLIT_NAMES = {"train": "TRAIN", "val": "VALID", "test": "TEST"}
MIN_LEAVES, MAX_LEAVES = 5, 392  # classes below a WordNet node that episodes are drawn from
MAX_COUNT = 10**8  # classes of a data set, images of a class


@dataclass(frozen=True)
class DatasetSpecification:
    """Classes and splits of one data set; a class id is a position in `class_names`."""

    name: str
    class_names: tuple[str, ...]
    images: tuple[int, ...]  #: number of images by class id
    file_pattern: str
    _classes: dict[str, np.ndarray]  # split -> int64 class ids
    _groups: dict[str, list[np.ndarray]] | None  # split -> groups of class ids; None: flat

    @classmethod
    def read(cls, path: Path) -> DatasetSpecification:
        """Read a `dataset_spec.json`.

        Raises:
            ValueError: not a specification; the message names the file and the key.
        """
        try:
            values = json.loads(path.read_text())
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; name a dataset_spec.json") from error
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8
            raise ValueError(f"{path}: not JSON: {error}") from error
        readers = {
            "DatasetSpecification": _flat,
            "BiLevelDatasetSpecification": _two_levels,
            "HierarchicalDatasetSpecification": _graph,
        }
        kind = values.get("__class__") if isinstance(values, dict) else None
        if not isinstance(kind, str) or kind not in readers:
            raise ValueError(f"{path}: __class__ is {kind!r}; should be {' or '.join(readers)}")
        try:
            names = _by_id(values["class_names"])
            if not all(isinstance(name, str) for name in names):
                raise ValueError("class_names should be texts")
            for number, name in enumerate(names):
                if names.index(name) < number:
                    raise ValueError(
                        f"class_names: ids {names.index(name)} and {number} are both {name!r}"
                    )
            classes, groups, images = readers[kind](values, names)
            count = sum(map(len, classes.values()))
            if len(names) != count or len(images) != count:
                raise ValueError(
                    f"the splits have {count} classes, class_names {len(names)},"
                    f" images_per_class {len(images)}"
                )
            name, pattern = values["name"], values["file_pattern"]
            if not isinstance(name, str) or not isinstance(pattern, str):
                raise ValueError(f"name {name!r} and file_pattern {pattern!r} should be texts")
            return cls(name, names, images, pattern, classes, groups)
        except KeyError as error:
            raise ValueError(f"{path}: {error} is missing") from error
        except (ValueError, TypeError, AttributeError) as error:  # such as a list for a mapping
            raise ValueError(f"{path}: {error}") from error

    def classes(self, split: str) -> np.ndarray:
        """Return the int64 class ids of train, val or test."""
        return self._classes[split]

    def groups(self, split: str) -> list[np.ndarray] | None:
        """Return the groups that an episode's classes are drawn from; None: one of all classes.

        A group holds the int64 class ids of an alphabet (Omniglot) or a WordNet node (ILSVRC).
        """
        return None if self._groups is None else self._groups[split]


def _by_id(values: dict[str, Any]) -> tuple[Any, ...]:
    """Return the values of {"0": ..., "1": ..., ...} in order."""
    missing = [number for number in range(len(values)) if str(number) not in values]
    if missing:
        raise ValueError(f"ids should count from 0 to {len(values) - 1}; {missing[0]} is missing")
    return tuple(values[str(number)] for number in range(len(values)))


def _consecutive(counts: dict[str, int]) -> dict[str, np.ndarray]:
    """Number ids through train, val and test."""
    sizes = [_count(counts[name]) for name in SPLIT_NAMES.values()]
    ends = np.cumsum(sizes)
    return {
        split: np.arange(end - size, end)
        for split, size, end in zip(SPLIT_NAMES, sizes, ends, strict=True)
    }


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"{value!r} is not a number of classes or images")
    return value


# Each reader returns (class ids by split, groups by split or None, images by class id).


def _flat(values: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, None, tuple[int, ...]]:
    """Read a specification without groups."""
    images = tuple(map(_count, _by_id(values["images_per_class"])))
    return _consecutive(values["classes_per_split"]), None, images


def _two_levels(values: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, Any, tuple[int, ...]]:
    """Read Omniglot's: superclasses are split, and classes are numbered through them."""
    sizes = [_count(size) for size in _by_id(values["classes_per_superclass"])]
    ends = np.cumsum(sizes)
    members = [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    groups = {
        split: [members[number] for number in numbers]
        for split, numbers in _consecutive(values["superclasses_per_split"]).items()
    }
    empty = np.empty(0, dtype=np.int64)
    classes = {split: np.concatenate([empty, *parts]) for split, parts in groups.items()}
    return classes, groups, tuple(map(_count, _by_id(values["images_per_class"])))


def _graph(values: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, Any, tuple[int, ...]]:
    """Read ILSVRC's: each split is a graph of WordNet nodes whose leaves are the classes."""
    ids = {name: number for number, name in enumerate(names)}
    classes, groups, images = {}, {}, {}
    for split, key in SPLIT_NAMES.items():
        children = {node["wn_id"]: node["children_ids"] for node in values["split_subgraphs"][key]}
        leaves: dict[str, frozenset[int]] = {}
        for node in children:
            _span(node, children, ids, leaves, ())
        classes[split] = np.array(
            sorted(ids[node] for node, below in children.items() if not below), dtype=np.int64
        )
        groups[split] = [
            np.array(sorted(leaves[node]), dtype=np.int64)
            for node in children
            if MIN_LEAVES <= len(leaves[node]) <= MAX_LEAVES
        ]
        counts = values["images_per_class"][key]
        images |= {int(number): _count(counts[names[number]]) for number in classes[split]}
    return classes, groups, tuple(images[number] for number in sorted(images))


def _span(
    node: str,
    children: dict[str, list[str]],
    ids: dict[str, int],
    leaves: dict[str, frozenset[int]],
    above: tuple[str, ...],
) -> frozenset[int]:
    """Return the class ids below a node; cached in `leaves`, as a node may have several parents."""
    if node in above:
        raise ValueError(f"split_subgraphs: {node} is below itself")
    if node not in leaves:
        below = children[node]
        leaves[node] = (
            frozenset().union(*(_span(n, children, ids, leaves, (*above, node)) for n in below))
            if below
            else frozenset([ids[node]])
        )
    return leaves[node]

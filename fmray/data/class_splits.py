"""Which split each class of a collection is in: as the data says, by a file, or by a seeded hash.

In: class names, and what says their split. Out: class name -> train, val or test. A class is in one
split: its images are never divided.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from fmray.data.image_store import SPLITS

HELD_OUT = 0.15  # of the classes, in each of val and test
WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def hash_split(names: Iterable[str], seed: int) -> dict[str, str]:
    """Split by the order of a seeded hash of the names: 15 % of the classes (2 at least) each to
    val and test, but never so many that train has none. Same names, same split, in any collection.
    """
    ordered = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    held = min(max(2, round(HELD_OUT * len(ordered))), (len(ordered) - 1) // 2)
    splits = ["val"] * held + ["test"] * held + ["train"] * (len(ordered) - 2 * held)
    return dict(zip(ordered, splits, strict=True))


def file_split(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Split by a JSON file {train|val|test: [class names]}; Meta-Dataset's `valid` is val.

    The file may name classes that are not there.

    Raises:
        ValueError: it is no such file, names a class twice, or leaves one of `names` out.
    """
    try:
        listed = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name a JSON file of class splits") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(listed, dict) or not all(isinstance(part, list) for part in listed.values()):
        raise ValueError(f"{path}: should be {{train|val|test: [class names]}}")
    split: dict[str, str] = {}
    for key, part in listed.items():
        if key not in WORDS:
            raise ValueError(f"{path}: {key}: no such split; should be train, val or test")
        for name in part:
            if name in split:
                raise ValueError(f"{path}: class {name!r} is listed twice ({split[name]}, {key})")
            split[name] = WORDS[key]
    for name in names:
        if name not in split:
            raise ValueError(f"{path}: class {name!r} has no split; list it in train, val or test")
    return {name: split[name] for name in names}


def merge_splits(where: str, found: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Class name -> split from (class name, word for its split) pairs of the data itself.

    Raises:
        ValueError: a word that means no split, or a class in two splits.
    """
    split: dict[str, str] = {}
    for name, word in found:
        if word not in WORDS:
            raise ValueError(
                f"{where}: class {name!r}: split is {word!r}; should be train, val or test"
            )
        if split.setdefault(name, WORDS[word]) != WORDS[word]:
            raise ValueError(
                f"{where}: class {name!r} is in {split[name]} and in {WORDS[word]}; a class has one"
                " split: mend it, or set split: hash to split anew"
            )
    return split


def splits_table(splits: dict[str, tuple[str, dict[str, str]]]) -> str:
    """Classes a split of each collection, as text. splits: collection -> (where its split is from,
    class name -> split)."""
    width = max(map(len, ["collection", *splits]))
    lines = [f"{'collection':{width}}  train   val  test  classes split by"]
    for name, (source, split) in splits.items():
        counts = "  ".join(f"{list(split.values()).count(part):4d}" for part in SPLITS)
        lines.append(f"{name:{width}}   {counts}  {source}")
    return "\n".join(lines)

"""Meta-Dataset specifications: the published numbers, and groups against brute force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmray.fewshot.specification import DatasetSpecification

# train, val, test classes: table 5 of the Meta-Dataset paper
PUBLISHED = {
    "ilsvrc_2012": (712, 158, 130),
    "omniglot": (883, 81, 659),
    "aircraft": (70, 15, 15),
    "cu_birds": (140, 30, 30),
    "dtd": (33, 7, 7),
    "quickdraw": (241, 52, 52),
    "fungi": (994, 200, 200),
    "vgg_flower": (71, 15, 16),
    "traffic_sign": (0, 0, 43),
    "mscoco": (0, 40, 40),
}
SPLITS = ("train", "val", "test")


def read(folder: Path, name: str) -> DatasetSpecification:
    return DatasetSpecification.read(
        folder / "meta_dataset" / "dataset_specs" / f"{name}_dataset_spec.json"
    )


def write(path: Path, **changes: Any) -> Path:
    values = {
        "__class__": "DatasetSpecification",
        "name": "three",
        "classes_per_split": {"TRAIN": 1, "VALID": 1, "TEST": 1},
        "class_names": {"0": "a", "1": "b", "2": "c"},
        "images_per_class": {"0": 5, "1": 6, "2": 7},
        "file_pattern": "{}.tfrecords",
    }
    path.write_text(json.dumps(values | changes))
    return path


def test_numbers_of_classes_match_the_paper(real_data: Path) -> None:
    for name, counts in PUBLISHED.items():
        specification = read(real_data, name)
        classes = [specification.classes(split) for split in SPLITS]
        assert tuple(map(len, classes)) == counts
        assert sorted(np.concatenate(classes)) == list(range(sum(counts)))


def test_splits_match_the_published_lists(real_data: Path) -> None:
    for name in ("cu_birds", "dtd", "mscoco", "quickdraw", "fungi", "aircraft"):
        specification = read(real_data, name)
        listed = json.loads((real_data / "meta_dataset/splits" / f"{name}_splits.json").read_text())
        for split, key in zip(SPLITS, ("train", "valid", "test"), strict=True):
            names = {specification.class_names[number] for number in specification.classes(split)}
            assert names == set(listed.get(key, []))


def test_groups_are_eligible_nodes_and_alphabets(real_data: Path) -> None:
    imagenet, omniglot = read(real_data, "ilsvrc_2012"), read(real_data, "omniglot")
    assert [len(imagenet.groups(split)) for split in SPLITS] == [113, 18, 15]
    assert [len(omniglot.groups(split)) for split in SPLITS] == [25, 5, 20]
    for split in SPLITS:
        sizes = [len(group) for group in imagenet.groups(split)]
        assert min(sizes) >= 5 and max(sizes) <= 392
        of_alphabets = np.concatenate(omniglot.groups(split))
        assert (of_alphabets == omniglot.classes(split)).all()
        for alphabet in omniglot.groups(split):
            names = {omniglot.class_names[number].rpartition("-")[0] for number in alphabet}
            assert len(names) == 1
    assert read(real_data, "cu_birds").groups("train") is None


def test_groups_of_a_graph_match_a_walk_down_every_path(real_data: Path) -> None:
    """A walk down every path meets a shared descendant more than once."""
    path = real_data / "meta_dataset/dataset_specs/ilsvrc_2012_dataset_spec.json"
    graph = json.loads(path.read_text())["split_subgraphs"]["VALID"]
    children = {node["wn_id"]: node["children_ids"] for node in graph}
    specification = read(real_data, "ilsvrc_2012")
    expected = []
    for top in children:
        ends, stack = set(), [top]
        while stack:
            node = stack.pop()
            stack += children[node]
            if not children[node]:
                ends.add(specification.class_names.index(node))
        if 5 <= len(ends) <= 392:
            expected.append(sorted(ends))
    assert [list(group) for group in specification.groups("val")] == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"__class__": "Other"}, "__class__ is 'Other'"),
        ({"class_names": {"0": "a", "1": "b", "3": "c"}}, "0 to 2; 2 is missing"),
        ({"class_names": {"0": "a", "1": "b", "2": "a"}}, "ids 0 and 2 are both 'a'"),
        ({"class_names": {"0": "a", "1": "b"}}, "the splits have 3 classes, class_names 2"),
        ({"images_per_class": {"0": 1}}, "images_per_class 1"),
        ({"classes_per_split": {"TRAIN": 3}}, "'VALID' is missing"),
        ({"classes_per_split": 3}, "spec.json: "),
    ],
)
def test_invalid_specification_is_an_error(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=r"spec\.json: ") as error:
        DatasetSpecification.read(write(tmp_path / "spec.json", **changes))
    assert message in str(error.value)


def test_cyclic_graph_is_an_error(tmp_path: Path) -> None:
    nodes = [{"wn_id": "x", "children_ids": ["y"]}, {"wn_id": "y", "children_ids": ["x"]}]
    graphs = {"TRAIN": nodes, "VALID": [], "TEST": []}
    changes = {"__class__": "HierarchicalDatasetSpecification", "split_subgraphs": graphs}
    with pytest.raises(ValueError, match="x is below itself"):
        DatasetSpecification.read(write(tmp_path / "spec.json", **changes))

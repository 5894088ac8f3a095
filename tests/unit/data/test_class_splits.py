"""Class splits by hash, by file, and by the data."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmray.data.class_splits import file_split, hash_split, merge_splits, splits_table


@given(st.sets(st.text(max_size=5), min_size=1, max_size=60), st.integers(0, 9), st.randoms())
def test_hash_split_depends_only_on_names_and_seed(names, seed, random) -> None:
    shuffled = random.sample(sorted(names), len(names))
    split = hash_split(shuffled, seed)
    assert split == hash_split(sorted(names), seed) and set(split) == names
    counts = Counter(split.values())
    assert counts["train"] >= 1 and counts["val"] == counts["test"]
    if len(names) >= 5:
        assert counts["val"] == max(2, round(0.15 * len(names)))


def test_hash_split_changes_with_the_seed() -> None:
    names = [f"class {number}" for number in range(40)]
    assert len({tuple(sorted(hash_split(names, seed).items())) for seed in range(5)}) == 5


def test_hash_split_sizes_match_the_real_data(real_data: Path) -> None:
    """`split_70_15_15` comes with the data and follows the same rule."""
    rows = list(csv.DictReader((real_data / "images/class_splits.tsv").open(), delimiter="\t"))
    for domain in {row["domain"] for row in rows}:
        given_split = {
            row["class_name"]: row["split_70_15_15"] for row in rows if row["domain"] == domain
        }
        assert Counter(hash_split(given_split, 0).values()) == Counter(given_split.values()), domain


def test_split_files_of_meta_dataset(real_data: Path) -> None:
    path = real_data / "meta_dataset/splits/dtd_splits.json"
    listed = json.loads(path.read_text())
    split = file_split(path, ["banded", "braided", "crystalline"])
    for name, part in split.items():
        assert name in listed[{"val": "valid"}.get(part, part)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"),
        ("[]", "should be {train"),
        ('{"train": ["a", "b"], "extra": []}', "extra: unknown split"),
        ('{"train": ["a", "b"], "test": ["a"]}', "class 'a' is listed twice (train, test)"),
        ('{"train": ["a"]}', "class 'b' has no split"),
    ],
)
def test_invalid_split_file_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "splits.json").write_text(text)
    with pytest.raises(ValueError, match=r"splits\.json: ") as error:
        file_split(tmp_path / "splits.json", ["a", "b"])
    assert message in str(error.value)


def test_splits_from_the_data() -> None:
    assert merge_splits("x", [("a", "valid"), ("b", "test"), ("a", "val")]) == {
        "a": "val",
        "b": "test",
    }
    with pytest.raises(ValueError, match="x: class 'a' is in train and in test"):
        merge_splits("x", [("a", "train"), ("a", "test")])
    with pytest.raises(ValueError, match="x: class 'a': split is 'extra'"):
        merge_splits("x", [("a", "extra")])


def test_splits_table_counts_classes() -> None:
    table = splits_table({"birds": ("a file", {"a": "train", "b": "train", "c": "test"})})
    assert table.splitlines()[1].split() == ["birds", "2", "0", "1", "a", "file"]

"""Formats of image collections, and errors that name the file and the reason."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.images import (
    class_folders,
    image_recipe,
    noise_image,
    parquet,
    prepare_here,
    tfrecords,
)

from fmray.config.fewshot import CollectionConfig
from fmray.data.image_sources import Collection, SourceImage, find_collection, read_piece
from fmray.data.records import BadRow
from fmray.data.tfrecord import example, write_records


def find(path: Path, **config: Any) -> Collection:
    return find_collection("c", CollectionConfig(path=path, **config), 0, 10_000)


def read(collection: Collection) -> list[SourceImage | BadRow]:
    return [row for piece in collection.pieces for row in read_piece(piece)]


def rows(**columns: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_class_folders(tmp_path: Path) -> None:
    class_folders(tmp_path, {"b": 2, "a": 1})
    (tmp_path / "a" / "deep").mkdir()
    (tmp_path / "a" / "deep" / "x.PNG").write_bytes(noise_image(9))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    collection = find(tmp_path)
    assert list(collection.splits) == ["a", "b"] and collection.split_source == "hash, seed 0"
    assert {(row.class_name, row.source) for row in read(collection)} == {
        ("a", "a/0.png"),
        ("a", "a/deep/x.PNG"),
        ("b", "b/0.png"),
        ("b", "b/1.png"),
    }


def test_split_folders(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 1, "b": 1})
    class_folders(tmp_path / "valid", {"c": 1}, seed=5)
    assert find(tmp_path).splits == {"a": "train", "b": "train", "c": "val"}
    class_folders(tmp_path / "test", {"a": 1}, seed=9)
    with pytest.raises(ValueError, match=r"class 'a' is in test and in train; .* split: hash"):
        find(tmp_path)
    assert set(find(tmp_path, split="hash").splits) == {"a", "b", "c"}


def test_parquet_with_labels_only_and_datasets_images(tmp_path: Path) -> None:
    images = [{"bytes": noise_image(number), "path": f"{number}.png"} for number in range(30)]
    parquet(tmp_path / "a.parquet", rows(image=images, label=[5, 6] * 15), row_group_size=4)
    collection = find(tmp_path / "a.parquet")
    assert list(collection.splits) == ["5", "6"]
    read_back = read(collection)
    assert [row.image for row in read_back] == [image["bytes"] for image in images]
    assert [row.source for row in read_back] == [f"a.parquet#{number}" for number in range(30)]


def test_tfrecords(tmp_path: Path) -> None:
    collection = find(tfrecords(tmp_path / "r", [("x", 2), ("a", 1), ("m", 3)], (1, 1, 1)))
    assert collection.splits == {"a": "val", "m": "test", "x": "train"}
    assert collection.specification == tmp_path / "r" / "dataset_spec.json"
    assert [row.class_name for row in read(collection)] == ["x", "x", "a", "m", "m", "m"]
    image = read(collection)[0]
    assert image.image == noise_image(0) and image.source == "0.tfrecords@0"


def test_corrupt_record_is_an_error_with_file_and_byte(tmp_path: Path) -> None:
    path = tfrecords(tmp_path / "r", [("a", 2), ("b", 1)], (1, 0, 1))
    begin = len(example(noise_image(0), 0)) + 16
    data = bytearray((path / "0.tfrecords").read_bytes())
    data[begin + 40] ^= 1
    (path / "0.tfrecords").write_bytes(data)
    store = tmp_path / "store"
    with pytest.raises(ValueError, match=rf"0\.tfrecords: row 1: byte {begin}: wrong checksum"):
        prepare_here(image_recipe(store, {"c": path}))
    line = json.loads((store / "bad_rows.jsonl").read_text())
    assert line["file"].endswith("0.tfrecords") and f"byte {begin}" in line["reason"]
    assert prepare_here(image_recipe(store, {"c": path}, on_bad_row="skip")).rows == 2


def test_records_that_contradict_the_specification_are_errors(tmp_path: Path) -> None:
    path = tfrecords(tmp_path / "r", [("a", 1), ("b", 1)], (1, 0, 1))
    write_records(path / "0.tfrecords", [example(noise_image(0), 1)])
    bad = [row for row in read(find(path)) if isinstance(row, BadRow)]
    assert [row.reason for row in bad] == [
        "byte 0: label 1; by the specification the file is class 0, 'a'"
    ]
    write_records(path / "0.tfrecords", [example(noise_image(n), 0) for n in range(3)])
    assert read(find(path))[3].reason == "the file has 3 images; the specification says 1"
    write_records(path / "2.tfrecords", [])
    with pytest.raises(ValueError, match=r"2\.tfrecords: not a class of the specification of r"):
        find(path)


def test_parquet_that_contradicts_the_specification_is_an_error(tmp_path: Path) -> None:
    path = tfrecords(tmp_path / "r", [("a", 1), ("b", 1)], (1, 0, 1)) / "dataset_spec.json"
    images = [noise_image(0), noise_image(1)]
    file = parquet(tmp_path / "x.parquet", rows(image=images, class_name=["a", "z"]))
    with pytest.raises(ValueError, match="class 'z' is not in the specification of r"):
        find(file, specification=path)
    columns = {"image": images, "class_name": ["a", "b"], "split": ["train", "val"]}
    parquet(file, rows(**columns))
    with pytest.raises(ValueError, match="class 'b' is val here, and test in the specification"):
        find(file, specification=path)
    parquet(file, rows(**columns | {"split": ["train", "test"]}))
    assert find(file, specification=path).splits == {"a": "train", "b": "test"}


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"label": [0, 0], "class_name": ["a", "b"]}, "label 0 goes with 'a' and 'b'"),
        ({"label": [0, 1], "class_name": ["a", "a"]}, "class_name 'a' goes with 0 and 1"),
        ({"class_name": ["a", "a"], "split": ["train", "test"]}, "'a' is in "),
        ({"class_name": ["a", "b"], "split": ["train", "extra"]}, "'b': split is 'extra'"),
        ({"name": ["a", "b"]}, "has columns image, name; should have image, and class_name"),
    ],
)
def test_contradictory_parquet_columns_are_errors(
    tmp_path: Path, columns: dict[str, list[Any]], message: str
) -> None:
    file = parquet(tmp_path / "x.parquet", rows(image=[noise_image(0), noise_image(1)], **columns))
    with pytest.raises(ValueError, match=r"x\.parquet: ") as error:
        find(file)
    assert message in str(error.value)


def test_class_without_images_is_an_error_or_skipped(tmp_path: Path) -> None:
    class_folders(tmp_path / "tree", {"a": 1, "b": 0, "d": 1})
    records = tfrecords(tmp_path / "r", [("a", 1), ("b", 1)], (1, 0, 1))
    (records / "1.tfrecords").unlink()
    store = tmp_path / "store"
    with pytest.raises(ValueError, match="tree/b: the class has no images"):
        prepare_here(image_recipe(store, {"c": tmp_path / "tree"}))
    with pytest.raises(ValueError, match=r"1\.tfrecords: class 'b' has no images: no such file"):
        prepare_here(image_recipe(store, {"c": records}))
    skipped = image_recipe(store, {"c": tmp_path / "tree", "r": records}, on_bad_row="skip")
    assert prepare_here(skipped).bad_rows == 2


def test_broken_images_are_bad_rows(tmp_path: Path) -> None:
    class_folders(tmp_path / "tree", {"a": 2, "b": 2})
    (tmp_path / "tree/a/0.png").write_bytes(b"not an image")
    content = (tmp_path / "tree/b/1.png").read_bytes()
    (tmp_path / "tree/b/1.png").write_bytes(content[: len(content) // 2])
    bad = [row for row in read(find(tmp_path / "tree")) if isinstance(row, BadRow)]
    assert [os.path.relpath(row.file, tmp_path) for row in bad] == ["tree/a/0.png", "tree/b/1.png"]
    assert bad[0].reason.startswith("broken image: no image format that fmray reads (")
    assert bad[1].reason.startswith("broken image: ")
    images = [noise_image(0), None, b"x"]
    file = parquet(tmp_path / "x.parquet", rows(image=images, class_name=["a", "a", None]))
    assert [str(row) for row in read(find(file))[1:]] == [
        f"{file}: row 1: image is null",
        f"{file}: row 2: class_name is null",
    ]


def test_dangling_links_are_bad_rows(tmp_path: Path) -> None:
    class_folders(tmp_path / "tree", {"a": 2, "b": 2})
    (tmp_path / "tree/a/gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"tree/a/gone.png: cannot be read: No such file"):
        prepare_here(image_recipe(tmp_path / "store", {"c": tmp_path / "tree"}))
    recipe = image_recipe(tmp_path / "store", {"c": tmp_path / "tree"}, on_bad_row="skip")
    assert prepare_here(recipe).rows == 4


def test_path_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images\.collections\.c\.path: .*no such file or folder"):
        find(tmp_path / "missing")
    with pytest.raises(ValueError, match="no images found; is its format not folders"):
        find(tmp_path)
    (tmp_path / "x.parquet").write_text("not Parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: not a Parquet file"):
        find(tmp_path)

"""Trees of image folders: what is a class, what is a split, what is left out, and what is asked."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from support.image_cases import image_file, quadrants
from support.images import image_recipe, noise_image, prepare_here

from fmray.data.class_splits import split_of
from fmray.data.image_folders import Layout, describe_left_out, read_tree

KEY = "images.collections.c"


def make(path: Path, *files: str) -> Path:
    """Write files; those whose name has no suffix, or an image's, are images."""
    for number, name in enumerate(files):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = file.suffix in (".txt", ".json", ".csv", ".xml")
        file.write_bytes(b"text" if text else noise_image(number))
    return path


def found(path: Path, layout: Layout | None = None) -> dict[str, list[str]]:
    """Return the classes as `split:name` with their files."""
    tree = read_tree(path, layout, KEY)
    return {
        f"{found.split}:{found.name}": [str(f.relative_to(path)) for f in found.files]
        for found in tree.classes
    }


def left_out(path: Path, layout: Layout | None = None) -> str:
    return describe_left_out(read_tree(path, layout, KEY).left_out)


@pytest.mark.parametrize(
    "split, words",
    {
        "train": "train Train TRAIN training Training_set trainset meta_train meta-training base"
        " base_classes metatrain",
        "val": "val valid Validation validation dev meta_val metavalid Val_set",
        "test": "test Test testing meta_test novel novel_classes TestSet",
    }.items(),
)
def test_common_names_of_splits_are_known(split: str, words: str) -> None:
    assert {word: split_of(word) for word in words.split()} == dict.fromkeys(words.split(), split)
    assert not any(map(split_of, ("trains", "bus", "contest", "baseball", "values", "", "meta")))


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Val", "Test"),
        ("training", "validation", "testing"),
        ("meta_train", "meta_val", "meta_test"),
        ("base", "dev", "novel"),
    ],
)
def test_split_folders_are_recognised(tmp_path: Path, names: tuple[str, str, str]) -> None:
    train, val, test = names
    make(tmp_path, f"{train}/a/0.png", f"{train}/b/x/0.png", f"{val}/c/0.png", f"{test}/d/0.png")
    make(tmp_path, "__MACOSX/train/a/._0.png", "annotations/a.json", "devkit/x/y.txt", "README.txt")
    assert set(found(tmp_path)) == {f"{train}:a", f"{train}:b", f"{val}:c", f"{test}:d"}
    text = left_out(tmp_path)
    assert "hidden or system folders: 1 (. 1)" in text
    assert "folders next to the split folders: 2 (annotations 1, devkit 1)" in text
    assert "files that are no image (.txt): 2 (" in text


def test_files_are_images_by_their_content(tmp_path: Path) -> None:
    make(tmp_path, "a/0.png", "a/1", "a/2.jfif", "a/3.JPG", "a/4.data", "b/0.xyz", "b/x.txt")
    (tmp_path / "a" / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    (tmp_path / "a" / "pointer").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "b" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "b" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    make(tmp_path, "b/.ipynb_checkpoints/0.png", ".git/x.png")
    names = ["0.png", "1", "2.jfif", "3.JPG", "4.data", "photo.heic", "pointer"]
    assert found(tmp_path) == {":a": [f"a/{name}" for name in names], ":b": ["b/0.xyz"]}
    assert left_out(tmp_path) == (
        "hidden or system folders: 2 (. 1, b 1); files that are no image (.db): 1 (b 1);"
        " files that are no image (.txt): 1 (b 1); hidden files: 1 (b 1)"
    )


def test_preparation_prints_what_is_left_out_and_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "tree", "a/0.png", "a/notes.txt", "b/1.png", "c/2.png")
    exif = quadrants().getexif()
    exif[0x0112] = 6
    (tmp_path / "tree" / "a" / "lying").write_bytes(image_file(quadrants(), exif=exif))
    recipe = image_recipe(tmp_path / "store", {"c": tmp_path / "tree"})
    for _ in range(2):  # made, up to date
        assert prepare_here(recipe).rows == 4
        out = capsys.readouterr().out
        assert "c: left out files that are no image (.txt): 1 (a 1)" in out
        assert "c: images: 1 turned by EXIF" in out


@pytest.mark.parametrize(
    "files, message, answers",
    [
        (
            ["images/a/0.png", "images/b/1.png"],
            "images hold folders only, no images; set images.collections.c.layout: classes if",
            {"classes": [":images"], "leaves": [":images/a", ":images/b"]},
        ),
        (
            ["dogs/small/0.png", "dogs/large/1.png", "cats/small/2.png"],
            "cats, dogs hold folders only",
            {
                "classes": [":cats", ":dogs"],
                "leaves": [":cats/small", ":dogs/large", ":dogs/small"],
            },
        ),
        (
            ["Train/dogs/small/0.png", "Test/cats/small/2.png"],
            "Test/cats, Train/dogs hold folders only, no images; set images.collections.c.layout:"
            " splits if",
            {
                "splits": ["Test:cats", "Train:dogs"],
                "leaves": ["Test:cats/small", "Train:dogs/small"],
            },
        ),
        (
            ["train/a/0.png", "test/b/1.png", "unlabeled/2.png"],
            "test, train look like split folders, but unlabeled next to them holds images, too;",
            {"splits": ["test:b", "train:a"], "classes": [":test", ":train", ":unlabeled"]},
        ),
        (
            ["train/0.png", "test/1.png"],
            "test, train are named like splits, but hold images instead of class folders",
            {"classes": [":test", ":train"]},
        ),
    ],
)
def test_trees_that_can_be_read_in_several_ways_are_questions(
    tmp_path: Path, files: list[str], message: str, answers: dict[Layout, list[str]]
) -> None:
    make(tmp_path, *files)
    with pytest.raises(ValueError) as error:
        read_tree(tmp_path, None, KEY)
    assert message in str(error.value) and str(tmp_path) in str(error.value)
    for layout, classes in answers.items():
        assert f"layout: {layout}" in str(error.value)
        assert list(found(tmp_path, layout)) == classes


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    make(tmp_path, "train/0.png", "bus/1.png", "car/2.png")
    assert list(found(tmp_path)) == [":bus", ":car", ":train"]


def test_some_classes_with_deep_images_are_classes(tmp_path: Path) -> None:
    make(tmp_path, "a/0.png", "b/x/y/1.png")
    assert list(found(tmp_path)) == [":a", ":b"]


def test_images_outside_of_classes(tmp_path: Path) -> None:
    make(tmp_path, "0.png", "1.png")
    with pytest.raises(ValueError, match="2 images, but no class folders; move the images"):
        read_tree(tmp_path, None, KEY)
    make(tmp_path, "train/a/2.png", "train/3.png")
    assert list(found(tmp_path)) == ["train:a"]
    assert left_out(tmp_path) == "images outside the class folders: 3 (. 2, train 1)"


def test_empty_classes_are_kept_as_mistakes_and_annotations_are_not(tmp_path: Path) -> None:
    make(tmp_path, "a/0.png", "labels/a.txt", "b/notes.txt")
    assert found(tmp_path) == {":a": ["a/0.png"], ":b": []}
    assert "folders of annotations: 1 (labels 1)" in left_out(tmp_path)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    make(tmp_path / "there" / "a", "0.png", "deep/1.png")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").symlink_to(tmp_path / "there" / "a")
    (tmp_path / "there" / "a" / "deep" / "up").symlink_to(tmp_path / "there" / "a")
    assert found(tmp_path / "tree") == {":a": ["a/0.png", "a/deep/1.png"]}
    assert left_out(tmp_path / "tree") == "links to a folder above: 1 (a/deep 1)"
    os.mkfifo(tmp_path / "there" / "a" / "pipe")
    assert "special files: 1 (a 1)" in left_out(tmp_path / "tree")


def test_composed_and_decomposed_names_are_one_class(tmp_path: Path) -> None:
    composed = "caf\u00e9"
    make(tmp_path, f"{composed}/0.png", f"{unicodedata.normalize('NFD', composed)}/1.png")
    assert [found.name for found in read_tree(tmp_path, None, KEY).classes] == [composed] * 2
    recipe = image_recipe(tmp_path.parent / f"{tmp_path.name}-store", {"c": tmp_path})
    assert prepare_here(recipe).rows == 2

"""List trees of image folders: which folders are classes, their splits, and what is left out.

A tree holds class folders, or split folders (`train`, `Validation`, `meta_test`, ...) of class
folders; the images of a class may be at any depth in its folder. Where a tree can be read in more
than one way, the user is asked: the error names the folders and the settings that decide.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fmray.data.class_splits import split_of
from fmray.data.images import looks_like_image

Layout = Literal["classes", "splits", "leaves"]
Folder = tuple[str, ...]  # its names, from the tree's root

# A file with another suffix, or with none, is opened to see whether it is an image.
SUFFIXES = {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm"}
SUFFIXES |= {".tif", ".tiff", ".webp"}
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"}
# no classes, unless they hold images
ANNOTATION_FOLDERS = {"annotation", "annotations", "devkit", "docs", "label", "labels", "lists"}
ANNOTATION_FOLDERS |= {"meta", "metadata", "splits"}
EXAMPLES = 3  # folders that a message names for each kind


@dataclass(frozen=True)
class ClassFolder:
    """A class with the images in its folder; none is a mistake of the data."""

    name: str
    split: str  # as the folder above is called; "" without one
    path: Path
    files: list[Path]  # sorted


@dataclass
class ImageTree:
    """The classes of a tree, and the number of files and folders that are left out."""

    classes: list[ClassFolder]
    left_out: Counter[tuple[str, str]]  # (kind of file or folder, folder)


def read_tree(path: Path, layout: Layout | None, key: str) -> ImageTree:
    """List the classes of a tree with their images.

    Args:
        layout: what the folders are; by default the tree shows it.
        key: name of the collection's section in the recipe, for messages.

    Raises:
        ValueError: the tree can be read in several ways, does not fit `layout`, or has no folders.
    """
    left_out = Counter[tuple[str, str]]()
    images = _list_images(path, left_out)
    if images[()] and len(images) == 1:
        raise ValueError(
            f"{path}: {len(images[()])} images, but no class folders; move the images of each class"
            " into a folder"
        )

    # the level of the splits, if there is one
    parents = {folder[:-1] for folder in images if folder}
    filled = {f[:depth] for f, files in images.items() if files for depth in range(len(f) + 1)}
    tops = sorted(folder for folder in images if len(folder) == 1)
    splits = [top for top in tops if split_of(top[0]) and top in parents]
    if layout == "classes":
        splits = []
    elif layout == "splits" and not splits:
        raise ValueError(
            f"{key}.layout: splits, but {path} has no folder such as train, val or test that"
            " contains class folders"
        )
    others = [top for top in tops if top not in splits] if splits else []
    if layout is None:
        _ask_about_splits(path, key, splits, [top for top in others if top in filled])
        if not splits and tops and all(split_of(top[0]) and images[top] for top in tops):
            raise ValueError(
                f"{path}: {_names(tops)} are named like splits, but hold images instead of class"
                f" folders; set {key}.layout: classes if they are the classes"
            )
    for folder in others:
        left_out["folders next to the split folders", folder[0]] += 1

    # the level of the classes
    depth = 2 if splits else 1
    classes: dict[Folder, list[Path]] = {}
    for folder in sorted(images):
        if folder[:1] in others:
            continue
        if len(folder) < depth:
            if images[folder]:
                kind = "images outside the class folders"
                left_out[kind, "/".join(folder) or "."] += len(images[folder])
        elif layout != "leaves":
            classes.setdefault(folder[:depth], []).extend(images[folder])
        elif images[folder]:
            classes[folder] = images[folder]
    for folder in [f for f in classes if not classes[f] and f[-1].lower() in ANNOTATION_FOLDERS]:
        left_out["folders of annotations", "/".join(folder)] += 1
        del classes[folder]
    if layout is None:
        _ask_about_classes(path, key, [f for f in classes if classes[f]], images, bool(splits))

    found = []
    for folder, files in classes.items():
        names = folder[depth - 1 :] if layout == "leaves" else folder[-1:]
        name = unicodedata.normalize("NFC", "/".join(names))
        split = folder[0] if splits else ""
        found.append(ClassFolder(name, split, path.joinpath(*folder), sorted(files)))
    return ImageTree(found, left_out)


def describe_left_out(left_out: Counter[tuple[str, str]]) -> str:
    """Return what is left out by kind, each with its folders, as text; empty if nothing is."""
    kinds: dict[str, list[str]] = {}
    totals = Counter[str]()
    for (kind, folder), count in sorted(left_out.items(), key=lambda item: (-item[1], item[0])):
        kinds.setdefault(kind, []).append(f"{folder} {count}")
        totals[kind] += count
    parts = []
    for kind, folders in sorted(kinds.items(), key=lambda item: (-totals[item[0]], item[0])):
        more = f", {len(folders) - EXAMPLES} more folders" if len(folders) > EXAMPLES else ""
        parts.append(f"{kind}: {totals[kind]} ({', '.join(folders[:EXAMPLES])}{more})")
    return "; ".join(parts)


# --- Questions ---


def _ask_about_splits(path: Path, key: str, splits: list[Folder], others: list[Folder]) -> None:
    if splits and others:
        raise ValueError(
            f"{path}: {_names(splits)} look like split folders, but {_names(others)} next to them"
            f" {'holds' if len(others) == 1 else 'hold'} images, too; set {key}.layout: splits to"
            f" leave out {_names(others)}, or layout: classes if every folder is a class"
        )


def _ask_about_classes(
    path: Path, key: str, folders: list[Folder], images: dict[Folder, list[Path]], split: bool
) -> None:
    """Ask if no folder of the class level holds images itself."""
    if not folders or any(images[folder] for folder in folders):
        return
    leaf = next(leaf for leaf in images if images[leaf] and leaf[: len(folders[0])] == folders[0])
    inside = "" if split else f", or {key}.path to a folder inside, such as {path / folders[0][0]}"
    raise ValueError(
        f"{path}: {_names(folders)} hold folders only, no images; set {key}.layout:"
        f" {'splits' if split else 'classes'} if these are the classes, layout: leaves if the"
        f" folders that hold the images are, such as {'/'.join(leaf)}{inside}"
    )


def _names(folders: list[Folder]) -> str:
    names = ", ".join("/".join(folder) for folder in folders[:EXAMPLES])
    more = len(folders) - EXAMPLES
    return names if more <= 0 else f"{names} and {more} more"


# --- Listing ---


def _list_images(path: Path, left_out: Counter[tuple[str, str]]) -> dict[Folder, list[Path]]:
    """Return the image files of every folder of a tree, and count what is left out.

    Links are followed, unless they lead back to a folder above.

    Raises:
        ValueError: a folder cannot be read.
    """
    images: dict[Folder, list[Path]] = {}
    # a folder, and which folders (device, inode) it and those above it are
    waiting: list[tuple[Folder, set[tuple[int, int]]]] = [((), set())]
    while waiting:
        folder, above = waiting.pop()
        images[folder] = []
        place = "/".join(folder) or "."
        try:
            stat = os.stat(path.joinpath(*folder))
            entries = sorted(os.scandir(path.joinpath(*folder)), key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"{error.filename}: {error.strerror}") from error
        above = above | {(stat.st_dev, stat.st_ino)}
        for entry in entries:
            if entry.is_dir():
                stat = entry.stat()
                if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS:
                    left_out["hidden or system folders", place] += 1
                elif (stat.st_dev, stat.st_ino) in above:
                    left_out["links to a folder above", place] += 1
                else:
                    waiting.append(((*folder, entry.name), above))
            elif entry.name.startswith("."):
                left_out["hidden files", place] += 1
            elif not entry.is_file() and os.path.exists(entry.path):
                left_out["special files", place] += 1
            else:
                suffix = Path(entry.name).suffix.lower()
                if suffix in SUFFIXES or looks_like_image(Path(entry.path)):
                    images[folder].append(Path(entry.path))
                else:
                    left_out[f"files that are no image ({suffix or 'no suffix'})", place] += 1
    return images

"""The split of each class: from a seeded hash, a file, or the words that the data use."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from fmray.data.image_store import SPLITS

HELD_OUT = 0.15  # share of the classes in val, and in test
_WORDS = {
    "train": ("train", "training", "base"),
    "val": ("val", "valid", "validation", "dev", "development"),
    "test": ("test", "testing", "novel"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}


def split_of(word: str) -> str | None:
    """Return train, val or test for a name of it, such as `Training` or `meta_val`; else None."""
    letters = re.sub("[^a-z]", "", word.lower())
    return _SPLIT_OF.get(letters) or _SPLIT_OF.get(re.sub("^meta|set$|classes$", "", letters))


def hash_split(names: Iterable[str], seed: int) -> dict[str, str]:
    """Return the split of each class, by the order of a seeded hash of the names.

    15 % of the classes, at least 2, go to val and as many to test, but fewer if train would have
    none. The same names have the same splits in any collection.
    """
    ordered = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    count = min(max(2, round(HELD_OUT * len(ordered))), (len(ordered) - 1) // 2)
    splits = ["val"] * count + ["test"] * count + ["train"] * (len(ordered) - 2 * count)
    return dict(zip(ordered, splits, strict=True))


def file_split(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the split of each class from a JSON file {train|val|test: [class names]}.

    Other words for a split are known, such as Meta-Dataset's `valid`. The file may name classes
    that the collection lacks.

    Raises:
        ValueError: the file is not of this form, names a class twice, or lacks one of `names`.
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
        word = split_of(key)
        if word is None:
            raise ValueError(f"{path}: {key}: unknown split; should be train, val or test")
        for name in (unicodedata.normalize("NFC", str(name)) for name in part):
            if name in split:
                raise ValueError(f"{path}: class {name!r} is listed twice ({split[name]}, {key})")
            split[name] = word
    for name in names:
        if name not in split:
            raise ValueError(f"{path}: class {name!r} has no split; list it in train, val or test")
    return {name: split[name] for name in names}


def merge_splits(where: str, pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the split of each class from the (class name, split) pairs of the data.

    Args:
        where: the source, for messages.
        pairs: class names with a word that `split_of` knows; may repeat.

    Raises:
        ValueError: a split is unknown, or a class is in two splits.
    """
    split: dict[str, str] = {}
    for name, word in pairs:
        part = split_of(str(word))
        if part is None:
            raise ValueError(
                f"{where}: class {name!r}: split is {word!r}; should be train, val or test"
            )
        if split.setdefault(name, part) != part:
            raise ValueError(
                f"{where}: class {name!r} is in {split[name]} and in {part}; a class has one"
                " split: fix the data, or set split: hash to ignore its splits"
            )
    return split


def splits_table(splits: dict[str, tuple[str, dict[str, str]]]) -> str:
    """Return the number of classes per collection and split as text.

    Args:
        splits: collection -> (source of its splits, class name -> split).
    """
    width = max(map(len, ["collection", *splits]))
    lines = [f"{'collection':{width}}  train   val  test  classes split by"]
    for name, (source, split) in splits.items():
        counts = "  ".join(f"{list(split.values()).count(part):4d}" for part in SPLITS)
        lines.append(f"{name:{width}}   {counts}  {source}")
    return "\n".join(lines)

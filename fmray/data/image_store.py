"""Reading a store of labelled images: classes at once, images when they are needed.

In: a folder that `jobs/prepare_data.py` has finished. Out: global row ids with labels, and encoded
images by row id from a memory map on this node (`image_cache`), or as a stream from Parquet.

The store's layout, which `image_ingest` writes:

    images/<collection>/<split>/part-XXXXX.parquet   `IMAGE_SCHEMA`; a class begins a row group, its
                                                     rows are in an order drawn once
    images/<collection>/dataset_spec.json            of a collection split by its specification
    index.parquet    `INDEX_SCHEMA`: a row for each piece of a class, in the order of row ids
    duplicates.tsv   images left out since their bytes were there before
    class_splits.tsv the split of each class
    manifest.json    written last: its presence means done

Row ids count from 0 through collections by name, splits (train, val, test), labels and places in
the class. They hold as long as `ImageStore.fingerprint` does.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fmray.fewshot.specification import DatasetSpecification

# Images of one folder of a store as an uncompressed Arrow IPC file in a memory map, for random
# access.
#
# In: Parquet parts. Out: encoded images by row number. The file is made once on a node, by the
# first process that asks; Parquet itself must read a whole row group to give one image.

BATCH_BYTES = 64 * 2**20  # of images in memory while the file is made; few batches open fast
SCHEMA = pa.schema([("image", pa.binary())])


class MappedImages:
    """The images of an Arrow IPC file, by row number; nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *map(len, batches)])
        self._offsets: list[np.ndarray] = []  # int32 [rows + 1], in the map
        self._data: list[memoryview] = []
        for batch in batches:
            _, offsets, data = batch.column(0).buffers()
            self._offsets.append(np.frombuffer(offsets, dtype=np.int32))
            self._data.append(memoryview(data).cast("B"))

    def views(self, rows: np.ndarray) -> list[memoryview]:
        """Encoded images of `rows` int64 [n], counted from the file's first; nothing is copied."""
        number = np.searchsorted(self._starts, rows, side="right") - 1
        row = rows - self._starts[number]
        if (number == number[0]).all():
            return self._slices(int(number[0]), row)
        found: list[memoryview] = [self._data[0]] * len(rows)
        for batch in np.unique(number):
            there = np.flatnonzero(number == batch)
            for place, view in zip(there, self._slices(int(batch), row[there]), strict=True):
                found[place] = view
        return found

    def _slices(self, batch: int, row: np.ndarray) -> list[memoryview]:
        offsets, data = self._offsets[batch], self._data[batch]
        starts, ends = offsets[row].tolist(), offsets[row + 1].tolist()
        return [data[start:end] for start, end in zip(starts, ends, strict=True)]


def mapped_images(name: Path, parts: Sequence[Path]) -> MappedImages:
    """The map `<name>.arrow` of the images of all parts in order, made where it is missing."""
    path = name.with_name(name.name + ".arrow")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other workers of this node wait, then find it made
            if not path.exists():
                temporary = path.with_suffix(f".{os.getpid()}.tmp")
                _write(temporary, parts)
                temporary.replace(path)
    return MappedImages(path)


def _write(path: Path, parts: Sequence[Path]) -> None:
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        for part in parts:
            with pq.ParquetFile(part) as file:
                held: list[pa.Table] = []
                for group in range(file.num_row_groups):
                    held.append(file.read_row_group(group, columns=["image"]))
                    if sum(table.nbytes for table in held) >= BATCH_BYTES:
                        writer.write_table(pa.concat_tables(held).combine_chunks())
                        held = []
                if held:
                    writer.write_table(pa.concat_tables(held).combine_chunks())


SPECIFICATION = "dataset_spec.json"
SPLITS = ("train", "val", "test")
IMAGE_SCHEMA = pa.schema(
    [
        ("image", pa.binary()),
        ("label", pa.int32()),
        ("class_name", pa.string()),
        ("source", pa.string()),
    ]
)
"""`image`: encoded bytes as in the source. `label`: index of the class in its collection, in order
of class names. `source`: where the image came from."""
INDEX_SCHEMA = pa.schema(
    [
        ("collection", pa.string()),
        ("split", pa.string()),
        ("label", pa.int32()),
        ("class_name", pa.string()),
        ("count", pa.int64()),
        ("file", pa.string()),
        ("row_group", pa.int32()),
    ]
)
"""`file`: relative to the store. `row_group`: the first one of the piece."""


@dataclass(frozen=True)
class ClassEntry:
    """A class of the store; its images are the row ids `first` to `first + count - 1`."""

    collection: str
    split: str
    label: int
    name: str
    count: int
    first: int


@dataclass(frozen=True)
class Rows:
    """Some images. `rows` int64 [n]: global row ids; `labels` int64 [n]: class index within the
    collection; `class_names`: of the whole collection, by label."""

    rows: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class ImageManifest:
    """What a store holds and what it was made of.

    `collections`: name -> a hash of all that decides its content; `fingerprint`: hash of the
    content itself, the same wherever and however it was made.
    """

    version: int
    collections: dict[str, str]
    fingerprint: str
    rows: int
    duplicates: int
    bad_rows: int

    @staticmethod
    def path(store: Path) -> Path:
        """Where the manifest of a store lies."""
        return store / "manifest.json"

    @classmethod
    def read(cls, store: Path) -> ImageManifest:
        """Raises ValueError where there is no finished store or its manifest is not one."""
        path = cls.path(store)
        if not path.is_file():
            raise ValueError(
                f"{store}: not a finished image store (no {path.name}); run jobs/prepare_data.py"
            )
        try:
            return cls(**json.loads(path.read_text()))
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise ValueError(
                f"{path}: not the manifest of an image store ({error}); delete it and run"
                " jobs/prepare_data.py"
            ) from error

    def write(self, store: Path) -> None:
        """Written to a temporary name and moved."""
        write_json(self.path(store), asdict(self))


class ImageStore:
    """Classes and images of a finished store. Safe to read from several threads."""

    def __init__(self, store: Path, cache: Path, fingerprint: str, index: list[Any]) -> None:
        """See `open`. index: rows of `INDEX_SCHEMA`."""
        self.path, self.fingerprint = store, fingerprint
        self._cache, self._lock = cache / fingerprint, threading.Lock()
        self._mapped: dict[tuple[str, str], MappedImages] = {}
        self._folders: dict[tuple[str, str], list[str]] = {}  # (collection, split) -> files
        self._first: dict[tuple[str, str], int] = {}  # (collection, split) -> first row id
        classes: dict[tuple[str, int], ClassEntry] = {}
        first = 0
        for piece in index:
            folder = (piece["collection"], piece["split"])
            self._first.setdefault(folder, first)
            files = self._folders.setdefault(folder, [])
            if piece["file"] not in files[-1:]:
                files.append(piece["file"])
            key = (piece["collection"], piece["label"])
            before = classes.get(key)
            classes[key] = ClassEntry(
                *folder,
                label=piece["label"],
                name=piece["class_name"],
                count=piece["count"] + (before.count if before else 0),
                first=before.first if before else first,
            )
            first += piece["count"]
        self.num_rows = first
        self.classes = tuple(classes.values())
        self._starts = np.array(list(self._first.values()), dtype=np.int64)
        self._order = list(self._first)

    @classmethod
    def open(cls, store: Path, cache: Path | None = None) -> ImageStore:
        """Open a finished store.

        Args:
            cache: folder for the memory map, local to this node; default: in the store.

        Raises:
            ValueError: there is no finished store.
        """
        manifest = ImageManifest.read(store)
        index = pq.read_table(store / "index.parquet", schema=INDEX_SCHEMA).to_pylist()
        return cls(store, cache or store / "cache", manifest.fingerprint, index)

    @property
    def collections(self) -> tuple[str, ...]:
        """Names of the collections, sorted."""
        return tuple(dict.fromkeys(collection for collection, _ in self._folders))

    def select(
        self, collection: str, split: Literal["train", "val", "test", "all"] = "all"
    ) -> Rows:
        """All images of a collection, or of one split of it; none is an answer.

        Raises:
            ValueError: the store has no such collection, or there is no such split.
        """
        self._check(collection, split)
        entries = [entry for entry in self.classes if entry.collection == collection]
        names = {entry.label: entry.name for entry in entries}
        chosen = [entry for entry in entries if split in ("all", entry.split)]
        counts = [entry.count for entry in chosen]
        rows = [np.arange(entry.first, entry.first + entry.count) for entry in chosen]
        return Rows(
            np.concatenate([np.empty(0, dtype=np.int64), *rows]),
            np.repeat(np.array([entry.label for entry in chosen], dtype=np.int64), counts),
            tuple(names[label] for label in sorted(names)),
        )

    def groups(self, collection: str, split: str) -> list[np.ndarray] | None:
        """Labels of each alphabet (Omniglot) or eligible WordNet node (ILSVRC) that an episode of
        Meta-Dataset is drawn from, int64; None where it is drawn from all classes.

        Classes without images are left out of their groups, and groups without classes of `split`.
        """
        self._check(collection, split)
        path = self.path / "images" / collection / SPECIFICATION
        specification = DatasetSpecification.read(path) if path.is_file() else None
        found = None if specification is None else specification.groups(split)
        if found is None:
            return None
        label = {e.name: e.label for e in self.classes if e.collection == collection}
        names = [[specification.class_names[number] for number in group] for group in found]
        labels = [[label[name] for name in group if name in label] for group in names]
        return [np.array(sorted(group), dtype=np.int64) for group in labels if group]

    def images(self, rows: Sequence[int] | np.ndarray) -> list[bytes]:
        """Encoded images of some row ids, in their order: copies, to keep or send."""
        return [bytes(view) for view in self.views(rows)]

    def views(self, rows: Sequence[int] | np.ndarray) -> list[memoryview]:
        """Encoded images of some row ids, in their order, in the memory map itself: to decode here.

        The first call for a collection's split makes its memory map, once on a node.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if not len(rows):
            return []
        if rows.min() < 0 or rows.max() >= self.num_rows:
            wrong = rows[(rows < 0) | (rows >= self.num_rows)][0]
            raise ValueError(f"{self.path}: no row {wrong}; rows are 0 to {self.num_rows - 1}")
        folder = np.searchsorted(self._starts, rows, side="right") - 1
        if (folder == folder[0]).all():  # as in every episode of one collection
            return self._map(int(folder[0])).views(rows - self._starts[folder[0]])
        found = [memoryview(b"")] * len(rows)
        for number in np.unique(folder):
            there = np.flatnonzero(folder == number)
            views = self._map(int(number)).views(rows[there] - self._starts[number])
            for place, view in zip(there, views, strict=True):
                found[place] = view
        return found

    def batches(
        self, collection: str, split: Literal["train", "val", "test", "all"], size: int
    ) -> Iterator[tuple[np.ndarray, list[bytes]]]:
        """Row ids and encoded images, at most `size` at a time: one pass over the Parquet files,
        in the order of row ids, without a memory map.

        Raises:
            ValueError: as `select`.
        """
        self._check(collection, split)
        for folder, files in self._folders.items():
            if folder[0] != collection or split not in ("all", folder[1]):
                continue
            row = self._first[folder]
            for file in files:
                with pq.ParquetFile(self.path / file) as part:
                    for batch in part.iter_batches(size, columns=["image"]):
                        yield np.arange(row, row + len(batch)), batch.column(0).to_pylist()
                        row += len(batch)

    def _check(self, collection: str, split: str) -> None:
        if collection not in self.collections:
            raise ValueError(
                f"{self.path}: no collection {collection!r}; it has {', '.join(self.collections)}"
            )
        if split not in (*SPLITS, "all"):
            raise ValueError(f"split {split!r}: should be train, val, test or all")

    def _map(self, number: int) -> MappedImages:
        folder = self._order[number]
        with self._lock:
            if folder not in self._mapped:
                files = [self.path / file for file in self._folders[folder]]
                self._mapped[folder] = mapped_images(self._cache / "-".join(folder), files)
            return self._mapped[folder]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Written to a temporary name and moved."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)

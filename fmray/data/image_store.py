"""Read a store of labelled images: all classes at once, images when they are needed.

`fmray.data.image_ingest` writes a store with this layout:

    images/<collection>/<split>/part-XXXXX.parquet   `IMAGE_SCHEMA`; each class begins a row group,
                                                     and its rows are in a fixed random order
    images/<collection>/dataset_spec.json            if its specification decides the splits
    index.parquet      `INDEX_SCHEMA`: one row per piece of a class, in the order of row ids
    duplicates.tsv     images that were skipped because their bytes occurred before
    class_splits.tsv   the split of each class
    manifest.json      written last: the store is complete

Row ids count from 0 through collections by name, splits (train, val, test), labels, and places in
the class. They are valid while `ImageStore.fingerprint` is the same.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fmray.data.store import StoreManifest
from fmray.fewshot.specification import DatasetSpecification
from fmray.runtime.files import atomic_path

SPECIFICATION = "dataset_spec.json"
SPLITS = ("train", "val", "test")
IMAGE_SCHEMA = pa.schema(
    [
        ("image", pa.binary()),  # encoded bytes as in the source
        ("label", pa.int32()),  # index of the class in its collection, in order of class names
        ("class_name", pa.string()),
        ("source", pa.string()),  # where the image came from
    ]
)
INDEX_SCHEMA = pa.schema(
    [
        ("collection", pa.string()),
        ("split", pa.string()),
        ("label", pa.int32()),
        ("class_name", pa.string()),
        ("count", pa.int64()),
        ("file", pa.string()),  # relative to the store
        ("row_group", pa.int32()),  # the piece's first
    ]
)


@dataclass(frozen=True)
class ClassEntry:
    """A class of the store; its images have the row ids `first` to `first + count - 1`."""

    collection: str
    split: str
    label: int
    name: str
    count: int
    first: int


@dataclass(frozen=True)
class Rows:
    """Images of a collection."""

    rows: np.ndarray  # [n] int64, row ids
    labels: np.ndarray  # [n] int64, class index within the collection
    class_names: tuple[str, ...]  # all classes of the collection, by label


@dataclass(frozen=True)
class ImageManifest(StoreManifest):
    """What a store contains and what it was made from."""

    kind: ClassVar[str] = "image store"
    version: int
    collections: dict[str, str]  # name -> hash of everything that decides its content
    fingerprint: str  # hash of the content itself, the same wherever and however it was made
    rows: int
    duplicates: int
    bad_rows: int


class ImageStore:
    """Classes and images of a complete store. Thread-safe."""

    def __init__(self, store: Path, cache: Path, fingerprint: str, index: list[Any]) -> None:
        """Use `open` instead. `index`: rows of `INDEX_SCHEMA`."""
        self.path, self.fingerprint = store, fingerprint
        self._cache, self._lock = cache / fingerprint, threading.Lock()
        self._mapped: dict[tuple[str, str], MappedImages] = {}
        self._folders: dict[tuple[str, str], list[str]] = {}  # (collection, split) -> files
        self._first: dict[tuple[str, str], int] = {}  # (collection, split) -> first row id
        classes: dict[tuple[str, int], ClassEntry] = {}
        next_row = 0
        for piece in index:
            folder = (piece["collection"], piece["split"])
            self._first.setdefault(folder, next_row)
            files = self._folders.setdefault(folder, [])
            if piece["file"] not in files[-1:]:
                files.append(piece["file"])
            key = (piece["collection"], piece["label"])
            earlier = classes.get(key)
            classes[key] = ClassEntry(
                *folder,
                label=piece["label"],
                name=piece["class_name"],
                count=piece["count"] + (earlier.count if earlier else 0),
                first=earlier.first if earlier else next_row,
            )
            next_row += piece["count"]
        self.num_rows = next_row
        self.classes = tuple(classes.values())
        self._starts = np.array(list(self._first.values()), dtype=np.int64)  # by place in _order
        self._order = list(self._first)

    @classmethod
    def open(cls, store: Path, cache: Path | None = None) -> ImageStore:
        """Open a complete store.

        Args:
            cache: folder for the memory map, local to this node; by default in the store.

        Raises:
            ValueError: the store is missing or incomplete.
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
        """Return all images of a collection or of one of its splits; possibly none.

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
        """Return the groups of classes that Meta-Dataset draws an episode from, as int64 labels.

        A group is an alphabet (Omniglot) or an eligible WordNet node (ILSVRC). None if episodes are
        drawn from all classes. Classes without images and empty groups are skipped.
        """
        self._check(collection, split)
        path = self.path / "images" / collection / SPECIFICATION
        specification = DatasetSpecification.read(path) if path.is_file() else None
        groups = None if specification is None else specification.groups(split)
        if groups is None:
            return None
        label_of = {e.name: e.label for e in self.classes if e.collection == collection}
        names = [[specification.class_names[number] for number in group] for group in groups]
        labels = [[label_of[name] for name in group if name in label_of] for group in names]
        return [np.array(sorted(group), dtype=np.int64) for group in labels if group]

    def images(self, rows: Sequence[int] | np.ndarray) -> list[bytes]:
        """Return copies of the encoded images of row ids, in their order."""
        return [bytes(view) for view in self.views(rows)]

    def views(self, rows: Sequence[int] | np.ndarray) -> list[memoryview]:
        """Return the encoded images of row ids, in their order, as views of the memory map.

        The first call for a split of a collection makes its memory map, once per node.

        Raises:
            ValueError: the store has no such row.
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
        views = [memoryview(b"")] * len(rows)
        for number in np.unique(folder):
            places = np.flatnonzero(folder == number)
            part = self._map(int(number)).views(rows[places] - self._starts[number])
            for place, view in zip(places, part, strict=True):
                views[place] = view
        return views

    def batches(
        self, collection: str, split: Literal["train", "val", "test", "all"], size: int
    ) -> Iterator[tuple[np.ndarray, list[bytes]]]:
        """Yield row ids and encoded images, at most `size` at a time, in the order of row ids.

        One pass over the Parquet files; needs no memory map.

        Raises:
            ValueError: see `select`.
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
        """Return the memory map of a split of a collection, by its place in the store's order."""
        folder = self._order[number]
        with self._lock:
            if folder not in self._mapped:
                files = [self.path / file for file in self._folders[folder]]
                self._mapped[folder] = mapped_images(self._cache / "-".join(folder), files)
            return self._mapped[folder]


# --- Memory map, for random access: Parquet must read a complete row group for a single image ---

MAP_BATCH_BYTES = 64 * 2**20  # of images in memory while the file is made; few batches open fast
MAP_SCHEMA = pa.schema([("image", pa.binary())])


class MappedImages:
    """The images of an Arrow IPC file by row number; reads only what is accessed."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *map(len, batches)])
        self._offsets: list[np.ndarray] = []  # of each batch, int32 [rows + 1], in the map
        self._data: list[memoryview] = []
        for batch in batches:
            _, offsets, data = batch.column(0).buffers()
            self._offsets.append(np.frombuffer(offsets, dtype=np.int32))
            self._data.append(memoryview(data).cast("B"))

    def views(self, rows: np.ndarray) -> list[memoryview]:
        """Return the encoded images of `rows` (int64 [n], from 0 in the file) without a copy."""
        batch = np.searchsorted(self._starts, rows, side="right") - 1
        row = rows - self._starts[batch]
        if (batch == batch[0]).all():
            return self._slices(int(batch[0]), row)
        views: list[memoryview] = [self._data[0]] * len(rows)
        for number in np.unique(batch):
            places = np.flatnonzero(batch == number)
            for place, view in zip(places, self._slices(int(number), row[places]), strict=True):
                views[place] = view
        return views

    def _slices(self, batch: int, row: np.ndarray) -> list[memoryview]:
        offsets, data = self._offsets[batch], self._data[batch]
        starts, ends = offsets[row].tolist(), offsets[row + 1].tolist()
        return [data[start:end] for start, end in zip(starts, ends, strict=True)]


def mapped_images(name: Path, parts: Sequence[Path]) -> MappedImages:
    """Open `<name>.arrow`, the images of all parts in order; make it if it is missing."""
    path = name.with_name(name.name + ".arrow")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process of a node makes it, the others wait
            if not path.exists():
                with atomic_path(path) as temporary:
                    _write_map(temporary, parts)
    return MappedImages(path)


def _write_map(path: Path, parts: Sequence[Path]) -> None:
    with pa.ipc.new_file(str(path), MAP_SCHEMA) as writer:
        for part in parts:
            with pq.ParquetFile(part) as file:
                tables: list[pa.Table] = []
                for group in range(file.num_row_groups):
                    tables.append(file.read_row_group(group, columns=["image"]))
                    if sum(table.nbytes for table in tables) >= MAP_BATCH_BYTES:
                        writer.write_table(pa.concat_tables(tables).combine_chunks())
                        tables = []
                if tables:
                    writer.write_table(pa.concat_tables(tables).combine_chunks())

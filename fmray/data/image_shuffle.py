"""The external shuffle of an image collection: sort pieces into runs, find duplicates, merge runs
into parts. Each step is a task of its own; none holds more than a portion of the images.

In: pieces of source. Out: runs (Arrow IPC files in the work folder), lists of duplicates, Parquet
parts of the store.

A row's digest is a hash of its image keyed by the seed. Rows sorted by digest within their class
are in an order drawn at random, the same however they were cut into tasks; rows with the same image
are neighbours; and a range of digests is a known share of a class, which is how a class larger than
memory is cut.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fmray.data.image_sources import FoundImage, Piece, read_piece
from fmray.data.image_store import IMAGE_SCHEMA, write_json
from fmray.data.records import BadRow

VERSION = "1"  # a changed format or check makes old runs and parts stale
PORTION = 64 * 2**20  # bytes of images that a task holds, and that a part has, about
RUN_SCHEMA = pa.schema(
    [
        ("label", pa.int32()),
        ("digest", pa.binary(16)),
        ("place", pa.int64()),
        ("image", pa.binary()),
        ("source", pa.string()),
    ]
)
"""Sorted by label and digest. `place`: of the image in its collection, in order of source."""
DUPLICATES_SCHEMA = pa.schema(
    [
        ("label", pa.int32()),
        ("place", pa.int64()),
        ("source", pa.string()),
        ("kept_label", pa.int32()),
        ("kept_source", pa.string()),
    ]
)
TASK_ROWS = 40  # bits of a place that count a task's rows


@dataclass(frozen=True)
class SortTask:
    """Read `pieces` and write them as runs `<path>-<n>.arrow`, and the result as `<path>.json`.

    `write_bad`: whether bad rows are left out, or make the task fail.
    """

    path: str
    number: int
    pieces: tuple[Piece, ...]
    class_names: tuple[str, ...]  # by label
    seed: int
    portion: int
    write_bad: bool

    def key(self) -> str:
        """Hash of all that decides the runs."""
        values = asdict(self) | {"version": VERSION, "path": None}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Run:
    """A sorted file; `rows` and `bytes` of images by label."""

    path: str
    rows: dict[int, int]
    bytes: dict[int, int]


@dataclass(frozen=True)
class SortResult:
    """What a sort task wrote and left out."""

    runs: tuple[Run, ...]
    bad: tuple[BadRow, ...]


@dataclass(frozen=True)
class DuplicatesTask:
    """Among the rows of all runs whose digest is in share `number` of `of`, list those to leave
    out."""

    path: str
    runs: tuple[str, ...]
    number: int
    of: int


@dataclass(frozen=True)
class Slice:
    """Share `number` of `of` of the digests of a class."""

    label: int
    number: int = 0
    of: int = 1


@dataclass(frozen=True)
class PartTask:
    """Merge some slices into the part at `path`. `collection_key` stands for what the runs hold."""

    path: str
    collection_key: str
    slices: tuple[Slice, ...]
    class_names: tuple[str, ...]
    runs: tuple[str, ...]
    duplicates: tuple[str, ...]
    rows_per_group: int

    def key(self) -> str:
        """Hash of all that decides the part's content."""
        values = [VERSION, self.collection_key, *map(asdict, self.slices)]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class PartResult:
    """`pieces`: (label, rows, first row group) in order; `digest`: of the content."""

    pieces: tuple[tuple[int, int, int], ...]
    digest: str


def sorted_runs(task: SortTask) -> SortResult | None:
    """The result of a sort task that was finished before; None otherwise."""
    path = Path(task.path + ".json")
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    if found["key"] != task.key() or not all(Path(run["path"]).exists() for run in found["runs"]):
        return None
    numbers = ("rows", "bytes")
    runs = (
        Run(run["path"], *({int(label): n for label, n in run[name].items()} for name in numbers))
        for run in found["runs"]
    )
    return SortResult(tuple(runs), tuple(BadRow(**row) for row in found["bad"]))


def sort_images(task: SortTask) -> SortResult:
    """Do a sort task; its result's file is written last, and only if no bad row is an error."""
    result_path = Path(task.path + ".json")
    result_path.unlink(missing_ok=True)  # an earlier version's, whose runs are overwritten
    label_of = {name: label for label, name in enumerate(task.class_names)}
    key = str(task.seed).encode()
    held: list[tuple[int, bytes, int, bytes, str]] = []
    held_bytes, place = 0, task.number << TASK_ROWS
    runs: list[Run] = []
    bad: list[BadRow] = []
    for found in _read(task.pieces):
        place += 1
        if isinstance(found, BadRow):
            bad.append(found)
            continue
        digest = hashlib.blake2b(found.image, digest_size=16, key=key).digest()
        held.append((label_of[found.class_name], digest, place, found.image, found.source))
        held_bytes += len(found.image)
        if held_bytes >= task.portion:
            runs.append(_write_run(f"{task.path}-{len(runs)}.arrow", held))
            held, held_bytes = [], 0
    if held:
        runs.append(_write_run(f"{task.path}-{len(runs)}.arrow", held))
    result = SortResult(tuple(runs), tuple(bad))
    if task.write_bad or not bad:
        write_json(result_path, {"key": task.key(), **asdict(result)})
    return result


def _read(pieces: Sequence[Piece]) -> Iterator[FoundImage | BadRow]:
    for piece in pieces:
        yield from read_piece(piece)


def _write_run(path: str, held: list[tuple[int, bytes, int, bytes, str]]) -> Run:
    held.sort(key=lambda row: row[:3])
    rows: dict[int, int] = {}
    size: dict[int, int] = {}
    for label, _, _, image, _ in held:
        rows[label] = rows.get(label, 0) + 1
        size[label] = size.get(label, 0) + len(image)
    columns = zip(RUN_SCHEMA, zip(*held, strict=True), strict=True)
    arrays = [pa.array(values, type=field.type) for field, values in columns]
    with pa.ipc.new_file(path + ".tmp", RUN_SCHEMA) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=RUN_SCHEMA))
    os.replace(path + ".tmp", path)
    return Run(path, rows, size)


class _OpenRun:
    """A run in a memory map: what sorts it as arrays, the rest when it is asked for."""

    def __init__(self, path: str) -> None:
        self.batch = pa.ipc.open_file(pa.memory_map(path)).get_batch(0)
        self.labels = self.batch.column("label").to_numpy()  # int32 [rows]
        digests = self.batch.column("digest")
        self.digests = np.frombuffer(digests.buffers()[1], dtype=">u8").reshape(-1, 2)

    def slice(self, wanted: Slice) -> pa.RecordBatch:
        """Its rows of a slice of a class; no copy."""
        begin = int(np.searchsorted(self.labels, wanted.label, side="left"))
        end = int(np.searchsorted(self.labels, wanted.label, side="right"))
        low, high = _bounds(wanted.number, wanted.of)
        first = self.digests[begin:end, 0]
        end = begin + int(np.searchsorted(first, high, side="right"))
        begin += int(np.searchsorted(first, low, side="left"))
        return self.batch.slice(begin, end - begin)


def _bounds(number: int, of: int) -> tuple[np.uint64, np.uint64]:
    """The first and last digest (its first 8 bytes) of a share of all digests."""
    return np.uint64((number << 64) // of), np.uint64(((number + 1 << 64) // of) - 1)


def find_duplicates(task: DuplicatesTask) -> int:
    """List the rows whose image is there before, in order of source; returns how many."""
    low, high = _bounds(task.number, task.of)
    first, second, places, runs, rows = [], [], [], [], []
    opened = [_OpenRun(path) for path in task.runs]
    for number, run in enumerate(opened):
        inside = np.flatnonzero((run.digests[:, 0] >= low) & (run.digests[:, 0] <= high))
        first.append(run.digests[inside, 0].astype(np.uint64))
        second.append(run.digests[inside, 1].astype(np.uint64))
        places.append(run.batch.column("place").to_numpy()[inside])
        runs.append(np.full(len(inside), number, dtype=np.int32))
        rows.append(inside.astype(np.int32))
    keys = [np.concatenate(values) for values in (places, second, first)]
    order = np.lexsort(keys)
    high_half, low_half = keys[2][order], keys[1][order]
    same = (high_half[1:] == high_half[:-1]) & (low_half[1:] == low_half[:-1])
    run, row = np.concatenate(runs)[order], np.concatenate(rows)[order]
    begins = np.maximum.accumulate(np.where(np.append(True, ~same), np.arange(len(order)), 0))
    left_out = np.flatnonzero(same) + 1

    def value(column: str, at: int) -> Any:
        return opened[run[at]].batch.column(column)[int(row[at])].as_py()

    found = [
        {name: value(name, at) for name in ("label", "place", "source")}
        | {f"kept_{name}": value(name, begins[at]) for name in ("label", "source")}
        for at in left_out
    ]
    table = pa.Table.from_pylist(found, schema=DUPLICATES_SCHEMA)
    pq.write_table(table, task.path + ".tmp")
    os.replace(task.path + ".tmp", task.path)
    return len(found)


def finished_part(task: PartTask) -> PartResult | None:
    """The result of a part that is there and was made of the same things; None otherwise."""
    path = Path(task.path)
    if not path.exists():
        return None
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except pa.ArrowInvalid:  # not Parquet: somebody else's file, or a broken disk
        return None
    if metadata.get(b"fmray.key") != task.key().encode():
        return None
    found = json.loads(metadata[b"fmray.result"])
    return PartResult(tuple(tuple(piece) for piece in found["pieces"]), found["digest"])


def write_part(task: PartTask) -> PartResult:
    """Do a part task, under a temporary name; one slice of one class is in memory at a time."""
    opened = [_OpenRun(path) for path in task.runs]
    dropped = [pq.read_table(path, columns=["label", "place"]) for path in task.duplicates]
    drop = pa.concat_tables([DUPLICATES_SCHEMA.empty_table().select([0, 1]), *dropped])
    drop_label, drop_place = drop["label"].to_numpy(), drop["place"].to_numpy()
    content, pieces, groups = hashlib.sha256(), [], 0
    # images are compressed already, names repeat
    compression = dict.fromkeys(IMAGE_SCHEMA.names, "ZSTD") | {"image": "NONE"}
    with pq.ParquetWriter(
        task.path + ".tmp", IMAGE_SCHEMA, compression=compression, use_dictionary=["class_name"]
    ) as writer:
        for wanted in task.slices:
            batches = [run.slice(wanted) for run in opened]
            table = pa.Table.from_batches(batches, schema=RUN_SCHEMA)
            places = drop_place[drop_label == wanted.label]
            kept = np.flatnonzero(~np.isin(table["place"].to_numpy(), places))
            if not len(kept):
                continue
            digests = b"".join(table["digest"].to_pylist())
            keys = np.frombuffer(digests, dtype=">u8").reshape(-1, 2)[kept]
            order = kept[np.lexsort((keys[:, 1], keys[:, 0]))]
            table = table.select(["image", "source", "digest"]).take(pa.array(order))
            for digest in table["digest"].to_pylist():
                content.update(digest)
            name = pa.scalar(task.class_names[wanted.label])
            columns = {
                "image": table["image"],
                "label": pa.repeat(pa.scalar(wanted.label, pa.int32()), len(table)),
                "class_name": pa.repeat(name, len(table)),
                "source": table["source"],
            }
            stored = pa.table(columns, schema=IMAGE_SCHEMA)
            writer.write_table(stored, row_group_size=task.rows_per_group)
            pieces.append((wanted.label, len(table), groups))
            groups += -(-len(table) // task.rows_per_group)
        result = PartResult(tuple(pieces), content.hexdigest())
        writer.add_key_value_metadata(
            {"fmray.key": task.key(), "fmray.result": json.dumps(asdict(result))}
        )
    os.replace(task.path + ".tmp", task.path)
    return result

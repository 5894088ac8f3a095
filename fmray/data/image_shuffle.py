"""External shuffle of an image collection.

Three kinds of tasks: sort pieces of the source into runs (Arrow IPC files in the work folder), find
duplicates, and merge runs into Parquet parts of the store. A task has at most about `PORTION` bytes
of images in memory.

A row's digest is a hash of its image, keyed by the seed. Rows sorted by digest within their class
are in a random order that does not depend on how the source was cut into tasks. Rows with the same
image are neighbours. A range of digests is a known share of a class, so a class larger than memory
can be cut by digest.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fmray.data.image_sources import Piece, SourceImage, read_piece
from fmray.data.image_store import IMAGE_SCHEMA
from fmray.data.images import DECODER_VERSION
from fmray.data.records import BadRow
from fmray.runtime.files import atomic_path, digest_of, dumps, write_json

VERSION = "1"  # increase it when a changed format or check makes old runs and parts stale
PORTION = 64 * 2**20  # bytes of images in a task's memory and in a part, about
RUN_SCHEMA = pa.schema(  # sorted by label and digest
    [
        ("label", pa.int32()),
        ("digest", pa.binary(16)),
        ("place", pa.int64()),  # of the image in its collection, in the order of the source
        ("image", pa.binary()),
        ("source", pa.string()),
    ]
)
DUPLICATES_SCHEMA = pa.schema(
    [
        ("label", pa.int32()),
        ("place", pa.int64()),
        ("source", pa.string()),
        ("kept_label", pa.int32()),
        ("kept_source", pa.string()),
    ]
)
TASK_BITS = 40  # low bits of a place: the row within its task; high bits: the task

# --- Tasks and results ---


@dataclass(frozen=True)
class SortTask:
    """Read `pieces`; write runs to `<path>-<n>.arrow` and the result to `<path>.json`."""

    path: str
    number: int
    pieces: tuple[Piece, ...]
    class_names: tuple[str, ...]  # by label
    seed: int
    portion: int  # bytes of images in a run, about
    write_bad: bool  # write a result even if there are bad rows

    def key(self) -> str:
        """Return a hash of everything that decides the runs."""
        values = asdict(self) | {"version": VERSION, "decoder": DECODER_VERSION, "path": None}
        return digest_of(values)


@dataclass(frozen=True)
class Run:
    """A sorted file."""

    path: str
    rows: dict[int, int]  # label -> number of images
    bytes: dict[int, int]  # label -> bytes of images


@dataclass(frozen=True)
class SortResult:
    """What a sort task wrote, and the bad rows that it skipped."""

    runs: tuple[Run, ...]
    bad: tuple[BadRow, ...]
    changes: dict[str, int]  # of decoding -> images, by the names of `images.CHANGES`


@dataclass(frozen=True)
class DuplicatesTask:
    """List the duplicates among the rows whose digest is in share `number` of `of`."""

    path: str
    runs: tuple[str, ...]
    number: int
    of: int


@dataclass(frozen=True)
class Slice:
    """The images of a class whose digest is in share `number` of `of`."""

    label: int
    number: int = 0
    of: int = 1


@dataclass(frozen=True)
class PartTask:
    """Merge slices into the part at `path`."""

    path: str
    collection_key: str  # stands for the content of the runs
    slices: tuple[Slice, ...]
    class_names: tuple[str, ...]
    runs: tuple[str, ...]
    duplicates: tuple[str, ...]
    rows_per_group: int

    def key(self) -> str:
        """Return a hash of everything that decides the part's content."""
        values = [VERSION, self.collection_key, *map(asdict, self.slices)]
        return digest_of(values)


@dataclass(frozen=True)
class PartResult:
    """What a part contains."""

    pieces: tuple[tuple[int, int, int], ...]  # (label, rows, first row group) in order
    digest: str  # hash of the content


# --- Sorting ---


def sorted_runs(task: SortTask) -> SortResult | None:
    """Return the result of a sort task that an earlier run has finished; None if there is none."""
    path = Path(task.path + ".json")
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    if values["key"] != task.key() or not all(Path(run["path"]).exists() for run in values["runs"]):
        return None
    counts = ("rows", "bytes")
    runs = (
        Run(run["path"], *({int(label): n for label, n in run[name].items()} for name in counts))
        for run in values["runs"]
    )
    bad = tuple(BadRow(**row) for row in values["bad"])
    return SortResult(tuple(runs), bad, values["changes"])


def sort_images(task: SortTask) -> SortResult:
    """Run a sort task; the result is written last, and only if no bad row is an error."""
    result_path = Path(task.path + ".json")
    result_path.unlink(missing_ok=True)  # of an earlier version, whose runs are overwritten
    label_of = {name: label for label, name in enumerate(task.class_names)}
    key = str(task.seed).encode()
    rows: list[tuple[int, bytes, int, bytes, str]] = []
    size, place = 0, task.number << TASK_BITS
    runs: list[Run] = []
    bad: list[BadRow] = []
    changes = Counter[str]()
    for item in _read(task.pieces):
        place += 1
        if isinstance(item, BadRow):
            bad.append(item)
            continue
        changes.update(item.changes)
        digest = hashlib.blake2b(item.image, digest_size=16, key=key).digest()
        rows.append((label_of[item.class_name], digest, place, item.image, item.source))
        size += len(item.image)
        if size >= task.portion:
            runs.append(_write_run(f"{task.path}-{len(runs)}.arrow", rows))
            rows, size = [], 0
    if rows:
        runs.append(_write_run(f"{task.path}-{len(runs)}.arrow", rows))
    result = SortResult(tuple(runs), tuple(bad), dict(changes))
    if task.write_bad or not bad:
        write_json(result_path, {"key": task.key(), **asdict(result)})
    return result


def _read(pieces: Sequence[Piece]) -> Iterator[SourceImage | BadRow]:
    for piece in pieces:
        yield from read_piece(piece)


def _write_run(path: str, rows: list[tuple[int, bytes, int, bytes, str]]) -> Run:
    """Sort rows of `RUN_SCHEMA` in place and write them."""
    rows.sort(key=lambda row: row[:3])
    counts: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for label, _, _, image, _ in rows:
        counts[label] = counts.get(label, 0) + 1
        sizes[label] = sizes.get(label, 0) + len(image)
    columns = zip(RUN_SCHEMA, zip(*rows, strict=True), strict=True)
    arrays = [pa.array(values, type=field.type) for field, values in columns]
    with (
        atomic_path(Path(path)) as temporary,
        pa.ipc.new_file(str(temporary), RUN_SCHEMA) as writer,
    ):
        writer.write_batch(pa.record_batch(arrays, schema=RUN_SCHEMA))
    return Run(path, counts, sizes)


class _OpenRun:
    """A memory-mapped run: labels and digests as arrays, the rest on access."""

    def __init__(self, path: str) -> None:
        self.batch = pa.ipc.open_file(pa.memory_map(path)).get_batch(0)
        self.labels = self.batch.column("label").to_numpy()  # int32 [rows]
        digests = self.batch.column("digest")
        self.digests = np.frombuffer(digests.buffers()[1], dtype=">u8").reshape(-1, 2)

    def slice(self, wanted: Slice) -> pa.RecordBatch:
        """Return the rows of a slice of a class without a copy."""
        begin = int(np.searchsorted(self.labels, wanted.label, side="left"))
        end = int(np.searchsorted(self.labels, wanted.label, side="right"))
        low, high = _bounds(wanted.number, wanted.of)
        high_halves = self.digests[begin:end, 0]
        end = begin + int(np.searchsorted(high_halves, high, side="right"))
        begin += int(np.searchsorted(high_halves, low, side="left"))
        return self.batch.slice(begin, end - begin)


def _bounds(number: int, of: int) -> tuple[np.uint64, np.uint64]:
    """Return the first and last digest (high 8 bytes) of share `number` of `of`."""
    return np.uint64((number << 64) // of), np.uint64(((number + 1 << 64) // of) - 1)


# --- Duplicates ---


def find_duplicates(task: DuplicatesTask) -> int:
    """List the rows whose image occurs earlier in the source; return how many there are."""
    # digest and place of every row in the task's share
    low, high = _bounds(task.number, task.of)
    high_halves, low_halves, places, run_numbers, row_numbers = [], [], [], [], []
    runs = [_OpenRun(path) for path in task.runs]
    for number, run in enumerate(runs):
        inside = np.flatnonzero((run.digests[:, 0] >= low) & (run.digests[:, 0] <= high))
        high_halves.append(run.digests[inside, 0].astype(np.uint64))
        low_halves.append(run.digests[inside, 1].astype(np.uint64))
        places.append(run.batch.column("place").to_numpy()[inside])
        run_numbers.append(np.full(len(inside), number, dtype=np.int32))
        row_numbers.append(inside.astype(np.int32))

    # sort by digest, then place: each group of equal digests begins with the image to keep
    keys = [np.concatenate(values) for values in (places, low_halves, high_halves)]
    order = np.lexsort(keys)
    high_half, low_half = keys[2][order], keys[1][order]
    same = (high_half[1:] == high_half[:-1]) & (low_half[1:] == low_half[:-1])
    run_of, row_of = np.concatenate(run_numbers)[order], np.concatenate(row_numbers)[order]
    begins = np.maximum.accumulate(np.where(np.append(True, ~same), np.arange(len(order)), 0))
    duplicates = np.flatnonzero(same) + 1

    def value(column: str, at: int) -> Any:
        return runs[run_of[at]].batch.column(column)[int(row_of[at])].as_py()

    rows = [
        {name: value(name, at) for name in ("label", "place", "source")}
        | {f"kept_{name}": value(name, begins[at]) for name in ("label", "source")}
        for at in duplicates
    ]
    with atomic_path(Path(task.path)) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=DUPLICATES_SCHEMA), temporary)
    return len(rows)


# --- Parts ---


def finished_part(task: PartTask) -> PartResult | None:
    """Return the result of a part that was made from the same task; None if there is none."""
    path = Path(task.path)
    if not path.exists():
        return None
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except pa.ArrowInvalid:  # not Parquet: an unrelated file, or a damaged disk
        return None
    if metadata.get(b"fmray.key") != task.key().encode():
        return None
    values = json.loads(metadata[b"fmray.result"])
    return PartResult(tuple(tuple(piece) for piece in values["pieces"]), values["digest"])


def write_part(task: PartTask) -> PartResult:
    """Run a part task; one slice of one class is in memory at a time."""
    runs = [_OpenRun(path) for path in task.runs]
    lists = [pq.read_table(path, columns=["label", "place"]) for path in task.duplicates]
    duplicates = pa.concat_tables([DUPLICATES_SCHEMA.empty_table().select([0, 1]), *lists])
    labels, places = duplicates["label"].to_numpy(), duplicates["place"].to_numpy()
    content, pieces, groups = hashlib.sha256(), [], 0
    # images are compressed already, names repeat
    compression = dict.fromkeys(IMAGE_SCHEMA.names, "ZSTD") | {"image": "NONE"}
    with (
        atomic_path(Path(task.path)) as temporary,
        pq.ParquetWriter(
            temporary, IMAGE_SCHEMA, compression=compression, use_dictionary=["class_name"]
        ) as writer,
    ):
        for wanted in task.slices:
            # the slice's rows of all runs without duplicates, in the order of their digests
            batches = [run.slice(wanted) for run in runs]
            table = pa.Table.from_batches(batches, schema=RUN_SCHEMA)
            is_duplicate = np.isin(table["place"].to_numpy(), places[labels == wanted.label])
            rows = np.flatnonzero(~is_duplicate)
            if not len(rows):
                continue
            digests = b"".join(table["digest"].to_pylist())
            keys = np.frombuffer(digests, dtype=">u8").reshape(-1, 2)[rows]
            order = rows[np.lexsort((keys[:, 1], keys[:, 0]))]
            table = table.select(["image", "source", "digest"]).take(pa.array(order))

            # write them, and note where the class begins
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
            {"fmray.key": task.key(), "fmray.result": dumps(asdict(result))}
        )
    return result

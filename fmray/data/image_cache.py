"""Images of one folder of a store as an uncompressed Arrow IPC file in a memory map, for random
access.

In: Parquet parts. Out: encoded images by row number. The file is made once on a node, by the first
process that asks; Parquet itself must read a whole row group to give one image.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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

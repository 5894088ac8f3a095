"""Reading a data store: metadata of all rows at once, row groups when they are needed.

In: a folder that ingest has finished. Out: arrays over rows and samples, and decoded Parquet rows
by number.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

# The manifest of a data store: what it holds and what it was made of. Written last, so its
# presence means done.


@dataclass(frozen=True)
class Manifest:
    """`settings`: sources and options; `processor`: its fingerprint; `counts`: split -> rows,
    answers, shards."""

    settings: dict[str, Any]
    processor: str
    counts: dict[str, dict[str, int]]
    bad_rows: int

    @staticmethod
    def path(store: Path) -> Path:
        """Where the manifest of a store lies."""
        return store / "manifest.json"

    @staticmethod
    def exists(store: Path) -> bool:
        """Whether `store` is a finished store."""
        return Manifest.path(store).is_file()

    @classmethod
    def read(cls, store: Path) -> Manifest:
        """Raises ValueError where there is no finished store or its manifest is not one."""
        path = cls.path(store)
        if not path.is_file():
            raise ValueError(
                f"{store}: not a finished data store (no {path.name}); run jobs/prepare_data.py"
            )
        try:
            return cls(**json.loads(path.read_text()))
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise ValueError(
                f"{path}: not a manifest ({error}); delete it and run jobs/prepare_data.py"
            ) from error

    def write(self, store: Path) -> None:
        """Written to a temporary name and moved."""
        temporary = self.path(store).with_name("manifest.json.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")
        temporary.replace(self.path(store))

    def summary(self) -> str:
        """Counts in words."""
        parts = [
            f"{count['rows']} {split} rows with {count['answers']} answers"
            for split, count in self.counts.items()
        ]
        return ", ".join([*parts, f"{self.bad_rows} bad rows left out"])


CACHE_BYTES = 3 * 2**30  # of row groups kept in memory


@dataclass(frozen=True)
class Samples:
    """One entry for each training sample, in store order."""

    row: np.ndarray  # [n] row of the store
    turn: np.ndarray  # [n] last answer turn the sample holds
    length: np.ndarray  # [n] tokens
    group: np.ndarray  # [n] row group, counted over all parts


class StoreSplit:
    """One split of a store; rows are numbered through all its parts. Safe to read from several
    threads."""

    def __init__(self, store: Path, split: str, cache_bytes: int = CACHE_BYTES) -> None:
        """Raises ValueError for a store that is not finished or has no such split."""
        counts = Manifest.read(store).counts
        if split not in counts:
            raise ValueError(f"{store}: has no split {split!r}, only {', '.join(counts)}")
        shards = range(counts[split]["shards"])
        self.files = [store / split / f"part-{shard:05d}.parquet" for shard in shards]
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._cache_bytes, self._cached_bytes = cache_bytes, 0
        self._group_place: list[tuple[int, int]] = []  # row group -> (file, row group in it)
        group_rows: list[int] = []
        tables = []
        for number, file in enumerate(self.files):
            with pq.ParquetFile(file) as part:
                for group in range(part.metadata.num_row_groups):
                    self._group_place.append((number, group))
                    group_rows.append(part.metadata.row_group(group).num_rows)
                tables.append(part.read(columns=["turn_tokens", "tags", "row"]))
        self.bytes = sum(file.stat().st_size for file in self.files)
        self.group_start = np.cumsum([0, *group_rows])  # [groups + 1] rows before each group
        table = pa.concat_tables(tables).combine_chunks()
        self.source_row = table["row"].to_numpy()  # [rows] row of the source file
        self.turns = (
            pc.list_value_length(table["turn_tokens"]).to_numpy().astype(np.int64)
        )  # [rows]
        self.turn_tokens = pc.list_flatten(table["turn_tokens"]).to_numpy()  # [answers]
        self.first_answer = np.cumsum(self.turns) - self.turns  # [rows] into turn_tokens and tags
        self.tags, self._tag_codes = _tag_codes(table["tags"].to_pylist(), self.turns)

    def __len__(self) -> int:
        return len(self.turns)

    def tag(self, row: int, turn: int) -> str | None:
        """Kind of one question."""
        code = int(self._tag_codes[self.first_answer[row] + turn])
        return None if code < 0 else self.tags[code]

    def samples(self, kind: str, max_length: int) -> Samples:
        """All samples of at most `max_length` tokens: one for each answer (`turn`), or for each row
        (`conversation`).

        A conversation that is too long ends with the last answer that fits.
        """
        row = np.repeat(np.arange(len(self)), self.turns)
        turn = np.arange(len(row)) - self.first_answer[row]
        kept = self.turn_tokens <= max_length
        if kind == "conversation":
            # lengths grow along a row, so an answer is the last one kept when the next one is not
            following = np.append(kept[1:], False) & (np.append(row[1:], -1) == row)
            kept &= ~following
        row, turn, length = row[kept], turn[kept], self.turn_tokens[kept]
        group = np.searchsorted(self.group_start, row, side="right") - 1
        return Samples(row, turn, length, group)

    def image(self, row: int) -> bytes | None:
        """Encoded picture of a row; its row group stays in memory for the next ones."""
        table, index = self._locate(row)
        return table["image"][index].as_py()

    def conversation(self, row: int) -> list[dict[str, str]]:
        """Conversation of a row in LLaVA's format."""
        table, index = self._locate(row)
        return table["conversations"][index].as_py()

    def _locate(self, row: int) -> tuple[pa.Table, int]:
        group = int(np.searchsorted(self.group_start, row, side="right") - 1)
        return self._group(group), row - int(self.group_start[group])

    def _group(self, group: int) -> pa.Table:
        with self._lock:
            table = self._cache.get(group)
            if table is not None:
                self._cache.move_to_end(group)
                return table
            number, inside = self._group_place[group]
            with pq.ParquetFile(self.files[number]) as part:
                table = part.read_row_group(inside, columns=["image", "conversations"])
            self._cache[group] = table
            self._cached_bytes += table.nbytes
            while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
                _, dropped = self._cache.popitem(last=False)
                self._cached_bytes -= dropped.nbytes
            return table


def _tag_codes(rows: list[list[str] | None], turns: np.ndarray) -> tuple[list[str], np.ndarray]:
    """All tags, sorted, and the index of each answer's tag, -1 where the row has none."""
    names = sorted({tag for row in rows if row for tag in row})
    code = {name: index for index, name in enumerate(names)}
    codes: list[int] = []
    for row, answers in zip(rows, turns, strict=True):
        codes += [code[tag] for tag in row] if row else [-1] * int(answers)
    return names, np.array(codes, dtype=np.int32)

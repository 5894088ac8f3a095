"""Read a data store: the metadata of all rows at once, images and texts by row group on demand.

A store is a folder that `fmray.data.ingest` has written: Parquet parts per split, the processor,
and `manifest.json`. The manifest is written last; a folder without one is not a store.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fmray.data.images import describe_changes
from fmray.runtime.console import count_of
from fmray.runtime.files import digest_of, sha256, write_json

CACHE_BYTES = 3 * 2**30  # of row groups kept in memory
MANY_UNKNOWN = 0.01  # share of unknown words in answers that asks for a remedy
NO_LIMIT = 2**31 - 1  # tokens of a sample


@dataclass(frozen=True)
class StoreManifest:
    """Read and write `manifest.json`, which makes a folder a complete store."""

    kind: ClassVar[str]  #: what messages call the store

    @staticmethod
    def path(store: Path) -> Path:
        """Return the path of a store's manifest."""
        return store / "manifest.json"

    @staticmethod
    def exists(store: Path) -> bool:
        """Return whether `store` is complete."""
        return StoreManifest.path(store).is_file()

    @classmethod
    def read(cls, store: Path) -> Self:
        """Read the manifest of a store.

        Raises:
            ValueError: the store is missing or incomplete, or its manifest is not valid.
        """
        path = cls.path(store)
        if not path.is_file():
            raise ValueError(
                f"{store}: no complete {cls.kind} (no {path.name}); run jobs/prepare_data.py"
            )
        try:
            return cls(**json.loads(path.read_text()))
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise ValueError(
                f"{path}: no {cls.kind} manifest ({error}); delete it and run jobs/prepare_data.py"
            ) from error

    def write(self, store: Path) -> None:
        """Write the manifest, which makes the store complete."""
        write_json(self.path(store), asdict(self))


@dataclass(frozen=True)
class Manifest(StoreManifest):
    """What a store contains and what it was made from."""

    kind: ClassVar[str] = "data store"
    settings: dict[str, Any]  # sources and options
    processor: str  # its fingerprint
    counts: dict[str, dict[str, int]]  # split -> rows, answers, shards
    bad_rows: int
    # SHA-256 of `records` (ids, conversations, tags) and of `images` (bytes), in the order in which
    # training reads them; the same wherever and however the store was made. {}: an old store
    content: dict[str, str] = field(default_factory=dict)
    #: of decoding -> images, by the names of `images.CHANGES`; empty before decoder version 2
    image_changes: dict[str, int] = field(default_factory=dict)
    #: key that nothing reads -> records that have it, see `records.unused_keys`
    unused_keys: dict[str, int] = field(default_factory=dict)
    #: of `words` in answers those `unknown` to the tokenizer, and answers that are `too_long`
    answer_counts: dict[str, int] = field(default_factory=dict)

    def fingerprint(self, store: Path) -> str:
        """Return a hash of the content; of an old store, of its manifest file."""
        if not self.content:
            return sha256(self.path(store))
        values = {"processor": self.processor, **self.content}
        return digest_of(values)

    def summary(self) -> str:
        """Return the counts as text."""
        parts = [
            f"{count['rows']} {split} rows with {count['answers']} answers"
            for split, count in self.counts.items()
        ]
        text = ", ".join([*parts, f"{self.bad_rows} bad rows skipped"])
        changes = describe_changes(self.image_changes)
        return "\n".join([f"{text}; {changes}" if changes else text, *self._notes()])

    def _notes(self) -> Iterator[str]:
        """Yield a line for each part of the records that is not used or cannot be learned."""
        for key, count in self.unused_keys.items():
            have = "has" if count == 1 else "have"
            yield f"  {count_of(count, 'record')} {have} `{key}`, which is not used"
        long, unknown, words = (
            self.answer_counts.get(name, 0) for name in ("too_long", "unknown", "words")
        )
        if long:
            limit = f"more than {self.settings['max_length']} tokens (data.max_length)"
            yield f"  {count_of(long, 'answer')} of {limit}: not used"
        if unknown:
            share = f"{unknown / words:.1%} of the words in answers ({unknown} of {words})"
            remedy = "raise model.scratch.max_vocabulary (words are split at spaces)"
            if not self.settings.get("scratch"):
                remedy = "name a model.source whose tokenizer knows them"
            many = unknown > MANY_UNKNOWN * words
            never = f"; an answer with one never counts as right: {remedy}" if many else ""
            yield f"  {share} are unknown to the tokenizer{never}"


@dataclass(frozen=True)
class Samples:
    """Training samples in store order; one array entry per sample."""

    row: np.ndarray  # [n] row of the store
    turn: np.ndarray  # [n] last answer of the row that belongs to the sample
    length: np.ndarray  # [n] tokens
    group: np.ndarray  # [n] row group, counted over all parts
    max_length: int  # tokens
    left_out: int  # answers that end after so many tokens

    def __str__(self) -> str:
        text = f"{count_of(len(self.row), 'sample')} of {count_of(len(np.unique(self.row)), 'row')}"
        if self.left_out:
            answers = count_of(self.left_out, "answer")
            text += f" ({answers} of more than {self.max_length} tokens left out)"
        return text


class StoreSplit:
    """One split of a store; rows are numbered across its parts. Thread-safe."""

    def __init__(self, store: Path, split: str, cache_bytes: int = CACHE_BYTES) -> None:
        """Read the metadata of all rows.

        Raises:
            ValueError: the store is incomplete or has no such split.
        """
        manifest = Manifest.read(store)
        counts, self.max_length = manifest.counts, manifest.settings.get("max_length", NO_LIMIT)
        if split not in counts:
            raise ValueError(f"{store}: no split {split!r}, only {', '.join(counts)}")
        shards = range(counts[split]["shards"])
        self.files = [store / split / f"part-{shard:05d}.parquet" for shard in shards]
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._cache_bytes, self._cached_bytes = cache_bytes, 0

        # row groups of all parts, and the columns that are small
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

        turns = pc.list_value_length(table["turn_tokens"]).to_numpy().astype(np.int64)
        self.source_row = table["row"].to_numpy()  # [rows] row of the source file
        self.turns = turns  # [rows] number of answers
        self.turn_tokens = pc.list_flatten(table["turn_tokens"]).to_numpy()  # [answers]
        self.first_answer = np.cumsum(turns) - turns  # [rows] index into turn_tokens and tags
        self.tags, self._tag_codes = _tag_codes(table["tags"].to_pylist(), turns)

    def __len__(self) -> int:
        return len(self.turns)

    def ids(self, source_rows: Iterable[int]) -> list[str]:
        """Return the ids of rows of the source file; reads the ids of all rows."""
        ids: list[str] = []
        for file in self.files:
            with pq.ParquetFile(file) as part:
                ids += part.read(columns=["id"])["id"].to_pylist()
        of_row = dict(zip(self.source_row.tolist(), ids, strict=True))
        return [of_row[row] for row in source_rows]

    def tag(self, row: int, turn: int) -> str | None:
        """Return the kind of a question; None if the row has no tags."""
        code = int(self._tag_codes[self.first_answer[row] + turn])
        return None if code < 0 else self.tags[code]

    def samples(self, kind: str, max_length: int | None = None, rows: int | None = None) -> Samples:
        """Return the samples of at most `max_length` tokens, for training and for evaluation.

        Args:
            kind: "turn" for one sample per answer, "conversation" for one per row. A conversation
                that is too long ends with the last answer that fits.
            max_length: default: that of the store.
            rows: of the first so many rows; default: of all.
        """
        max_length = self.max_length if max_length is None else max_length
        count = len(self) if rows is None else min(rows, len(self))
        row = np.repeat(np.arange(count), self.turns[:count])
        turn = np.arange(len(row)) - self.first_answer[row]
        tokens = self.turn_tokens[: len(row)]
        fits = tokens <= max_length
        left_out = int((~fits).sum())
        if kind == "conversation":
            # lengths grow along a row: the last answer that fits is followed by one that does not
            next_fits = np.append(fits[1:], False) & (np.append(row[1:], -1) == row)
            fits &= ~next_fits
        row, turn, length = row[fits], turn[fits], tokens[fits]
        group = np.searchsorted(self.group_start, row, side="right") - 1
        return Samples(row, turn, length, group, max_length, left_out)

    def image(self, row: int) -> bytes | None:
        """Return the encoded image of a row; None if it is text only."""
        table, index = self._locate(row)
        return table["image"][index].as_py()

    def conversation(self, row: int) -> list[dict[str, str]]:
        """Return the conversation of a row in LLaVA's format."""
        table, index = self._locate(row)
        return table["conversations"][index].as_py()

    def _locate(self, row: int) -> tuple[pa.Table, int]:
        """Return the row group of a row, and its index in it."""
        group = int(np.searchsorted(self.group_start, row, side="right") - 1)
        return self._group(group), row - int(self.group_start[group])

    def _group(self, group: int) -> pa.Table:
        """Return a row group from the cache, which drops the least recently used ones."""
        with self._lock:
            table = self._cache.get(group)
            if table is not None:
                self._cache.move_to_end(group)
                return table
            number, group_in_file = self._group_place[group]
            with pq.ParquetFile(self.files[number]) as part:
                table = part.read_row_group(group_in_file, columns=["image", "conversations"])
            self._cache[group] = table
            self._cached_bytes += table.nbytes
            while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
                _, dropped = self._cache.popitem(last=False)
                self._cached_bytes -= dropped.nbytes
            return table


def _tag_codes(rows: list[list[str] | None], turns: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return all tags, sorted, and the index of each answer's tag; -1 if the row has none."""
    names = sorted({tag for row in rows if row for tag in row})
    code = {name: index for index, name in enumerate(names)}
    codes: list[int] = []
    for row, answers in zip(rows, turns, strict=True):
        codes += [code[tag] for tag in row] if row else [-1] * int(answers)
    return names, np.array(codes, dtype=np.int32)

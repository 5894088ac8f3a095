"""One shard of a data store: read the images, check the rows, write one Parquet part. Runs inside a
Ray Data task.

In: a `ShardTask`. Out: the part at its final name, or nothing; and a `ShardResult`, kept in the
part's metadata.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import UnidentifiedImageError

from fmray.data.encoding import BROKEN_IMAGE, IMAGE_MARK, decode_image, encode, image_tokens
from fmray.data.processor import load_processor
from fmray.data.records import BadRow, record_id

if TYPE_CHECKING:
    from transformers import ProcessorMixin

VERSION = "1"  # a changed format or check makes old parts stale
ROW_GROUP = 64  # rows; what the loader reads at a time
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),
        ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
        ("tags", pa.list_(pa.string())),
        ("turn_tokens", pa.list_(pa.int32())),
        ("row", pa.int64()),
    ]
)
"""`image`: encoded bytes as in the source, null for text alone. `tags`: one for each answer.
`turn_tokens`: length in tokens, the image's included, up to and with each answer. `row`: index in
the source file."""


@dataclass(frozen=True)
class ShardTask:
    """All a worker needs. Paths are absolute, on storage that every node sees; `rows` is JSON
    [[row, record], ...]."""

    split: str
    path: str
    file: str
    rows: bytes
    image_folder: str
    processor: str
    processor_hash: str
    max_length: int
    pictures: str  # what generated images were made of: their names and questions do not say
    write_bad: bool  # whether a shard with bad rows is written without them, or not at all

    def key(self) -> str:
        """Hash of all that decides the part's content, but the images' own bytes."""
        parts = [
            self.file,
            self.image_folder,
            self.processor_hash,
            str(self.max_length),
            self.pictures,
        ]
        return hashlib.sha256("\0".join([VERSION, *parts]).encode() + bytes(self.rows)).hexdigest()


@dataclass(frozen=True)
class ShardResult:
    """What a shard holds, and its bad rows as dicts of `BadRow`."""

    rows: int
    answers: int
    bad_rows: list[dict[str, Any]]

    def to_json(self) -> str:
        """For the part's metadata and the way back to the driver."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> ShardResult:
        """The reverse of `to_json`."""
        return cls(**json.loads(text))


def finished_part(task: ShardTask) -> ShardResult | None:
    """The result of a part that is there and was made of the same things; None otherwise."""
    path = Path(task.path)
    if not path.exists():
        return None
    try:
        metadata = pq.read_schema(path).metadata or {}
    except pa.ArrowInvalid:  # not Parquet: somebody else's file, or a broken disk
        return None
    if metadata.get(b"fmray.key") != task.key().encode():
        return None
    return ShardResult.from_json(metadata[b"fmray.result"])


def write_shard(task: ShardTask) -> ShardResult:
    """Write one part under a temporary name and move it.

    The same task always gives the same bytes. With bad rows and not `write_bad`, nothing is
    written.
    """
    processor = _processor(task.processor, task.processor_hash)
    good, bad = [], []
    for row, record in json.loads(task.rows):
        checked = _check(row, record, task, processor)
        if isinstance(checked, str):
            bad.append(asdict(BadRow(task.file, row, record_id(record), checked)))
        else:
            good.append(checked)
    result = ShardResult(len(good), sum(len(row["turn_tokens"]) for row in good), bad)
    if bad and not task.write_bad:
        return result
    schema = SCHEMA.with_metadata({"fmray.key": task.key(), "fmray.result": result.to_json()})
    temporary = task.path + ".tmp"
    # Images are compressed already; everything else shrinks well.
    compression = {column: "NONE" if column == "image" else "ZSTD" for column in _leaves()}
    with pq.ParquetWriter(
        temporary, schema, compression=compression, use_dictionary=["tags.list.element"]
    ) as writer:
        for start in range(0, len(good), ROW_GROUP):
            writer.write_table(pa.Table.from_pylist(good[start : start + ROW_GROUP], schema=schema))
    os.replace(temporary, task.path)
    return result


def _check(
    row: int, record: dict[str, Any], task: ShardTask, processor: ProcessorMixin
) -> dict[str, Any] | str:
    """The row to store, or why it is bad. Its form has been checked before."""
    token = getattr(processor, "image_token", IMAGE_MARK)
    if token != IMAGE_MARK and any(token in turn["value"] for turn in record["conversations"]):
        return f"the text holds {token!r}, which the processor keeps for images"
    image, size = None, None
    if record.get("image") is not None:
        path = Path(task.image_folder, record["image"])
        try:
            image = path.read_bytes()
        except OSError as error:  # not there, not readable, a folder, a name too long
            return f"missing image: {path} ({error.strerror})"
        try:
            size = decode_image(image).size
        except UnidentifiedImageError:  # its text has a memory address, and shards are repeatable
            return f"broken image: {path} (no image format that Pillow knows)"
        except BROKEN_IMAGE as error:
            return f"broken image: {path} ({error})"
    try:
        encoded = encode(processor, record["conversations"])
    except ValueError as error:
        return str(error)
    lengths = encoded.turn_tokens(image_tokens(processor, size) if size else 0)
    if lengths[0] > task.max_length:
        return (
            f"too long: {lengths[0]} tokens at the first answer; "
            f"data.max_length is {task.max_length}"
        )
    return {
        "id": record_id(record),
        "image": image,
        "conversations": [
            {"from": turn["from"], "value": turn["value"]} for turn in record["conversations"]
        ],
        "tags": record.get("tags"),
        "turn_tokens": lengths,
        "row": row,
    }


def _leaves() -> list[str]:
    """Parquet's names of the columns."""
    turns = ["conversations.list.element.from", "conversations.list.element.value"]
    return ["id", "image", *turns, "tags.list.element", "turn_tokens.list.element", "row"]


@functools.lru_cache(maxsize=1)  # a worker process writes many shards
def _processor(path: str, processor_hash: str) -> ProcessorMixin:
    return load_processor(path)

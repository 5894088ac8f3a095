"""LLaVA files -> a Parquet store, through Ray Data.

In: a recipe whose `data` section names LLaVA JSON or JSONL files and an image folder (or asks for
generated shapes). Out: `<store>/{train,validation}/part-XXXXX.parquet`, `<store>/processor`,
`<store>/manifest.json`.

Part i holds the good rows among rows [i * rows_per_shard, (i + 1) * rows_per_shard) of its split,
in source order. A part is written whole or not at all and carries a key of all that made it: a
second run writes nothing, and a killed one goes on with the parts that are missing. Only the
manifest, written last, makes a folder a store.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import UnidentifiedImageError
from tqdm import tqdm

from fmray.config import AdaLlavaRecipe
from fmray.data import shapes
from fmray.data.processor import fingerprint, load_processor, scratch_processor
from fmray.data.ray_tasks import run_tasks
from fmray.data.records import (
    BAD_ROWS,
    BROKEN_IMAGE,
    IMAGE_MARK,
    BadRow,
    decode_image,
    encode,
    find_bad_rows,
    image_tokens,
    read_records,
    record_id,
    stop_at_bad_rows,
)
from fmray.data.store import Manifest

if TYPE_CHECKING:
    from transformers import ProcessorMixin


# One shard of a data store: read the images, check the rows, write one Parquet part. Runs inside a
# Ray Data task.
#
# In: a `ShardTask`. Out: the part at its final name, or nothing; and a `ShardResult`, kept in the
# part's metadata.

PART_VERSION = "1"  # a changed format or check makes old parts stale
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
        return hashlib.sha256(
            "\0".join([PART_VERSION, *parts]).encode() + bytes(self.rows)
        ).hexdigest()


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


__all__ = ["SCHEMA", "prepare"]

VERSION = 1  # of parts and manifest: a changed format makes old stores stale


@dataclass(frozen=True)
class _Source:
    """One LLaVA file with its records."""

    file: Path
    records: list[Any]
    bad: list[BadRow]


def prepare(recipe: AdaLlavaRecipe) -> Manifest:
    """Make the store of a recipe, or find it made; starts Ray only where none runs in this process.

    Raises ValueError for files that cannot be read, for bad rows unless `data.on_bad_row` is `skip`
    (all are listed in `<store>/bad_rows.jsonl`), and for a processor that cannot serve.
    """
    store = recipe.data.store.resolve()  # workers have other working directories
    files, image_folder = _find_sources(recipe, store)
    settings = _settings(recipe, files, image_folder)
    processor = None if recipe.model.source == "scratch" else _base_processor(recipe)
    found = Manifest.read(store) if Manifest.exists(store) else None
    if found is not None and _is_current(found, store, settings, processor):
        print(f"store {recipe.data.store}: up to date, {found.summary()}")
        return found

    sources = {}
    for name, file in files.items():
        records = read_records(file)
        sources[name] = _Source(file, records, find_bad_rows(file, records))
    bad = [row for source in sources.values() for row in source.bad]
    stop_at_bad_rows(store, bad, "data.on_bad_row", recipe.data.on_bad_row)
    if processor is None:
        processor = scratch_processor(_texts(sources), recipe.model.scratch)
    processor_hash = fingerprint(processor)
    if found is None or found.processor != processor_hash:
        Manifest.path(store).unlink(missing_ok=True)
        _save_processor(processor, store / "processor")

    plan = _plan_shards(recipe, sources, store, image_folder, processor_hash, settings)
    # what was bad may have been mended since, so parts with bad rows are made again
    kept = ((task.path, finished_part(task)) for task in plan)
    results = {path: result for path, result in kept if result and not result.bad_rows}
    missing = [task for task in plan if task.path not in results]
    if missing:
        Manifest.path(store).unlink(missing_ok=True)
        for folder in {Path(task.path).parent for task in missing}:
            folder.mkdir(parents=True, exist_ok=True)
            for left_over in folder.glob("*.tmp"):  # of a run that was killed
                left_over.unlink()
        writing = run_tasks(write_shard, missing, recipe.cluster)
        progress = tqdm(writing, total=len(plan), initial=len(results), desc="ingest", unit="shard")
        results |= {task.path: result for task, result in progress}

    bad += [BadRow(**row) for result in results.values() for row in result.bad_rows]
    stop_at_bad_rows(store, bad, "data.on_bad_row", recipe.data.on_bad_row)
    _remove_strangers(store, set(results))
    counts = {split: _count(plan, results, split) for split in ("train", "validation")}
    for split, count in counts.items():
        if not count["rows"]:
            raise ValueError(f"{store / BAD_ROWS}: all {split} rows are bad")
    manifest = Manifest(settings, processor_hash, counts, bad_rows=len(bad))
    manifest.write(store)
    written = f"{len(missing)} of {len(plan)} shards written"
    print(f"store {recipe.data.store}: {written}, {manifest.summary()}")
    return manifest


def _find_sources(recipe: AdaLlavaRecipe, store: Path) -> tuple[dict[str, Path], Path]:
    """LLaVA files by split name and their image folder; generated where the recipe says so."""
    data = recipe.data
    if data.shapes is not None:
        source = store / "source"
        shapes.generate(source, data.shapes, recipe.seed)
        return {split: source / f"{split}.json" for split in ("train", "validation")}, source
    if data.train is None:
        raise ValueError(
            "data: nothing to prepare; set data.train to a LLaVA file, or data.shapes to make one"
        )
    files = {"train": data.train.resolve()}
    if data.validation is not None:
        files["validation"] = data.validation.resolve()
    for name, file in files.items():
        if not file.is_file():
            raise ValueError(f"data.{name}: {file}: no such file; name a LLaVA JSON or JSONL file")
    image_folder = (data.image_folder or data.train.parent).resolve()
    if not image_folder.is_dir():
        raise ValueError(f"data.image_folder: {image_folder}: no such folder")
    return files, image_folder


def _settings(recipe: AdaLlavaRecipe, files: dict[str, Path], image_folder: Path) -> dict[str, Any]:
    """All that decides what the store holds, but the processor. Images are taken not to change
    under their names."""
    data, scratch = recipe.data, recipe.model.scratch
    return {
        "version": VERSION,
        "files": {name: str(file) for name, file in files.items()},
        "sha256": {name: _file_hash(file) for name, file in files.items()},
        "image_folder": str(image_folder),
        "shapes": None
        if data.shapes is None
        else {**data.shapes.model_dump(), "seed": recipe.seed},
        "validation_share": None if "validation" in files else data.validation_share,
        "rows_per_shard": data.rows_per_shard,
        "max_length": data.max_length,
        "on_bad_row": data.on_bad_row,
        "scratch": None
        if recipe.model.source != "scratch"
        else scratch.model_dump(include={"image_size", "patch_size", "max_vocabulary"}),
    }


def _is_current(
    found: Manifest, store: Path, settings: dict[str, Any], processor: ProcessorMixin | None
) -> bool:
    """Whether a finished store is what would be made now, file for file.

    A model trained from scratch and then loaded from its directory brings the same processor: that
    is the same store. Stores with bad rows are looked at again, since a missing image may be there
    by now.
    """
    if found.bad_rows or {**found.settings, "scratch": None} != {**settings, "scratch": None}:
        return False
    if processor is None:
        if found.settings["scratch"] != settings["scratch"]:
            return False
    elif fingerprint(processor) != found.processor:
        return False
    return all(
        _part(store, split, shard).exists()
        for split, count in found.counts.items()
        for shard in range(count["shards"])
    )


def _base_processor(recipe: AdaLlavaRecipe) -> ProcessorMixin:
    try:
        return load_processor(recipe.model.source, recipe.model.revision)
    except ValueError as error:
        raise ValueError(f"model.source: {error}") from error


def _texts(sources: dict[str, _Source]) -> Iterator[str]:
    """Texts of all good records, for the vocabulary."""
    for source in sources.values():
        bad = {row.row for row in source.bad}
        for row, record in enumerate(source.records):
            if row not in bad:
                yield from (turn["value"] for turn in record["conversations"])


def _plan_shards(
    recipe: AdaLlavaRecipe,
    sources: dict[str, _Source],
    store: Path,
    image_folder: Path,
    processor_hash: str,
    settings: dict[str, Any],
) -> list[ShardTask]:
    """Cut each split into shards. Rows known to be bad keep their place, so mending one changes one
    shard only."""
    splits: dict[str, list[tuple[int, Any]]] = {"train": [], "validation": []}
    for name, source in sources.items():
        bad = {row.row for row in source.bad}
        for row, record in enumerate(source.records):
            split = name
            if "validation" not in sources and _held_out(
                record_id(record), recipe.data.validation_share
            ):
                split = "validation"
            splits[split].append((row, None if row in bad else record))
    size = recipe.data.rows_per_shard
    tasks = []
    for split, rows in splits.items():
        if not rows:
            share = recipe.data.validation_share
            raise ValueError(
                f"data.validation_share: {share} of {len(sources['train'].records)} rows leave "
                f"none for the {split} split; change it or name a file in data.validation"
            )
        file = sources.get(split, sources["train"]).file
        for shard in range(math.ceil(len(rows) / size)):
            content = [row for row in rows[shard * size : (shard + 1) * size] if row[1] is not None]
            task = ShardTask(
                split=split,
                path=str(_part(store, split, shard)),
                file=str(file),
                rows=json.dumps(content).encode(),
                image_folder=str(image_folder),
                processor=str(store / "processor"),
                processor_hash=processor_hash,
                max_length=recipe.data.max_length,
                pictures=json.dumps(settings["shapes"]),
                write_bad=recipe.data.on_bad_row == "skip",
            )
            tasks.append(task)
    return tasks


def _count(plan: list[ShardTask], results: dict[str, ShardResult], split: str) -> dict[str, int]:
    paths = [task.path for task in plan if task.split == split]
    rows = sum(results[path].rows for path in paths)
    answers = sum(results[path].answers for path in paths)
    return {"rows": rows, "answers": answers, "shards": len(paths)}


def _save_processor(processor: ProcessorMixin, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(folder.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    processor.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def _remove_strangers(store: Path, parts: set[str]) -> None:
    """Parts of an earlier, longer version of the store."""
    for split in ("train", "validation"):
        for path in (store / split).glob("part-*.parquet"):
            if str(path) not in parts:
                path.unlink()


def _part(store: Path, split: str, shard: int) -> Path:
    return store / split / f"part-{shard:05d}.parquet"


def _held_out(name: str | None, share: float) -> bool:
    """By a hash of the id, so all conversations about one picture stay on one side."""
    if name is None:
        return False
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest, "big") < share * 2**32


def _file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

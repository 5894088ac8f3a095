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

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from fmray.config import Recipe
from fmray.data import shapes
from fmray.data.manifest import Manifest
from fmray.data.processor import fingerprint, load_processor, scratch_processor
from fmray.data.ray_tasks import run_tasks
from fmray.data.records import (
    BAD_ROWS,
    BadRow,
    find_bad_rows,
    read_records,
    record_id,
    stop_at_bad_rows,
)
from fmray.data.shard import SCHEMA, ShardResult, ShardTask, finished_part, write_shard

if TYPE_CHECKING:
    from transformers import ProcessorMixin

__all__ = ["SCHEMA", "prepare"]

VERSION = 1  # of parts and manifest: a changed format makes old stores stale


@dataclass(frozen=True)
class _Source:
    """One LLaVA file with its records."""

    file: Path
    records: list[Any]
    bad: list[BadRow]


def prepare(recipe: Recipe) -> Manifest:
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


def _find_sources(recipe: Recipe, store: Path) -> tuple[dict[str, Path], Path]:
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


def _settings(recipe: Recipe, files: dict[str, Path], image_folder: Path) -> dict[str, Any]:
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


def _base_processor(recipe: Recipe) -> ProcessorMixin:
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
    recipe: Recipe,
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

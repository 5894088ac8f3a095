"""Convert LLaVA files to a Parquet store, with one task per shard (`run_tasks`).

The recipe's `data` section names LLaVA JSON or JSONL files and an image folder, or asks for
generated shapes. The store has this layout:

    train/part-XXXXX.parquet, validation/part-XXXXX.parquet    `SCHEMA`
    processor/                                                 tokenizer, image processor, template
    bad_rows.jsonl                                             records that were skipped
    manifest.json                                              written last: the store is complete

Part i contains the good rows among rows [i * rows_per_shard, (i + 1) * rows_per_shard) of its
split, in source order. A part is written atomically and carries a hash of everything that decides
its content, and the state of its image files: a second run writes nothing, a run after a crash
writes only the missing parts, and a run after images were replaced writes their parts again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fmray.config import AdaLlavaRecipe
from fmray.data import shapes
from fmray.data.base_model import check_base
from fmray.data.images import DECODER_VERSION, ImageError, decode_image
from fmray.data.processor import (
    fingerprint,
    load_processor,
    scratch_processor,
    unknown_token,
)
from fmray.data.ray_tasks import run_tasks
from fmray.data.records import (
    BAD_ROWS,
    BadRow,
    encode,
    find_bad_rows,
    find_control_token,
    image_tokens,
    read_records,
    record_id,
    stop_at_bad_rows,
    unused_keys,
)
from fmray.data.store import Manifest
from fmray.runtime.console import say, track
from fmray.runtime.files import atomic_folder, atomic_path, digest_of, dumps, find_file, sha256

if TYPE_CHECKING:
    from transformers import ProcessorMixin

VERSION = 1  # of the manifest; increase it when a change makes old stores stale
PART_VERSION = "3"  # of parts; increase it when a changed format or check makes old parts stale
ROW_GROUP = 64  # rows; what the loader reads at a time
STAMP_THREADS = 32  # that look at image files: on network storage each answer takes a while
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),  # encoded bytes as in the source; null for text only
        ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
        ("tags", pa.list_(pa.string())),  # one per answer
        ("turn_tokens", pa.list_(pa.int32())),  # tokens up to each answer's end, image included
        ("row", pa.int64()),  # index in the source file
    ]
)

# --- Preparing a store ---


@dataclass(frozen=True)
class _Source:
    """A LLaVA file with its records."""

    file: Path
    records: list[Any]
    bad: list[BadRow]


def prepare(recipe: AdaLlavaRecipe) -> Manifest:
    """Make the store of a recipe unless it is up to date; starts Ray if none is running.

    Raises:
        ValueError: a file cannot be read, the processor is not usable, or there are bad rows and
            `data.on_bad_row` is not `skip` (all are listed in `<store>/bad_rows.jsonl`).
    """
    # read the records
    store = recipe.data.store.resolve()  # workers have other working directories
    files, image_folder = _find_sources(recipe, store)
    settings = _settings(recipe, files, image_folder)
    processor = None if recipe.model.source == "scratch" else _base_processor(recipe)
    manifest = Manifest.read(store) if Manifest.exists(store) else None
    sources = {}
    for name, file in files.items():
        records = read_records(file)
        sources[name] = _Source(file, records, find_bad_rows(file, records))
    bad = [row for source in sources.values() for row in source.bad]
    stop_at_bad_rows(store, bad, "data.on_bad_row", recipe.data.on_bad_row)

    # a new processor makes the old store invalid
    if processor is None:
        processor = scratch_processor(_texts(sources), recipe.model.scratch)
    processor_hash = fingerprint(processor)
    if manifest is None or manifest.processor != processor_hash:
        Manifest.path(store).unlink(missing_ok=True)
        with atomic_folder(store / "processor") as folder:
            processor.save_pretrained(folder)

    # write the missing parts; parts with bad rows again, since the source may have been fixed
    tasks = _plan_shards(recipe, sources, store, image_folder, processor_hash, settings)
    earlier = ((task.path, finished_part(task)) for task in tasks)
    results = {path: result for path, result in earlier if result and not result.bad_rows}
    missing = [task for task in tasks if task.path not in results]
    new_images = sum(map(has_new_images, missing))
    if missing:
        Manifest.path(store).unlink(missing_ok=True)
        _make_folders(missing)
        writing = run_tasks(write_shard, missing, recipe.cluster)
        progress = track(writing, "ingest", "shard", total=len(tasks), done=len(results))
        results |= {task.path: result for task, result in progress}

    # complete the store
    bad += [BadRow(**row) for result in results.values() for row in result.bad_rows]
    stop_at_bad_rows(store, bad, "data.on_bad_row", recipe.data.on_bad_row)
    _remove_stale_parts(store, set(results))
    counts = {split: _count(tasks, results, split) for split in ("train", "validation")}
    for split, count in counts.items():
        if not count["rows"]:
            raise ValueError(f"{store / BAD_ROWS}: all {split} rows are bad")
    made = Manifest(
        settings,
        processor_hash,
        counts,
        len(bad),
        _content(tasks, results),
        _sum(result.image_changes for result in results.values()),
        _sum(unused_keys(_good(source)) for source in sources.values()),
        _sum(result.answer_counts for result in results.values()),
    )
    if manifest is not None and not missing and _without_sizes(made) == _without_sizes(manifest):
        say(f"store {recipe.data.store}: up to date, {manifest.summary()}")
        return manifest
    made.write(store)
    written = f"{len(missing)} of {len(tasks)} shards written"
    if new_images:
        written += f", {new_images} because image files were replaced"
        if manifest is not None and made.content == manifest.content:
            written += " by equal ones"
    say(f"store {recipe.data.store}: {written}, {made.summary()}")
    return made


def _find_sources(recipe: AdaLlavaRecipe, store: Path) -> tuple[dict[str, Path], Path]:
    """Return LLaVA files by split and their image folder; generate them if the recipe asks so."""
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
    """Return everything that decides the content of the store, except processor and images."""
    data, scratch = recipe.data, recipe.model.scratch
    scratch_settings = scratch.model_dump(include={"image_size", "patch_size", "max_vocabulary"})
    return {
        "version": VERSION,
        "decoder": DECODER_VERSION,
        "files": {name: str(file) for name, file in files.items()},
        "sha256": {name: sha256(file) for name, file in files.items()},
        "image_folder": str(image_folder),
        "shapes": None
        if data.shapes is None
        else {**data.shapes.model_dump(), "seed": recipe.seed},
        "validation_share": None if "validation" in files else data.validation_share,
        "rows_per_shard": data.rows_per_shard,
        "max_length": data.max_length,
        "on_bad_row": data.on_bad_row,
        "scratch": scratch_settings if recipe.model.source == "scratch" else None,
    }


def _without_sizes(manifest: Manifest) -> Manifest:
    """Return the manifest without the sizes of a model from scratch.

    Such a model, loaded from its directory after training, has the same processor and so uses the
    same store.
    """
    return replace(manifest, settings={**manifest.settings, "scratch": None})


def _base_processor(recipe: AdaLlavaRecipe) -> ProcessorMixin:
    try:
        return check_base(recipe.model.source, recipe.model.revision)
    except ValueError as error:
        raise ValueError(f"model.source: {error}") from error


def _texts(sources: dict[str, _Source]) -> Iterator[str]:
    """Yield the texts of all good records, for the vocabulary."""
    for source in sources.values():
        for record in _good(source):
            yield from (turn["value"] for turn in record["conversations"])


def _good(source: _Source) -> Iterator[dict[str, Any]]:
    """Yield the records of a file that are not bad."""
    bad = {row.row for row in source.bad}
    yield from (record for row, record in enumerate(source.records) if row not in bad)


def _plan_shards(
    recipe: AdaLlavaRecipe,
    sources: dict[str, _Source],
    store: Path,
    image_folder: Path,
    processor_hash: str,
    settings: dict[str, Any],
) -> list[ShardTask]:
    """Cut each split into shards.

    Bad rows keep their place in the numbering, so that fixing one changes only its shard.
    """
    splits: dict[str, list[tuple[int, Any]]] = {"train": [], "validation": []}
    for name, source in sources.items():
        bad = {row.row for row in source.bad}
        for row, record in enumerate(source.records):
            split = name
            if "validation" not in sources and _is_held_out(
                row, record, recipe.data.validation_share
            ):
                split = "validation"
            splits[split].append((row, None if row in bad else record))
    size, check = recipe.data.rows_per_shard, recipe.data.check_images
    names = {name for rows in splits.values() for name in _image_names(rows)}
    stamps = _stamps(image_folder, names, check)
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
                rows=dumps(content).encode(),
                image_folder=str(image_folder),
                processor=str(store / "processor"),
                processor_hash=processor_hash,
                max_length=recipe.data.max_length,
                shapes=dumps(settings["shapes"]),
                write_bad=recipe.data.on_bad_row == "skip",
                check_images=check,
                images=digest_of([[name, stamps[name]] for name in _image_names(content)]),
            )
            tasks.append(task)
    return tasks


def _is_held_out(row: int, record: Any, share: float) -> bool:
    """Decide by a hash of the id, so that all conversations about one image are in one split.

    Without an id, the image's name stands for it, and without an image the row number.
    """
    image = record.get("image") if isinstance(record, dict) else None
    name = record_id(record) or (image if isinstance(image, str) else str(row))
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest, "big") < share * 2**32


def _count(tasks: list[ShardTask], results: dict[str, ShardResult], split: str) -> dict[str, int]:
    paths = [task.path for task in tasks if task.split == split]
    rows = sum(results[path].rows for path in paths)
    answers = sum(results[path].answers for path in paths)
    return {"rows": rows, "answers": answers, "shards": len(paths)}


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    return dict(sum(map(Counter, counts), Counter[str]()))


def _make_folders(tasks: list[ShardTask]) -> None:
    """Make the folders of parts, without the leftovers of a run that was killed."""
    for folder in {Path(task.path).parent for task in tasks}:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.partial"):
            leftover.unlink()


def _content(tasks: list[ShardTask], results: dict[str, ShardResult]) -> dict[str, str]:
    """Return the hashes of all records and of all images, in the order of the store."""
    content = {}
    for name in ("records", "images"):
        groups: dict[str, list[str]] = {}
        for task in tasks:
            groups.setdefault(task.split, []).extend(getattr(results[task.path], name))
        content[name] = digest_of(groups)
    return content


def _remove_stale_parts(store: Path, parts: set[str]) -> None:
    """Remove the parts of an earlier, longer version of the store."""
    for split in ("train", "validation"):
        for path in (store / split).glob("part-*.parquet"):
            if str(path) not in parts:
                path.unlink()


def _part(store: Path, split: str, shard: int) -> Path:
    return store / split / f"part-{shard:05d}.parquet"


# --- The state of image files ---


def _image_names(rows: Iterable[tuple[int, Any]]) -> Iterator[str]:
    """Yield the name of each record's image; rows are (row, record, or None for a bad one)."""
    for _, record in rows:
        if record is not None and record.get("image") is not None:
            yield record["image"]


def _stamps(folder: Path, names: Iterable[str], check: str) -> dict[str, str]:
    """Return what shows that an image file was replaced, by its name.

    Args:
        check: `stat` for size and modification time, `hash` for the SHA-256 of the bytes.
    """
    names = list(names)
    with ThreadPoolExecutor(STAMP_THREADS) as pool:
        stamps = pool.map(lambda name: _stamp(find_file(folder, name), check), names)
        return dict(zip(names, stamps, strict=True))


def _stamp(path: Path, check: str) -> str:
    try:
        if check == "hash":
            return sha256(path)
        stat = path.stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"
    except OSError:  # it becomes a bad row when it is read
        return "missing"


# --- Writing one shard, in a Ray worker ---


@dataclass(frozen=True)
class ShardTask:
    """Everything that a worker needs. Paths are absolute, on storage that every node sees."""

    split: str
    path: str
    file: str
    rows: bytes  # JSON [[row, record], ...]
    image_folder: str
    processor: str
    processor_hash: str
    max_length: int
    shapes: str  # JSON of the generator's settings: file names and questions do not show them
    write_bad: bool  # write a shard with bad rows without them; otherwise don't write it
    check_images: str = "stat"
    images: str = ""  # hash of the names and `_stamps` of the image files

    def key(self) -> str:
        """Return a hash of everything that decides the part's content, except the image files."""
        parts = [
            PART_VERSION,
            str(DECODER_VERSION),
            self.file,
            self.image_folder,
            self.processor_hash,
            str(self.max_length),
            self.shapes,
        ]
        return hashlib.sha256("\0".join(parts).encode() + bytes(self.rows)).hexdigest()


@dataclass(frozen=True)
class ShardResult:
    """Counts, bad rows and hashes of a shard; also stored in the part's metadata."""

    rows: int
    answers: int
    bad_rows: list[dict[str, Any]]  # fields of `BadRow`
    records: list[str]  # SHA-256 of the texts of each row group
    images: list[str]  # SHA-256 of the images of each row group
    image_changes: dict[str, int]  # of decoding -> images, by the names of `images.CHANGES`
    answer_counts: dict[str, int]  # see `Manifest`


def finished_part(task: ShardTask) -> ShardResult | None:
    """Return the result of a part that was made from the same task; None if there is none."""
    metadata = _metadata(task)
    if metadata is None or _images_replaced(task, metadata):
        return None
    return ShardResult(**json.loads(metadata[b"fmray.result"]))


def has_new_images(task: ShardTask) -> bool:
    """Return whether a part differs from its task in the image files only.

    Parts with bad rows have no hashes of their images, and are not known to differ.
    """
    metadata = _metadata(task)
    return (
        metadata is not None
        and task.check_images in json.loads(metadata[b"fmray.images"])
        and _images_replaced(task, metadata)
    )


def _metadata(task: ShardTask) -> dict[bytes, bytes] | None:
    """Return the metadata of a part that was made from the same records and settings, or None."""
    path = Path(task.path)
    if not path.exists():
        return None
    try:
        metadata = pq.read_schema(path).metadata or {}
    except pa.ArrowInvalid:  # not Parquet: an unrelated file, or a damaged disk
        return None
    return metadata if metadata.get(b"fmray.key") == task.key().encode() else None


def _images_replaced(task: ShardTask, metadata: dict[bytes, bytes]) -> bool:
    return json.loads(metadata[b"fmray.images"]).get(task.check_images) != task.images


def write_shard(task: ShardTask) -> ShardResult:
    """Check the rows of a task and write its part; the same task always gives the same bytes.

    Writes nothing if there are bad rows and `write_bad` is off.
    """
    # check the rows
    processor = _processor(task.processor, task.processor_hash)
    rows = json.loads(task.rows)
    names = list(_image_names(rows))
    stamps = _stamps(Path(task.image_folder), set(names), "stat")  # before the images are read
    good, bad, changes, counts = [], [], Counter[str](), Counter[str]()
    for row, record in rows:
        checked = _check(row, record, task, processor, changes, counts)
        if isinstance(checked, str):
            bad.append(asdict(BadRow(task.file, row, record_id(record), checked)))
        else:
            good.append(checked)

    # hash what training will read
    texts = [[row["id"], row["conversations"], row["tags"]] for row in good]
    hashes = [row["image"] and hashlib.sha256(row["image"]).hexdigest() for row in good]
    result = ShardResult(
        rows=len(good),
        answers=sum(len(row["turn_tokens"]) for row in good),
        bad_rows=bad,
        records=[digest_of(group) for group in _row_groups(texts)],
        images=[digest_of(group) for group in _row_groups(hashes)],
        image_changes=dict(changes),  # no Counter: `asdict` would break it
        answer_counts=dict(counts),
    )
    if bad and not task.write_bad:
        return result
    state = {"stat": digest_of([[name, stamps[name]] for name in names])}
    if not bad:  # otherwise the part is written again in any case
        state["hash"] = digest_of(list(zip(names, filter(None, hashes), strict=True)))

    # write the part
    metadata = {
        "fmray.key": task.key(),
        "fmray.result": dumps(asdict(result)),
        "fmray.images": dumps(state),
    }
    schema = SCHEMA.with_metadata(metadata)
    # Images are compressed already; everything else shrinks well.
    compression = {column: "NONE" if column == "image" else "ZSTD" for column in _leaf_columns()}
    with (
        atomic_path(Path(task.path)) as temporary,
        pq.ParquetWriter(
            temporary, schema, compression=compression, use_dictionary=["tags.list.element"]
        ) as writer,
    ):
        for group in _row_groups(good):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
    return result


def _row_groups(rows: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(rows), ROW_GROUP):
        yield rows[start : start + ROW_GROUP]


def _check(
    row: int,
    record: dict[str, Any],
    task: ShardTask,
    processor: ProcessorMixin,
    changes: Counter[str],
    counts: Counter[str],
) -> dict[str, Any] | str:
    """Return the row to store, or why it is bad; `check_record` has accepted the record.

    Counts what decoding changed in its image, and the `answer_counts` of a good row.
    """
    unknown = unknown_token(processor)
    control = find_control_token(processor, record["conversations"])
    if control is not None:
        return control
    image, size = None, None
    if record.get("image") is not None:
        path = find_file(Path(task.image_folder), record["image"])
        try:
            image = path.read_bytes()
        except OSError as error:  # missing, not readable, a folder, a name that is too long
            return f"missing image: {path} ({error.strerror})"
        try:
            decoded = decode_image(image)
        except ImageError as error:
            return f"broken image: {path} ({error})"
        size = decoded.image.size
        changes.update(decoded.changes)
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
    counts["too_long"] += sum(length > task.max_length for length in lengths)
    for start, end in zip(encoded.starts, encoded.ends, strict=True):
        counts["words"] += end - start - 1  # without the end-of-answer token
        counts["unknown"] += int((encoded.ids[start:end] == unknown).sum())
    return {
        "id": record_id(record) or str(row),
        "image": image,
        "conversations": [
            {"from": turn["from"], "value": turn["value"]} for turn in record["conversations"]
        ],
        "tags": record.get("tags"),
        "turn_tokens": lengths,
        "row": row,
    }


def _leaf_columns() -> list[str]:
    """Return the names of `SCHEMA`'s columns in Parquet."""
    turns = ["conversations.list.element.from", "conversations.list.element.value"]
    return ["id", "image", *turns, "tags.list.element", "turn_tokens.list.element", "row"]


@functools.lru_cache(maxsize=1)  # a worker process writes many shards
def _processor(path: str, processor_hash: str) -> ProcessorMixin:
    return load_processor(path)

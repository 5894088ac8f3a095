"""Convert image collections to the store that `fmray.data.image_store` describes.

The `images` section of a few-shot recipe names the collections. Three steps, each a set of
independent tasks (`fmray.data.image_shuffle`): sort pieces of the source into runs, find
duplicates, merge runs into parts. Runs, parts and collections carry a hash of everything that
decides their content: a second run writes no images, a run after a crash resumes with what is
missing, and a changed recipe remakes only the collections that it changes.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from fmray.config import ClusterConfig
from fmray.config.fewshot import FewshotRecipe
from fmray.data.class_splits import splits_table
from fmray.data.image_shuffle import (
    PORTION,
    VERSION,
    DuplicatesTask,
    PartResult,
    PartTask,
    Slice,
    SortResult,
    SortTask,
    find_duplicates,
    finished_part,
    sort_images,
    sorted_runs,
    write_part,
)
from fmray.data.image_sources import Collection, Piece, by_content, find_collection
from fmray.data.image_store import INDEX_SCHEMA, SPECIFICATION, SPLITS, ImageManifest
from fmray.data.images import DECODER_VERSION, describe_changes
from fmray.data.ray_tasks import run_tasks
from fmray.data.records import BadRow, stop_at_bad_rows
from fmray.runtime.console import say, track
from fmray.runtime.files import atomic_path, digest_of, write_atomic, write_json

DUPLICATES_ROWS = 2_000_000  # rows whose digests one task compares, about
DUPLICATES = ("collection", "class_name", "source", "kept_class_name", "kept_source")
T = TypeVar("T", SortTask, DuplicatesTask, PartTask)
R = TypeVar("R")
_Sorted = list[tuple[SortTask, SortResult]]


@dataclass(frozen=True)
class _Content:
    """What a complete collection contains; stored as `images/<collection>/collection.json`."""

    key: str  # hash of everything that decides the content
    content: str  # hash of the content
    index: list[dict[str, Any]]  # rows of `INDEX_SCHEMA`
    duplicates: list[list[str]]  # rows of `DUPLICATES`
    bad: list[dict[str, Any]]  # fields of `BadRow`
    changes: dict[str, int] = field(default_factory=dict)  # of decoding -> images


def prepare_images(recipe: FewshotRecipe) -> ImageManifest:
    """Make the store of a recipe unless it is up to date; starts Ray if none is running.

    Prints the class splits before they are used, and a table of the store's content at the end.

    Raises:
        ValueError: a source cannot be read, a class has no split or no images, or there are bad
            rows and `images.on_bad_row` is not `skip` (all are listed in
            `<store>/bad_rows.jsonl`).
    """
    # find the classes and their splits
    images, store = recipe.images, recipe.images.store.resolve()
    if not images.collections:
        raise ValueError("images.collections: nothing to prepare; name a collection and its path")
    collections = [
        find_collection(name, config, recipe.seed, PORTION)
        for name, config in sorted(images.collections.items())
    ]
    if images.check_images == "hash":
        collections = [replace(c, pieces=by_content(c.pieces)) for c in collections]
    say(splits_table({c.name: (c.split_source, c.splits) for c in collections}))
    for collection in collections:
        if collection.left_out:
            say(f"{collection.name}: left out {collection.left_out}")
    bad = [row for collection in collections for row in collection.bad]
    stop_at_bad_rows(store, bad, "images.on_bad_row", images.on_bad_row)
    splits = [[c.name, *item] for c in collections for item in c.splits.items()]
    store.mkdir(parents=True, exist_ok=True)
    _write_table(store / "class_splits.tsv", ("collection", "class_name", "split"), splits)

    # make the collections that are missing or have changed
    keys = {collection.name: _key(collection, recipe) for collection in collections}
    contents = {name: _read_content(store, name, key) for name, key in keys.items()}
    missing = [collection for collection in collections if contents[collection.name] is None]
    if missing:
        ImageManifest.path(store).unlink(missing_ok=True)
        for collection in missing:  # first, so that a half-made collection is never complete
            _content_file(store, collection.name).unlink(missing_ok=True)
        contents |= _make(missing, keys, recipe, store)

    # complete the store
    manifest = _complete(store, recipe, contents)
    say(_table(contents))
    for name, content in contents.items():
        if content.changes:
            say(f"{name}: {describe_changes(content.changes)}")
    done = f"{len(missing)} of {len(collections)} collections made"
    say(f"store {images.store}: {done}, {manifest.rows} images")
    return manifest


def _key(collection: Collection, recipe: FewshotRecipe) -> str:
    """Return a hash of everything that decides the content of a collection.

    Source files count by size and modification time, or by their content (`images.check_images`).
    """
    specification = collection.specification
    values = {
        "version": VERSION,
        "decoder": DECODER_VERSION,
        "pieces": [asdict(piece) for piece in collection.pieces],
        "splits": collection.splits,
        "specification": specification and specification.read_text(),
        "bad": [asdict(row) for row in collection.bad],
        "seed": recipe.seed,
        "rows_per_group": recipe.images.rows_per_group,
        "on_bad_row": recipe.images.on_bad_row,
    }
    return digest_of(values)


def _read_content(store: Path, name: str, key: str) -> _Content | None:
    """Return the content of a complete collection that was made with the same key, or None."""
    path = _content_file(store, name)
    if not path.is_file():
        return None
    content = _Content(**json.loads(path.read_text()))
    if content.key != key or not all((store / row["file"]).exists() for row in content.index):
        return None
    return content


def _make(
    missing: list[Collection], keys: dict[str, str], recipe: FewshotRecipe, store: Path
) -> Iterator[tuple[str, _Content]]:
    """Make collections, step by step for all of them; yield each when it is complete."""
    images, cluster = recipe.images, recipe.cluster
    sort_tasks = {c.name: _sort_tasks(c, recipe, store) for c in missing}
    runs = _run_step("sort", sort_images, sorted_runs, sort_tasks, cluster)
    bad = {c.name: c.bad + [row for _, r in runs[c.name] for row in r.bad] for c in missing}
    all_bad = [row for rows in bad.values() for row in rows]
    stop_at_bad_rows(store, all_bad, "images.on_bad_row", images.on_bad_row)

    searches = {name: _duplicates_tasks(runs[name], _work(store, name)) for name in runs}
    _run_step("duplicates", find_duplicates, lambda task: None, searches, cluster)

    part_tasks = {}
    for collection in missing:
        name = collection.name
        template = PartTask(
            path=str(store / "images" / name),
            collection_key=keys[name],
            slices=(),
            class_names=tuple(collection.splits),
            runs=(),
            duplicates=tuple(task.path for task in searches[name]),
            rows_per_group=images.rows_per_group,
        )
        part_tasks[name] = list(_part_tasks(template, collection, runs[name]))
    parts = _run_step("parts", write_part, finished_part, part_tasks, cluster)

    for collection in missing:
        name = collection.name
        content = _collect(collection, keys[name], parts[name], searches[name], bad[name], store)
        changes = sum((Counter(result.changes) for _, result in runs[name]), Counter[str]())
        content = replace(content, changes=dict(changes))
        specification = store / "images" / name / SPECIFICATION
        specification.unlink(missing_ok=True)
        if collection.specification is not None:
            shutil.copyfile(collection.specification, specification)
        write_json(_content_file(store, name), asdict(content))
        shutil.rmtree(_work(store, name))
        yield name, content


def _run_step(
    step: str,
    function: Callable[[T], R],
    earlier_result: Callable[[T], R | None],
    tasks: dict[str, list[T]],
    cluster: ClusterConfig,
) -> dict[str, list[tuple[T, R]]]:
    """Run the tasks of a step that have no earlier result.

    Returns:
        For each collection, its tasks in order, each with its result.
    """
    all_tasks = [task for group in tasks.values() for task in group]
    earlier = ((task.path, earlier_result(task)) for task in all_tasks)
    results = {path: result for path, result in earlier if result is not None}
    missing = [task for task in all_tasks if task.path not in results]
    for folder in {Path(task.path).parent for task in missing}:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.partial"):  # of a run that was killed
            leftover.unlink()
    running = run_tasks(function, missing, cluster)
    progress = track(running, step, "task", total=len(all_tasks), done=len(results))
    results |= {task.path: result for task, result in progress}
    return {name: [(task, results[task.path]) for task in group] for name, group in tasks.items()}


def _sort_tasks(collection: Collection, recipe: FewshotRecipe, store: Path) -> list[SortTask]:
    """Cut a collection into tasks of about a portion.

    A TFRecord file is never divided; its task writes several runs if it is large.
    """
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in collection.pieces:
        if size and size + piece.bytes > PORTION:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.bytes
    return [
        SortTask(
            path=str(_work(store, collection.name) / f"sorted-{number:05d}"),
            number=number,
            pieces=tuple(pieces),
            class_names=tuple(collection.splits),
            seed=recipe.seed,
            portion=PORTION,
            write_bad=recipe.images.on_bad_row == "skip",
        )
        for number, pieces in enumerate(groups)
    ]


def _duplicates_tasks(runs: _Sorted, work: Path) -> list[DuplicatesTask]:
    """Cut the search for duplicates into tasks by ranges of digests."""
    paths = tuple(run.path for _, result in runs for run in result.runs)
    rows = sum(sum(run.rows.values()) for _, result in runs for run in result.runs)
    of = max(1, -(-rows // DUPLICATES_ROWS))
    return [
        DuplicatesTask(str(work / f"duplicates-{number:05d}.parquet"), paths, number, of)
        for number in range(of)
    ]


def _part_tasks(template: PartTask, collection: Collection, runs: _Sorted) -> Iterator[PartTask]:
    """Cut each split into parts of about a portion: several classes, or a share of a large one.

    Args:
        template: the fields that all parts have in common; its path is the collection's folder.
    """
    size: Counter[int] = Counter()  # label -> bytes
    runs_with: dict[int, list[str]] = {}  # label -> runs with images of the class
    for _, result in runs:
        for run in result.runs:
            size.update(run.bytes)
            for label in run.bytes:
                runs_with.setdefault(label, []).append(run.path)
    for split in SPLITS:
        parts: list[list[Slice]] = [[]]
        part_size = 0.0
        for label, name in enumerate(collection.splits):
            if collection.splits[name] != split:
                continue
            of = max(1, -(-size[label] // PORTION))
            for number in range(of):
                if part_size and part_size + size[label] / of > PORTION:
                    parts.append([])
                    part_size = 0.0
                parts[-1].append(Slice(label, number, of))
                part_size += size[label] / of
        for number, slices in enumerate(parts):
            if slices:
                paths = {path for piece in slices for path in runs_with.get(piece.label, [])}
                yield replace(
                    template,
                    path=f"{template.path}/{split}/part-{number:05d}.parquet",
                    slices=tuple(slices),
                    runs=tuple(sorted(paths)),
                )


def _collect(
    collection: Collection,
    key: str,
    parts: list[tuple[PartTask, PartResult]],
    searches: list[DuplicatesTask],
    bad: list[BadRow],
    store: Path,
) -> _Content:
    """Combine the results of a collection's tasks, and remove parts of an earlier version.

    Raises:
        ValueError: a class is left without images.
    """
    names = list(collection.splits)
    index, digests = [], []
    for task, result in parts:
        file = Path(task.path).relative_to(store)
        digests.append([str(file), result.digest])
        for label, rows, group in result.pieces:
            piece = (collection.name, file.parent.name, label, names[label], rows, str(file), group)
            index.append(dict(zip(INDEX_SCHEMA.names, piece, strict=True)))

    duplicates = []
    for row in sorted(
        (row for task in searches for row in pq.read_table(task.path).to_pylist()),
        key=lambda row: row["place"],
    ):
        images = (names[row["label"]], row["source"], names[row["kept_label"]], row["kept_source"])
        duplicates.append([collection.name, *images])

    empty = set(range(len(names))) - {row["label"] for row in index}
    if empty:
        name = names[min(empty)]
        copies = sum(row[1] == name for row in duplicates)
        raise ValueError(
            f"images.collections.{collection.name}: class {name!r} has no images left: {copies} are"
            " duplicates of other images, the rest are bad; fix or remove the class"
        )
    files = {row["file"] for row in index}
    for path in (store / "images" / collection.name).glob("*/part-*"):
        if str(path.relative_to(store)) not in files:
            path.unlink()  # of an earlier version
    digest = digest_of([names, digests])
    return _Content(key, digest, index, duplicates, [asdict(row) for row in bad])


def _complete(store: Path, recipe: FewshotRecipe, contents: dict[str, _Content]) -> ImageManifest:
    """Write the files that describe the complete store, the manifest last."""
    bad = [BadRow(**row) for content in contents.values() for row in content.bad]
    stop_at_bad_rows(store, bad, "images.on_bad_row", recipe.images.on_bad_row)
    index = [row for content in contents.values() for row in content.index]
    with atomic_path(store / "index.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(index, schema=INDEX_SCHEMA), temporary)
    duplicates = [row for content in contents.values() for row in content.duplicates]
    _write_table(store / "duplicates.tsv", DUPLICATES, duplicates)
    digests = [[name, content.content] for name, content in contents.items()]
    manifest = ImageManifest(
        version=int(VERSION),
        collections={name: content.key for name, content in contents.items()},
        fingerprint=digest_of(digests)[:16],
        rows=sum(row["count"] for row in index),
        duplicates=len(duplicates),
        bad_rows=len(bad),
    )
    manifest.write(store)
    for folder in (store / "cache").glob("*"):  # memory maps of earlier contents
        if folder.name != manifest.fingerprint:
            shutil.rmtree(folder)
    return manifest


def _write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows([header, *rows])
    write_atomic(path, text.getvalue())


def _table(contents: dict[str, _Content]) -> str:
    """Return the number of images per collection and split as text."""
    width = max(map(len, ["collection", *contents]))
    lines = [f"{'collection':{width}}     train       val      test  duplicates  bad"]
    for name, content in contents.items():
        rows = Counter[str]()
        for piece in content.index:
            rows[piece["split"]] += piece["count"]
        counts = "".join(f"{rows[split]:10d}" for split in SPLITS)
        numbers = f"{counts}  {len(content.duplicates):10d}  {len(content.bad):3d}"
        lines.append(f"{name:{width}}{numbers}")
    return "\n".join(lines)


def _content_file(store: Path, name: str) -> Path:
    return store / "images" / name / "collection.json"


def _work(store: Path, name: str) -> Path:
    """Return the folder of a collection's runs while it is being made; every node sees it."""
    return store / "work" / name

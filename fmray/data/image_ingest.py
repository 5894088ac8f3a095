"""Image collections -> the image store, through Ray Data.

In: the `images` section of a few-shot recipe. Out: the store that `image_store` describes.

Three steps, each a set of independent tasks (`image_shuffle`): sort pieces of source into runs,
find images that are there twice, merge runs into parts. A run and a part carry a key of all that
made them, and a collection its own: a second run writes nothing, a killed one goes on with what is
missing, and of a changed recipe only the changed collections are made again. Only the manifest,
written last, makes a folder a store.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from fmray.config import ClusterConfig
from fmray.config.fewshot import FewshotRecipe
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
from fmray.data.image_sources import Collection, Piece, find_collection, splits_table
from fmray.data.image_store import (
    INDEX_SCHEMA,
    SPECIFICATION,
    SPLITS,
    ImageManifest,
    write_json,
)
from fmray.data.ray_tasks import run_tasks
from fmray.data.records import BadRow, stop_at_bad_rows

ROWS_AT_ONCE = 2_000_000  # whose digests are compared by one task
DUPLICATES = ("collection", "class_name", "source", "kept_class_name", "kept_source")
T = TypeVar("T", SortTask, DuplicatesTask, PartTask)
R = TypeVar("R")
_Sorted = list[tuple[SortTask, SortResult]]


@dataclass(frozen=True)
class _Finished:
    """A finished collection, as `images/<collection>/collection.json` keeps it."""

    key: str
    content: str
    index: list[dict[str, Any]]
    duplicates: list[list[str]]
    bad: list[dict[str, Any]]


def prepare_images(recipe: FewshotRecipe) -> ImageManifest:
    """Make the store of a recipe, or find it made; starts Ray only where none runs in this process.

    Prints the class splits before they are used, and a table of what the store holds at the end.

    Raises:
        ValueError: a source that cannot be read, classes without a split or without images, bad
            rows unless `images.on_bad_row` is `skip` (all are listed in `<store>/bad_rows.jsonl`).
    """
    images, store = recipe.images, recipe.images.store.resolve()
    if not images.collections:
        raise ValueError("images.collections: nothing to prepare; name a collection and its path")
    collections = [
        find_collection(name, config, recipe.seed, PORTION)
        for name, config in sorted(images.collections.items())
    ]
    print(splits_table({found.name: (found.split_source, found.splits) for found in collections}))
    bad = [row for found in collections for row in found.bad]
    stop_at_bad_rows(store, bad, "images.on_bad_row", images.on_bad_row)
    splits = [[c.name, *item] for c in collections for item in c.splits.items()]
    store.mkdir(parents=True, exist_ok=True)
    _write_table(store / "class_splits.tsv", ("collection", "class_name", "split"), splits)
    keys = {found.name: _key(found, recipe) for found in collections}
    finished = {name: _finished(store, name, key) for name, key in keys.items()}
    missing = [found for found in collections if finished[found.name] is None]
    if missing:
        ImageManifest.path(store).unlink(missing_ok=True)
        for found in missing:  # or a half-made collection passes for the one it was
            _listing(store, found.name).unlink(missing_ok=True)
        finished |= _make(missing, keys, recipe, store)
    manifest = _finish(store, recipe, finished)
    print(_table(finished))
    done = f"{len(missing)} of {len(collections)} collections made"
    print(f"store {images.store}: {done}, {manifest.rows} images")
    return manifest


def _key(found: Collection, recipe: FewshotRecipe) -> str:
    """Hash of all that decides what a collection holds; sources by size and modification time."""
    values = {
        "version": VERSION,
        "pieces": [asdict(piece) for piece in found.pieces],
        "splits": found.splits,
        "specification": found.specification and found.specification.read_text(),
        "bad": [asdict(row) for row in found.bad],
        "seed": recipe.seed,
        "rows_per_group": recipe.images.rows_per_group,
        "on_bad_row": recipe.images.on_bad_row,
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _finished(store: Path, name: str, key: str) -> _Finished | None:
    path = _listing(store, name)
    if not path.is_file():
        return None
    found = _Finished(**json.loads(path.read_text()))
    there = all((store / piece["file"]).exists() for piece in found.index)
    return found if found.key == key and there else None


def _make(
    missing: list[Collection], keys: dict[str, str], recipe: FewshotRecipe, store: Path
) -> Iterator[tuple[str, _Finished]]:
    """Make collections, all of a step together; yields each when it is finished."""
    images, cluster = recipe.images, recipe.cluster
    sorts = {found.name: _sort_tasks(found, recipe, store) for found in missing}
    runs = _run("sort", sort_images, sorted_runs, sorts, cluster)
    bad = [row for found in missing for row in _bad_rows(found, runs)]
    stop_at_bad_rows(store, bad, "images.on_bad_row", images.on_bad_row)

    searches = {name: _duplicates_tasks(runs[name], _work(store, name)) for name in runs}
    _run("duplicates", find_duplicates, lambda task: None, searches, cluster)

    merges = {}
    for found in missing:
        task = PartTask(
            path=str(store / "images" / found.name),
            collection_key=keys[found.name],
            slices=(),
            class_names=tuple(found.splits),
            runs=(),
            duplicates=tuple(task.path for task in searches[found.name]),
            rows_per_group=images.rows_per_group,
        )
        merges[found.name] = list(_part_tasks(task, found, runs[found.name]))
    parts = _run("parts", write_part, finished_part, merges, cluster)

    for found in missing:
        made = _collect(found, keys[found.name], parts[found.name], searches[found.name], store)
        made = replace(made, bad=[asdict(row) for row in _bad_rows(found, runs)])
        specification = store / "images" / found.name / SPECIFICATION
        specification.unlink(missing_ok=True)
        if found.specification is not None:
            shutil.copyfile(found.specification, specification)
        write_json(_listing(store, found.name), asdict(made))
        shutil.rmtree(_work(store, found.name))
        yield found.name, made


def _run(
    step: str,
    function: Callable[[T], R],
    find: Callable[[T], R | None],
    tasks: dict[str, list[T]],
    cluster: ClusterConfig,
) -> dict[str, list[tuple[T, R]]]:
    """Do the tasks of a step that `find` does not find done; collection -> its tasks, each with its
    result."""
    every = [task for plan in tasks.values() for task in plan]
    results = {task.path: result for task in every if (result := find(task)) is not None}
    missing = [task for task in every if task.path not in results]
    for folder in {Path(task.path).parent for task in missing}:
        folder.mkdir(parents=True, exist_ok=True)
    done = run_tasks(function, missing, cluster)
    progress = tqdm(done, total=len(every), initial=len(results), desc=step, unit="task")
    results |= {task.path: result for task, result in progress}
    return {name: [(task, results[task.path]) for task in plan] for name, plan in tasks.items()}


def _sort_tasks(found: Collection, recipe: FewshotRecipe, store: Path) -> list[SortTask]:
    """Tasks of a portion each, but a TFRecord file is never divided: it is written as many runs."""
    plan: list[list[Piece]] = [[]]
    held = 0
    for piece in found.pieces:
        if held and held + piece.bytes > PORTION:
            plan.append([])
            held = 0
        plan[-1].append(piece)
        held += piece.bytes
    return [
        SortTask(
            path=str(_work(store, found.name) / f"sorted-{number:05d}"),
            number=number,
            pieces=tuple(pieces),
            class_names=tuple(found.splits),
            seed=recipe.seed,
            portion=PORTION,
            write_bad=recipe.images.on_bad_row == "skip",
        )
        for number, pieces in enumerate(plan)
    ]


def _duplicates_tasks(runs: _Sorted, work: Path) -> list[DuplicatesTask]:
    paths = tuple(run.path for _, result in runs for run in result.runs)
    rows = sum(sum(run.rows.values()) for _, result in runs for run in result.runs)
    of = max(1, -(-rows // ROWS_AT_ONCE))
    return [
        DuplicatesTask(str(work / f"duplicates-{number:05d}.parquet"), paths, number, of)
        for number in range(of)
    ]


def _part_tasks(task: PartTask, found: Collection, runs: _Sorted) -> Iterator[PartTask]:
    """Cut each split into parts of a portion: many classes, or a share of one.

    task: what all parts have in common; its path is the collection's folder.
    """
    size: Counter[int] = Counter()
    holders: dict[int, list[str]] = {}
    for _, result in runs:
        for run in result.runs:
            size.update(run.bytes)
            for label in run.bytes:
                holders.setdefault(label, []).append(run.path)
    for split in SPLITS:
        slices: list[list[Slice]] = [[]]
        held = 0
        for label, name in enumerate(found.splits):
            if found.splits[name] != split:
                continue
            of = max(1, -(-size[label] // PORTION))
            for number in range(of):
                if held and held + size[label] / of > PORTION:
                    slices.append([])
                    held = 0
                slices[-1].append(Slice(label, number, of))
                held += size[label] / of
        for number, part in enumerate(slices):
            if part:
                paths = {path for piece in part for path in holders.get(piece.label, [])}
                yield replace(
                    task,
                    path=f"{task.path}/{split}/part-{number:05d}.parquet",
                    slices=tuple(part),
                    runs=tuple(sorted(paths)),
                )


def _collect(
    found: Collection,
    key: str,
    parts: list[tuple[PartTask, PartResult]],
    searches: list[DuplicatesTask],
    store: Path,
) -> _Finished:
    """What a collection holds, from the results of its tasks.

    Raises:
        ValueError: a class is left without images.
    """
    names = list(found.splits)
    index, content = [], []
    for task, result in parts:
        file = Path(task.path).relative_to(store)
        content.append([str(file), result.digest])
        for label, rows, group in result.pieces:
            piece = (found.name, file.parent.name, label, names[label], rows, str(file), group)
            index.append(dict(zip(INDEX_SCHEMA.names, piece, strict=True)))
    duplicates = []
    for row in sorted(
        (row for task in searches for row in pq.read_table(task.path).to_pylist()),
        key=lambda row: row["place"],
    ):
        images = (names[row["label"]], row["source"], names[row["kept_label"]], row["kept_source"])
        duplicates.append([found.name, *images])
    empty = set(range(len(names))) - {row["label"] for row in index}
    if empty:
        name = names[min(empty)]
        twice = sum(row[1] == name for row in duplicates)
        raise ValueError(
            f"images.collections.{found.name}: class {name!r} has no images left: {twice} are"
            " those of other classes, the rest are bad; mend it or take it out"
        )
    for path in (store / "images" / found.name).glob("*/part-*"):
        if str(path.relative_to(store)) not in {row["file"] for row in index}:
            path.unlink()  # of an earlier version
    digest = hashlib.sha256(json.dumps([names, content]).encode()).hexdigest()
    return _Finished(key, digest, index, duplicates, [])


def _bad_rows(found: Collection, runs: dict[str, _Sorted]) -> list[BadRow]:
    return found.bad + [row for _, result in runs[found.name] for row in result.bad]


def _finish(store: Path, recipe: FewshotRecipe, finished: dict[str, _Finished]) -> ImageManifest:
    """Write what is about the whole store, the manifest last."""
    bad = [BadRow(**row) for made in finished.values() for row in made.bad]
    stop_at_bad_rows(store, bad, "images.on_bad_row", recipe.images.on_bad_row)
    index = [row for made in finished.values() for row in made.index]
    temporary = store / "index.parquet.tmp"
    pq.write_table(pa.Table.from_pylist(index, schema=INDEX_SCHEMA), temporary)
    temporary.replace(store / "index.parquet")
    duplicates = [row for made in finished.values() for row in made.duplicates]
    _write_table(store / "duplicates.tsv", DUPLICATES, duplicates)
    content = [[name, made.content] for name, made in finished.items()]
    manifest = ImageManifest(
        version=int(VERSION),
        collections={name: made.key for name, made in finished.items()},
        fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16],
        rows=sum(row["count"] for row in index),
        duplicates=len(duplicates),
        bad_rows=len(bad),
    )
    manifest.write(store)
    for folder in (store / "cache").glob("*"):  # maps of an earlier content
        if folder.name != manifest.fingerprint:
            shutil.rmtree(folder)
    return manifest


def _write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *rows])
    temporary.replace(path)


def _table(finished: dict[str, _Finished]) -> str:
    """Images a split of each collection, as text."""
    width = max(map(len, ["collection", *finished]))
    lines = [f"{'collection':{width}}     train       val      test  duplicates  bad"]
    for name, made in finished.items():
        rows = Counter[str]()
        for piece in made.index:
            rows[piece["split"]] += piece["count"]
        counts = "".join(f"{rows[split]:10d}" for split in SPLITS)
        lines.append(f"{name:{width}}{counts}  {len(made.duplicates):10d}  {len(made.bad):3d}")
    return "\n".join(lines)


def _listing(store: Path, name: str) -> Path:
    return store / "images" / name / "collection.json"


def _work(store: Path, name: str) -> Path:
    """Folder of a collection's runs while it is made; every node sees it."""
    return store / "work" / name

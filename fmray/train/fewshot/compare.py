"""The comparison: target x (method, selection), every cell with intervals, resumable cell by cell.

In: a recipe with `compare.targets`. Out: in `<storage>/<run id>/` the resolved `recipe.yaml`,
`selections/`, a file a cell in `cells/`, and when all are there `results.json`, `tasks.parquet`
(every accuracy of every task) and `comparison.png`; in MLflow a run with a child a cell. The same
run id goes on where it stopped: what is there is not computed again.

An image store that is not there yet is prepared, and a small encoder without a checkpoint is
pretrained by the recipe's `pretrain` section first, so that one command does all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from fmray.config import LoadedRecipe
from fmray.config.fewshot import FewshotRecipe, Selection, TargetConfig
from fmray.data.image_ingest import prepare_images
from fmray.data.image_store import ImageManifest, ImageStore
from fmray.fewshot import Encoder, confidence_interval
from fmray.plots import fewshot as fewshot_plots
from fmray.runtime import tracking
from fmray.runtime.console import changed_settings, say
from fmray.runtime.nodes import session
from fmray.train.fewshot.comparison import (
    Cell,
    CellResult,
    Comparison,
    digest,
    make_cell,
    read_cell,
    run_cells,
    weights_digest,
    write_cell,
)
from fmray.train.fewshot.encoder import TaskFeatures, decode_all, load_encoder
from fmray.train.fewshot.evaluate import percent, shots_name
from fmray.train.fewshot.pretrain import pretrain
from fmray.train.fewshot.select import candidate_tasks, choose, embed_tasks


def compare(loaded: LoadedRecipe[FewshotRecipe], run_id: str) -> Comparison:
    """Compute the cells that are missing, and put the table together.

    `cluster.workers` trainings at a time as Ray tasks; 0: one after another in this process.

    Raises ValueError for a recipe that has no targets, or whose data do not allow an episode.
    """
    recipe = loaded.recipe.with_absolute_paths()
    if not recipe.compare.targets:
        raise ValueError("compare.targets: name at least one target, such as {collection: NAME}")
    run_dir = recipe.cluster.storage / run_id
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(loaded.dump(), encoding="utf-8")
    say(changed_settings(loaded, run_dir / "recipe.yaml"))
    if not ImageManifest.path(recipe.images.store).is_file():
        prepare_images(recipe)
    with tracking.open_job_run(recipe, run_id, "compare_fewshot") as run:
        recipe = _with_encoder(recipe, run_dir, run_id)
        with nullcontext() if recipe.cluster.workers == 0 else session(recipe):
            store = ImageStore.open(recipe.images.store, recipe.images.cache)
            cells = _plan(recipe, store, run_dir)
            found = _run(recipe, store, cells, run_dir, run_id, run.mlflow_run_id)
        result = _comparison(recipe, cells, found)
        _write(result, cells, found, run_dir)
        for name in ("results.json", "tasks.parquet", "comparison.png"):
            run.artifact(run_dir / name)
        for line, columns in result.accuracies.items():
            for shots in dict.fromkeys(shots for _, shots in columns):
                means = [values.mean() for (_, n), values in columns.items() if n == shots]
                run.log(0, **{f"mean/{line}/{shots_name(shots)}": float(np.mean(means))})
    say(result.table())
    say(f"results: {run_dir / 'results.json'}")
    return result


def _with_encoder(recipe: FewshotRecipe, run_dir: Path, run_id: str) -> FewshotRecipe:
    """The recipe with weights to start from: a small encoder has none on a hub."""
    config = recipe.encoder
    if not config.name.startswith("small/") or config.checkpoint is not None:
        return recipe
    checkpoint = pretrain(recipe, run_dir / "pretraining", f"{run_id}-pretraining").model_dir
    return recipe.model_copy(
        update={"encoder": config.model_copy(update={"checkpoint": checkpoint})}
    )


def _plan(recipe: FewshotRecipe, store: ImageStore, run_dir: Path) -> list[Cell]:
    """All cells of the table; the tasks are selected here, once for each target and selection."""
    encoder = load_encoder(recipe.encoder)
    weights = weights_digest(encoder)
    known: dict[str, TaskFeatures] = {}  # of candidates: embedded once for all targets
    cells: list[Cell] = []
    for target in recipe.compare.targets:
        candidates = {task.name: task for task in candidate_tasks(store, recipe, target)}
        for method in recipe.compare.methods:
            if method == "direct":
                plans: list[tuple[Selection | None, int | None, list[str]]] = [(None, None, [])]
            elif method != "multitask":
                plans = [(None, None, list(candidates))]
            else:
                plans = list(_selections(recipe, store, encoder, weights, target, known, run_dir))
            for selection, seed, names in plans:
                tasks = {name: candidates[name] for name in names}
                cells.append(
                    make_cell(recipe, store, weights, target, method, selection, seed, tasks)
                )
    return cells


def _selections(
    recipe: FewshotRecipe,
    store: ImageStore,
    encoder: Encoder,
    weights: str,
    target: TargetConfig,
    known: dict[str, TaskFeatures],
    run_dir: Path,
) -> Iterator[tuple[Selection, int | None, list[str]]]:
    """(selection, its seed where it has one, names of the tasks) for one target; kept on disk."""
    measured = None
    for selection in recipe.compare.selections:
        for seed in recipe.compare.random_seeds if selection == "random" else (None,):
            settings = {
                "encoder": weights,
                "store": store.fingerprint,
                "target": target.model_dump(),
                "select": recipe.select.model_copy(update={"method": selection}).model_dump(),
                "episodes": recipe.episodes.model_dump(exclude={"tasks"}),
                "seeds": [recipe.seed, seed],
            }
            path = run_dir / "selections" / f"{digest(settings)}.json"
            if not path.is_file():
                measured = measured or embed_tasks(recipe, store, encoder, target, known)
                chosen = choose(recipe, store, encoder, target, selection, seed or 0, measured)
                _write_json(path, settings | {"tasks": chosen.names})
            names = json.loads(path.read_text(encoding="utf-8"))["tasks"]
            label = selection if seed is None else f"{selection} {seed}"
            say(f"{target.collection}: {label}: {len(names)} tasks: {', '.join(names)}")
            yield selection, seed, names


def _run(
    recipe: FewshotRecipe,
    store: ImageStore,
    cells: list[Cell],
    run_dir: Path,
    run_id: str,
    parent: str | None,
) -> dict[str, CellResult]:
    """Accuracies by key: read where they are there, computed where not, one training at a time or
    `cluster.workers` of them."""
    files = {cell.key: run_dir / "cells" / f"{cell.key}.parquet" for cell in cells}
    found = {key: read_cell(path) for key, path in files.items() if path.is_file()}
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.key not in found:
            groups.setdefault(cell.training, []).append(cell)
    say(
        f"{len(cells)} cells; {sum(cell.key in found for cell in cells)} are there already,"
        f" {len(groups)} trainings to run"
    )
    if not groups:
        return found
    kept = decode_all(store, load_encoder(recipe.encoder).preprocess)
    run_all = _in_process if recipe.cluster.workers == 0 else _as_ray_tasks
    for done, (group, measured) in enumerate(run_all(recipe, list(groups.values()), kept), 1):
        for key, values in measured.items():
            write_cell(files[key], values)
        found |= measured
        for cell in group:
            _track(recipe, cell, found[cell.key], run_id, parent)
            accuracies = ", ".join(
                f"{shots_name(shots)} {percent(confidence_interval(values))}"
                for shots, values in found[cell.key].accuracies.items()
            )
            say(
                f"[{done}/{len(groups)}] {cell.name}: {accuracies}"
                f" ({found[cell.key].seconds:.0f} s of training)"
            )
    return found


def _in_process(
    recipe: FewshotRecipe, groups: list[list[Cell]], kept: np.ndarray | None
) -> Iterator[tuple[list[Cell], dict[str, CellResult]]]:
    for group in groups:
        yield group, run_cells(recipe, group, kept)


def _as_ray_tasks(
    recipe: FewshotRecipe, groups: list[list[Cell]], kept: np.ndarray | None
) -> Iterator[tuple[list[Cell], dict[str, CellResult]]]:
    cluster = recipe.cluster
    remote = ray.remote(run_cells).options(
        num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker
    )
    shared = ray.put(kept)  # one copy on a node, which all its tasks read
    waiting = list(reversed(groups))
    running: dict[ray.ObjectRef, list[Cell]] = {}
    while waiting or running:
        while waiting and len(running) < cluster.most_workers:
            group = waiting.pop()
            running[remote.remote(recipe, group, shared)] = group
        [ready], _ = ray.wait(list(running), num_returns=1)
        yield running.pop(ready), ray.get(ready)


def _track(
    recipe: FewshotRecipe, cell: Cell, measured: CellResult, run_id: str, parent: str | None
) -> None:
    """The cell's child run in MLflow."""
    parameters = {
        "target": cell.target.model_dump(),
        "method": cell.method,
        "selection": cell.selection,
        "seed": cell.seed,
        "tasks": ", ".join(cell.tasks),
        "training": cell.training,
        "key": cell.key,
    }
    with tracking.open_run(
        recipe.tracking,
        recipe.cluster.storage,
        f"{run_id}-{cell.name}",
        parameters,
        {"fmray.job": "compare_fewshot"},
        parent,
    ) as run:
        for shots, values in measured.accuracies.items():
            run.log(0, **{f"accuracy/{shots_name(shots)}": float(values.mean())})
        run.log(0, seconds=measured.seconds)
        if measured.loss is not None:
            run.log(0, loss=measured.loss)


def _comparison(
    recipe: FewshotRecipe, cells: list[Cell], found: dict[str, CellResult]
) -> Comparison:
    """Cells to lines and columns; seeds of a line become their mean, task by task."""
    parts: dict[str, dict[tuple[str, int], list[np.ndarray]]] = {}
    ways: dict[tuple[str, int], int] = {}
    for cell in cells:
        measured = found[cell.key]
        for shots, values in measured.accuracies.items():
            column = (cell.column, shots)
            ways[column] = measured.ways[shots]
            parts.setdefault(cell.row, {}).setdefault(column, []).append(values)
    accuracies = {
        line: {column: np.mean(values, axis=0) for column, values in columns.items()}
        for line, columns in parts.items()
    }
    return Comparison(accuracies, ways)


def _write(
    result: Comparison, cells: list[Cell], found: dict[str, CellResult], run_dir: Path
) -> None:
    records: list[dict[str, Any]] = []
    for cell in cells:
        measured = found[cell.key]
        for shots, values in measured.accuracies.items():
            label = {
                "target": cell.column,
                "line": cell.row,
                "seed": cell.seed,
                "shots": shots,
            }
            records += [
                label | {"task": task, "accuracy": accuracy}
                for task, accuracy in enumerate(values.tolist())
            ]
    path = run_dir / "tasks.parquet"
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(pa.Table.from_pylist(records), partial)
    os.replace(partial, path)
    trainings = [
        {
            "cell": cell.name,
            "tasks": list(cell.tasks),
            "training": cell.training,
            "seconds": found[cell.key].seconds,
            "loss": found[cell.key].loss,
        }
        for cell in cells
    ]
    points = []
    for line, columns in result.accuracies.items():
        for (target, shots), values in columns.items():
            interval = confidence_interval(values)
            points.append(
                fewshot_plots.Accuracy(target, shots, line, interval.mean, interval.half_width)
            )
    fewshot_plots.comparison(points, run_dir / "comparison.png")
    _write_json(run_dir / "results.json", result.values() | {"trainings": trainings})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)

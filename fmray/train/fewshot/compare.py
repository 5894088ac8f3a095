"""The comparison job: every method and selection on every target, resumed cell by cell.

Writes to the run's folder:

    recipe.yaml      the resolved recipe
    selections/      chosen tasks, one file per target and selection
    cells/           accuracies, one file per cell
    results.json     the table
    tasks.parquet    the accuracy of every task
    comparison.png   the table as a figure

The last three are written when all cells exist. The same run id resumes: existing selections and
cells are not computed again. MLflow has a run with a child per cell.

The job prepares a missing image store, and pretrains a small encoder without a checkpoint by the
recipe's `pretrain` section, so that one command is enough.
"""

from __future__ import annotations

import json
import math
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
from fmray.errors import GaveUp
from fmray.fewshot import Encoder, confidence_interval
from fmray.plots import fewshot as fewshot_plots
from fmray.runtime import tracking
from fmray.runtime.console import changed_settings, say
from fmray.runtime.files import atomic_path, write_json
from fmray.runtime.nodes import session
from fmray.train.fewshot.comparison import (
    Cell,
    CellResult,
    Column,
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
    """Compute the missing cells and return the table.

    `cluster.workers` trainings run at a time as Ray tasks; 0: one after another in this process.

    Raises:
        ValueError: a recipe without targets, or whose data do not allow an episode.
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
            results = _compute(recipe, store, cells, run_dir, run_id, run.mlflow_run_id)
        comparison = _comparison(cells, results)
        _write(comparison, cells, results, run_dir)
        for name in ("results.json", "tasks.parquet", "comparison.png"):
            run.artifact(run_dir / name)
        for line, columns in comparison.accuracies.items():
            for shots in dict.fromkeys(shots for _, shots in columns):
                means = [values.mean() for (_, n), values in columns.items() if n == shots]
                run.log(0, **{f"mean/{line}/{shots_name(shots)}": float(np.mean(means))})
    say(comparison.table())
    say(f"results: {run_dir / 'results.json'}")
    return comparison


def _with_encoder(recipe: FewshotRecipe, run_dir: Path, run_id: str) -> FewshotRecipe:
    """Return the recipe with weights to start from: pretrain a small encoder without any."""
    config = recipe.encoder
    if not config.name.startswith("small/") or config.checkpoint is not None:
        return recipe
    checkpoint = pretrain(recipe, run_dir / "pretraining", f"{run_id}-pretraining").model_dir
    return recipe.model_copy(
        update={"encoder": config.model_copy(update={"checkpoint": checkpoint})}
    )


def _plan(recipe: FewshotRecipe, store: ImageStore, run_dir: Path) -> list[Cell]:
    """Return all cells of the table; select the tasks once for each target and selection."""
    encoder = load_encoder(recipe.encoder)
    weights = weights_digest(encoder)
    known: dict[str, TaskFeatures] = {}  # candidates are embedded once for all targets
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
    """Yield (selection, seed if it is random, names of tasks) for one target; cached on disk."""
    embedded = None
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
                embedded = embedded or embed_tasks(recipe, store, encoder, target, known)
                chosen = choose(recipe, store, encoder, target, selection, seed or 0, embedded)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, settings | {"tasks": chosen.names})
            names = json.loads(path.read_text(encoding="utf-8"))["tasks"]
            label = selection if seed is None else f"{selection} {seed}"
            say(f"{target.collection}: {label}: {len(names)} tasks: {', '.join(names)}")
            yield selection, seed, names


def _compute(
    recipe: FewshotRecipe,
    store: ImageStore,
    cells: list[Cell],
    run_dir: Path,
    run_id: str,
    parent: str | None,
) -> dict[str, CellResult]:
    """Return results by key: read the cells that exist, and compute the others."""
    files = {cell.key: run_dir / "cells" / f"{cell.key}.parquet" for cell in cells}
    results = {key: read_cell(path) for key, path in files.items() if path.is_file()}
    trainings: dict[str, list[Cell]] = {}  # missing cells by training
    for cell in cells:
        if cell.key not in results:
            trainings.setdefault(cell.training, []).append(cell)
    say(
        f"{len(cells)} cells: {sum(cell.key in results for cell in cells)} exist already,"
        f" {len(trainings)} trainings to run"
    )
    if not trainings:
        return results
    decoded = decode_all(store, load_encoder(recipe.encoder).preprocess)
    run_all = _in_process if recipe.cluster.workers == 0 else _as_ray_tasks
    for done, (group, computed) in enumerate(
        run_all(recipe, list(trainings.values()), decoded), start=1
    ):
        for key, result in computed.items():
            write_cell(files[key], result)
        results |= computed
        for cell in group:
            result = results[cell.key]
            _track(recipe, cell, result, run_id, parent)
            accuracies = ", ".join(
                f"{shots_name(shots)} {percent(confidence_interval(values))}"
                for shots, values in result.accuracies.items()
            )
            say(
                f"[{done}/{len(trainings)}] {cell.name}: {accuracies}"
                f" ({result.seconds:.0f} s of training)"
            )
    return results


def _in_process(
    recipe: FewshotRecipe, groups: list[list[Cell]], decoded: np.ndarray | None
) -> Iterator[tuple[list[Cell], dict[str, CellResult]]]:
    """Yield the cells and results of each training, one after another."""
    for group in groups:
        yield group, run_cells(recipe, group, decoded)


def _as_ray_tasks(
    recipe: FewshotRecipe, groups: list[list[Cell]], decoded: np.ndarray | None
) -> Iterator[tuple[list[Cell], dict[str, CellResult]]]:
    """Yield the cells and results of each training as it ends, `cluster.workers` at a time."""
    cluster = recipe.cluster
    remote = ray.remote(run_cells).options(
        num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker
    )
    shared = ray.put(decoded)  # one copy per node, which all its tasks read
    waiting = list(reversed(groups))
    running: dict[ray.ObjectRef, list[Cell]] = {}
    while waiting or running:
        while waiting and len(running) < cluster.most_workers:
            group = waiting.pop()
            running[remote.remote(recipe, group, shared)] = group
        [ready], _ = ray.wait(list(running), num_returns=1)
        try:
            computed = ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, GaveUp):  # a training diverged
                raise GaveUp(str(error.cause)) from None
            raise
        yield running.pop(ready), computed


def _track(
    recipe: FewshotRecipe, cell: Cell, result: CellResult, run_id: str, parent: str | None
) -> None:
    """Log the cell as a child run in MLflow."""
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
        for shots, values in result.accuracies.items():
            run.log(0, **{f"accuracy/{shots_name(shots)}": float(values.mean())})
        run.log(0, seconds=result.seconds)
        if result.loss is not None:
            run.log(0, loss=result.loss)


def _comparison(cells: list[Cell], results: dict[str, CellResult]) -> Comparison:
    """Put cells into lines and columns; the seeds of a line become their mean, task by task."""
    by_line: dict[str, dict[Column, list[np.ndarray]]] = {}
    ways: dict[Column, int] = {}
    for cell in cells:
        result = results[cell.key]
        for shots, values in result.accuracies.items():
            column = (cell.column, shots)
            ways[column] = result.ways[shots]
            by_line.setdefault(cell.row, {}).setdefault(column, []).append(values)
    accuracies = {
        line: {column: np.mean(values, axis=0) for column, values in columns.items()}
        for line, columns in by_line.items()
    }
    return Comparison(accuracies, ways)


def _write(
    comparison: Comparison, cells: list[Cell], results: dict[str, CellResult], run_dir: Path
) -> None:
    """Write tasks.parquet, comparison.png and results.json."""
    records: list[dict[str, Any]] = []
    for cell in cells:
        for shots, values in results[cell.key].accuracies.items():
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
    with atomic_path(run_dir / "tasks.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(records), temporary)

    points = []
    for line, columns in comparison.accuracies.items():
        for (target, shots), values in columns.items():
            interval = confidence_interval(values)
            points.append(
                fewshot_plots.Accuracy(target, shots, line, interval.mean, interval.half_width)
            )
    fewshot_plots.comparison(points, run_dir / "comparison.png")

    trainings = []
    for cell in cells:
        result = results[cell.key]
        diverged = result.loss is not None and not math.isfinite(result.loss)
        trainings.append(
            {
                "cell": cell.name,
                "tasks": list(cell.tasks),
                "training": cell.training,
                "seconds": result.seconds,
                "loss": None if diverged else result.loss,  # JSON has no NaN
            }
        )
    write_json(run_dir / "results.json", comparison.values() | {"trainings": trainings})

"""The training job: from a recipe to a trained model, on Ray Train.

In: a `LoadedRecipe` and a run id; a running Ray, or one to start. Out: a `Result`, and in
`<storage>/<run id>/` the resolved `recipe.yaml`, `log.jsonl`, checkpoints and `model/`. The same
run id goes on where the run stopped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from fmray.config import AdaLlavaRecipe, BaseRecipe, LoadedRecipe
from fmray.runtime import tracking
from fmray.runtime.cluster import start_or_join
from fmray.runtime.nodes import check_nodes
from fmray.runtime.placement import machines_of_cluster, preflight
from fmray.train import checkpoint as checkpoints
from fmray.train.mirror import get_folder, last_state, open_mirror, put_files
from fmray.train.supervise import fit

POLL_SECONDS = "0.5"  # how often Ray's controller collects reports; a report waits for it


@dataclass(frozen=True)
class Result:
    """model_dir: safetensors and processor. metrics: the last step's and the last evaluation's."""

    model_dir: Path
    metrics: dict[str, float]
    mlflow_run_id: str | None
    run_dir: Path
    best_checkpoint: Path | None


def train(
    loaded: LoadedRecipe,
    run_id: str,
    callbacks: Sequence[UserCallback] = (),
    parent: str | None = None,
) -> Result:
    """Run the recipe's training and wait for it.

    callbacks: of Ray's controller, told of each report. parent: MLflow run id, for a trial.

    Raises ValueError for a recipe, data store or checkpoint that does not fit, and what
    `fmray.train.supervise.fit` raises.
    """
    recipe = loaded.recipe.with_absolute_paths()
    run_dir = recipe.cluster.storage / run_id
    _check_store(recipe)
    mirror = open_mirror(recipe.cluster, run_dir)
    newest = last_state(run_dir, mirror)
    if newest is not None:
        where, state = newest
        checkpoints.check_state(state, recipe, where)
        print(f"run {run_id} goes on from {where}", flush=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(loaded.dump(), encoding="utf-8")
    put_files(mirror, "recipe.yaml")
    print(loaded.dump(), flush=True)
    config = {
        "recipe": recipe.model_dump_json(),
        "recipe_text": loaded.dump(),
        "run_id": run_id,
    }
    with tracking.open_job_run(recipe, run_id, "train", parent) as run:
        # the run, and with sqlite its database, is there before workers that may be killed write to
        # it; and whatever becomes of them, it is ended here
        mlflow_run_id = run.mlflow_run_id
        if recipe.cluster.workers == 0:
            outcome = fit(recipe, run_id, config, _train_here, run, callbacks)
        else:
            with session(recipe):
                outcome = fit(recipe, run_id, config, _train_worker, run, callbacks)
    get_folder(mirror, run_dir / "model")
    values = outcome.values
    best = values["best_step"]
    best_checkpoint = checkpoints.checkpoint_path(run_dir, best) if best is not None else None
    result = Result(
        run_dir / "model",
        values["metrics"],
        mlflow_run_id,
        run_dir,
        best_checkpoint if best_checkpoint is not None and best_checkpoint.is_dir() else None,
    )
    print("\n".join([*_table(recipe, run_id, result), *outcome.lines()]), flush=True)
    return result


def _train_worker(config: dict[str, Any]) -> dict[str, Any] | None:
    # the loop's imports take seconds, and the driver and Ray's controller have no use for them
    from fmray.train.loop import train_worker

    return train_worker(config)


def _train_here(config: dict[str, Any]) -> dict[str, Any] | None:
    from fmray.train.loop import train_here

    return train_here(config)


@contextmanager
def session(recipe: BaseRecipe) -> Iterator[None]:
    """A Ray that has room for the recipe's workers, on nodes that can work together.

    Raises ValueError when they would wait for ever for what Ray does not have, and when a node has
    other packages, another time or another storage folder.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    # Ray's print says each line twice where stdout is redirected, as in its own workers
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    cluster = recipe.cluster
    with start_or_join(cluster):
        machines = machines_of_cluster()
        findings = preflight(recipe, machines)
        if len(machines) > 1:
            shared = {} if cluster.mirror else {"cluster.storage": cluster.storage}
            nodes = check_nodes(shared)
            print("\n".join(map(str, nodes)), flush=True)
            findings += nodes
        if failures := [finding.text for finding in findings if finding.level == "FAIL"]:
            raise ValueError("; ".join(failures))
        yield


def _check_store(recipe: AdaLlavaRecipe) -> None:
    store = recipe.data.store
    for part in ("processor", "train", "validation", "manifest.json"):
        if not (store / part).exists():
            raise ValueError(
                f"data.store {store}: no {part}; "
                "prepare it with `python jobs/prepare_data.py --config ...`"
            )


def _table(recipe: AdaLlavaRecipe, run_id: str, result: Result) -> list[str]:
    """The end of the job in a few lines."""
    metrics = result.metrics
    lines = [
        f"run {run_id}: {int(metrics['step'])} steps",
        f"{'budget':>8}  {'accuracy':>8}  {'loss':>8}",
    ]
    for name, value in metrics.items():
        kind, _, budget = name.partition("/")
        if kind == "accuracy":
            lines.append(f"{budget:>8}  {value:8.4f}  {metrics[f'loss/{budget}']:8.4f}")
    lines.append(f"model: {result.model_dir}")
    if result.best_checkpoint is not None:
        lines.append(f"best checkpoint: {result.best_checkpoint}")
    if result.mlflow_run_id is not None:
        lines.append(
            f"MLflow run: {result.mlflow_run_id} (experiment {recipe.tracking.experiment})"
        )
    return lines

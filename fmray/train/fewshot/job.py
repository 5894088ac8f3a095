"""The finetuning job: from a recipe to a better encoder, on Ray Train.

In: a `LoadedRecipe` of kind fewshot whose image store is prepared, and a run id. Out: a `Result`,
and in `<storage>/<run id>/` the resolved `recipe.yaml`, `selection.json` (the tasks it was
finetuned on), `log.jsonl`, checkpoints and `model/`. The same run id goes on where the run stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from fmray.config import LoadedRecipe
from fmray.config.fewshot import FewshotRecipe
from fmray.data.image_store import ImageStore
from fmray.runtime import tracking
from fmray.train.job import session
from fmray.train.mirror import get_folder, open_mirror, put_files
from fmray.train.supervise import fit


@dataclass(frozen=True)
class Result:
    """model_dir: of the finetuned encoder. metrics: the last step's. tasks: chosen, by name."""

    model_dir: Path
    metrics: dict[str, float]
    tasks: list[str]
    mlflow_run_id: str | None
    run_dir: Path


def train_fewshot(
    loaded: LoadedRecipe[FewshotRecipe],
    run_id: str,
    callbacks: Sequence[UserCallback] = (),
    parent: str | None = None,
) -> Result:
    """Choose the tasks, finetune the encoder on them, and wait for it.

    callbacks: of Ray's controller, told of each report. parent: MLflow run id, for a trial.

    Raises ValueError for a recipe, store or checkpoint that does not fit, and what
    `fmray.train.supervise.fit` raises.
    """
    recipe = loaded.recipe.with_absolute_paths()
    check_trainable(recipe)
    run_dir = recipe.cluster.storage / run_id
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(loaded.dump(), encoding="utf-8")
    mirror = open_mirror(recipe.cluster, run_dir)
    put_files(mirror, "recipe.yaml")
    print(loaded.dump(), flush=True)
    with tracking.open_job_run(recipe, run_id, "train_fewshot", parent) as run:
        mlflow_run_id = run.mlflow_run_id
        alone = recipe.cluster.workers == 0
        with nullcontext() if alone else session(recipe):
            if mirror is not None and not (run_dir / "selection.json").exists():
                mirror.get("selection.json")  # where the run began elsewhere
            tasks = _tasks(recipe, run_dir / "selection.json")
            put_files(mirror, "selection.json")
            config = {
                "recipe": recipe.model_dump_json(),
                "recipe_text": loaded.dump(),
                "run_id": run_id,
                "tasks": tasks,
            }
            loop = _train_here if alone else _train_worker
            outcome = fit(recipe, run_id, config, loop, run, callbacks)
        run.artifact(run_dir / "selection.json")
    get_folder(mirror, run_dir / "model")
    metrics = outcome.values["metrics"]
    result = Result(run_dir / "model", metrics, tasks, mlflow_run_id, run_dir)
    print("\n".join([*_table(recipe, run_id, result), *outcome.lines()]), flush=True)
    if recipe.tracking.register_as is not None:
        tracking.register(
            recipe.tracking,
            recipe.cluster.storage,
            recipe.tracking.register_as,
            result.model_dir,
            run_id,
        )
    return result


def check_trainable(recipe: FewshotRecipe) -> None:
    """Raises ValueError for what has nothing to learn, or nothing to choose the tasks by."""
    if recipe.train.method == "direct":
        raise ValueError(
            "train.method: direct adaptation trains nothing; evaluate the encoder as it is, with"
            " `python jobs/evaluate.py`"
        )
    if recipe.target is None and not recipe.select.only and recipe.select.method != "all":
        raise ValueError(
            f"select.method: {recipe.select.method} chooses tasks for a target: set"
            " target.collection, or select.method: all"
        )


def _tasks(recipe: FewshotRecipe, path: Path) -> list[str]:
    """Names of the tasks to finetune on: of the run so far, or chosen now and written to `path`."""
    # imports torch and an encoder's library, which the driver of a resumed run has no use for
    from fmray.train.fewshot.encoder import load_encoder
    from fmray.train.fewshot.select import candidate_tasks, choose

    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))["tasks"]
    store = ImageStore.open(recipe.images.store, recipe.images.cache)
    if recipe.select.only or recipe.select.method == "all":
        candidates = [task.name for task in candidate_tasks(store, recipe, recipe.target)]
        chosen = list(recipe.select.only) or candidates
        found: dict[str, Any] = {"tasks": chosen}
    else:
        selected = choose(
            recipe,
            store,
            load_encoder(recipe.encoder),
            recipe.target,
            recipe.select.method,
            recipe.seed,
        )
        chosen = list(selected.names)
        found = {"tasks": chosen, "similarity": dict(selected.similarity)}
        candidates = selected.order
    for key, names in (("only", recipe.select.only), ("weights", recipe.select.weights)):
        if unknown := [name for name in names if name not in candidates]:
            raise ValueError(
                f"select.{key}: there is no candidate task {unknown[0]!r}; there are"
                f" {', '.join(candidates)}"
            )
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    print(f"finetuning on {len(chosen)} tasks: {', '.join(chosen)}", flush=True)
    return chosen


def _train_worker(config: dict[str, Any]) -> dict[str, Any]:
    # the loop's imports take seconds, and Ray's controller has no use for them
    from fmray.train.fewshot.loop import train_worker

    return train_worker(config)


def _train_here(config: dict[str, Any]) -> dict[str, Any]:
    from fmray.train.fewshot.loop import train_here

    return train_here(config)


def _table(recipe: FewshotRecipe, run_id: str, result: Result) -> list[str]:
    """The end of the job in a few lines."""
    metrics = result.metrics
    episodes = recipe.episodes
    lines = [
        f"run {run_id}: {int(metrics['step'])} steps of {recipe.train.method} on"
        f" {len(result.tasks)} tasks ({episodes.ways}-way {episodes.shots}-shot)",
    ]
    if "loss" in metrics:  # not in a run that had no step left to take
        lines.append(f"{'':>12}{'loss':>10}{'accuracy':>10}")
        lines.append(f"{'last step':>12}{metrics['loss']:>10.4f}{metrics['accuracy']:>10.4f}")
    lines.append(f"model: {result.model_dir}")
    if result.mlflow_run_id is not None:
        lines.append(
            f"MLflow run: {result.mlflow_run_id} (experiment {recipe.tracking.experiment})"
        )
    return lines

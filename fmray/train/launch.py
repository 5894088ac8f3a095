"""Runs the training job of a recipe: from the driver's checks to the registered model.

`train` serves every kind of recipe. The run's folder `<storage>/<run id>/` gets the resolved
`recipe.yaml`, `log.jsonl`, checkpoints and `model/` (few-shot: also `selection.json`, the tasks it
is finetuned on). The same run id resumes a run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from fmray.config import AdaLlavaRecipe, BaseRecipe, LoadedRecipe
from fmray.config.fewshot import FewshotRecipe
from fmray.data.images import DECODER_VERSION
from fmray.data.store import Manifest
from fmray.runtime import tracking
from fmray.runtime.console import changed_settings, say
from fmray.runtime.files import write_atomic
from fmray.runtime.nodes import session
from fmray.train import checkpoint as checkpoints
from fmray.train.method import JOB_NAMES, Evaluation, TrainJob
from fmray.train.mirror import Mirror, get_folder, last_state, open_mirror, put_files
from fmray.train.resume import check_resume, run_settings
from fmray.train.supervise import fit

SELECTION = "selection.json"


@dataclass(frozen=True)
class Result:
    """What a finished training leaves."""

    run_dir: Path
    model_dir: Path  #: safetensors, with the processor or the encoder's settings
    metrics: dict[str, float]  #: the last step's and the last evaluation's, by their logged names
    evaluation: Evaluation | None = None
    best_checkpoint: Path | None = None  #: None: no evaluation, or no longer kept
    mlflow_run_id: str | None = None
    model_version: str | None = None  #: version in the model registry, with `register_as`
    tasks: list[str] = field(default_factory=list)  #: finetuned on (few-shot)
    skipped_steps: int = 0  #: see `train.skip_nonfinite`


def train(
    loaded: LoadedRecipe[Any],
    run_id: str,
    callbacks: Sequence[UserCallback] = (),
    parent: str | None = None,
) -> Result:
    """Train the recipe's model on Ray Train and wait for it.

    Args:
        callbacks: of Ray's controller, called at each report.
        parent: MLflow run id of the search that this run is a trial of.

    Raises:
        ValueError: recipe, data or checkpoint do not fit together.
        GaveUp, SystemExit: see `fmray.train.supervise.fit`.
        TrackingError: the model could not be registered.
    """
    recipe = loaded.recipe.with_absolute_paths()
    check_trainable(recipe)
    check_model(recipe)
    cluster, run_dir = recipe.cluster, recipe.cluster.storage / run_id
    mirror = open_mirror(cluster, run_dir)
    newest = last_state(run_dir, mirror)
    tasks: list[str] = []
    if newest is not None:
        tasks = _earlier_tasks(run_dir, mirror) if isinstance(recipe, FewshotRecipe) else []
        where, state = newest
        notes = check_resume(state, recipe, run_settings(recipe, tasks), where)
        say("\n".join([f"run {run_id}: resuming from {where}", *notes]))
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(run_dir / "recipe.yaml", loaded.dump())
    put_files(mirror, "recipe.yaml")
    say(changed_settings(loaded, run_dir / "recipe.yaml"))

    # The driver's MLflow run is open before the workers' (with sqlite it creates the database), and
    # it ends the run whatever becomes of them.
    in_process = cluster.workers == 0
    with tracking.open_job_run(recipe, run_id, JOB_NAMES[recipe.kind], parent) as run:
        mlflow_run_id = run.mlflow_run_id
        with nullcontext() if in_process else session(recipe):
            if isinstance(recipe, FewshotRecipe):
                tasks = tasks or _choose_tasks(recipe, run_dir / SELECTION)
                put_files(mirror, SELECTION)
                run.artifact(run_dir / SELECTION)
            job = TrainJob(recipe, loaded.dump(), run_id, tuple(tasks))
            loop = _train_in_process if in_process else _train_worker
            outcome = fit(recipe, run_id, {"job": job}, loop, run, callbacks)
    get_folder(mirror, run_dir / "model")

    version = None
    if recipe.tracking.register_as is not None:
        version = tracking.register(
            recipe.tracking, cluster.storage, recipe.tracking.register_as, run_dir / "model", run_id
        )
    values = outcome.values
    result = Result(
        run_dir=run_dir,
        model_dir=run_dir / "model",
        metrics=values["metrics"],
        evaluation=values["evaluation"],
        best_checkpoint=_best_checkpoint(run_dir, values["best_step"]),
        mlflow_run_id=mlflow_run_id,
        model_version=version,
        tasks=list(tasks),
        skipped_steps=values["skipped_steps"],
    )
    say("\n".join([*_summary(recipe, run_id, result), *outcome.lines()]))
    return result


def check_trainable(recipe: BaseRecipe) -> None:
    """Raise ValueError for a recipe that trains nothing, or whose data are not prepared."""
    if isinstance(recipe, AdaLlavaRecipe):
        store = recipe.data.store
        for part in ("processor", "train", "validation", "manifest.json"):
            if not (store / part).exists():
                raise ValueError(
                    f"data.store {store}: no {part}; "
                    "prepare it with `python jobs/prepare_data.py --config ...`"
                )
        if Manifest.read(store).settings.get("decoder") != DECODER_VERSION:
            say(
                f"data.store {store}: made with another version of the image decoder;"
                " `python jobs/prepare_data.py --config ...` checks its images again"
            )
    elif recipe.train.method == "direct":
        raise ValueError(
            "train.method: direct adaptation trains nothing; evaluate the encoder as it is, with"
            " `python jobs/evaluate.py`"
        )
    elif recipe.target is None and not recipe.select.only and recipe.select.method != "all":
        raise ValueError(
            f"select.method: {recipe.select.method} chooses tasks for a target: set"
            " target.collection, or select.method: all"
        )


def check_model(recipe: AdaLlavaRecipe | FewshotRecipe) -> None:
    """Raise ValueError, before any worker starts, for files or a model that cannot be right."""
    if isinstance(recipe, FewshotRecipe):
        from fmray.fewshot.encoders import check_files

        check_files(recipe.encoder.name, recipe.encoder.checkpoint)
        return
    if recipe.model.source == "scratch":
        return
    from fmray.data.base_model import check_base, local_folder
    from fmray.data.processor import load_processor

    source, revision = recipe.model.source, recipe.model.revision
    if local_folder(source, revision) is None:  # the workers load it from the hub
        return
    processor = load_processor(recipe.data.store / "processor")
    try:
        check_base(source, revision, processor)
    except ValueError as error:
        raise ValueError(f"model.source: {error}") from error


def _earlier_tasks(run_dir: Path, mirror: Mirror | None) -> list[str]:
    """The tasks that a run with checkpoints has selected."""
    path = run_dir / SELECTION
    if mirror is not None and not path.exists():
        mirror.get(SELECTION)  # the run began on another machine
    return json.loads(path.read_text(encoding="utf-8"))["tasks"] if path.is_file() else []


def _choose_tasks(recipe: FewshotRecipe, path: Path) -> list[str]:
    # imports torch and the encoders' libraries, which a resumed run does not need
    from fmray.train.fewshot.select import choose_for_run

    return choose_for_run(recipe, path)


def _train_worker(config: dict[str, Any]) -> dict[str, Any]:
    # the loop's imports take seconds, and the driver and Ray's controller do not need them
    from fmray.train.loop import train_worker

    return train_worker(config)


def _train_in_process(config: dict[str, Any]) -> dict[str, Any]:
    from fmray.train.loop import train_in_process

    return train_in_process(config)


def _best_checkpoint(run_dir: Path, step: int | None) -> Path | None:
    if step is None:
        return None
    path = checkpoints.checkpoint_path(run_dir, step)
    return path if path.is_dir() else None


def _summary(recipe: BaseRecipe, run_id: str, result: Result) -> list[str]:
    """The end of the job in a few lines."""
    metrics = result.metrics
    title = f"run {run_id}: {int(metrics['step'])} steps"
    if isinstance(recipe, FewshotRecipe):
        episodes = recipe.episodes
        title += (
            f" of {recipe.train.method} on {len(result.tasks)} tasks"
            f" ({episodes.ways}-way {episodes.shots}-shot)"
        )
    lines = [title]
    if isinstance(recipe, FewshotRecipe) and "loss" in metrics:  # some step was left to take
        lines.append(f"{'':>12}{'loss':>10}{'accuracy':>10}")
        lines.append(f"{'last step':>12}{metrics['loss']:>10.4f}{metrics['accuracy']:>10.4f}")
    scores = result.evaluation.scores if result.evaluation is not None else []
    if len(scores) == 1 and scores[0].loss is not None:
        lines[0] += f", accuracy {scores[0].accuracy:.4f}, loss {scores[0].loss:.4f}"
    elif scores:
        what = "shots" if isinstance(recipe, FewshotRecipe) else "budget"
        lines.append(f"{what:>8}" + "".join(f"{score.name:>11}" for score in scores))
        lines.append("accuracy" + "".join(f"{score.accuracy:11.4f}" for score in scores))
        losses = [score.loss for score in scores if score.loss is not None]
        if losses:
            lines.append(f"{'loss':>8}" + "".join(f"{loss:11.4f}" for loss in losses))
    if result.skipped_steps:
        lines.append(f"skipped steps, because of a loss not finite: {result.skipped_steps}")
    lines.append(f"model: {result.model_dir}")
    if result.model_version is not None:
        name = recipe.tracking.register_as
        lines.append(f"registered as models:/{name}@production (version {result.model_version})")
    where = []
    if result.best_checkpoint is not None:
        where.append(f"best checkpoint: {result.best_checkpoint.name}")
    if result.mlflow_run_id is not None:
        where.append(
            f"MLflow run: {result.mlflow_run_id} (experiment {recipe.tracking.experiment})"
        )
    return [*lines, *(["; ".join(where)] if where else [])]

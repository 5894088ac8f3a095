"""The training loop of one worker, for every kind of training: read it from the top.

Ray Train calls `train_worker` on every worker. The `Method` of the recipe's kind takes the steps;
the loop resumes, logs, evaluates, saves, reacts to preemption, and exports. The run's folder gets
`log.jsonl` (a line per step), checkpoints and, at the end, `model/`.

What a step computes does not depend on the number of ranks: see each method.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from fmray.runtime import tracking
from fmray.runtime.run_log import Progress, StatusFile, StepLog, event
from fmray.train import checkpoint as checkpoints
from fmray.train.checkpoint import TrainState
from fmray.train.engine import single_process_group
from fmray.train.finite import Diverged, FiniteCheck, name_samples, weights_finite
from fmray.train.method import (
    JOB_NAMES,
    Evaluation,
    Method,
    TrainJob,
    Worker,
    create_method,
)
from fmray.train.mirror import CheckpointManager
from fmray.train.resume import check_resume, run_settings
from fmray.train.supervise import PreemptionNotice


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train, evaluate, checkpoint and export; runs on every worker, with `{"job": TrainJob}`.

    Resumes from the run's newest complete checkpoint, whatever the number of ranks that made it.
    When the worker is told to stop (`PreemptionNotice`), it saves a checkpoint and returns early.

    Returns `metrics` (of the last step and the last evaluation), `evaluation`, `best_step` and
    `skipped_steps`, or `preempted`, the reason of the early end.

    Raises ValueError when recipe, data, model or checkpoint do not fit together, and Diverged for a
    loss, gradient, evaluation or weight that is not finite (`fmray.train.finite`).
    """
    job: TrainJob = config["job"]
    recipe, train = job.recipe, job.recipe.train

    # set up: this rank, the model and its data, the checkpoint to resume from
    worker = _worker(recipe.cluster)
    method = create_method(job, worker)
    settings = run_settings(recipe, job.tasks)
    manager = CheckpointManager.open(recipe.cluster, job.run_dir)
    engine, state = _resume(job, method, manager, worker, settings)
    start = step = state.step if state is not None else 0
    best, best_step = (state.best, state.best_step) if state is not None else (None, None)
    total = method.total_steps
    check = _finite_check(job, worker, manager, state)
    if worker.is_rank_zero:
        text = f"step {start} of {total}; {worker.world_size} ranks, each {method.share} a step"
        event(job.run_dir, text)

    name, is_rank_zero = JOB_NAMES[recipe.kind], worker.is_rank_zero
    cpus = recipe.cluster.cpus_per_worker
    with (
        _rank_zero_first(worker, manager),
        tracking.open_job_run(recipe, job.run_id, name, enabled=is_rank_zero) as run,
        StepLog(job.run_dir / "log.jsonl", keep_until=start, enabled=is_rank_zero) as log,
        Progress(total, start, is_rank_zero, job.run_id) as progress,
        PreemptionNotice(worker.rank) as worker.preemption,
        StatusFile(job.run_dir, name, start, total, cpus, worker.device) as status,
    ):
        metrics: dict[str, float] = {}
        evaluation: Evaluation | None = None
        for step, metrics in method.steps(engine, start):
            # every step: log, and decide what else is due
            log.write(step, metrics)
            run.log(step, **{f"train/{key}": value for key, value in metrics.items()})
            progress.update(step, metrics)
            check.step(step, metrics, lambda: name_samples(worker, manager.group))
            last, stop = step == total, worker.stop_reason
            evaluate_now = method.evaluates and (last or _due(step, train.eval_every)) and not stop
            save_now = stop or last or _due(step, train.checkpoint_every)

            # once in a while: evaluate
            if evaluate_now or save_now:
                check.weights(step, weights_finite(engine.module, worker))
            if evaluate_now:
                evaluation = _from_rank_zero(method.evaluate(engine), worker, manager)
                scores = evaluation.metrics()
                log.write(step, scores)
                run.log(step, **{f"eval/{key}": value for key, value in scores.items()})
                check.evaluation(step, scores)
                if not last:  # the job's summary has the last one
                    progress.say(f"step {step}: {evaluation}")

            # once in a while, and before an early end: save
            if save_now:
                if evaluate_now and (best is None or evaluation.accuracy > best):
                    best, best_step = evaluation.accuracy, step
                run.flush()
                status.check()
                state = _state(job, method, worker, settings, step, best, best_step, check.skipped)
                manager.save(engine, state, job.recipe_text, train.keep_checkpoints)
            if stop:
                manager.wait()
                return {"preempted": f"{stop}: checkpoint at step {step}"}

            # Do not report checkpoints to Ray: it aborts the run if one that it knows is missing.
            if evaluate_now:
                report = {"step": step, "score": evaluation.accuracy, **metrics}
                ray.train.report(report | evaluation.metrics())

        # the end: export the model, wait for the copies
        if evaluation is None and method.evaluates:  # resumed after the last step
            evaluation = _from_rank_zero(method.evaluate(engine), worker, manager)
            check.evaluation(step, evaluation.metrics())
        status.check()
        method.export(engine, job.run_dir / "model")
        manager.finish()
    scores = evaluation.metrics() if evaluation is not None else {}
    return {
        "metrics": {"step": step, **metrics, **scores, **method.summary()},
        "evaluation": evaluation,
        "best_step": best_step,
        "skipped_steps": check.skipped,
    }


def train_in_process(config: dict[str, Any]) -> dict[str, Any]:
    """`train_worker` in this process (Ray Train's local mode), with a process group of its own."""
    with single_process_group():
        return train_worker(config)


def _worker(cluster: Any) -> Worker:
    """This rank as Ray Train placed it."""
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and cluster.workers != 0:
        torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
    return Worker(context.get_world_rank(), context.get_world_size(), device)


def _resume(
    job: TrainJob,
    method: Method,
    manager: CheckpointManager,
    worker: Worker,
    settings: dict[str, Any],
) -> tuple[Any, TrainState | None]:
    """The engine, restored from the run's newest complete checkpoint where there is one."""
    newest: Path | None = manager.find()
    if newest is None:
        return method.build(None), None
    state = checkpoints.read_state(newest)
    check_resume(state, job.recipe, settings, newest)  # the driver has reported the changes
    if state.step > method.total_steps:
        raise ValueError(
            f"train.steps: {newest} has taken {state.step} steps, and the recipe asks for"
            f" {method.total_steps}; ask for at least {state.step}, or give a new --run-id"
        )
    convert = checkpoints.needs_universal(state, worker.world_size)
    engine = method.build(state.world_size if convert else None)
    if convert:
        manager.make_universal(newest, method.zero_stage)
    manager.load(engine, newest, convert)
    if not weights_finite(engine.module, worker):
        raise ValueError(
            f"{newest}: its weights are not finite; remove it to resume from the checkpoint before"
        )
    return engine, state


def _finite_check(
    job: TrainJob, worker: Worker, manager: CheckpointManager, state: TrainState | None
) -> FiniteCheck:
    """What stops the run, or skips a step, when a value is not finite."""

    def report(text: str) -> None:
        if worker.is_rank_zero:
            event(job.run_dir, text)

    def advice(step: int) -> str:
        if (newest := manager.newest) is None:
            return "nothing is exported, and no checkpoint was written; lower train.lr"
        text = (
            f"nothing is exported; the last finite checkpoint is {newest.name}, from which the same"
            " --run-id resumes; lower train.lr"
        )
        if newest == checkpoints.checkpoint_path(job.run_dir, step - 1):  # perhaps as bad as inf
            names = [path.name for path in checkpoints.list_checkpoints(job.run_dir)]
            before = next((f"resume from {name}" for name in names if name < newest.name), None)
            text += f" (and remove it to {before or 'start again'}, if step {step} fails again)"
        return text

    skipped = 0 if state is None else state.skipped_steps
    return FiniteCheck(job.run_id, report, advice, job.recipe.train.skip_nonfinite, skipped)


@contextmanager
def _rank_zero_first(worker: Worker, manager: CheckpointManager) -> Iterator[None]:
    """When all ranks raise Diverged, let rank 0 end its files: Ray ends all at the first error."""
    try:
        yield
    except Diverged:
        if worker.world_size > 1:
            dist.barrier(group=manager.group)
        raise


def _state(
    job: TrainJob,
    method: Method,
    worker: Worker,
    settings: dict[str, Any],
    step: int,
    best: float | None,
    best_step: int | None,
    skipped_steps: int,
) -> TrainState:
    epoch, cursor = method.position(step)
    return TrainState(
        step=step,
        epoch=epoch,
        cursor=cursor,
        seed=job.recipe.seed,
        world_size=worker.world_size,
        zero_stage=method.zero_stage,
        config_hash=checkpoints.settings_hash(settings),
        settings=settings,
        best=best,
        best_step=best_step,
        skipped_steps=skipped_steps,
    )


def _from_rank_zero(value: Any, worker: Worker, manager: CheckpointManager) -> Any:
    """Rank 0's value on every rank. An evaluation may take longer than a step may: the group that
    waits for storage waits for it too."""
    values = [value]
    if worker.world_size > 1:
        dist.broadcast_object_list(values, group=manager.group)
    return values[0]


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0

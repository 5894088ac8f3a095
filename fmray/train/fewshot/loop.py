"""The finetuning loop of one worker: episodes in, a better encoder out.

In: `{"recipe": JSON, "recipe_text": YAML, "run_id": name, "tasks": names}`, paths absolute. Out: on
rank 0 a dict with the last metrics; in the run's folder `log.jsonl` (a line per step), checkpoints
and, at the end, `model/`.

Which episodes a step uses depends on the seed and the step alone. Worker r of w takes every w-th of
them, from the r-th; the gradient is that of their mean, so it is the same for any w.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from fmray.config.fewshot import FewshotRecipe, FewshotTrainConfig
from fmray.data.image_store import ImageStore
from fmray.data.loader import passes_of
from fmray.fewshot import Encoder, finetuning_mode
from fmray.runtime import tracking
from fmray.runtime.run_log import Progress, StatusFile, StepLog, event
from fmray.train import checkpoint as checkpoints
from fmray.train.checkpoint import TrainState
from fmray.train.engine import ZERO_STAGE, TorchEngine, make_engine, single_process_group
from fmray.train.fewshot.encoder import Pictures, export_encoder, load_encoder
from fmray.train.fewshot.evaluate import measure, shots_name, task_samplers
from fmray.train.fewshot.learners import make_learner
from fmray.train.fewshot.select import candidate_tasks
from fmray.train.fewshot.tasks import TrainingSet, read_ahead
from fmray.train.mirror import CheckpointManager
from fmray.train.supervise import PreemptionNotice

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# settings that do not change what is computed
FREE_SETTINGS = ("checkpoint_every", "keep_checkpoints", "eval_every", "eval_split")
EVALUATION_SEED = 1_000_003  # added to the recipe's: not the tasks that jobs/evaluate.py measures


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Finetune, checkpoint, export. Runs on every worker.

    Goes on from the run's newest checkpoint, whatever the number of workers that made it. Told to
    stop (`PreemptionNotice`), it makes a checkpoint and returns with the key `preempted`.

    Raises ValueError for what does not fit.
    """
    recipe = FewshotRecipe.model_validate_json(config["recipe"])
    train = recipe.train
    run_dir = recipe.cluster.storage / config["run_id"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    first = rank == 0
    device = ray.train.torch.get_device() if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and recipe.cluster.workers != 0:
        torch.set_num_threads(max(1, int(recipe.cluster.cpus_per_worker)))

    store = ImageStore.open(recipe.images.store, recipe.images.cache)
    encoder = load_encoder(recipe.encoder).to(device)
    tasks = [
        task
        for task in candidate_tasks(store, recipe, recipe.target)
        if task.name in set(config["tasks"])
    ]
    training = TrainingSet(tasks, store, recipe.episodes, recipe.seed, recipe.select.weights)
    pictures = Pictures(store, encoder.preprocess)
    learner = make_learner(encoder, training, pictures, train, recipe.seed, device)
    settings = training_settings(recipe, config["tasks"])
    copies = CheckpointManager.open(recipe.cluster, run_dir)
    resumed, state = _find_state(copies, settings)
    evaluate = _evaluation(recipe, store, pictures) if train.eval_every is not None else None

    universal = state is not None and checkpoints.needs_universal(state, world_size)
    if universal and train.optimizer == "sgd":  # DeepSpeed converts Adam's states alone
        raise ValueError(
            f"{resumed} was made by {state.world_size} workers with ZeRO and SGD, which can only be"
            f" resumed by as many, not by {world_size}; set cluster.workers back"
        )
    if universal:
        copies.make_universal(resumed, ZERO_STAGE)
    engine = make_engine(learner, train, world_size, universal)
    if state is not None:
        copies.load(engine, resumed, universal)
    start = state.step if state is not None else 0
    if first:
        share = f"{passes_of(train.episodes_per_step, 1, world_size)} episodes"
        text = f"{world_size} ranks, each {share} a step"
        event(run_dir, f"step {start} of {train.steps}; {text}")

    with (
        tracking.open_job_run(recipe, config["run_id"], "train_fewshot", enabled=first) as run,
        StepLog(run_dir / "log.jsonl", keep_until=start, enabled=first) as log,
        Progress(train.steps, start, enabled=first) as progress,
        PreemptionNotice(rank) as notice,
        StatusFile(
            run_dir, "train_fewshot", start, train.steps, recipe.cluster.cpus_per_worker, device
        ) as status,
    ):
        metrics: dict[str, float] = {}
        found: dict[str, float] = {}
        steps = run_steps(
            engine, training, pictures, train, start, rank, world_size, device, notice
        )
        for step, metrics, stop in steps:
            log.write(step, metrics)
            run.log(step, **{f"train/{name}": value for name, value in metrics.items()})
            progress.update(step, metrics)
            evaluate_now = (
                stop is None and evaluate is not None and _due(step, train.eval_every, train.steps)
            )
            if evaluate_now and first:  # the others wait in the report
                found = evaluate(encoder)
                finetuning_mode(engine.module)
                log.write(step, found)
                run.log(step, **{f"eval/{name}": value for name, value in found.items()})
                progress.say(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()))
            if stop is not None or _due(step, train.checkpoint_every, train.steps):
                saved = TrainState(
                    step=step,
                    epoch=step * train.episodes_per_step // recipe.episodes.tasks,
                    cursor=step * train.episodes_per_step % recipe.episodes.tasks,
                    seed=recipe.seed,
                    world_size=world_size,
                    zero_stage=ZERO_STAGE if train.strategy == "zero" else 0,
                    config_hash=checkpoints.settings_hash(settings),
                    settings=settings,
                    best=None,
                    best_step=None,
                )
                run.flush()
                status.check()
                copies.save(engine, saved, config["recipe_text"], train.keep_checkpoints)
            if stop is not None:
                copies.wait()
                return {"preempted": f"{stop}: checkpoint at step {step}"}
            if evaluate_now:  # of checkpoints Ray is not told: its notes of a lost one end a run
                ray.train.report({"step": step, "score": step, **metrics, **found})
        if evaluate is not None and first and not found:  # resumed after the last step
            found = evaluate(encoder)
        status.check()
        if first:
            export_encoder(encoder, run_dir / "model")
        copies.finish()
    return {"metrics": {"step": train.steps, **metrics, **found}}


def train_here(config: dict[str, Any]) -> dict[str, Any]:
    """`train_worker` in this process, for Ray Train's local mode.

    With a process group of its own, gone afterwards.
    """
    with single_process_group():
        return train_worker(config)


def run_steps(
    engine: TorchEngine | DeepSpeedEngine,
    training: TrainingSet,
    pictures: Pictures,
    train: FewshotTrainConfig,
    start: int,
    rank: int,
    world_size: int,
    device: torch.device,
    notice: PreemptionNotice | None = None,
) -> Iterator[tuple[int, dict[str, float], str | None]]:
    """Take the steps after `start`; after each, its number, its metrics over all workers, and why
    to stop now, if so."""
    finetuning_mode(engine.module)
    episodes = train.episodes_per_step
    passes = passes_of(episodes, 1, world_size)
    own = len(range(rank, episodes, world_size))
    # the engine's mean is over passes x workers; what fills up the last pass counts for nothing
    weights = [passes * world_size / episodes] * own + [0.0] * (passes - own)
    order = []
    for step in range(start, train.steps):
        mine = training.order(step, episodes)[rank::world_size]
        order += [*mine, *mine[: passes - own]]
    batches = read_ahead(training, pictures, order)
    for step in range(start + 1, train.steps + 1):
        began = time.monotonic()
        # loss, accuracy, whether to ask for a notice
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for weight, batch in zip(weights, batches, strict=False):  # of all steps
            inputs = (batch.support, batch.query, batch.labels)
            loss, accuracy = engine(*(part.to(device) for part in inputs))
            engine.backward(loss * weight)
            engine.step()
            if weight:
                sums[:2] += torch.stack([loss.detach(), accuracy.detach()])
        if notice is not None:
            sums[2] = notice.should_poll()
        if world_size > 1:
            dist.all_reduce(sums)
        *means, ask = sums.tolist()
        loss_mean, accuracy_mean = (mean / episodes for mean in means)
        metrics = {
            "loss": loss_mean,
            "accuracy": accuracy_mean,
            "episodes_per_s": episodes / (time.monotonic() - began),
        }
        norm = engine.get_global_grad_norm()
        if norm is not None:
            metrics["grad_norm"] = float(norm)
        yield step, metrics, notice.poll() if notice is not None and ask else None


def _evaluation(
    recipe: FewshotRecipe, store: ImageStore, pictures: Pictures
) -> Callable[[Encoder], dict[str, float]]:
    """What measures an encoder on the target: mean accuracy by `accuracy/N-shot` (`variable-shot`).

    Raises ValueError for a target without images in that split, or too few for a task.
    """
    split = recipe.train.eval_split or recipe.target.split
    target = recipe.target.model_copy(update={"split": split})
    rows = store.select(target.collection, split)
    seed = recipe.seed + EVALUATION_SEED
    samplers = task_samplers(store, rows, target, recipe.evaluate, seed)

    def evaluate(encoder: Encoder) -> dict[str, float]:
        found = measure(encoder, pictures, rows, samplers, recipe.evaluate)
        return {f"accuracy/{shots_name(n)}": float(values.mean()) for n, values in found.items()}

    return evaluate


def _due(step: int, every: int | None, last: int) -> bool:
    return step == last or (every is not None and step % every == 0)


def training_settings(recipe: FewshotRecipe, tasks: Sequence[str]) -> dict[str, Any]:
    """Dotted settings that decide what a run computes, the chosen tasks among them."""
    values = recipe.model_dump(mode="json", include={"seed", "encoder", "episodes", "train"})
    for name in FREE_SETTINGS:
        values["train"].pop(name)
    values |= {"tasks": list(tasks), "weights": recipe.select.weights}
    return checkpoints.flatten_settings(values)


def _find_state(
    copies: CheckpointManager, settings: dict[str, Any]
) -> tuple[Path, TrainState] | tuple[None, None]:
    """The run's newest whole checkpoint, checked against the settings."""
    newest = copies.find()
    if newest is None:
        return None, None
    state = checkpoints.read_state(newest)
    checkpoints.check_settings(state, settings, newest)
    return newest, state

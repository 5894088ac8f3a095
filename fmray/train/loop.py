"""The training loop of one worker: started by Ray Train, stepped by DeepSpeed, read from the top.

In: `{"recipe": JSON, "recipe_text": YAML, "run_id": name}`, paths absolute. Out: on rank 0 a dict
with the last metrics; in the run's folder `log.jsonl` (a line per step), checkpoints and, at the
end, `model/`.

What a step computes does not depend on the number of workers: the loss is the mean over the answer
tokens of the *global* batch, and the level and the noise of a sample are drawn from (seed, step,
sample).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn

from fmray.config import AdaLlavaRecipe
from fmray.data.loader import Batch, InstructionLoader, evaluation_batches
from fmray.data.processor import load_processor
from fmray.runtime import tracking
from fmray.runtime.run_log import Progress, StatusFile, StepLog, event
from fmray.train import checkpoint as checkpoints
from fmray.train.adallava.batches import (
    answer_tokens,
    blank_row,
    draw,
    model_inputs,
    score_answers,
    with_picture,
)
from fmray.train.adallava.model import DTYPES, build_model, merge_lora
from fmray.train.checkpoint import TrainState
from fmray.train.engine import (
    engine_config,
    import_deepspeed,
    make_optimizer,
    make_schedule,
    single_process_group,
)
from fmray.train.mirror import CheckpointManager
from fmray.train.supervise import PreemptionNotice

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import ProcessorMixin


def train_worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """Train, evaluate, checkpoint, export. Runs on every worker.

    Goes on from the run's newest checkpoint, whatever the number of workers that made it. Told to
    stop (`PreemptionNotice`), it makes a checkpoint and returns with the key `preempted`.

    Raises ValueError for what does not fit.
    """
    recipe = AdaLlavaRecipe.model_validate_json(config["recipe"])
    run_dir = recipe.cluster.storage / config["run_id"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    first = rank == 0
    device = ray.train.torch.get_device() if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and recipe.cluster.workers != 0:
        torch.set_num_threads(max(1, int(recipe.cluster.cpus_per_worker)))
    deepspeed = import_deepspeed()

    processor = load_processor(recipe.data.store / "processor")
    loader = InstructionLoader(
        recipe.data.store,
        "train",
        processor,
        global_batch=recipe.train.global_batch,
        rank=rank,
        world_size=world_size,
        seed=recipe.seed,
        samples=recipe.data.samples,
        max_length=recipe.data.max_length,
        micro_batch=recipe.train.micro_batch,
        threads=recipe.data.loader_threads,
        prefetch=recipe.data.prefetch_batches,
    )
    passes = loader.passes
    model = build_model(recipe, processor)
    levels = _levels(recipe, model) if recipe.adaptive is not None else None
    total = recipe.train.steps or max(1, round(recipe.train.epochs * loader.steps_per_epoch))
    blank = blank_row(processor)

    copies = CheckpointManager.open(recipe.cluster, run_dir)
    resumed, state = _find_state(recipe, copies)
    universal = state is not None and checkpoints.needs_universal(state, world_size)
    if universal:
        copies.make_universal(resumed, recipe.zero.stage)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, recipe),
        lr_scheduler=lambda optimizer: make_schedule(optimizer, recipe, total),
        config=engine_config(recipe, world_size, universal),
        dist_init_required=False,
    )
    if state is not None:
        copies.load(engine, resumed, universal)
    step = state.step if state is not None else 0
    best, best_step = (state.best, state.best_step) if state is not None else (None, None)
    if first:
        micro_batch = recipe.train.micro_batch
        full = recipe.train.global_batch == passes * micro_batch * world_size
        share = f"{passes} passes of {'' if full else 'at most '}{micro_batch} samples"
        event(run_dir, f"step {step} of {total}; {world_size} ranks, each {share} a step")

    with (
        tracking.open_job_run(recipe, config["run_id"], "train", enabled=first) as run,
        StepLog(run_dir / "log.jsonl", keep_until=step, enabled=first) as log,
        Progress(total, step, enabled=first) as progress,
        PreemptionNotice(rank) as notice,
        StatusFile(run_dir, "train", step, total, recipe.cluster.cpus_per_worker, device) as status,
    ):
        metrics: dict[str, float] = {}
        found: dict[str, float] = {}
        started, waited = time.monotonic(), loader.wait_seconds
        for micro_batches in _steps(loader, step, total):
            assert len(micro_batches) == passes, (len(micro_batches), passes)
            engine.train()
            [tokens_learned] = _sum([sum(answer_tokens(batch) for batch in micro_batches)], device)
            loss_sum = torch.zeros((), device=device)
            share_sum, rows = 0.0, 0
            for batch in micro_batches:
                batch = with_picture(batch, blank)
                inputs = model_inputs(batch, DTYPES[recipe.model.dtype], device)
                if levels is not None:
                    units_on, noise = draw(batch, recipe.seed, step, levels)
                    if not batch.filler:
                        share_sum += float(model.share_of(units_on).sum())
                        rows += len(units_on)
                    inputs |= {"units_on": units_on.to(device), "noise": noise.to(device)}
                loss = engine(**inputs).loss * answer_tokens(batch)
                # DeepSpeed takes the mean over workers and micro batches; this makes it the mean
                # over tokens
                engine.backward(loss * (world_size * passes / tokens_learned))
                engine.step()
                loss_sum += loss.detach()
            step += 1

            learned = [batch for batch in micro_batches if not batch.filler]
            tokens = sum(int(batch.attention_mask.sum()) for batch in learned)
            sums = _sum([float(loss_sum), share_sum, rows, tokens, notice.should_poll()], device)
            stop = notice.poll() if sums[4] else None
            seconds, waiting = time.monotonic() - started, loader.wait_seconds - waited
            metrics = {
                "loss": sums[0] / tokens_learned,
                "lr": float(engine.get_lr()[0]),
                "tokens_per_s": sums[3] / seconds,
                "waiting_share": waiting / seconds,
            }
            norm = engine.get_global_grad_norm()  # None for stage 0 in float32
            if norm is not None:
                metrics["grad_norm"] = float(norm)
            if levels is not None:
                metrics["budget"] = sums[1] / sums[2]
            log.write(step, metrics)
            run.log(step, **{f"train/{name}": value for name, value in metrics.items()})
            progress.update(step, metrics)

            last = step == total
            evaluate_now = stop is None and (last or _due(step, recipe.train.eval_every))
            save_now = stop is not None or last or _due(step, recipe.train.checkpoint_every)
            if evaluate_now:
                found = evaluate_budgets(engine, recipe, processor, rank, world_size, device)
                accuracies = [value for name, value in found.items() if name.startswith("accuracy")]
                score = sum(accuracies) / len(accuracies)
                log.write(step, found)
                run.log(step, **{f"eval/{name}": value for name, value in found.items()})
                progress.say(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()))
            if save_now:
                if evaluate_now and (best is None or score > best):
                    best, best_step = score, step
                settings = checkpoints.training_settings(recipe)
                saved = TrainState(
                    step=step,
                    epoch=step // loader.steps_per_epoch,
                    cursor=step % loader.steps_per_epoch,
                    seed=recipe.seed,
                    world_size=world_size,
                    zero_stage=recipe.zero.stage,
                    config_hash=checkpoints.settings_hash(settings),
                    settings=settings,
                    best=best,
                    best_step=best_step,
                )
                run.flush()
                status.check()
                copies.save(engine, saved, config["recipe_text"], recipe.train.keep_checkpoints)
            if stop is not None:
                copies.wait()
                return {"preempted": f"{stop}: checkpoint at step {step}"}
            if evaluate_now:  # of checkpoints Ray is not told: its notes of a lost one end a run
                ray.train.report({"step": step, "score": score, **metrics, **found})
            started, waited = time.monotonic(), loader.wait_seconds

        if not found:  # resumed after the last step: there was nothing left to train
            found = evaluate_budgets(engine, recipe, processor, rank, world_size, device)
        weights = checkpoints.full_state(model)
        status.check()
        if first:
            if recipe.model.lora is not None:
                weights = merge_lora(weights, recipe.model.lora.alpha, recipe.model.lora.rank)
            plain = build_model(recipe, processor, lora=False)
            checkpoints.export_model(plain, weights, processor, run_dir / "model")
        copies.finish()
    return {
        "metrics": {"step": step, **metrics, **found, **_operations(recipe, model)},
        "best_step": best_step,
    }


def train_here(config: dict[str, Any]) -> dict[str, Any] | None:
    """`train_worker` in this process, for Ray Train's local mode.

    With a process group of its own, gone afterwards.
    """
    with single_process_group():
        return train_worker(config)


def evaluate_budgets(
    engine: DeepSpeedEngine,
    recipe: AdaLlavaRecipe,
    processor: ProcessorMixin,
    rank: int,
    world_size: int,
    device: torch.device,
) -> dict[str, float]:
    """Share of validation answers that are right in every token, and loss per answer token.

    At each of `train.eval_budgets` (without one for a base model), teacher-forced, over
    `train.eval_rows` answers. Layers are masked, not skipped: every rank runs the same modules,
    which ZeRO-3 needs. Every rank must call this.
    """
    blank = blank_row(processor)
    batches = list(
        evaluation_batches(
            recipe.data.store,
            "validation",
            processor,
            recipe.train.micro_batch,
            rows=recipe.train.eval_rows,
            rank=rank,
            world_size=world_size,
        )
    )
    engine.eval()
    results: dict[str, float] = {}
    for budget in recipe.train.eval_budgets if recipe.adaptive is not None else (None,):
        totals = torch.zeros(
            4, dtype=torch.float64, device=device
        )  # answers, right ones, tokens, loss
        for batch in batches:
            batch = with_picture(batch, blank)
            inputs = model_inputs(batch, DTYPES[recipe.model.dtype], device)
            labels = inputs.pop("labels")
            if budget is not None:
                _, noise = draw(batch, recipe.seed, 0, range(engine.module.layout.num_units + 1))
                # labels say where the prompt ends
                inputs |= {"labels": labels, "budget": budget, "noise": noise.to(device)}
                inputs["execution"] = "masked"
            with torch.no_grad():
                logits = engine(**inputs).logits
            if not batch.filler:
                totals += torch.stack(score_answers(logits, labels)).sum(1)
        dist.all_reduce(totals)
        name = "base" if budget is None else f"{budget:g}"
        answers, right, tokens, loss = totals.tolist()
        results |= {f"accuracy/{name}": right / answers, f"loss/{name}": loss / tokens}
    return results


def _find_state(
    recipe: AdaLlavaRecipe, copies: CheckpointManager
) -> tuple[Path, TrainState] | tuple[None, None]:
    """The run's newest whole checkpoint, checked against the recipe."""
    newest = copies.find()
    if newest is None:
        return None, None
    state = checkpoints.read_state(newest)
    checkpoints.check_state(state, recipe, newest)
    return newest, state


def _levels(recipe: AdaLlavaRecipe, model: nn.Module) -> range:
    """The numbers of switches that training draws from.

    Raises ValueError for a budget that no plan can keep.
    """
    tokens = recipe.data.max_length
    for budget in recipe.train.eval_budgets:
        model.cost.max_units(budget, tokens)
    smallest = recipe.adaptive.min_budget
    lowest = 0 if smallest is None else model.cost.max_units(smallest, tokens)
    return range(lowest, model.layout.num_units + 1)


def _operations(recipe: AdaLlavaRecipe, model: nn.Module) -> dict[str, float]:
    """What a prefill of `data.max_length` tokens costs by the cost model.

    `operations/BUDGET` and, of the full decoder's layers, `share/BUDGET`; their means `operations`
    and `share`; {} for a base model.
    """
    if recipe.adaptive is None:
        return {}
    cost, tokens, found = model.cost, recipe.data.max_length, {}
    for name, of in (("operations", cost.prefill), ("share", cost.share)):
        values = {b: of(tokens, cost.max_units(b, tokens)) for b in recipe.train.eval_budgets}
        found |= {f"{name}/{b:g}": float(value) for b, value in values.items()}
        found[name] = sum(map(float, values.values())) / len(values)
    return found


def _steps(loader: InstructionLoader, step: int, total: int) -> Iterator[list[Batch]]:
    """This rank's micro batches, a list per optimizer step, from `step` to `total`."""
    while step < total:
        epoch, start = divmod(step, loader.steps_per_epoch)
        for micro_batches in loader.epoch(epoch, start):
            yield micro_batches
            step += 1
            if step == total:
                return


def _sum(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sum over the workers."""
    # float32 would lose whole tokens above 2**24
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0

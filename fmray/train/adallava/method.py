"""How an AdaLLaVA model, or its base model, is trained: the `adallava` method.

The loss is the mean over the answer tokens of the *global* batch, and the number of units and the
noise of a sample are drawn from (seed, step, sample), so that a step computes the same on any
number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fmray.config import AdaLlavaRecipe
from fmray.data.loader import Batch, InstructionLoader, evaluation_batches, evaluation_samples
from fmray.data.processor import load_processor, unknown_token
from fmray.data.store import StoreSplit
from fmray.runtime.run_log import event
from fmray.train.adallava.batches import (
    answer_tokens,
    blank_row,
    draw,
    model_inputs,
    score_answers,
    with_image,
)
from fmray.train.adallava.model import DTYPES, build_model, merge_lora
from fmray.train.checkpoint import export_model, full_state
from fmray.train.engine import (
    engine_config,
    import_deepspeed,
    make_optimizer,
    make_schedule,
    scaled,
)
from fmray.train.method import Evaluation, Score, TrainJob, Worker

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class AdaLlavaMethod:
    """See `fmray.train.method.Method`. Stepped by DeepSpeed."""

    evaluates = True

    def __init__(self, job: TrainJob, worker: Worker) -> None:
        recipe: AdaLlavaRecipe = job.recipe
        self._recipe, self._worker = recipe, worker
        self._deepspeed = import_deepspeed()
        self._dtype = DTYPES[recipe.model.dtype]
        self._processor = load_processor(recipe.data.store / "processor")
        self._loader = InstructionLoader(
            recipe.data.store,
            "train",
            self._processor,
            global_batch=recipe.train.global_batch,
            rank=worker.rank,
            world_size=worker.world_size,
            seed=recipe.seed,
            samples=recipe.data.samples,
            max_length=recipe.data.max_length,
            micro_batch=recipe.train.micro_batch,
            threads=recipe.data.loader_threads,
            prefetch=recipe.data.prefetch_batches,
        )
        held_out = StoreSplit(recipe.data.store, "validation")
        evaluated = evaluation_samples(held_out, recipe.train.eval_rows, recipe.data.max_length)
        if worker.is_rank_zero and (self._loader.samples.left_out or evaluated.left_out):
            event(job.run_dir, f"training on {self._loader.samples}; evaluation on {evaluated}")
        self._model = build_model(recipe, self._processor)
        self._levels = self._trained_levels() if recipe.adaptive is not None else None
        self._blank = blank_row(self._processor)

        epochs = round(recipe.train.epochs * self._loader.steps_per_epoch)
        self.total_steps = recipe.train.steps or max(1, epochs)
        self.zero_stage = recipe.zero.stage
        passes, micro_batch = self._loader.passes, recipe.train.micro_batch
        full = recipe.train.global_batch == passes * micro_batch * worker.world_size
        self.share = (
            f"{passes} {'pass' if passes == 1 else 'passes'} of"
            f" {'' if full else 'at most '}{micro_batch} samples"
        )

    def build(self, resumed_from: int | None) -> DeepSpeedEngine:
        """The DeepSpeed engine of the recipe's ZeRO stage."""
        recipe = self._recipe
        engine, _, _, _ = self._deepspeed.initialize(
            model=self._model,
            optimizer=make_optimizer(self._model, recipe),
            lr_scheduler=lambda optimizer: make_schedule(optimizer, recipe, self.total_steps),
            config=engine_config(recipe, self._worker.world_size, resumed_from is not None),
            dist_init_required=False,
        )
        return engine

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, steps done in it)."""
        return divmod(step, self._loader.steps_per_epoch)

    def steps(self, engine: DeepSpeedEngine, start: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield (step, metrics) after each optimizer step on a global batch."""
        loader, worker = self._loader, self._worker
        began, waited = time.monotonic(), loader.wait_seconds
        for step, micro_batches in enumerate(self._micro_batches(start), start):
            assert len(micro_batches) == loader.passes, (len(micro_batches), loader.passes)
            engine.train()
            [learned] = worker.sum([sum(answer_tokens(batch) for batch in micro_batches)])

            # forward, backward and step for each micro batch; DeepSpeed steps at the last one
            loss_sum = torch.zeros((), device=worker.device)
            share_sum, rows = 0.0, 0
            worker.passes = []
            for batch in micro_batches:
                inputs, share = self._training_inputs(batch, step)
                if share is not None:
                    share_sum += float(share.sum())
                    rows += len(share)
                loss = engine(**inputs).loss * answer_tokens(batch)
                # DeepSpeed averages over ranks and micro batches; this gives the mean over tokens
                engine.backward(scaled(loss, worker.world_size * loader.passes / learned))
                engine.step()
                loss_sum += loss.detach()
                worker.passes.append((partial(loader.ids, batch.rows), loss.detach()))
            if not engine.was_step_applied():
                engine.lr_scheduler.step()  # the rate depends on the number of the step alone

            # metrics of the global batch
            tokens = sum(int(b.attention_mask.sum()) for b in micro_batches if not b.filler)
            norm = float(engine.get_global_grad_norm())
            sums = worker.end_step([float(loss_sum), share_sum, rows, tokens, norm])
            seconds, waiting = time.monotonic() - began, loader.wait_seconds - waited
            metrics = {
                "loss": sums[0] / learned,
                "grad_norm": sums[4] / worker.world_size,  # every rank has the global one
                "lr": float(engine.get_lr()[0]),
                "tokens_per_s": sums[3] / seconds,
                "waiting_share": waiting / seconds,
            }
            if self._levels is not None:
                metrics["budget"] = sums[1] / sums[2]
            yield step + 1, metrics
            began, waited = time.monotonic(), loader.wait_seconds  # without evaluation and saving

    def evaluate(self, engine: DeepSpeedEngine) -> Evaluation:
        """Score the validation answers at each of `train.eval_budgets` (a base model: once).

        Teacher-forced, over the answers of the first `train.eval_rows` rows (those of at most
        `data.max_length` tokens): the share that is right in every token, and the loss per answer
        token. Layers are masked, not skipped: every rank runs the same modules, which ZeRO-3 needs.
        """
        recipe, worker = self._recipe, self._worker
        unknown = unknown_token(self._processor)
        batches = list(
            evaluation_batches(
                recipe.data.store,
                "validation",
                self._processor,
                recipe.train.micro_batch,
                rows=recipe.train.eval_rows,
                rank=worker.rank,
                world_size=worker.world_size,
                max_length=recipe.data.max_length,
            )
        )
        engine.eval()
        scores = []
        for budget in recipe.train.eval_budgets if recipe.adaptive is not None else (None,):
            # answers, right ones, tokens, loss
            totals = torch.zeros(4, dtype=torch.float64, device=worker.device)
            for batch in batches:
                logits, labels = self._logits(engine, batch, budget)
                if not batch.filler:
                    totals += torch.stack(score_answers(logits, labels, unknown)).sum(1)
            dist.all_reduce(totals)
            answers, right, tokens, loss = totals.tolist()
            name = "base" if budget is None else f"{budget:g}"
            scores.append(Score(name, right / answers, loss / tokens, budget))
        return Evaluation(tuple(scores))

    def export(self, engine: DeepSpeedEngine, target: Path) -> None:
        """Write safetensors and processor, LoRA folded into the weights."""
        recipe = self._recipe
        weights = full_state(self._model)
        if not self._worker.is_rank_zero:
            return
        if recipe.model.lora is not None:
            weights = merge_lora(weights, recipe.model.lora.alpha, recipe.model.lora.rank)
        plain = build_model(recipe, self._processor, lora=False)
        export_model(plain, weights, self._processor, target)

    def summary(self) -> dict[str, float]:
        """Cost of a prefill of `data.max_length` tokens by the cost model; {} for a base model.

        `operations/BUDGET`, `share/BUDGET` (of the full decoder's layers), and their means
        `operations` and `share`.
        """
        recipe, values = self._recipe, {}
        if recipe.adaptive is None:
            return {}
        cost, tokens = self._model.cost, recipe.data.max_length
        for name, value_of in (("operations", cost.prefill), ("share", cost.share)):
            each = {
                budget: float(value_of(tokens, cost.max_units(budget, tokens)))
                for budget in recipe.train.eval_budgets
            }
            values |= {f"{name}/{budget:g}": value for budget, value in each.items()}
            values[name] = sum(each.values()) / len(each)
        return values

    def _trained_levels(self) -> range:
        """Numbers of units that training draws from.

        Raises ValueError for a budget that no plan can keep.
        """
        recipe, model = self._recipe, self._model
        tokens = recipe.data.max_length
        for budget in recipe.train.eval_budgets:
            model.cost.max_units(budget, tokens)
        smallest = recipe.adaptive.min_budget
        lowest = 0 if smallest is None else model.cost.max_units(smallest, tokens)
        return range(lowest, model.layout.num_units + 1)

    def _micro_batches(self, step: int) -> Iterator[list[Batch]]:
        """This rank's micro batches, a list per optimizer step, from `step` to the last."""
        while step < self.total_steps:
            epoch, start = self.position(step)
            for micro_batches in self._loader.epoch(epoch, start):
                yield micro_batches
                step += 1
                if step == self.total_steps:
                    return

    def _training_inputs(self, batch: Batch, step: int) -> tuple[dict, Tensor | None]:
        """The model's arguments, and each row's share of operations (None: filler, or no plan)."""
        batch = with_image(batch, self._blank)
        inputs = model_inputs(batch, self._dtype, self._worker.device)
        if self._levels is None:
            return inputs, None
        units_on, noise = draw(batch, self._recipe.seed, step, self._levels)
        device = self._worker.device
        inputs |= {"units_on": units_on.to(device), "noise": noise.to(device)}
        return inputs, None if batch.filler else self._model.share_of(units_on)

    def _logits(
        self, engine: DeepSpeedEngine, batch: Batch, budget: float | None
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, n, V] under a budget, and the labels [B, n]."""
        batch = with_image(batch, self._blank)
        inputs = model_inputs(batch, self._dtype, self._worker.device)
        labels = inputs.pop("labels")
        if budget is not None:
            levels = range(engine.module.layout.num_units + 1)
            _, noise = draw(batch, self._recipe.seed, 0, levels)
            # labels say where the prompt ends
            inputs |= {"labels": labels, "budget": budget, "noise": noise.to(labels.device)}
            inputs["execution"] = "masked"
        with torch.no_grad():
            return engine(**inputs).logits, labels

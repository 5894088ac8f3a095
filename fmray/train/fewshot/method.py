"""Finetuning of an image encoder on episodes: the `fewshot` method of the training loop.

The episodes of a step depend on the seed and the step alone. Rank r of w takes every w-th of them,
starting with the r-th. The gradient is that of their mean, so it does not depend on w.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fmray.config.fewshot import FewshotRecipe, FewshotTrainConfig
from fmray.data.image_store import ImageStore
from fmray.data.loader import passes_of
from fmray.errors import NotFinite
from fmray.fewshot import Encoder, finetuning_mode
from fmray.train.engine import ZERO_STAGE, TorchEngine, make_engine, scaled
from fmray.train.fewshot.encoder import ImageReader, export_encoder, load_encoder
from fmray.train.fewshot.evaluate import measure_accuracy, shots_name, task_samplers
from fmray.train.fewshot.learners import make_learner
from fmray.train.fewshot.select import candidate_tasks
from fmray.train.fewshot.tasks import TrainingSet, read_ahead
from fmray.train.method import Evaluation, Score, TrainJob, Worker

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

EVALUATION_SEED = 1_000_003  # added to the seed: other tasks than those of jobs/evaluate.py


class FewshotMethod:
    """See `fmray.train.method.Method`. The engine is plain torch (DDP) or DeepSpeed ZeRO."""

    def __init__(self, job: TrainJob, worker: Worker) -> None:
        recipe: FewshotRecipe = job.recipe
        train = recipe.train
        self._recipe, self._worker = recipe, worker
        store = ImageStore.open(recipe.images.store, recipe.images.cache)
        self._encoder = load_encoder(recipe.encoder).to(worker.device)
        chosen = set(job.tasks)
        tasks = [t for t in candidate_tasks(store, recipe, recipe.target) if t.name in chosen]
        self._training = TrainingSet(
            tasks, store, recipe.episodes, recipe.seed, recipe.select.weights
        )
        self._images = ImageReader(store, self._encoder.preprocess)
        self._learner = make_learner(
            self._encoder, self._training, self._images, train, recipe.seed, worker.device
        )
        self.evaluates = train.eval_every is not None
        self._measure = _evaluation(recipe, store, self._images) if self.evaluates else None

        self.total_steps = train.steps
        self.zero_stage = ZERO_STAGE if train.strategy == "zero" else 0
        self.share = f"{passes_of(train.episodes_per_step, 1, worker.world_size)} episodes"

    def build(self, resumed_from: int | None) -> TorchEngine | DeepSpeedEngine:
        """Return the engine of `train.strategy`.

        Raises:
            ValueError: ZeRO states of SGD that another number of ranks has sharded.
        """
        train, world_size = self._recipe.train, self._worker.world_size
        if resumed_from is not None and train.optimizer == "sgd":
            # DeepSpeed converts only Adam's states
            raise ValueError(
                f"the checkpoint was made by {resumed_from} workers with ZeRO and SGD, which can"
                f" only be resumed by as many, not by {world_size}; set cluster.workers back"
            )
        return make_engine(self._learner, train, world_size, resumed_from is not None)

    def position(self, step: int) -> tuple[int, int]:
        """Return (epochs over all episodes, episodes used since)."""
        return divmod(step * self._recipe.train.episodes_per_step, self._recipe.episodes.tasks)

    def steps(
        self, engine: TorchEngine | DeepSpeedEngine, start: int
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield (step, metrics) after each optimizer step."""
        train = self._recipe.train
        return run_steps(engine, self._training, self._images, train, start, self._worker)

    def evaluate(self, engine: TorchEngine | DeepSpeedEngine) -> Evaluation | None:
        """Return the mean accuracy on the target's tasks by number of shots; rank 0 measures it."""
        if not self._worker.is_rank_zero:
            return None
        evaluation = self._measure(self._encoder)
        finetuning_mode(engine.module)
        return evaluation

    def export(self, engine: TorchEngine | DeepSpeedEngine, target: Path) -> None:
        """Write the encoder, without the head or temperature trained on top of it."""
        if self._worker.is_rank_zero:
            export_encoder(self._encoder, target)

    def summary(self) -> dict[str, float]:
        """Return nothing: an encoder has no metrics that do not depend on training."""
        return {}


def run_steps(
    engine: TorchEngine | DeepSpeedEngine,
    training: TrainingSet,
    images: ImageReader,
    train: FewshotTrainConfig,
    start: int,
    worker: Worker,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Take the steps after `start`; yield each step's number and its metrics over all ranks."""
    finetuning_mode(engine.module)
    episodes, rank, world_size = train.episodes_per_step, worker.rank, worker.world_size
    passes = passes_of(episodes, 1, world_size)
    # The engine averages over passes x ranks. A rank with fewer episodes than passes repeats one
    # with weight 0.
    of_rank = len(range(rank, episodes, world_size))
    weights = [passes * world_size / episodes] * of_rank + [0.0] * (passes - of_rank)
    order = []
    for step in range(start, train.steps):
        mine = training.order(step, episodes)[rank::world_size]
        order += [*mine, *mine[: passes - of_rank]]
    batches, indices = read_ahead(training, images, order), iter(order)
    for step in range(start + 1, train.steps + 1):
        began = time.monotonic()
        sums = torch.zeros(2, dtype=torch.float64, device=worker.device)  # loss, accuracy
        worker.passes = []
        for weight, index, batch in zip(weights, indices, batches, strict=False):  # of this step
            inputs = (batch.support, batch.query, batch.labels)
            loss, accuracy = engine(*(part.to(worker.device) for part in inputs))
            engine.backward(scaled(loss, weight))
            engine.step()
            worker.passes.append((partial(training.name, index), loss.detach()))
            if weight:
                sums += torch.stack([loss.detach(), accuracy.detach()])
        norm = float(engine.get_global_grad_norm())
        loss_sum, accuracy_sum, norm_sum = worker.end_step([*sums.tolist(), norm])
        yield (
            step,
            {
                "loss": loss_sum / episodes,
                "accuracy": accuracy_sum / episodes,
                "episodes_per_s": episodes / (time.monotonic() - began),
                "grad_norm": norm_sum / world_size,  # every rank has the global one
            },
        )


def _evaluation(
    recipe: FewshotRecipe, store: ImageStore, images: ImageReader
) -> Callable[[Encoder], Evaluation]:
    """Return a function that evaluates an encoder on the target; scores are named `N-shot`.

    They are NaN for an encoder whose features are not finite.

    Raises:
        ValueError: a target with no images in that split, or too few for a task.
    """
    split = recipe.train.eval_split or recipe.target.split
    target = recipe.target.model_copy(update={"split": split})
    rows = store.select(target.collection, split)
    seed = recipe.seed + EVALUATION_SEED
    samplers = task_samplers(store, rows, target, recipe.evaluate, seed)

    def evaluate(encoder: Encoder) -> Evaluation:
        try:
            values = measure_accuracy(encoder, images, rows, samplers, recipe.evaluate)
        except NotFinite:
            values = {shots: np.array([np.nan]) for shots in samplers}
        return Evaluation(
            tuple(Score(shots_name(n), float(accuracy.mean())) for n, accuracy in values.items())
        )

    return evaluate

"""What tells one kind of training from another: the `Method` that `loop.py` drives.

A method is built on every rank from a `TrainJob` and a `Worker`. It knows the model, the data and
the loss; everything else (resume, logging, evaluation schedule, checkpoints, preemption, export
schedule, registry) is the loop's and the launcher's, and is therefore the same for every kind.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fmray.config import BaseRecipe
from fmray.train.supervise import PreemptionNotice

#: kind of recipe -> its method's class, imported in the workers only (it takes seconds)
METHODS = {
    "adallava": "fmray.train.adallava.method:AdaLlavaMethod",
    "fewshot": "fmray.train.fewshot.method:FewshotMethod",
}

#: kind of recipe -> the name of the job in MLflow and in the run's status file
JOB_NAMES = {"adallava": "train", "fewshot": "train_fewshot"}


@dataclass(frozen=True)
class TrainJob:
    """What the driver hands to every worker."""

    recipe: BaseRecipe  #: paths are absolute
    recipe_text: str  #: YAML with the origin of each value, stored in every checkpoint
    run_id: str
    tasks: tuple[str, ...] = ()  #: names of the tasks to finetune on (few-shot only)

    @property
    def run_dir(self) -> Path:
        """Folder of the run: log, checkpoints, exported model."""
        return self.recipe.cluster.storage / self.run_id


@dataclass(frozen=True)
class Score:
    """Accuracy in [0, 1] and loss per answer token in nats at one operating point."""

    name: str  #: "0.5" (a budget), "base", "5-shot"; the end of the metric's name
    accuracy: float
    loss: float | None = None
    budget: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The scores of one evaluation, in order."""

    scores: tuple[Score, ...]

    @property
    def accuracy(self) -> float:
        """Mean accuracy over the operating points: decides which checkpoint is the best."""
        return sum(score.accuracy for score in self.scores) / len(self.scores)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4f}" for name, value in self.metrics().items())

    def metrics(self) -> dict[str, float]:
        """`accuracy/NAME` and `loss/NAME`, as logged."""
        values = {f"accuracy/{score.name}": score.accuracy for score in self.scores}
        return values | {f"loss/{s.name}": s.loss for s in self.scores if s.loss is not None}


@dataclass
class Worker:
    """This rank: its place among the others, its device, and the sum that ends each step."""

    rank: int
    world_size: int
    device: torch.device
    preemption: PreemptionNotice | None = field(default=None, repr=False)
    stop_reason: str | None = None  #: set by `end_step` when this run has been told to stop
    #: of each pass of this rank in the last step: what names its samples, and its loss
    passes: list[tuple[Callable[[], list[str]], Tensor]] = field(default_factory=list, repr=False)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank logs, tracks and exports."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the ranks; every rank must call this."""
        if self.world_size == 1:
            return list(map(float, values))
        # float32 would lose whole tokens above 2**24
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def end_step(self, values: Sequence[float]) -> list[float]:
        """`sum`, and in the same all-reduce whether any rank wants to look for a preemption."""
        *sums, due = self.sum([*values, self.preemption.should_poll() if self.preemption else 0.0])
        if due:
            self.stop_reason = self.preemption.poll()
        return sums


class Method(Protocol):
    """One kind of training on one rank. Every rank calls the same methods in the same order."""

    #: optimizer steps of the run
    total_steps: int
    #: ZeRO stage whose states are sharded over ranks; 0: every rank has them all
    zero_stage: int
    #: what a step is, for the log: "2 passes of 16 samples"
    share: str
    #: whether the last step, and every `train.eval_every` steps, are evaluated
    evaluates: bool

    def __init__(self, job: TrainJob, worker: Worker) -> None:
        """Load data and model. Raises ValueError for what does not fit the recipe."""

    def build(self, resumed_from: int | None) -> Any:
        """Return the engine (DeepSpeed's, or `TorchEngine`) around the model.

        Args:
            resumed_from: number of ranks whose sharded states will be converted and loaded
                (DeepSpeed's universal checkpoint); None: nothing is converted.

        Raises ValueError where such a checkpoint cannot be converted.
        """

    def steps(self, engine: Any, start: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Take the optimizer steps after `start`; yield each step's number and metrics.

        Each step ends with `Worker.end_step`. The metrics are those of the global batch. A step
        whose loss or gradient is not finite changes no weight, and sets `Worker.passes` too.
        """

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, steps done in it) after `step` optimizer steps."""

    def evaluate(self, engine: Any) -> Evaluation | None:
        """Evaluate the model in training; None on ranks that do not know the result."""

    def export(self, engine: Any, target: Path) -> None:
        """Rank 0 writes the trained model to `target`; every rank must call this."""

    def summary(self) -> dict[str, float]:
        """Metrics of the model that do not depend on training, such as its operations."""


def create_method(job: TrainJob, worker: Worker) -> Method:
    """The method of the job's kind of recipe."""
    module, _, name = METHODS[job.recipe.kind].partition(":")
    return getattr(importlib.import_module(module), name)(job, worker)

"""What a loss, gradient norm, evaluation or weight that is not finite does to a run; and spikes.

The optimizer never applies a gradient that is not finite (`fmray.train.engine`), so the weights
stay those of the step before. The run then stops, or continues with the next step if
`train.skip_nonfinite` allows it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fmray.errors import GaveUp
from fmray.train.method import Worker

SPIKE = 10.0  # a value so many times the median of the last ones is reported
WINDOW = 100  # steps that the median is taken over; a series reports one spike in so many steps
FEWEST = 10  # steps before the first report
LISTED = 8  # samples and ranks that a message names

_NAMES = {"loss": "loss", "grad_norm": "gradient norm"}


class Diverged(GaveUp):
    """A value of the run is not finite; every rank raises it."""


class FiniteCheck:
    """Checks a run's values: raises for one that is not finite, and reports spikes.

    Every rank has one. They are given the same values, so they come to the same verdicts.
    """

    def __init__(
        self,
        run_id: str,
        report: Callable[[str], None],
        advice: Callable[[int], str],
        allowed: int = 0,
        skipped: int = 0,
        setting: str = "train.skip_nonfinite",
    ) -> None:
        """Start to check.

        Args:
            report: shows a line.
            advice: returns what the user can do when the run stops at a step.
            allowed: number of steps that may be skipped, which is `setting`.
            skipped: steps that the run has skipped so far.
        """
        self.skipped = skipped
        self._run_id, self._report, self._advice = run_id, report, advice
        self._allowed, self._setting = allowed, setting
        self._spikes = {name: Spikes() for name in _NAMES}

    def step(self, step: int, metrics: Mapping[str, float], samples: Callable[[], str]) -> bool:
        """Check the metrics of a step; return whether it counts, False if it was skipped.

        Args:
            samples: returns which samples the step had; called if it is not finite.

        Raises:
            Diverged: a value is not finite, and no more steps may be skipped.
        """
        values = {name: metrics[name] for name in _NAMES if name in metrics}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            for name, value in values.items():
                if (usual := self._spikes[name].add(step, value)) is not None:
                    self._report(
                        f"step {step}: {_NAMES[name]} {value:.4g} is {value / usual:.0f} times the"
                        " median of the last steps"
                    )
            return True
        text = f"the {_NAMES[bad[0]]} is not finite ({samples()})"
        if self.skipped >= self._allowed:
            already = f"; {self.skipped} steps were skipped before" if self.skipped else ""
            hint = "" if self._allowed else f", or set {self._setting} to skip such steps"
            raise self._stopped(step, text + already, hint)
        self.skipped += 1
        self._report(
            f"step {step}: {text}; skipped, {self.skipped} of {self._setting}: {self._allowed}"
        )
        return False

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Raise Diverged if a score is not finite."""
        for name, value in scores.items():
            if not math.isfinite(value):
                raise self._stopped(step, f"{name} of the evaluation is not finite")

    def weights(self, step: int, finite: bool) -> None:
        """Raise Diverged unless the weights are finite."""
        if not finite:
            raise self._stopped(step, "the weights are not finite")

    def _stopped(self, step: int, text: str, hint: str = "") -> Diverged:
        return Diverged(f"run {self._run_id}: step {step}: {text}; {self._advice(step)}{hint}")


class Spikes:
    """Finds values far above the median of the last ones."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._quiet_until = 0

    def add(self, step: int, value: float) -> float | None:
        """Add a value; return the median before it if it is a spike, and none was lately."""
        usual = median(self._last) if len(self._last) >= FEWEST else math.inf
        self._last.append(value)
        if usual == 0.0 or value <= SPIKE * usual or step < self._quiet_until:
            return None
        self._quiet_until = step + WINDOW
        return usual


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all values of float tensors are finite; copies one number from the device."""
    floats = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
    return not floats or bool(torch.isfinite(nn.utils.get_total_norm(floats, math.inf)))


def weights_finite(module: nn.Module, worker: Worker) -> bool:
    """Return whether the trained weights are finite on every rank, shards included; collective."""
    weights = [_own_values(p, worker.rank) for p in module.parameters() if p.requires_grad]
    [bad] = worker.sum([not all_finite(weights)])
    return not bad


def _own_values(parameter: nn.Parameter, rank: int) -> Tensor:
    """Return a parameter; under ZeRO-3, where it is empty between the passes, this rank's shard.

    DeepSpeed does not initialize the padding that makes all shards equally long: it may be NaN.
    """
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter
    return shard[: max(0, parameter.ds_numel - rank * shard.numel())]


def name_samples(worker: Worker, group: dist.ProcessGroup | None = None) -> str:
    """Name rank and samples of the passes whose loss is not finite, or of all; collective."""
    bad = [names for names, loss in worker.passes if not bool(torch.isfinite(loss))]
    names = bad or [names for names, _ in worker.passes]
    mine = (bool(bad), list(dict.fromkeys(name for some in names for name in some())))
    ranks = [mine]
    if worker.world_size > 1:
        ranks *= worker.world_size
        dist.all_gather_object(ranks, mine, group=group)
    guilty = [rank for rank, (is_guilty, _) in enumerate(ranks) if is_guilty] or range(len(ranks))
    parts = [f"rank {rank}, samples {_listed(ranks[rank][1])}" for rank in guilty[:LISTED]]
    more = len(guilty) - LISTED
    return "; ".join([*parts, *([f"and {more} more ranks"] if more > 0 else [])])


def _listed(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")

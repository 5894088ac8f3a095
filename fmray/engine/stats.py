"""What a worker has seen: histograms and a snapshot of counters, ready to be exported.

In: numbers as they happen (`Ledger`). Out: `Histogram`, `WorkerStats`; frozen values, no metrics
library.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmray.engine.policy import Decision
from fmray.engine.requests import EngineStats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SHARES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
UNITS = (0.0, 1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 20.0, 32.0, 64.0, 128.0)


@dataclass(frozen=True)
class Histogram:
    """counts[i]: values above bounds[i - 1] and up to bounds[i]; one more for those above all."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float
    count: int

    @property
    def mean(self) -> float:
        """Of all values; 0 where there is none."""
        return self.sum / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """Upper bound of the bucket that holds the quantile (inf: above all); 0 without values."""
        target = share * self.count
        cumulative = itertools.accumulate(self.counts)
        if not self.count:
            return 0.0
        for bound, seen in zip((*self.bounds, float("inf")), cumulative, strict=True):
            if seen >= target:
                return bound
        raise AssertionError("counts do not add up")


class Tally:
    """A histogram that grows."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        # 1e-9: a share of 0.6 that came out of a division belongs below the bound 0.6
        self._counts[bisect.bisect_left(self.bounds, value - 1e-9)] += 1
        self._sum += value

    def snapshot(self) -> Histogram:
        """As it stands."""
        return Histogram(self.bounds, tuple(self._counts), self._sum, sum(self._counts))


@dataclass(frozen=True)
class WorkerStats:
    """Counters since the start, and what is so now.

    submitted: all that were asked for; refused: by `Refused.code`; admitted: that have begun;
    finished: by the reason of their last event. deadlines_promised: decisions with deadline_met
    true; deadlines_met, deadlines_missed: outcomes, promised or not. queued, active: requests.
    level: switches that `auto` has now; level_budget: the same as a share of the decoder.
    mean_budget: of admitted requests. Histograms: seconds waited, to the first token, and to the
    end (both from `submit`). first_token_error, answer_error: median |predicted - measured| /
    measured of recent requests (answers: those that used all their tokens), NaN before there are
    any. calibration_error: of single prefills and decode steps. speed: how much slower than
    calibrated both run now. callback_errors: listeners that had gone, their requests cancelled.
    """

    submitted: int
    admitted: int
    finished: dict[str, int]
    refused: dict[str, int]
    deadlines_promised: int
    deadlines_met: int
    deadlines_missed: int
    tokens_out: int
    callback_errors: int
    queued: int
    active: int
    draining: bool
    level: int
    level_budget: float
    mean_budget: float
    budget: Histogram
    units_on: Histogram
    queue_seconds: Histogram
    first_token_seconds: Histogram
    answer_seconds: Histogram
    first_token_error: float
    answer_error: float
    calibration_error: tuple[float, float]
    speed: tuple[float, float]
    engine: EngineStats | None


class Outcomes:
    """Measured / forecast of recent requests, and how far from the truth callers were told.

    Forecasts cannot know who comes after; by how much those delay the ones who run is learnt here.
    margin: the headroom before there are enough.
    """

    def __init__(self, margin: float) -> None:
        self.margin = margin
        self.ratios: deque[float] = deque(maxlen=200)
        self.errors: deque[float] = deque(maxlen=200)

    def add(self, measured: float, forecast: float, told: float) -> None:
        """One more, in seconds from its admission; told: what the decision said."""
        if min(forecast, measured) > 0:
            self.ratios.append(measured / forecast)
            self.errors.append(abs(told - measured) / measured)

    @property
    def usual(self) -> float:
        """Factor by which forecasts are usually too short (median); 1 before 5 outcomes."""
        if len(self.ratios) < 5:
            return 1.0
        return min(2.0, max(0.5, statistics.median(self.ratios)))

    @property
    def headroom(self) -> float:
        """Factor that nine of ten outcomes stayed below; the configured one before 20 of them."""
        if len(self.ratios) < 20:
            return self.margin * self.usual
        return min(3.0, max(1.0, float(np.quantile(self.ratios, 0.9))))

    @property
    def error(self) -> float:
        """Median |told - measured| / measured."""
        return statistics.median(self.errors) if self.errors else math.nan


class Ledger:
    """Everything a dispatcher counts. margin: see `Outcomes`."""

    def __init__(self, margin: float) -> None:
        self.counts: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.outcomes = {"first_token": Outcomes(margin), "answer": Outcomes(margin)}
        self.tallies = {
            "budget": Tally(SHARES),
            "units_on": Tally(UNITS),
            "queue_seconds": Tally(SECONDS),
            "first_token_seconds": Tally(SECONDS),
            "answer_seconds": Tally(SECONDS),
        }

    def decided(self, decision: Decision, share: float) -> None:
        """A request begins; share: of the decoder that it runs."""
        self.counts["admitted"] += 1
        self.counts["deadlines_promised"] += decision.deadline_met is True
        self.tallies["budget"].add(share)
        self.tallies["units_on"].add(decision.units_on)
        self.tallies["queue_seconds"].add(decision.waited_ms / 1000)

    def snapshot(self, **now: Any) -> WorkerStats:
        """What was counted, beside what is so `now`."""
        names = ("submitted", "admitted", "deadlines_promised", "deadlines_met",
                 "deadlines_missed", "tokens_out")  # fmt: skip
        histograms: dict[str, Any] = {n: tally.snapshot() for n, tally in self.tallies.items()}
        return WorkerStats(
            **{name: self.counts[name] for name in names},
            **histograms,
            **now,
            finished=dict(self.finished),
            refused=dict(self.refused),
            mean_budget=histograms["budget"].mean,
            first_token_error=self.outcomes["first_token"].error,
            answer_error=self.outcomes["answer"].error,
        )

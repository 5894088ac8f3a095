"""Statistics of a worker: counters, histograms, and the accuracy of its predictions.

`StatsCollector` records events as they happen; `WorkerStats` is a frozen snapshot to export.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmray.engine.policy import Decision
from fmray.engine.requests import EngineStats, Milestone

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SHARES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
UNITS = (0.0, 1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 20.0, 32.0, 64.0, 128.0)


@dataclass(frozen=True)
class Histogram:
    """Values counted in buckets."""

    bounds: tuple[float, ...]
    #: counts[i]: values in (bounds[i - 1], bounds[i]]; the last one: values above all bounds
    counts: tuple[int, ...]
    sum: float
    count: int

    @property
    def mean(self) -> float:
        """Mean of all values; 0 if there are none."""
        return self.sum / self.count if self.count else 0.0


class HistogramBuilder:
    """A histogram that values are added to."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        # 1e-9: a share of 0.6 that comes from a division belongs to the bucket up to 0.6.
        self._counts[bisect.bisect_left(self.bounds, value - 1e-9)] += 1
        self._sum += value

    def snapshot(self) -> Histogram:
        """The current histogram."""
        return Histogram(self.bounds, tuple(self._counts), self._sum, sum(self._counts))


@dataclass(frozen=True)
class WorkerStats:
    """Counters since the start, and the current state."""

    submitted: int  #: all requests, refused ones included
    admitted: int  #: requests that the engine started
    finished: dict[str, int]  #: by the reason of the last event
    refused: dict[str, int]  #: by `Refused.code`
    deadlines_promised: int  #: decisions with deadline_met == True
    deadlines_met: int  #: outcomes, promised or not
    deadlines_missed: int
    tokens_out: int
    callback_errors: int  #: listeners that raised; their requests were cancelled
    queued: int
    active: int
    draining: bool
    auto_units: int  #: units that `auto` requests get now
    auto_budget: float  #: the same as a share of the decoder
    mean_budget: float  #: of admitted requests
    budget: Histogram
    units_on: Histogram
    queue_seconds: Histogram
    first_token_seconds: Histogram  #: from `submit`
    answer_seconds: Histogram  #: from `submit`
    #: median |predicted - measured| / measured of recent requests; NaN before there are any
    first_token_error: float
    answer_error: float  #: of answers that used all their tokens
    calibration_error: tuple[float, float]  #: of single prefills and decode steps
    speed: tuple[float, float]  #: of prefills and decode steps; 2 is twice as slow as calibrated
    engine: EngineStats | None


class ForecastCorrection:
    """Ratio of measured to forecast times of recent requests.

    A forecast does not know future arrivals; this learns by how much they delay running requests.
    """

    def __init__(self, margin: float) -> None:
        """margin: the headroom until there are enough measurements."""
        self.margin = margin
        self.ratios: deque[float] = deque(maxlen=200)
        self.errors: deque[float] = deque(maxlen=200)

    def add(self, measured: float, forecast: float, predicted: float) -> None:
        """Record one request, in seconds from its admission; predicted: the corrected forecast."""
        if min(forecast, measured) > 0:
            self.ratios.append(measured / forecast)
            self.errors.append(abs(predicted - measured) / measured)

    @property
    def usual(self) -> float:
        """Median ratio in [0.5, 2]; 1 for fewer than 5 measurements."""
        if len(self.ratios) < 5:
            return 1.0
        return min(2.0, max(0.5, statistics.median(self.ratios)))

    @property
    def headroom(self) -> float:
        """90th percentile of the ratio in [1, 3]; from `margin` for fewer than 20 measurements."""
        if len(self.ratios) < 20:
            return self.margin * self.usual
        return min(3.0, max(1.0, float(np.quantile(self.ratios, 0.9))))

    @property
    def error(self) -> float:
        """Median |predicted - measured| / measured; NaN without measurements."""
        return statistics.median(self.errors) if self.errors else math.nan


class StatsCollector:
    """All statistics of one dispatcher."""

    def __init__(self, margin: float) -> None:
        """margin: see `ForecastCorrection`."""
        self.counts: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.corrections: dict[Milestone, ForecastCorrection] = {
            "first_token": ForecastCorrection(margin),
            "answer": ForecastCorrection(margin),
        }
        self.histograms = {
            "budget": HistogramBuilder(SHARES),
            "units_on": HistogramBuilder(UNITS),
            "queue_seconds": HistogramBuilder(SECONDS),
            "first_token_seconds": HistogramBuilder(SECONDS),
            "answer_seconds": HistogramBuilder(SECONDS),
        }

    def admitted(self, decision: Decision, share: float) -> None:
        """Record an admitted request; share: of the decoder, as it runs."""
        self.counts["admitted"] += 1
        self.counts["deadlines_promised"] += decision.deadline_met is True
        self.histograms["budget"].add(share)
        self.histograms["units_on"].add(decision.units_on)
        self.histograms["queue_seconds"].add(decision.waited_ms / 1000)

    def snapshot(self, **state: Any) -> WorkerStats:
        """The statistics, with the remaining fields of `WorkerStats` from `state`."""
        names = ("submitted", "admitted", "deadlines_promised", "deadlines_met",
                 "deadlines_missed", "tokens_out")  # fmt: skip
        histograms: dict[str, Any] = {
            name: builder.snapshot() for name, builder in self.histograms.items()
        }
        return WorkerStats(
            **{name: self.counts[name] for name in names},
            **histograms,
            **state,
            finished=dict(self.finished),
            refused=dict(self.refused),
            mean_budget=histograms["budget"].mean,
            first_token_error=self.corrections["first_token"].error,
            answer_error=self.corrections["answer"].error,
        )

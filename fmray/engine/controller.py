"""Budgets that follow the load: how many switches `auto` has now, so that a stated p95 holds.

In: the rows that run, the requests that wait, arrivals and measured latencies, and the time. Out: a
number of switches between a floor and all of them, and whether a request is to be shed.

* Feed-forward: the forecast (`fmray.engine.forecast`) of everyone who waits, under every number of
  switches at once. The level is the largest number with which they all come in within the aim,
  less a reserve while more arrives than can be done with all switches.
* It falls at once. It rises one grid step at a time, when the forecast one step up has been well
  within the aim for a while, and the work that has been arriving fits one step up (so that a
  standing overload finds its level and stays there, instead of climbing and falling).
* Feedback: the aim is a share of the target, moved after every answer by the quantile rule of
  adaptive conformal inference (Gibbs and Candes 2021): a miss lowers it, a hit raises it a little,
  so that in the long run misses are as rare as asked, however wrong the forecast is.
* Shedding: a request that would miss the aim even if everyone had the floor. Only then, so that
  what is admitted is answered in time and the machine is never busy with late answers.

Pure: the caller's clock comes in as `now`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fmray.engine.forecast import Forecast, Moment, Row, Waiting

AIM = 0.95  # share of the target aimed at, at first and at most
LOWEST_AIM = 0.4
AIM_STEP = 0.05
MISSES = 0.03  # asked of the feedback: safely fewer than the 5 % that a p95 allows
RESERVE = 0.25  # of the aim, kept for what comes next while more arrives than the machine can do
RAISE_AT = 0.65  # of what is kept: the forecast one step up must be below this to rise
FULL = 0.97  # of the machine: arriving work one step up must be below this to rise
LASTING = 1.05  # of the machine: above this the arriving work is an overload that will last
MEMORY = 20  # targets long is the memory of what has been arriving
GRID_STEPS = 8  # from the floor to the top, at most this many raises


@dataclass(frozen=True)
class LoadTarget:
    """95 % of requests have their first token, or answer, within `seconds` of being submitted."""

    seconds: float
    of: Moment = "first_token"

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"the p95 target is {self.seconds!r} seconds; a positive number")
        if self.of not in ("first_token", "answer"):
            raise ValueError(f"the p95 target is of {self.of!r}; 'first_token' or 'answer'")


@dataclass(frozen=True)
class Queued:
    """A request that waits, and for how long it has: seconds since it was submitted."""

    age: float
    request: Waiting


class LoadController:
    """The level of `auto`. floor, num_units: least and most switches."""

    def __init__(self, target: LoadTarget, forecast: Forecast, floor: int, num_units: int) -> None:
        if not 0 <= floor <= num_units:
            raise ValueError(f"the floor is {floor} switches of {num_units}")
        self.target = target
        self.forecast = forecast
        self.floor, self.num_units = floor, num_units
        self.level = num_units
        self.grid = np.arange(floor, num_units + 1)
        self.step = max(1, -(-(num_units - floor) // GRID_STEPS))
        self.hold = target.seconds / 4
        self.aim_share = AIM
        self._calm_since: float | None = None
        self._work = _Rate(len(self.grid), MEMORY * target.seconds)

    @property
    def aim(self) -> float:
        """Seconds that forecasts must keep now."""
        return self.aim_share * self.target.seconds

    def arrived(self, now: float, request: Waiting) -> None:
        """One more request was asked for (shed or not): the work it brings, at every level."""
        units = self.grid if request.units is None else np.full(len(self.grid), request.units)
        if request.units is None and request.cap is not None:
            units = np.minimum(units, request.cap)
        work = self.forecast.cost.answer(
            request.tokens, units, request.new_tokens, self.forecast.max_rows, request.pixels
        )
        self._work.add(now, work)

    def measured(self, seconds: float) -> None:
        """A request that followed the level had its first token, or answer, after `seconds`."""
        missed = seconds > self.target.seconds
        self.aim_share += AIM_STEP * (MISSES - missed)
        self.aim_share = min(AIM, max(LOWEST_AIM, self.aim_share))

    def update(self, now: float, rows: Sequence[Row], queue: Sequence[Queued]) -> int:
        """Set and return the level, for the requests that wait in this order."""
        worst = self._worst(rows, queue)
        load = self._work.busy(now)
        # A queue that the machine will work off by itself may use all of the aim.
        kept = self.aim if load[-1] <= LASTING else (1 - RESERVE) * self.aim
        fitting = np.flatnonzero(worst <= kept)
        needed = int(self.grid[fitting[-1]]) if len(fitting) else self.floor
        if needed < self.level:
            # An overload that lasts is met at once by the level that carries it, not in small
            # steps along the edge of the target.
            carried = np.flatnonzero(load <= LASTING)
            lasting = int(self.grid[carried[-1]]) if len(carried) else self.floor
            self.level = max(self.floor, min(needed, lasting))
            self._calm_since = None
            return self.level
        if self.level == self.num_units:
            return self.level
        above = min(self.level + self.step, self.num_units)
        index = above - self.floor
        if worst[index] > RAISE_AT * kept or load[index] > FULL:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        elif now - self._calm_since >= self.hold:
            self.level, self._calm_since = above, now
        return self.level

    def shed(
        self, rows: Sequence[Row], queue: Sequence[Queued], index: int, limit: float = 0.0
    ) -> float:
        """Whether request `index` of the queue is to be shed: 0 if not, else seconds until it is
        worth asking again. limit: seconds that this request itself allows, if more than the target.

        A request is shed for the wait, not for its own length: where it alone takes nearly all of
        the target or more, a wait of a quarter of it is allowed all the same. Shedding takes the
        level to the floor.
        """
        waiting, floor = [queued.request for queued in queue], self.grid[:1]
        times = self.forecast.play(rows, waiting, floor, self.target.of, watch=index)
        alone = self.forecast.play([], [waiting[index]], floor, self.target.of)
        wait = queue[index].age + float(times[index, 0] - alone[0, 0])
        allowed = max(self.aim, limit)
        late = wait - max(allowed - float(alone[0, 0]), allowed / 4)
        if late <= 0:
            return 0.0
        self.level, self._calm_since = self.floor, None
        return late

    def _worst(self, rows: Sequence[Row], queue: Sequence[Queued]) -> np.ndarray:
        """Per level, the longest time of any request that waits."""
        if not queue:
            return np.zeros(len(self.grid))
        waiting = [queued.request for queued in queue]
        times = self.forecast.play(rows, waiting, self.grid, self.target.of)
        return (times + np.array([queued.age for queued in queue])[:, None]).max(0)


class _Rate:
    """Seconds of work arriving a second, exponentially forgotten, at every level."""

    def __init__(self, levels: int, memory: float) -> None:
        self.memory = memory
        self._sum = np.zeros(levels)
        self._start: float | None = None
        self._at = 0.0

    def add(self, now: float, work: np.ndarray) -> None:
        if self._start is None:
            self._start = self._at = now
        self._sum = self._sum * math.exp(-max(0.0, now - self._at) / self.memory) + work
        self._at = now

    def busy(self, now: float) -> np.ndarray:
        """Share of the machine that the arriving work needs."""
        if self._start is None:
            return self._sum
        fade = math.exp(-max(0.0, now - self._at) / self.memory)
        # Time seen so far, at least a quarter of the memory: the first arrivals are no rate yet.
        seen = max(1 - math.exp(-(now - self._start) / self.memory), 0.25)
        return self._sum * fade / (self.memory * seen)

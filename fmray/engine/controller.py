"""Load controller: how many units `auto` requests get now, so that a p95 target holds.

* Feed-forward: the forecast (`fmray.engine.forecast`) of all waiting requests, for every number of
  units at once. The controller chooses the largest number with which all of them meet the aim, less
  a reserve while more work arrives than the machine can do with all units on.
* The number falls at once. It rises one grid step at a time, when the forecast one step up has been
  well within the aim for a while and the arriving work fits the machine one step up. So a permanent
  overload settles at one number instead of oscillating.
* Feedback: the aim is a fraction of the target, updated after every answer by the quantile rule of
  adaptive conformal inference (Gibbs and Candes 2021): a miss lowers it, a hit raises it a little,
  so that in the long run the rate of misses is the requested one, however wrong the forecast is.
* Shedding: only a request that would miss the aim even with `min_units` for everyone is refused. So
  admitted requests are answered in time, and the machine never works on late answers.

No clock: `now` is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fmray.engine.forecast import Forecast, Work
from fmray.engine.requests import Milestone

AIM = 0.95  # initial and largest aim, as a fraction of the target
MIN_AIM = 0.4
AIM_STEP = 0.05
MISSES = 0.03  # miss rate of the feedback: safely below the 5 % that a p95 allows
RESERVE = 0.25  # fraction of the aim kept free while more work arrives than the machine can do
RAISE_AT = 0.65  # the forecast one step up must be below this fraction of the limit to rise
FULL = 0.97  # the arriving work one step up must be below this fraction of the machine to rise
LASTING = 1.05  # arriving work above this fraction of the machine is a lasting overload
MEMORY = 20  # time constant of the arriving work, in targets
GRID_STEPS = 8  # at most this many raises from min_units to max_units


@dataclass(frozen=True)
class LoadTarget:
    """95 % of requests reach a milestone within `seconds` of `submit`."""

    seconds: float
    of: Milestone = "first_token"

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"the p95 target must be a positive number, not {self.seconds!r}")
        if self.of not in ("first_token", "answer"):
            raise ValueError(
                f"the p95 target must be of 'first_token' or 'answer', not {self.of!r}"
            )


class LoadController:
    """Number of units that `auto` requests get, between `min_units` and `max_units`."""

    def __init__(
        self, target: LoadTarget, forecast: Forecast, min_units: int, max_units: int
    ) -> None:
        if not 0 <= min_units <= max_units:
            raise ValueError(f"min_units must be in 0..{max_units}, not {min_units}")
        self.target = target
        self.forecast = forecast
        self.min_units, self.max_units = min_units, max_units
        self.units_on = max_units
        self.grid = np.arange(min_units, max_units + 1)
        self.step = max(1, -(-(max_units - min_units) // GRID_STEPS))
        self.hold = target.seconds / 4
        self.aim_fraction = AIM
        self._calm_since: float | None = None
        self._work = _WorkRate(len(self.grid), MEMORY * target.seconds)

    @property
    def aim(self) -> float:
        """Seconds that forecasts must meet now."""
        return self.aim_fraction * self.target.seconds

    def arrived(self, now: float, request: Work) -> None:
        """Record the work that a new request brings, admitted or not, for every number of units."""
        if request.units_on is not None:
            units_on = np.full(len(self.grid), request.units_on)
        elif request.max_units is not None:
            units_on = np.minimum(self.grid, request.max_units)
        else:
            units_on = self.grid
        rows = self.forecast.max_rows
        work = self.forecast.cost.answer(
            request.context, units_on, request.remaining, rows, request.pixels
        )
        self._work.add(now, work)

    def measured(self, seconds: float) -> None:
        """Update the aim after an `auto` request reached the target's milestone."""
        missed = seconds > self.target.seconds
        self.aim_fraction += AIM_STEP * (MISSES - missed)
        self.aim_fraction = min(AIM, max(MIN_AIM, self.aim_fraction))

    def update(self, now: float, running: Sequence[Work], queue: Sequence[Work]) -> int:
        """Set and return the number of units for the requests that wait in this order."""
        worst = self._worst(running, queue)
        load = self._work.load(now)
        # A queue that the machine can work off without help may use all of the aim.
        limit = self.aim if load[-1] <= LASTING else (1 - RESERVE) * self.aim
        fitting = np.flatnonzero(worst <= limit)
        needed = int(self.grid[fitting[-1]]) if len(fitting) else self.min_units
        if needed < self.units_on:
            # In a lasting overload, fall at once to the number that carries the arriving work,
            # not in small steps along the edge of the target.
            carried = np.flatnonzero(load <= LASTING)
            lasting = int(self.grid[carried[-1]]) if len(carried) else self.min_units
            self.units_on = max(self.min_units, min(needed, lasting))
            self._calm_since = None
            return self.units_on
        if self.units_on == self.max_units:
            return self.units_on
        # Rise one step once the step up has been safe for `hold` seconds.
        above = min(self.units_on + self.step, self.max_units)
        index = above - self.min_units
        if worst[index] > RAISE_AT * limit or load[index] > FULL:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        elif now - self._calm_since >= self.hold:
            self.units_on, self._calm_since = above, now
        return self.units_on

    def shed(
        self, running: Sequence[Work], queue: Sequence[Work], index: int, limit: float = 0.0
    ) -> float:
        """Decide whether request `index` of the queue is shed.

        A request is shed for its wait, not for its length: if it takes nearly all of the target or
        more when alone, it may still wait a quarter of it. Shedding sets `units_on` to
        `min_units`.

        Args:
            limit: seconds that this request allows, if more than the target.

        Returns:
            0 to keep it, else seconds until a retry may succeed.
        """
        least, of = self.grid[:1], self.target.of
        times = self.forecast.play(running, queue, least, of, watch=index)
        alone = float(self.forecast.play([], [queue[index]], least, of)[0, 0])
        wait = queue[index].age + (float(times[index, 0]) - alone)
        allowed = max(self.aim, limit)
        late = wait - max(allowed - alone, allowed / 4)
        if late <= 0:
            return 0.0
        self.units_on, self._calm_since = self.min_units, None
        return late

    def _worst(self, running: Sequence[Work], queue: Sequence[Work]) -> np.ndarray:
        """The longest time of any waiting request, for every number of units."""
        if not queue:
            return np.zeros(len(self.grid))
        times = self.forecast.play(running, queue, self.grid, self.target.of)
        return (times + np.array([work.age for work in queue])[:, None]).max(0)


class _WorkRate:
    """Seconds of work that arrive per second, exponentially averaged, per number of units."""

    def __init__(self, size: int, memory: float) -> None:
        self.memory = memory
        self._sum = np.zeros(size)
        self._start: float | None = None
        self._updated_at = 0.0

    def add(self, now: float, work: np.ndarray) -> None:
        if self._start is None:
            self._start = self._updated_at = now
        self._sum = self._sum * self._decay(now) + work
        self._updated_at = now

    def load(self, now: float) -> np.ndarray:
        """Fraction of the machine that the arriving work needs."""
        if self._start is None:
            return self._sum
        # Observed fraction of the memory; at least a quarter, as the first arrivals are no rate.
        observed = max(1 - math.exp(-(now - self._start) / self.memory), 0.25)
        return self._sum * self._decay(now) / (self.memory * observed)

    def _decay(self, now: float) -> float:
        return math.exp(-max(0.0, now - self._updated_at) / self.memory)

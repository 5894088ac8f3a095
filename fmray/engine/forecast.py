"""When will each of these requests have its first token, and its whole answer?

In: `CostToTime`, the rows that run, the requests that wait (in their order), and some numbers of
switches to compare. Out: seconds from now, per waiting request and number of switches.

The engine's steps are played forward: a request that waits takes the next free row; prefills take
turns with decode steps of the rows that run; between joins and leavings all rows decode together.
Which row leaves when is a matter of token counts alone, so the order of events is the same for
every number of switches, all are played at once, and every time grows with the switches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fmray.engine.calibration import CostToTime

Moment = Literal["first_token", "answer"]


@dataclass(frozen=True)
class Row:
    """A request that runs. units: its switches; context: keys that it holds; remaining: tokens
    still to come (expected); prefilled: False if its prefill is still to be done (then `context` is
    its prompt and `remaining` counts the first token)."""

    units: int
    context: int
    remaining: float
    prefilled: bool = True


@dataclass(frozen=True)
class Waiting:
    """A request that waits. units: its switches, or None: those that are compared, up to `cap`
    of them. tokens: of the prompt; new_tokens: expected; pixels: picture values to read."""

    tokens: int
    new_tokens: float
    units: int | None = None
    pixels: int = 0
    cap: int | None = None


class Forecast:
    """Plays an engine of `max_rows` rows forward."""

    def __init__(self, cost: CostToTime, max_rows: int) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; at least one row is needed")
        self.cost = cost
        self.max_rows = max_rows

    def play(
        self,
        rows: Sequence[Row],
        waiting: Sequence[Waiting],
        units: np.ndarray,
        until: Moment = "answer",
        watch: int | None = None,
        decoded: bool = True,
    ) -> np.ndarray:
        """Seconds until each waiting request's first token, or answer: [waiting, len(units)].

        units: int [L], numbers of switches compared. watch: index of the one request wanted; the
        play ends when it is there, and later moments are infinite. decoded: whether the last step
        was a decode step; after a prefill, another one has to wait for one.
        """
        levels = np.asarray(units, float)
        moments = np.full((len(waiting), len(levels)), np.inf)
        now = np.zeros(len(levels))
        running: list[list[Any]] = []  # [remaining, context, units, index or -1]
        joining: list[tuple[int, Waiting]] = []
        for row in rows:
            if row.prefilled:
                running.append([row.remaining, row.context, row.units, -1])
            else:
                joining.append((-1, Waiting(row.context, row.remaining, row.units)))
        joining += enumerate(waiting)
        left = len(waiting) if watch is None else 1
        while left and (running or joining):
            if joining and len(running) < self.max_rows:
                index, one = joining.pop(0)
                if running and not decoded:
                    now = now + self._steps(running, 1)
                    left -= self._leave(running, now, moments, until, watch)
                own = _units(one, levels)
                now = now + self.cost.prefill(one.tokens, own, pixels=one.pixels)
                if index >= 0 and until == "first_token":
                    moments[index] = now
                    left -= watch is None or index == watch
                decoded = False
                running.append([one.new_tokens - 1, one.tokens, own, index])
                left -= self._leave(running, now, moments, until, watch)
                continue
            steps = max(1.0, min(row[0] for row in running))
            now = now + self._steps(running, steps)
            decoded = True
            left -= self._leave(running, now, moments, until, watch)
        return moments

    def _steps(self, running: list[list[Any]], steps: float) -> Any:
        """Seconds of `steps` decode steps of all rows, which they advance by."""
        rows = len(running)
        units = sum(row[2] for row in running)
        context = sum(row[1] for row in running) + rows * (steps + 1) / 2
        for row in running:
            row[0] -= steps
            row[1] += steps
        return steps * self.cost.decode(rows, units, context)

    @staticmethod
    def _leave(
        running: list[list[Any]],
        now: np.ndarray,
        moments: np.ndarray,
        until: Moment,
        watch: int | None,
    ) -> int:
        """Rows that are done leave; how many of those wanted are."""
        done = [row for row in running if row[0] <= 0]
        if not done:
            return 0
        running[:] = [row for row in running if row[0] > 0]
        if until == "first_token":
            return 0
        wanted = 0
        for row in done:
            if row[3] >= 0:
                moments[row[3]] = now
                wanted += watch is None or row[3] == watch
        return wanted


def _units(one: Waiting, levels: np.ndarray) -> Any:
    if one.units is not None:
        return one.units
    return levels if one.cap is None else np.minimum(levels, one.cap)

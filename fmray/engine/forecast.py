"""Forecast of when each waiting request gets its first token and its complete answer.

Simulates the engine's steps: a waiting request takes the next free row, prefills alternate with
decode steps of the running rows, and between two arrivals or departures all rows decode together.

Which row ends when depends on token counts alone, so the order of events is the same for every
number of units. All numbers of units are therefore simulated at once, and every time is
non-decreasing in the number of units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmray.engine.calibration import CostToTime
from fmray.engine.requests import Milestone


@dataclass(frozen=True, slots=True)
class Work:
    """One request, waiting or running, as the forecast sees it."""

    context: int  #: keys it has; before its prefill: its prompt tokens
    remaining: float  #: expected tokens to come
    units_on: int | None = None  #: None: each of the compared numbers, up to `max_units`
    pixels: int = 0  #: values of `pixel_values` that its prefill reads
    max_units: int | None = None
    prefilled: bool = False
    age: float = 0.0  #: seconds since it was submitted


@dataclass(slots=True, eq=False)
class _Row:
    """A row of the simulated engine."""

    remaining: float
    context: float
    units_on: Any  # int, or an array with one number per column of the result
    index: int  # of the waiting request; -1 for a row that already runs


class Forecast:
    """Simulates an engine of `max_rows` rows."""

    def __init__(self, cost: CostToTime, max_rows: int) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, not {max_rows}")
        self.cost = cost
        self.max_rows = max_rows

    def play(
        self,
        running: Sequence[Work],
        waiting: Sequence[Work],
        units_on: np.ndarray,
        until: Milestone = "answer",
        watch: int | None = None,
        decoded: bool = True,
    ) -> np.ndarray:
        """Seconds from now until each waiting request reaches a milestone, [waiting, L].

        Args:
            running: requests that hold a row; those not yet prefilled come before `waiting`.
            waiting: requests in the order in which they get a row.
            units_on: int [L], the numbers of units to compare.
            until: the milestone.
            watch: index of the only request of interest; the simulation stops when it reaches the
                milestone, and later times are infinite.
            decoded: whether the last step was a decode step; after a prefill, the next prefill
                waits for a decode step.
        """
        columns = np.asarray(units_on, float)
        times = np.full((len(waiting), len(columns)), np.inf)
        now = np.zeros(len(columns))
        rows = [
            _Row(work.remaining, work.context, work.units_on, -1)
            for work in running
            if work.prefilled
        ]
        joining = [(-1, work) for work in running if not work.prefilled]
        joining += enumerate(waiting)
        missing = len(waiting) if watch is None else 1
        while missing and (rows or joining):
            if joining and len(rows) < self.max_rows:
                # The next request joins; after a prefill, one decode step comes first.
                index, work = joining.pop(0)
                if rows and not decoded:
                    now = now + self._decode(rows, 1)
                    missing -= self._remove_finished(rows, now, times, until, watch)
                units = _units_on(work, columns)
                now = now + self.cost.prefill(work.context, units, pixels=work.pixels)
                decoded = False
                if index >= 0 and until == "first_token":
                    times[index] = now
                    missing -= watch is None or index == watch
                rows.append(_Row(work.remaining - 1, work.context, units, index))
            else:
                # All rows decode until the first of them ends.
                steps = max(1.0, min(row.remaining for row in rows))
                now = now + self._decode(rows, steps)
                decoded = True
            missing -= self._remove_finished(rows, now, times, until, watch)
        return times

    def _decode(self, rows: list[_Row], steps: float) -> Any:
        """Advance all rows by `steps` decode steps; returns their seconds."""
        units_on = sum(row.units_on for row in rows)
        context = sum(row.context for row in rows) + len(rows) * (steps + 1) / 2
        for row in rows:
            row.remaining -= steps
            row.context += steps
        return steps * self.cost.decode(len(rows), units_on, context)

    @staticmethod
    def _remove_finished(
        rows: list[_Row],
        now: np.ndarray,
        times: np.ndarray,
        until: Milestone,
        watch: int | None,
    ) -> int:
        """Remove the finished rows; returns how many of them reached the milestone by that."""
        finished = [row for row in rows if row.remaining <= 0]
        if not finished:
            return 0
        rows[:] = [row for row in rows if row.remaining > 0]
        if until == "first_token":
            return 0
        count = 0
        for row in finished:
            if row.index >= 0:
                times[row.index] = now
                count += watch is None or row.index == watch
        return count


def _units_on(work: Work, columns: np.ndarray) -> Any:
    if work.units_on is not None:
        return work.units_on
    return columns if work.max_units is None else np.minimum(columns, work.max_units)

"""The trials of a search as they go: a live table in a terminal, plain lines elsewhere.

In: what happens to a trial. Out: text on stdout.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fmray.search.state import Finished

SHOWN_ROWS = 30  # of a live table; the last ones
VALUES_WIDTH = 60


@dataclass(frozen=True)
class Row:
    """One line: where a trial stands. status: `running`, or as `Finished`."""

    number: int
    origin: str
    values: Mapping[str, Any]
    status: str
    step: int
    metrics: Mapping[str, float]
    reason: str | None = None


class TrialTable:
    """A context: while it lasts, `show` keeps the terminal up to date.

    metrics: names of the columns.
    """

    def __init__(self, metrics: Sequence[str], trials: int) -> None:
        self._metrics, self._trials = list(metrics), trials
        self._rows: dict[int, Row] = {}
        self._live: Live | None = None

    def __enter__(self) -> TrialTable:
        if sys.stdout.isatty():
            self._live = Live(self._table(), refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, row: Row) -> None:
        """A trial started, was evaluated or ended."""
        self._rows[row.number] = row
        if self._live is not None:
            self._live.update(self._table())
        else:
            print(self._line(row), flush=True)

    def _line(self, row: Row) -> str:
        parts = [f"trial {row.number}: {row.status}"]
        if row.metrics:
            parts.append(f"step {row.step}")
            parts += [
                f"{name} {row.metrics[name]:.4g}" for name in self._metrics if name in row.metrics
            ]
        elif row.status == "running":
            parts += [row.origin, describe(row.values)]
        return ", ".join(parts) + (f": {row.reason}" if row.reason else "")

    def _table(self) -> Table:
        ended = sum(row.status != "running" for row in self._rows.values())
        rows = list(self._rows.values())[-SHOWN_ROWS:]
        return _rich_table(f"{ended} of {self._trials} trials ended", rows, self._metrics)


def final_table(finished: Sequence[Finished], metrics: Sequence[str]) -> str:
    """All trials, in order of their numbers, as text."""
    rows = [
        Row(t.number, t.origin, t.values, t.status, t.steps, t.metrics, t.reason)
        for t in sorted(finished, key=lambda trial: trial.number)
    ]
    console = Console(width=140, color_system=None)
    with console.capture() as captured:
        console.print(_rich_table(None, rows, metrics))
    return captured.get().rstrip()


def describe(values: Mapping[str, Any]) -> str:
    """`name=value` of all, cut where it is long."""
    parts = []
    for name, value in values.items():
        if isinstance(value, float):
            text = f"{value:.4g}"
        elif isinstance(value, (list, tuple)):
            text = "{" + " ".join(map(str, value)) + "}"
        else:
            text = str(value)
        parts.append(f"{name}={text}")
    text = " ".join(parts)
    return text if len(text) <= VALUES_WIDTH else text[: VALUES_WIDTH - 3] + "..."


def _rich_table(title: str | None, rows: Sequence[Row], metrics: Sequence[str]) -> Table:
    table = Table(title=title)
    for name in ("trial", "origin", "values", "status", "step", *metrics):
        table.add_column(name, justify="right" if name in ("trial", "step", *metrics) else "left")
    for row in rows:
        status = row.status + (f": {row.reason}" if row.reason else "")
        cells = [f"{row.metrics[name]:.4g}" if name in row.metrics else "" for name in metrics]
        # as text, not as rich's markup: values and reasons may hold brackets
        written = [str(row.number), row.origin, describe(row.values), status, str(row.step)]
        table.add_row(*(part.replace("[", r"\[") for part in written), *cells)
    return table

"""The table of a comparison: accuracies, paired differences, and what they say of the thesis.

In: accuracies over the same test tasks, by line of the table, target and shots. Out: text for the
terminal, and plain values for `results.json`. Differences are paired, task by task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fmray.fewshot import Interval, confidence_interval, paired_interval
from fmray.train.fewshot.evaluate import percent, shots_name

ALL, RANDOM, SELECTED = "multitask/all", "multitask/random", "multitask/selected"
CLAIMS = (
    # what the thesis says (chapter 3), and the lines of the table it is about
    ("selected tasks are at least as good as all tasks", SELECTED, ALL, ">="),
    ("selected tasks beat as many random ones", SELECTED, RANDOM, ">"),
    ("multitask finetuning beats standard finetuning", ALL, "standard", ">"),
    ("standard finetuning beats direct adaptation", "standard", "direct", ">"),
)

Column = tuple[str, int]  # target, shots


@dataclass(frozen=True)
class Claim:
    """A claim beside what was found: in how many columns the 95 % interval of `better - worse`
    lies above zero, holds it, or lies below; difference: mean over the columns, in [-1, 1]."""

    text: str
    better: str
    worse: str
    relation: str
    above: int
    within: int
    below: int
    difference: float

    def __str__(self) -> str:
        columns = self.above + self.within + self.below
        return (
            f"thesis: {self.text}. Found: {self.better} - {self.worse} is"
            f" {100 * self.difference:+.2f} points on average; above zero in {self.above} of"
            f" {columns} columns, undecided in {self.within}, below in {self.below}"
        )


@dataclass(frozen=True)
class Comparison:
    """Accuracies [tasks] by line and column. A line of several seeds is their mean, task by task.

    ways: by column.
    """

    accuracies: Mapping[str, Mapping[Column, np.ndarray]]
    ways: Mapping[Column, int]

    def difference(self, line: str, other: str, column: Column) -> Interval:
        """Paired interval of line - other."""
        return paired_interval(self.accuracies[line][column], self.accuracies[other][column])

    def claims(self) -> list[Claim]:
        """Those of the thesis whose lines are in the table."""
        found = []
        for text, better, worse, relation in CLAIMS:
            if better not in self.accuracies or worse not in self.accuracies:
                continue
            intervals = [self.difference(better, worse, column) for column in self.ways]
            above = sum(interval.low > 0 for interval in intervals)
            below = sum(interval.high < 0 for interval in intervals)
            within = len(intervals) - above - below
            mean = float(np.mean([interval.mean for interval in intervals]))
            found.append(Claim(text, better, worse, relation, above, within, below, mean))
        return found

    def table(self) -> str:
        """For the terminal: for each number of shots accuracies, then differences to all tasks and
        to random ones; below, the claims."""
        parts: list[str] = []
        for shots in dict.fromkeys(shots for _, shots in self.ways):
            columns = [column for column in self.ways if column[1] == shots]
            ways = [self.ways[column] or "variable" for column in columns]
            heads = [f"{target} {n}-way" for (target, _), n in zip(columns, ways, strict=True)]
            parts.append(f"{shots_name(shots)}: accuracy in %, with its 95 % interval over tasks")
            parts += _columns(heads, self._accuracy_lines(columns))
            for other in (ALL, RANDOM):
                if other in self.accuracies:
                    parts.append(f"{shots_name(shots)}: minus {other}, paired")
                    parts += _columns(heads, self._difference_lines(columns, other))
        return "\n".join([*parts, *map(str, self.claims())])

    def values(self) -> dict[str, Any]:
        """For `results.json`."""
        cells = [
            {
                "line": line,
                "target": target,
                "shots": shots,
                "ways": self.ways[target, shots],
                "accuracy": asdict(confidence_interval(values)),
            }
            | {
                f"minus {other}": asdict(self.difference(line, other, (target, shots)))
                for other in (ALL, RANDOM)
                if other in self.accuracies and other != line
            }
            for line, columns in self.accuracies.items()
            for (target, shots), values in columns.items()
        ]
        return {"cells": cells, "claims": [asdict(claim) for claim in self.claims()]}

    def _accuracy_lines(self, columns: list[Column]) -> Iterator[list[str]]:
        for line, values in self.accuracies.items():
            intervals = [confidence_interval(values[column]) for column in columns]
            mean = 100 * float(np.mean([interval.mean for interval in intervals]))
            yield [line, *map(percent, intervals), f"{mean:.2f}"]

    def _difference_lines(self, columns: list[Column], other: str) -> Iterator[list[str]]:
        for line in self.accuracies:
            if line == other:
                continue
            intervals = [self.difference(line, other, column) for column in columns]
            mean = 100 * float(np.mean([interval.mean for interval in intervals]))
            yield [line, *(percent(interval, "+") for interval in intervals), f"{mean:+.2f}"]


def _columns(heads: list[str], lines: Iterator[list[str]]) -> Iterator[str]:
    """Names set left, numbers right."""
    rows = [["", *heads, "mean"], *lines]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for first, *others in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([f"{first:<{widths[0]}}", *cells])

"""The figures of the few-shot jobs: similarity and coverage of tasks, comparison of methods.

Each function takes plain values and a path, and writes one image file in the format of its suffix.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fmray.plots.style import COLORS, GREY, LIGHT, MARKERS, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED = 60  # more tasks than this are drawn without names
_CHOSEN, _OTHER = COLORS[0], "#b8b8b8"


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a method on the K-shot tasks of a target."""

    target: str
    shots: int
    row: str  # the method, a row of the table
    accuracy: float  # in [0, 1]
    half_width: float  # of the 95 % interval


def similarity_bars(
    order: Sequence[str], similarity: Sequence[float], chosen: Collection[str], path: Path
) -> None:
    """Draw a bar per candidate task, the most similar on top and the chosen ones in colour.

    Raises:
        ValueError: no tasks.
    """
    if not order:
        raise ValueError("similarity_bars: no tasks to draw")
    from matplotlib.patches import Patch

    named = len(order) <= NAMED
    figure = new_figure(7.0, max(2.2, 0.27 * min(len(order), NAMED) + 1.3))
    axes = figure.add_subplot()
    axes.barh(
        range(len(order)),
        similarity,
        height=0.75 if named else 1.0,
        color=[_CHOSEN if name in chosen else _OTHER for name in order],
    )
    if named:
        axes.set_yticks(range(len(order)), order, parse_math=False)
    else:
        axes.set_ylabel("candidate tasks, by rank")
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.axvline(0.0, color=GREY, linewidth=0.8)
    axes.set_xlabel("cosine similarity of mean features to the target's")
    _grid(axes, "x")
    handles = [
        Patch(color=_CHOSEN, label=f"selected ({len(chosen)})"),
        Patch(color=_OTHER, label=f"not selected ({len(order) - len(chosen)})"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    save_figure(figure, path)


def coverage_curve(
    order: Sequence[str], coverage: Sequence[float], chosen: Collection[str], path: Path
) -> None:
    """Draw the coverage of the target by the first 1, 2, ... tasks of `order`.

    Where the target's mean is matched exactly, coverage is infinite and drawn as a cross at the
    top.

    Raises:
        ValueError: no tasks.
    """
    if not order:
        raise ValueError("coverage_curve: no tasks to draw")
    named = len(order) <= NAMED // 2
    figure = new_figure(max(6.5, 0.4 * len(order) + 2.0) if named else 9.0, 4.4)
    axes = figure.add_subplot()
    ranks = range(1, len(order) + 1)
    finite = [value if math.isfinite(value) else math.nan for value in coverage]
    axes.plot(ranks, finite, color=GREY, linewidth=1.4, zorder=2)
    for label, color, marker, inside in (
        ("task selected", _CHOSEN, "o", True),
        ("task not selected", _OTHER, "s", False),
    ):
        points = [r for r, name in zip(ranks, order, strict=True) if (name in chosen) == inside]
        axes.plot(
            points,
            [finite[rank - 1] for rank in points],
            marker,
            color=color,
            markersize=7 if named else 3,
            label=f"{label} ({len(points)})",
            zorder=3,
        )
    infinite = [rank for rank, value in zip(ranks, coverage, strict=True) if value == math.inf]
    if infinite:
        axes.plot(
            infinite,
            [0.97] * len(infinite),
            "x",
            color=COLORS[4],
            transform=axes.get_xaxis_transform(),
            label=f"infinite ({len(infinite)})",
        )
    if named:
        names = [
            name if rank == 1 else f"+ {name}" for rank, name in zip(ranks, order, strict=True)
        ]
        axes.set_xticks(ranks, names, rotation=40, ha="right", parse_math=False)
    axes.set_xlabel("tasks added, the most similar first")
    axes.set_ylabel("coverage of the target")
    highest = max((value for value in coverage if math.isfinite(value)), default=0.0)
    axes.set_ylim(0.0, 1.15 * highest or 1.0)
    _grid(axes, "both")
    axes.legend(loc="best", framealpha=0.9, edgecolor=LIGHT)
    save_figure(figure, path)


def comparison(points: Sequence[Accuracy], path: Path) -> None:
    """Draw accuracy by target: a panel per number of shots, a marker with interval per method.

    Colour and marker of a method follow from the order in which the methods first appear.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("comparison: no accuracies to draw")
    targets = list(dict.fromkeys(point.target for point in points))
    rows = list(dict.fromkeys(point.row for point in points))
    shots = sorted({point.shots for point in points})
    width = max(6.0, (0.11 * len(rows) + 0.4) * len(targets) + 1.2)
    figure = new_figure(width, 3.3 * len(shots) + 0.8)
    panels = figure.subplots(len(shots), 1, squeeze=False, sharex=True)[:, 0]
    for axes, number in zip(panels, shots, strict=True):
        for place, row in enumerate(rows):
            selected = [p for p in points if (p.row, p.shots) == (row, number)]
            shift = (place - (len(rows) - 1) / 2) * 0.8 / len(rows)
            axes.errorbar(
                [targets.index(point.target) + shift for point in selected],
                [point.accuracy for point in selected],
                yerr=[point.half_width for point in selected],
                linestyle="none",
                color=COLORS[place % len(COLORS)],
                marker=MARKERS[(place + place // len(COLORS)) % len(MARKERS)],
                markersize=5,
                elinewidth=1.1,
                capsize=2,
                label=row,
            )
        for line in range(1, len(targets)):
            axes.axvline(line - 0.5, color=LIGHT, linewidth=0.8)
        axes.set_xlim(-0.5, len(targets) - 0.5)
        axes.set_ylabel("accuracy")
        axes.set_title(f"{number}-shot, with 95 % intervals", loc="left")
        _grid(axes, "y")
    panels[-1].set_xticks(range(len(targets)), targets, rotation=20, ha="right", parse_math=False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    save_figure(figure, path)


def _grid(axes: Axes, axis: str) -> None:
    axes.grid(axis=axis, color=LIGHT, linewidth=0.7)
    axes.set_axisbelow(True)

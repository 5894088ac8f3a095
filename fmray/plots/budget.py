"""The figures of a run: accuracy against budget, and examples of plans.

Each function takes typed values (plain numbers, no tensors) and a path, and writes one image file
in the format of its suffix.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fmray.plots.style import COLORS, GREY, LIGHT, MARKERS, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

_ON, _OFF = "#0072B2", "#ffffff"
_PREFIX = "#7f7f7f"
_RIGHT, _WRONG = "#00735c", "#b34700"
_KINDS = ("learned", "random", "static", "importance", "deterministic")  # each has a fixed colour


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy of a kind of plans at a budget."""

    plans: str
    budget: float
    accuracy: float  # in [0, 1]
    half_width: float  # of the 95 % interval


@dataclass(frozen=True)
class PlanExample:
    """An answered question, with the plan that was used."""

    image: np.ndarray | Image  # [height, width, 3] uint8, or a PIL image
    question: str
    answer: str
    truth: str
    budget: float
    plan: list[bool]  # by unit; True is on
    prefix: int  # number of units that are always on


def budget_curve(rows: Sequence[CurvePoint], base_accuracy: float, path: Path) -> None:
    """Draw accuracy against budget: a line with 95 % intervals per kind of plans, and the base.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("budget_curve: no points to draw")
    figure = new_figure(7.0, 4.6)
    axes = figure.add_subplot()
    axes.axhline(base_accuracy, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
    kinds = sorted({row.plans for row in rows}, key=_kind_order)
    extra = [kind for kind in kinds if kind not in _KINDS]
    for position, kind in enumerate(kinds):
        points = sorted((row for row in rows if row.plans == kind), key=lambda row: row.budget)
        style = _KINDS.index(kind) if kind in _KINDS else len(_KINDS) + extra.index(kind)
        # shift the kinds a little: intervals at the same budget would hide each other
        shift = (position - (len(kinds) - 1) / 2) * 0.003
        axes.errorbar(
            [point.budget + shift for point in points],
            [point.accuracy for point in points],
            yerr=[point.half_width for point in points],
            color=COLORS[style % len(COLORS)],
            marker=MARKERS[style % len(MARKERS)],
            markersize=6,
            linewidth=1.8,
            elinewidth=1.1,
            capsize=3,
            label=f"{kind} plans",
            zorder=3,
        )
    axes.plot(
        [1.0],
        [base_accuracy],
        marker="*",
        markersize=15,
        color="black",
        linestyle="none",
        label=f"base model ({base_accuracy:.3f})",
        zorder=4,
    )
    axes.set_xlabel("latency budget (share of the base model's prefill operations)")
    axes.set_ylabel("accuracy on held-out questions")
    axes.grid(color=LIGHT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor=LIGHT)
    axes.set_title("Accuracy against budget, with 95 % intervals", loc="left")
    save_figure(figure, path)


def plan_examples(examples: Sequence[PlanExample], path: Path, columns: int = 2) -> None:
    """Draw the images of the examples in a grid, with question, answers and plans.

    Consecutive examples of the same image and question share one cell, with a line per budget: the
    answer, and a strip of the units (always on, on, off).

    Raises:
        ValueError: no examples.
    """
    if not examples:
        raise ValueError("plan_examples: no examples to draw")
    cells = _cells(examples)
    columns = min(columns, len(cells))
    lines = math.ceil(len(cells) / columns)
    # lay out in inches, so that lines and letters keep their size for any number of cells
    width, legend = 5.7, 0.6
    height = max(1.9, 0.85 + 0.31 * max(len(cell) for cell in cells))
    figure = new_figure(width * columns, legend + height * lines, layout="none")
    total_width, total_height = figure.get_size_inches()

    def add(left: float, top: float, width: float, height: float) -> Axes:
        bottom = total_height - top - height
        return figure.add_axes(
            (
                left / total_width,
                bottom / total_height,
                width / total_width,
                height / total_height,
            )
        )

    for index, cell in enumerate(cells):
        line, column = divmod(index, columns)
        left, top = column * width, legend + line * height
        image = add(left + 0.15, top + 0.08, 1.5, 1.5)
        image.imshow(np.asarray(cell[0].image), interpolation="nearest", cmap="gray")
        image.set_anchor("N")
        image.set_axis_off()
        _plan_strips(add(left + 1.8, top, width - 1.85, height), cell, width - 1.85, height)
    _plan_legend(figure)
    save_figure(figure, path)


def _cells(examples: Iterable[PlanExample]) -> list[list[PlanExample]]:
    """Group consecutive examples of the same image and question."""
    cells: list[list[PlanExample]] = []
    for example in examples:
        last = cells[-1][0] if cells else None
        if (
            last is not None
            and last.question == example.question
            and np.array_equal(np.asarray(last.image), np.asarray(example.image))
        ):
            cells[-1].append(example)
        else:
            cells.append([example])
    return cells


def _plan_strips(axes: Axes, cell: list[PlanExample], width: float, height: float) -> None:
    """Draw question and truth, and a line per budget: a box per unit, the answer; in inches."""
    from matplotlib.patches import Rectangle

    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    question = textwrap.fill(textwrap.shorten(cell[0].question, 88, placeholder=" ..."), 46)
    plain = {"parse_math": False, "va": "top"}  # a dollar sign does not start a formula
    axes.text(0, 0.08, question, fontsize=10, weight="bold", linespacing=1.1, **plain)
    truth_top = 0.32 + 0.17 * question.count("\n")
    truth = _short(cell[0].truth, 50)
    axes.text(0, truth_top, f"truth: {truth}", fontsize=9, color=GREY, **plain)
    for line, example in enumerate(cell):
        middle = 0.86 + 0.31 * line
        axes.text(0, middle, f"b = {example.budget:.2f}", va="center", fontsize=9)
        box = 2.0 / (example.prefix + len(example.plan))
        states = [_PREFIX] * example.prefix + [_ON if on else _OFF for on in example.plan]
        for unit, color in enumerate(states):
            axes.add_patch(
                Rectangle(
                    (0.62 + unit * box, middle - 0.11),
                    box * 0.86,
                    0.22,
                    facecolor=color,
                    edgecolor=GREY,
                    linewidth=0.6,
                )
            )
        right = example.answer.strip().lower() == example.truth.strip().lower()
        axes.text(
            2.7,
            middle,
            f"{'✓' if right else '✗'} {_short(example.answer, 16)}",
            va="center",
            parse_math=False,
            fontsize=9.5,
            color=_RIGHT if right else _WRONG,
        )


def _plan_legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    colors = {"always on": _PREFIX, "on": _ON, "off": _OFF}
    handles = [Patch(facecolor=color, edgecolor=GREY, label=name) for name, color in colors.items()]
    figure.legend(
        handles=handles,
        loc="upper left",
        ncols=3,
        frameon=False,
        fontsize=9,
        title="layers or units of the decoder, the first on the left",
        title_fontsize=9,
        alignment="left",
    )


def _kind_order(kind: str) -> tuple[int, str]:
    return (_KINDS.index(kind) if kind in _KINDS else len(_KINDS), kind)


def _short(text: str, length: int) -> str:
    return textwrap.shorten(text, length, placeholder=" ...") or "(empty)"

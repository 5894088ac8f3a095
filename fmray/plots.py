"""The figures of a run: accuracy against budget, plans as pictures, loss curves, plan usage.

In: the typed values below (plain numbers, no tensors) and a path. Out: one image file, in the
format of its ending, written under a temporary name and moved. Nothing is shown on a screen, and
matplotlib is imported only when a figure is made. Colours are told apart by the colour-blind too
(Okabe and Ito's palette), and every line also has a marker of its own.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

GREY, LIGHT, _ON, _OFF = "#555555", "#d9d9d9", "#0072B2", "#ffffff"
_PREFIX = "#7f7f7f"
_RIGHT, _WRONG = "#00735c", "#b34700"
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8a7f00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_KINDS = ("learned", "random", "static", "importance", "deterministic")  # always the same colour


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy of a kind of plans at a budget, in [0, 1]; `half_width`: of the 95 % interval."""

    plans: str
    budget: float
    accuracy: float
    half_width: float


@dataclass(frozen=True)
class PlanExample:
    """An answered question; `plan`: a switch per unit (True: on), `prefix`: units always on."""

    image: np.ndarray | Image  # [height, width, 3] uint8, or a PIL image
    question: str
    answer: str
    truth: str
    budget: float
    plan: list[bool]
    prefix: int


@dataclass(frozen=True)
class LossPoint:
    """One logged value of a named curve (`base`, `adaptive`, ...) at an optimizer step."""

    curve: str
    step: int
    loss: float


@dataclass(frozen=True)
class PlanUse:
    """The plan [K] of one request, its budget, and the type of its question where known."""

    budget: float
    plan: list[bool]
    question_type: str | None = None


def budget_curve(rows: Sequence[CurvePoint], base_accuracy: float, path: Path) -> None:
    """Draw accuracy against budget, a line per kind of plans with 95 % intervals, and the base.

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
        # Intervals at the same budget would hide each other: set the kinds a little apart.
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


def plan_pictures(examples: Sequence[PlanExample], path: Path, columns: int = 2) -> None:
    """Draw the pictures of the examples in a grid, with question, answers and plans.

    Examples of the same picture and question, next to each other in the list, share one cell: each
    budget is one line with its answer and a strip of units: always on, on, off.

    Raises:
        ValueError: no examples.
    """
    if not examples:
        raise ValueError("plan_pictures: no examples to draw")
    cells = _cells(examples)
    columns = min(columns, len(cells))
    lines = math.ceil(len(cells) / columns)
    # Laid out in inches, so that lines and letters keep their size for any number of cells.
    width, legend = 5.7, 0.6
    height = max(1.9, 0.85 + 0.31 * max(len(cell) for cell in cells))
    figure = new_figure(width * columns, legend + height * lines, layout="none")
    whole_width, whole_height = figure.get_size_inches()

    def add(left: float, top: float, width: float, height: float) -> Axes:
        bottom = whole_height - top - height
        return figure.add_axes(
            (
                left / whole_width,
                bottom / whole_height,
                width / whole_width,
                height / whole_height,
            )
        )

    for index, cell in enumerate(cells):
        line, column = divmod(index, columns)
        left, top = column * width, legend + line * height
        picture = add(left + 0.15, top + 0.08, 1.5, 1.5)
        picture.imshow(np.asarray(cell[0].image), interpolation="nearest", cmap="gray")
        picture.set_anchor("N")
        picture.set_axis_off()
        _plan_strips(add(left + 1.8, top, width - 1.85, height), cell, width - 1.85, height)
    _plan_legend(figure)
    save_figure(figure, path)


def loss_curve(history: Sequence[LossPoint], path: Path) -> None:
    """Draw loss against step, each curve thin as logged and bold as a running mean.

    Values that are not finite are left out of the line and marked at the foot.

    Raises:
        ValueError: nothing to draw.
    """
    if not history:
        raise ValueError("loss_curve: no points to draw")
    figure = new_figure(7.0, 4.2)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(point.curve for point in history))
    for index, name in enumerate(names):
        points = sorted((p for p in history if p.curve == name), key=lambda point: point.step)
        color = COLORS[index % len(COLORS)]
        finite = [point for point in points if math.isfinite(point.loss)]
        steps = [point.step for point in finite]
        losses = np.array([point.loss for point in finite])
        window = max(1, len(finite) // 60 * 2 + 1)
        if window > 1:
            axes.plot(steps, losses, color=color, linewidth=0.7, alpha=0.35)
        axes.plot(
            steps,
            _running_mean(losses, window),
            color=color,
            linewidth=2.0,
            marker=MARKERS[index % len(MARKERS)],
            markevery=max(1, len(finite) // 8),
            markersize=5,
            label=name + (f" (mean of {window})" if window > 1 else ""),
        )
        broken = [point.step for point in points if not math.isfinite(point.loss)]
        if broken:
            axes.plot(
                broken,
                [0.02] * len(broken),
                "x",
                color=color,
                transform=axes.get_xaxis_transform(),
                label=f"{name}: not finite ({len(broken)})",
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per answer token)")
    axes.grid(color=LIGHT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(loc="upper right", framealpha=0.9, edgecolor=LIGHT)
    axes.set_title("Training loss", loc="left")
    save_figure(figure, path)


def plan_usage(uses: Sequence[PlanUse], path: Path, by_question_type: bool = False) -> None:
    """Draw a heat map: the share of requests with a unit (column) on, at each budget (line).

    With `by_question_type` there is one map per type, on one scale.

    Raises:
        ValueError: no plans, or plans of different lengths.
    """
    if not uses:
        raise ValueError("plan_usage: no plans to draw")
    units = len(uses[0].plan)
    if any(len(use.plan) != units for use in uses):
        lengths = sorted({len(use.plan) for use in uses})
        raise ValueError(
            f"plan_usage: plans of different lengths {lengths}; draw one model at a time"
        )
    budgets = sorted({use.budget for use in uses}, reverse=True)
    maps: Mapping[str, list[PlanUse]] = {f"all {len(uses)} requests": list(uses)}
    if by_question_type:
        types = sorted({use.question_type or "untyped" for use in uses})
        maps = {t: [use for use in uses if (use.question_type or "untyped") == t] for t in types}
    columns = min(2, len(maps))
    lines = math.ceil(len(maps) / columns)
    width = min(7.5, max(3.6, 0.42 * units + 1.2))
    figure = new_figure(width * columns + 1.0, (0.36 * len(budgets) + 1.15) * lines + 0.35)
    plots = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes in plots.flat[len(maps) :]:
        axes.set_axis_off()
    for index, (title, chosen) in enumerate(maps.items()):
        axes = plots.flat[index]
        image = axes.imshow(
            _shares(chosen, budgets, units), cmap="cividis", vmin=0, vmax=1, aspect="auto"
        )
        axes.set_title(f"{title} (n = {len(chosen)})" if by_question_type else title, loc="left")
        axes.set_yticks(range(len(budgets)), [f"{budget:g}" for budget in budgets])
        step = max(1, units // 16)
        axes.set_xticks(range(0, units, step), [str(unit + 1) for unit in range(0, units, step)])
        axes.tick_params(length=0, labelbottom=index + columns >= len(maps))
        if index + columns >= len(maps):
            axes.set_xlabel("switchable unit, input side left")
        if index % columns == 0:
            axes.set_ylabel("budget")
        if units <= 16:
            _write_shares(axes, _shares(chosen, budgets, units))
    figure.colorbar(image, ax=plots, label="share of requests", fraction=0.05)
    save_figure(figure, path)


def _cells(examples: Iterable[PlanExample]) -> list[list[PlanExample]]:
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
    """Write question and truth, and a line per budget: a box per unit, the answer. In inches."""
    from matplotlib.patches import Rectangle

    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    question = textwrap.fill(textwrap.shorten(cell[0].question, 88, placeholder=" ..."), 46)
    plain = {"parse_math": False, "va": "top"}  # a dollar sign in a question is a dollar sign
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
        title="layers or units of the decoder, first one left",
        title_fontsize=9,
        alignment="left",
    )


def _shares(uses: Sequence[PlanUse], budgets: Sequence[float], units: int) -> np.ndarray:
    """[budgets, K] share of requests with the unit on; NaN where a budget has no request."""
    shares = np.full((len(budgets), units), np.nan)
    for line, budget in enumerate(budgets):
        plans = [use.plan for use in uses if use.budget == budget]
        if plans:
            shares[line] = np.mean(np.asarray(plans, dtype=float), axis=0)
    return shares


def _write_shares(axes: Axes, shares: np.ndarray) -> None:
    for (line, unit), share in np.ndenumerate(shares):
        if not math.isnan(share):
            color = "black" if share > 0.55 else "white"
            axes.text(
                unit, line, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=8
            )


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """[n] mean of the values within `window` / 2 before and after, of fewer at the ends."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    positions = np.arange(len(values))
    starts = np.maximum(positions - window // 2, 0)
    ends = np.minimum(positions + window // 2 + 1, len(values))
    return (sums[ends] - sums[starts]) / (ends - starts)


def _kind_order(kind: str) -> tuple[int, str]:
    return (_KINDS.index(kind) if kind in _KINDS else len(_KINDS), kind)


def _short(text: str, length: int) -> str:
    return textwrap.shorten(text, length, placeholder=" ...") or "(empty)"


def new_figure(width: float, height: float, layout: str = "constrained") -> Figure:
    """A figure of inches, bound to no window system and not kept by pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write under a temporary name and move; the folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix or '.png'}")
    try:
        figure.savefig(temporary, facecolor="white")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

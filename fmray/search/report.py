"""`report.html`: what a search found, in one file that opens without a network.

In: finished trials, the objectives, and what else is to be said. Out: one HTML file with its
figures in it as PNG, and no script; whatever comes from recipes, data or errors is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmray.config.search import ObjectiveConfig
from fmray.plots.style import COLORS, GREY, LIGHT, new_figure
from fmray.search.pareto import front, front_of, judged, trial_points
from fmray.search.state import Finished

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# The figures of a search's report: Pareto front, parallel coordinates, timeline, subset heat map.
#
# In: finished trials and the objectives. Out: matplotlib figures, not yet saved; None where there
# is nothing to draw. Names that come from recipes and data are drawn as they are, never as
# formulas.

PLAIN = {"parse_math": False}  # a dollar sign in a name is a dollar sign
STATUS_COLORS = {"done": COLORS[0], "stopped": COLORS[1], "failed": COLORS[4], "duplicate": LIGHT}
MOST_LINES = 80  # rows of a figure, so that it stays readable and within a page's height


def pareto_figure(
    finished: Sequence[Finished],
    objectives: Sequence[ObjectiveConfig],
    recommended: Finished | None = None,
) -> Figure | None:
    """Each pair of objectives, an operating point a mark, the front marked; for one objective, the
    best found so far."""
    trials = judged(finished, objectives)
    if not trials:
        return None
    if len(objectives) == 1:
        return _best_so_far(trials, objectives[0])
    points = trial_points(trials, objectives)
    on_front = front(points, [objective.mode for objective in objectives]).tolist()
    pairs = list(itertools.combinations(range(len(objectives)), 2))
    figure = new_figure(6.4 * min(2, len(pairs)), 4.4 * -(-len(pairs) // 2))
    panels = figure.subplots(-(-len(pairs) // 2), min(2, len(pairs)), squeeze=False).ravel()
    for axes in panels[len(pairs) :]:
        axes.set_axis_off()
    for axes, (up, across) in zip(panels, pairs, strict=False):
        for warm, color, marker in ((False, COLORS[0], "o"), (True, COLORS[1], "s")):
            chosen = [i for i, t in enumerate(trials) if t.origin.startswith("warm") == warm]
            axes.plot(
                points[chosen, across],
                points[chosen, up],
                marker,
                color=color,
                alpha=0.75,
                label=("warm start" if warm else "suggested") + f" ({len(chosen)})",
            )
        line = sorted(on_front, key=lambda i: points[i, across])
        axes.plot(
            points[line, across],
            points[line, up],
            "-" if len(objectives) == 2 else "",
            color="black",
            linewidth=1.2,
            marker="o",
            markersize=11,
            markerfacecolor="none",
            label=f"Pareto front ({len(line)})",
        )
        for i in line:
            axes.annotate(
                str(trials[i].number),
                points[i, [across, up]],
                xytext=(6, 6),
                textcoords="offset points",
                fontsize=8,
            )
        if recommended is not None:
            [point] = trial_points([recommended], objectives)
            label = f"recommended: trial {recommended.number}"
            axes.plot(point[across], point[up], "*", color=COLORS[4], ms=16, label=label)
        axes.set_xlabel(_name(objectives[across]), **PLAIN)
        axes.set_ylabel(_name(objectives[up]), **PLAIN)
        _finish(axes)
    return figure


def _best_so_far(trials: Sequence[Finished], objective: ObjectiveConfig) -> Figure:
    ordered = sorted(trials, key=lambda trial: trial.started + trial.seconds)
    values = trial_points(ordered, (objective,))[:, 0]
    best = (np.maximum if objective.mode == "max" else np.minimum).accumulate(values)
    figure = new_figure(7.0, 4.2)
    axes = figure.add_subplot()
    axes.plot(values, "o", color=COLORS[0], alpha=0.75, label="trial")
    axes.step(range(len(best)), best, where="post", color="black", label="best so far")
    axes.set_xlabel("trials, in the order they ended")
    axes.set_ylabel(_name(objective), **PLAIN)
    _finish(axes)
    return figure


def parallel_figure(
    finished: Sequence[Finished], objectives: Sequence[ObjectiveConfig]
) -> Figure | None:
    """A vertical axis a parameter and an objective, a line a trial, coloured by the first one.

    A subset is drawn by its size, a name by its place among the names seen.
    """
    # an axis is one objective's, over all budgets where there are several
    trials = [t for t in finished if all(judged([t], [o]) for o in objectives)]
    if not trials:
        return None
    names = list(dict.fromkeys(n for t in trials for n in t.values))
    columns = [_scale([trial.values.get(name) for trial in trials]) for name in names]
    columns += [_scale(column.tolist()) for column in trial_points(trials, objectives).T]
    labels = [*names, *(_name(objective) for objective in objectives)]
    heights = np.stack([column[0] for column in columns], axis=1)
    color = columns[len(names)][0] if objectives[0].mode == "max" else 1 - columns[len(names)][0]
    figure = new_figure(min(24.0, max(6.0, 1.5 * len(labels))), 4.6)
    axes = figure.add_subplot()
    from matplotlib import colormaps

    # the best are drawn last, on top
    for i in np.argsort(color):
        axes.plot(heights[i], color=colormaps["cividis"](color[i]), alpha=0.7, linewidth=1.4)
    for place, (_, ticks) in enumerate(columns):
        axes.axvline(place, color=GREY, linewidth=0.8)
        for height, text in ticks:
            axes.text(place + 0.03, height, text, fontsize=7, va="center", **PLAIN)
    axes.set_xticks(range(len(labels)), labels, rotation=20, ha="right", fontsize=8, **PLAIN)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(labels) - 0.6)
    axes.set_title(f"yellow: best in {objectives[0].metric}", loc="left", fontsize=9, **PLAIN)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def _scale(values: Sequence[Any]) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Heights in [0, 1] (NaN where there is no value), and (height, text) of the ticks."""
    sizes = [len(v) if is_subset(v) else v for v in values]
    known = [v for v in sizes if v is not None]
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in known) and known:
        low, high = min(known), max(known)
        # a range of decades is read on a logarithmic axis
        log = low > 0 and high / low >= 100
        ends = np.log([low, high]) if log else np.array([low, high], dtype=float)
        width = ends[1] - ends[0] or 1.0
        numbers = np.array([np.nan if v is None else v for v in sizes], dtype=float)
        heights = ((np.log(numbers) if log else numbers) - ends[0]) / width
        return heights, [(0.0, f"{low:.4g}"), *([(1.0, f"{high:.4g}")] if high > low else [])]
    names = sorted({str(v) for v in known})
    places = {name: i / max(1, len(names) - 1) for i, name in enumerate(names)}
    heights = np.array([np.nan if v is None else places[str(v)] for v in sizes])
    return heights, [(place, name[:24]) for name, place in places.items()]


def timeline_figure(finished: Sequence[Finished]) -> Figure | None:
    """When each trial ran, its steps, and how it ended; those that were not trained are left out.

    Of more than 80 trials, the last 80.
    """
    ran = sorted((t for t in finished if t.status != "duplicate"), key=lambda t: t.started)
    if not ran:
        return None
    begin = ran[0].started
    ran = ran[-MOST_LINES:]
    figure = new_figure(8.5, 1.2 + 0.2 * len(ran))
    axes = figure.add_subplot()
    for status in dict.fromkeys(trial.status for trial in ran):
        lines = [i for i, trial in enumerate(ran) if trial.status == status]
        axes.barh(
            lines,
            [ran[i].seconds for i in lines],
            left=[ran[i].started - begin for i in lines],
            height=0.75,
            color=STATUS_COLORS[status],
            label=f"{status} ({len(lines)})",
        )
    for i, trial in enumerate(ran):
        end = trial.started - begin + trial.seconds
        axes.text(end, i, f" {trial.steps} steps", va="center", fontsize=6, color=GREY)
    axes.set_yticks(range(len(ran)), [str(trial.number) for trial in ran], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_ylabel("trial")
    axes.set_xlabel("seconds since the first trial began")
    _finish(axes)
    return figure


def subset_figure(
    finished: Sequence[Finished], objectives: Sequence[ObjectiveConfig], parameter: str
) -> Figure | None:
    """Which items each trial took: a line a trial, best first, coloured by the first objective.

    Above: the mean of the trials with the item less that of those without it, which tells nothing
    of cause. Of more than 80 trials, the best 80.
    """
    trials = [t for t in judged(finished, objectives) if is_subset(t.values.get(parameter))]
    if not trials:
        return None
    first = objectives[0]
    scores = trial_points(trials, (first,))[:, 0]
    order = np.argsort(-scores if first.mode == "max" else scores, kind="stable")
    items = sorted({str(item) for trial in trials for item in trial.values[parameter]})
    taken = np.array(
        [[item in set(map(str, t.values[parameter])) for item in items] for t in trials]
    )
    gains = [
        scores[column].mean() - scores[~column].mean() if 0 < column.sum() < len(trials) else np.nan
        for column in taken.T
    ]
    shown = order[:MOST_LINES]
    figure = new_figure(min(24.0, max(5.0, 2.6 + 0.55 * len(items))), 2.6 + 0.2 * len(shown))
    axes = figure.add_subplot()
    heat = np.where(taken[shown], scores[shown, None], np.nan)
    image = axes.imshow(heat, cmap="cividis", aspect="auto", vmin=scores.min(), vmax=scores.max())
    marks = [
        f"{trials[i].number}{' w' if trials[i].origin.startswith('warm') else ''}" for i in shown
    ]
    axes.set_yticks(range(len(shown)), marks, fontsize=7)
    axes.set_ylabel("trial (w: warm start), best first")
    axes.set_xticks(range(len(items)), items, rotation=40, ha="right", fontsize=8, **PLAIN)
    for place, gain in enumerate(gains):
        text = "" if np.isnan(gain) else f"{gain:+.3f}"
        axes.text(place, -0.7, text, ha="center", va="bottom", fontsize=7)
    axes.set_title(
        f"{parameter}: mean with less mean without", loc="left", fontsize=9, pad=16, **PLAIN
    )
    figure.colorbar(image, ax=axes, fraction=0.05).set_label(_name(first), **PLAIN)
    return figure


def is_subset(value: Any) -> bool:
    """Is a value of a trial a set of names (as JSON has it, a list)?"""
    return isinstance(value, list | tuple | set | frozenset) and all(
        isinstance(item, str) for item in value
    )


def _name(objective: ObjectiveConfig) -> str:
    return f"{objective.metric} ({objective.mode})"


def _finish(axes: Axes) -> None:
    axes.grid(color=LIGHT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, framealpha=0.9, edgecolor=LIGHT)


# The browser itself is told to load nothing, whatever text found its way into the page.
_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }}
img {{ max-width: 100% }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }}
th, td {{ border-bottom: 1px solid #d9d9d9; padding: .25em .6em; text-align: left;
 vertical-align: top; overflow-wrap: anywhere }}
th {{ position: sticky; top: 0; background: #fff }}
tr.front {{ background: #eef5fa }}
tr.failed {{ color: #b34700 }}
.recommended {{ border-left: 4px solid #0072B2; padding-left: .8em }}
</style></head><body>
"""


def write_report(
    path: Path,
    finished: Sequence[Finished],
    objectives: Sequence[ObjectiveConfig],
    title: str,
    recommended: tuple[str, Finished] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write the report of a search, under a temporary name and moved.

    Args:
        recommended: the user's rule and the trial, at an operating point, that it picks.
        notes: lines of text for the top, such as a surrogate's rank correlation.
    """
    parts = [_HEAD.format(title=html.escape(title)), f"<h1>{html.escape(title)}</h1>\n"]
    parts.append(f"<p>{html.escape(_summary(finished))}</p>\n")
    chosen = None
    if recommended is not None:
        rule, chosen = recommended
        parts.append(f'<p class="recommended"><b>{html.escape(rule)}</b>: {_describe(chosen)}</p>')
    parts += [f"<p>{html.escape(note)}</p>\n" for note in notes]
    heading = "Pareto front" if len(objectives) > 1 else "Best found"
    parts.append(_section(heading, pareto_figure(finished, objectives, chosen)))
    parts.append(_section("Parallel coordinates", parallel_figure(finished, objectives)))
    parts.append(_section("Trial timeline", timeline_figure(finished)))
    subsets = dict.fromkeys(n for t in finished for n, v in t.values.items() if is_subset(v))
    for name in subsets:
        figure = subset_figure(finished, objectives, name)
        parts.append(_section(f"Subset heat map: {name}", figure))
    parts.append(_table(finished, objectives))
    parts.append("</body></html>\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    # a lone surrogate, as Python makes of bytes that are no text, is no character of UTF-8
    partial.write_text("".join(parts), encoding="utf-8", errors="backslashreplace")
    os.replace(partial, path)


def _summary(finished: Sequence[Finished]) -> str:
    counts = Counter(trial.status for trial in finished)
    ended = ", ".join(f"{count} {status}" for status, count in counts.items()) or "none"
    steps = sum(trial.steps for trial in finished if trial.status != "duplicate")
    seconds = sum(trial.seconds for trial in finished if trial.status != "duplicate")
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return f"{len(finished)} trials: {ended}. {steps} steps in {seconds:.0f} trial seconds. {now}"


def _describe(trial: Finished) -> str:
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in trial.metrics.items())
    overrides = " ".join(f"--set {override}" for override in trial.overrides)
    budget = f" at budget {trial.metrics['budget']:g}" if "budget" in trial.metrics else ""
    return (
        f"trial {trial.number}{budget} ({html.escape(metrics)})"
        f"<br><code>{html.escape(overrides) or 'the base recipe as it is'}</code>"
    )


def _section(heading: str, figure: Figure | None) -> str:
    title = html.escape(heading)
    if figure is None:
        return f"<h2>{title}</h2>\n<p>Nothing to draw: no trial was trained to its end.</p>\n"
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    image = base64.b64encode(buffer.getvalue()).decode()
    return f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/png;base64,{image}">\n'


def _table(finished: Sequence[Finished], objectives: Sequence[ObjectiveConfig]) -> str:
    """All trials by number; those of the front are shaded, failures have their reason."""
    best = {trial.number for trial in front_of(finished, objectives)}
    names = [objective.metric for objective in objectives]
    heads = ["trial", "origin", "status", *names, "steps", "seconds", "values", "reason"]
    lines = [f"<tr>{''.join(f'<th>{html.escape(head)}</th>' for head in heads)}</tr>\n"]
    for trial in sorted(finished, key=lambda trial: trial.number):
        found = [f"{trial.metrics[n]:.4g}" if n in trial.metrics else "" for n in names]
        cells = [str(trial.number), trial.origin, trial.status, *found, str(trial.steps)]
        values = json.dumps(dict(trial.values), ensure_ascii=False, default=sorted)
        cells += [f"{trial.seconds:.1f}", values, trial.reason or ""]
        kind = "front" if trial.number in best else trial.status
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr class="{kind}">{row}</tr>\n')
    return f"<h2>Trials</h2>\n<table>\n{''.join(lines)}</table>\n"

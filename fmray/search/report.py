"""`report.html`: what a search found, as one file that opens without a network.

The figures are embedded PNGs, and there is no script. Text from recipes, data and errors is escaped
in the page, and drawn literally in the figures.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmray.config.search import ObjectiveConfig
from fmray.plots.style import COLORS, GREY, LIGHT, new_figure
from fmray.runtime.files import dumps, write_atomic
from fmray.search.pareto import front, front_of, objective_values, valid_points
from fmray.search.state import FinishedTrial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLAIN = {"parse_math": False}  # draw a dollar sign in a name as it is
STATUS_COLORS = {"done": COLORS[0], "stopped": COLORS[1], "failed": COLORS[4], "duplicate": LIGHT}
MAX_ROWS = 80  # of a figure, so that it stays readable and fits on a page

# the content security policy makes the browser load nothing, whatever text the page contains
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
    finished: Sequence[FinishedTrial],
    objectives: Sequence[ObjectiveConfig],
    title: str,
    recommended: tuple[str, FinishedTrial] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write the report of a search; replaces an earlier one.

    Args:
        recommended: the user's rule and the operating point that it selects.
        notes: lines of text for the top, such as the rank correlation of a score.
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
    # UTF-8 cannot encode lone surrogates, which Python decodes invalid bytes to
    write_atomic(path, "".join(parts).encode("utf-8", errors="backslashreplace"))


def _summary(finished: Sequence[FinishedTrial]) -> str:
    counts = Counter(trial.status for trial in finished)
    by_status = ", ".join(f"{count} {status}" for status, count in counts.items()) or "none"
    steps = sum(trial.steps for trial in finished if trial.status != "duplicate")
    seconds = sum(trial.seconds for trial in finished if trial.status != "duplicate")
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return (
        f"{len(finished)} trials: {by_status}. {steps} steps in {seconds:.0f} trial seconds. {now}"
    )


def _describe(trial: FinishedTrial) -> str:
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in trial.metrics.items())
    overrides = " ".join(f"--set {override}" for override in trial.overrides)
    budget = f" at budget {trial.metrics['budget']:g}" if "budget" in trial.metrics else ""
    return (
        f"trial {trial.number}{budget} ({html.escape(metrics)})"
        f"<br><code>{html.escape(overrides) or 'the base recipe, unchanged'}</code>"
    )


def _section(heading: str, figure: Figure | None) -> str:
    title = html.escape(heading)
    if figure is None:
        return f"<h2>{title}</h2>\n<p>Nothing to draw: no trial was trained to the end.</p>\n"
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    image = base64.b64encode(buffer.getvalue()).decode()
    return f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/png;base64,{image}">\n'


def _table(finished: Sequence[FinishedTrial], objectives: Sequence[ObjectiveConfig]) -> str:
    """Return the table of all trials by number; those on the Pareto front are shaded."""
    on_front = {trial.number for trial in front_of(finished, objectives)}
    names = [objective.metric for objective in objectives]
    heads = ["trial", "origin", "status", *names, "steps", "seconds", "values", "reason"]
    lines = [f"<tr>{''.join(f'<th>{html.escape(head)}</th>' for head in heads)}</tr>\n"]
    for trial in sorted(finished, key=lambda trial: trial.number):
        metrics = [f"{trial.metrics[n]:.4g}" if n in trial.metrics else "" for n in names]
        cells = [str(trial.number), trial.origin, trial.status, *metrics, str(trial.steps)]
        values = dumps(dict(trial.values), ensure_ascii=False, default=sorted)
        cells += [f"{trial.seconds:.1f}", values, trial.reason or ""]
        kind = "front" if trial.number in on_front else trial.status
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr class="{kind}">{row}</tr>\n')
    return f"<h2>Trials</h2>\n<table>\n{''.join(lines)}</table>\n"


# --- Figures ---


def pareto_figure(
    finished: Sequence[FinishedTrial],
    objectives: Sequence[ObjectiveConfig],
    recommended: FinishedTrial | None = None,
) -> Figure | None:
    """Draw the operating points and the Pareto front, one panel per pair of objectives.

    For a single objective, draw the best value so far. None if there is nothing to draw.
    """
    trials = valid_points(finished, objectives)
    if not trials:
        return None
    if len(objectives) == 1:
        return _best_so_far(trials, objectives[0])
    points = objective_values(trials, objectives)
    on_front = front(points, [objective.mode for objective in objectives]).tolist()
    pairs = list(itertools.combinations(range(len(objectives)), 2))
    columns, rows = min(2, len(pairs)), -(-len(pairs) // 2)
    figure = new_figure(6.4 * columns, 4.4 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(pairs) :]:
        axes.set_axis_off()
    for axes, (up, across) in zip(panels, pairs, strict=False):
        # all operating points, by origin
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
        # the front, as a line only if these are all the objectives
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
            [point] = objective_values([recommended], objectives)
            label = f"recommended: trial {recommended.number}"
            axes.plot(point[across], point[up], "*", color=COLORS[4], ms=16, label=label)
        axes.set_xlabel(_name(objectives[across]), **PLAIN)
        axes.set_ylabel(_name(objectives[up]), **PLAIN)
        _finish(axes)
    return figure


def _best_so_far(trials: Sequence[FinishedTrial], objective: ObjectiveConfig) -> Figure:
    ordered = sorted(trials, key=lambda trial: trial.started + trial.seconds)
    values = objective_values(ordered, (objective,))[:, 0]
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
    finished: Sequence[FinishedTrial], objectives: Sequence[ObjectiveConfig]
) -> Figure | None:
    """Draw one vertical axis per parameter and objective, and one line per trial.

    Lines are coloured by the first objective. A subset is drawn by its size, a name by its position
    among the names that occur. None if there is nothing to draw.
    """
    # one line per trial: objectives are means over the budgets
    trials = [t for t in finished if all(valid_points([t], [o]) for o in objectives)]
    if not trials:
        return None
    names = list(dict.fromkeys(n for t in trials for n in t.values))
    columns = [_scale([trial.values.get(name) for trial in trials]) for name in names]
    columns += [_scale(column.tolist()) for column in objective_values(trials, objectives).T]
    labels = [*names, *(_name(objective) for objective in objectives)]
    heights = np.stack([column[0] for column in columns], axis=1)
    color = columns[len(names)][0] if objectives[0].mode == "max" else 1 - columns[len(names)][0]
    figure = new_figure(min(24.0, max(6.0, 1.5 * len(labels))), 4.6)
    axes = figure.add_subplot()
    from matplotlib import colormaps  # only imported if something is drawn

    # the best trials last, on top of the others
    for i in np.argsort(color):
        axes.plot(heights[i], color=colormaps["cividis"](color[i]), alpha=0.7, linewidth=1.4)
    for position, (_, ticks) in enumerate(columns):
        axes.axvline(position, color=GREY, linewidth=0.8)
        for height, text in ticks:
            axes.text(position + 0.03, height, text, fontsize=7, va="center", **PLAIN)
    axes.set_xticks(range(len(labels)), labels, rotation=20, ha="right", fontsize=8, **PLAIN)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(labels) - 0.6)
    axes.set_title(f"yellow: best in {objectives[0].metric}", loc="left", fontsize=9, **PLAIN)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def _scale(values: Sequence[Any]) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Return heights in [0, 1] (NaN for a missing value), and (height, text) of the ticks."""
    sizes = [len(v) if is_subset(v) else v for v in values]
    known = [v for v in sizes if v is not None]
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in known) and known:
        low, high = min(known), max(known)
        # logarithmic if the values span two decades
        log = low > 0 and high / low >= 100
        ends = np.log([low, high]) if log else np.array([low, high], dtype=float)
        width = ends[1] - ends[0] or 1.0
        numbers = np.array([np.nan if v is None else v for v in sizes], dtype=float)
        heights = ((np.log(numbers) if log else numbers) - ends[0]) / width
        return heights, [(0.0, f"{low:.4g}"), *([(1.0, f"{high:.4g}")] if high > low else [])]
    names = sorted({str(v) for v in known})
    positions = {name: i / max(1, len(names) - 1) for i, name in enumerate(names)}
    heights = np.array([np.nan if v is None else positions[str(v)] for v in sizes])
    return heights, [(position, name[:24]) for name, position in positions.items()]


def timeline_figure(finished: Sequence[FinishedTrial]) -> Figure | None:
    """Draw when each trained trial ran, its steps, and its status; at most the last `MAX_ROWS`."""
    ran = sorted((t for t in finished if t.status != "duplicate"), key=lambda t: t.started)
    if not ran:
        return None
    begin = ran[0].started
    ran = ran[-MAX_ROWS:]
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
    finished: Sequence[FinishedTrial], objectives: Sequence[ObjectiveConfig], parameter: str
) -> Figure | None:
    """Draw the items that each trial took, one row per trial, coloured by the first objective.

    The best trials are first, at most `MAX_ROWS`. Above each item: the mean of the trials with it
    minus the mean of those without it, which is a correlation and not an effect.
    """
    trials = [t for t in valid_points(finished, objectives) if is_subset(t.values.get(parameter))]
    if not trials:
        return None
    objective = objectives[0]
    scores = objective_values(trials, (objective,))[:, 0]
    order = np.argsort(-scores if objective.mode == "max" else scores, kind="stable")
    items = sorted({str(item) for trial in trials for item in trial.values[parameter]})
    taken = np.array(
        [[item in set(map(str, t.values[parameter])) for item in items] for t in trials]
    )
    gains = [
        scores[column].mean() - scores[~column].mean() if 0 < column.sum() < len(trials) else np.nan
        for column in taken.T
    ]
    shown = order[:MAX_ROWS]
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
    for position, gain in enumerate(gains):
        text = "" if np.isnan(gain) else f"{gain:+.3f}"
        axes.text(position, -0.7, text, ha="center", va="bottom", fontsize=7)
    axes.set_title(
        f"{parameter}: mean with minus mean without", loc="left", fontsize=9, pad=16, **PLAIN
    )
    figure.colorbar(image, ax=axes, fraction=0.05).set_label(_name(objective), **PLAIN)
    return figure


def is_subset(value: Any) -> bool:
    """Whether a value of a trial is a set of names (in JSON: a list)."""
    return isinstance(value, list | tuple | set | frozenset) and all(
        isinstance(item, str) for item in value
    )


def _name(objective: ObjectiveConfig) -> str:
    return f"{objective.metric} ({objective.mode})"


def _finish(axes: Axes) -> None:
    axes.grid(color=LIGHT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, framealpha=0.9, edgecolor=LIGHT)

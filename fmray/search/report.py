"""`report.html`: what a search found, in one file that opens without a network.

In: finished trials, the objectives, and what else is to be said. Out: one HTML file with its
figures in it as PNG, and no script; whatever comes from recipes, data or errors is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fmray.search.config import ObjectiveConfig
from fmray.search.pareto import front_of
from fmray.search.report_plots import (
    is_subset,
    parallel_figure,
    pareto_figure,
    subset_figure,
    timeline_figure,
)
from fmray.search.state import Finished

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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

"""Several objectives: the Pareto front, its hypervolume, and the trial that a rule recommends.

An adaptive model is one model per budget. A trial whose objectives are known at each budget
(`accuracy/0.5`, `share/0.5`, ...) therefore has one operating point per budget, and each of them
counts. An operating point is represented by the trial with the metrics of that budget, and the
budget itself as the metric `budget`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from fmray.config.search import ObjectiveConfig
from fmray.search.state import FinishedTrial

Mode = Literal["max", "min"]

_NUMBER = r"(?P<number>\d+\.?\d*|\.\d+)"
_BEST = re.compile(rf"best (?P<metric>\S+) under {_NUMBER}(?: (?P<cost>\S+))?")
_CHEAPEST = re.compile(rf"cheapest(?: (?P<cost>\S+))? within {_NUMBER} ?% of full")
RULES = (
    '"best METRIC under NUMBER", "cheapest within NUMBER % of full", or, with several costs, '
    '"best METRIC under NUMBER COST", "cheapest COST within NUMBER % of full"'
)


def front(points: ArrayLike, modes: Sequence[Mode]) -> np.ndarray:
    """Return the indices of the points that no other point dominates, best in column 0 first.

    A point dominates another if it is better in one objective and not worse in any. Equal points do
    not dominate each other: all of them are returned, in order of their indices.

    Args:
        points: [n, m], one column per objective.
        modes: one per column.

    Raises:
        ValueError: the shape does not fit the modes, or a value is not finite.
    """
    losses = _losses(points, modes)
    not_worse = (losses[:, None] <= losses[None]).all(2)
    better = (losses[:, None] < losses[None]).any(2)
    indices = np.flatnonzero(~(not_worse & better).any(0))
    return indices[np.lexsort((indices, *losses[indices].T[::-1]))]


def hypervolume(points: ArrayLike, modes: Sequence[Mode], reference: ArrayLike) -> float:
    """Return the exact volume between the points [n, m] and the reference point [m].

    Hypervolume by slicing objectives (HSO, While et al. 2006): slices along the last objective are
    m - 1 dimensional volumes; n^(m-1) steps. A point that is not better than the reference in
    every objective adds nothing. Larger is better, whatever the modes. Two fronts are comparable
    under the same reference only.

    Raises:
        ValueError: as `front`, or the reference has another length.
    """
    losses = _losses(points, modes)
    bound = _losses(np.asarray(reference, dtype=np.float64)[None], modes)[0]
    return _volume(losses[(losses < bound).all(1)], bound)


def _volume(losses: np.ndarray, bound: np.ndarray) -> float:
    if not len(losses):
        return 0.0
    if len(bound) == 1:
        return float(bound[0] - losses.min())
    losses = losses[np.argsort(losses[:, -1], kind="stable")]
    depths = np.diff(np.append(losses[:, -1], bound[-1]))
    return math.fsum(
        depth * _volume(losses[:count, :-1], bound[:-1])
        for count, depth in enumerate(depths.tolist(), 1)
        if depth
    )


def _losses(points: ArrayLike, modes: Sequence[Mode]) -> np.ndarray:
    """Return the points as float64 [n, m] where smaller is better."""
    values = np.asarray(points, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(modes) or not modes:
        raise ValueError(
            f"points must be [n, {len(modes)}], one column per mode, not {values.shape}"
        )
    if not np.isfinite(values).all():
        bad = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"points must be finite; point {bad[0]} is {values[tuple(bad)]}")
    return values * [-1.0 if mode == "max" else 1.0 for mode in modes]


def metrics_by_budget(metrics: Mapping[str, float]) -> dict[float, dict[str, float]]:
    """Group the metrics named `NAME/BUDGET`: budget -> name -> value, smallest budget first."""
    groups: dict[float, dict[str, float]] = {}
    for key, value in metrics.items():
        name, _, end = key.rpartition("/")
        try:
            budget = float(end)
        except ValueError:  # `accuracy`, `accuracy/5-shot`, `accuracy/base`
            continue
        groups.setdefault(budget, {})[name] = value
    return dict(sorted(groups.items()))


def operating_points(
    metrics: Mapping[str, float], objectives: Sequence[ObjectiveConfig]
) -> list[dict[str, float]]:
    """Return a trial's metrics at each budget, smallest first.

    With a single objective, or if no budget has all objectives, the only point is the trial's
    metrics as they are (means over the budgets).
    """
    points: list[dict[str, float]] = []
    if len(objectives) > 1:
        points = [
            values | {"budget": budget}
            for budget, values in metrics_by_budget(metrics).items()
            if all(objective.metric in values for objective in objectives)
        ]
    return points or [dict(metrics)]


def valid_points(
    finished: Sequence[FinishedTrial], objectives: Sequence[ObjectiveConfig]
) -> list[FinishedTrial]:
    """Return the operating points that count: those of trials that were trained to the end, with a
    finite value of each objective."""
    return [
        replace(trial, metrics=point)
        for trial in finished
        if trial.status == "done"
        for point in operating_points(trial.metrics, objectives)
        if all(math.isfinite(point.get(o.metric, math.nan)) for o in objectives)
    ]


def objective_values(
    trials: Sequence[FinishedTrial], objectives: Sequence[ObjectiveConfig]
) -> np.ndarray:
    """Return the objectives of `valid_points` as float64 [n, m]."""
    values = [[trial.metrics[o.metric] for o in objectives] for trial in trials]
    return np.array(values, dtype=np.float64).reshape(len(trials), len(objectives))


def front_of(
    finished: Sequence[FinishedTrial], objectives: Sequence[ObjectiveConfig]
) -> list[FinishedTrial]:
    """Return the operating points on the Pareto front, best in the first objective first."""
    trials = valid_points(finished, objectives)
    points = objective_values(trials, objectives)
    return [trials[index] for index in front(points, [o.mode for o in objectives])]


def rule_of(
    rule: str, objectives: Sequence[ObjectiveConfig]
) -> Callable[[Sequence[FinishedTrial]], FinishedTrial]:
    """Parse a rule; return the function that applies it to finished trials (see `recommend`).

    A search parses its rule before it starts, so that a wrong rule costs no training.

    Raises:
        ValueError: the rule has another form, or names a metric that is not an objective.
    """
    text = " ".join(rule.split())
    if match := _BEST.fullmatch(text):
        metric = _named(rule, match["metric"], objectives, "any")
        cost = _named(rule, match["cost"], [o for o in objectives if o is not metric], "min")
        limit = float(match["number"])
        return lambda finished: _best_under(rule, metric, cost, limit, finished)
    if match := _CHEAPEST.fullmatch(text):
        cost = _named(rule, match["cost"], objectives, "min")
        # `within P % of full` refers to the first objective that is not the cost
        others = [o for o in objectives if o is not cost]
        if not others:
            raise ValueError(f"recommend: {rule!r} needs a second objective next to {cost.metric}")
        share = float(match["number"]) / 100
        return lambda finished: _cheapest_within(rule, others[0], cost, share, finished)
    raise ValueError(f"recommend: {rule!r} is not a rule; the rules are {RULES}")


def recommend(
    rule: str, finished: Sequence[FinishedTrial], objectives: Sequence[ObjectiveConfig]
) -> FinishedTrial:
    """Return the operating point that a rule selects.

    - "best M under X": the best in M among the points with a cost of at most X. The cost is the
      objective with mode min.
    - "cheapest within P % of full": full is the point with the highest cost (of several, the best
      in the first objective that is not the cost). Among the points whose value is worse than that
      of full by at most P percent, the cheapest.

    Ties go to the better point in the other objective, then to the smaller trial number. With
    several costs, the rule names one: "best accuracy under 0.6 operations".

    Raises:
        ValueError: as `rule_of`, or no trial satisfies the rule.
    """
    return rule_of(rule, objectives)(finished)


def _named(
    rule: str, name: str | None, objectives: Sequence[ObjectiveConfig], mode: str
) -> ObjectiveConfig:
    """Return the objective with that name; without a name, the only objective of the mode."""
    fitting = [o for o in objectives if mode in ("any", o.mode)]
    if name is not None:
        fitting = [o for o in fitting if o.metric == name]
    if len(fitting) == 1:
        return fitting[0]
    known = ", ".join(f"{o.metric} ({o.mode})" for o in objectives) or "none left"
    if name is None:
        fault = f"needs exactly one cost (mode min) and there are {len(fitting)}"
    else:
        fault = f"no objective {name!r} fits"
    raise ValueError(
        f"recommend: {rule!r}: {fault}; the objectives are {known}; the rules are {RULES}"
    )


def _loss(trial: FinishedTrial, objective: ObjectiveConfig) -> float:
    value = trial.metrics[objective.metric]
    return -value if objective.mode == "max" else value


def _comparable(
    rule: str, finished: Sequence[FinishedTrial], metric: ObjectiveConfig, cost: ObjectiveConfig
) -> list[FinishedTrial]:
    trials = valid_points(finished, (metric, cost))
    if not trials:
        raise ValueError(
            f"recommend: {rule!r}: none of {len(finished)} trials was trained to the end with "
            f"finite {metric.metric} and {cost.metric}"
        )
    return trials


def _best_under(
    rule: str,
    metric: ObjectiveConfig,
    cost: ObjectiveConfig,
    limit: float,
    finished: Sequence[FinishedTrial],
) -> FinishedTrial:
    trials = _comparable(rule, finished, metric, cost)
    under = [trial for trial in trials if _loss(trial, cost) <= limit]
    if not under:
        least = min(_loss(trial, cost) for trial in trials)
        raise ValueError(
            f"recommend: {rule!r}: no trial has {cost.metric} of at most {limit:g}; the smallest "
            f"is {least:g}"
        )
    return min(under, key=lambda t: (_loss(t, metric), _loss(t, cost), t.number))


def _cheapest_within(
    rule: str,
    metric: ObjectiveConfig,
    cost: ObjectiveConfig,
    share: float,
    finished: Sequence[FinishedTrial],
) -> FinishedTrial:
    trials = _comparable(rule, finished, metric, cost)
    full = _loss(min(trials, key=lambda t: (-_loss(t, cost), _loss(t, metric))), metric)
    within = [trial for trial in trials if _loss(trial, metric) <= full + share * abs(full)]
    return min(within, key=lambda t: (_loss(t, cost), _loss(t, metric), t.number))

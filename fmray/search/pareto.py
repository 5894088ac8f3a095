"""Several objectives: the Pareto front, the volume it dominates, and the trial a rule asks for.

In: points [n, m] (a column an objective) and each objective's mode, or finished trials and the
objectives of their search. Out: indices, a volume, a trial at one of its operating points.

An adaptive model is many models: a trial whose objectives are known at each budget (`accuracy/0.5`,
`share/0.5`, ...) has an operating point a budget, all of which count. Such a point is the trial
with the metrics of that budget, and the budget itself as `budget`.
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
from fmray.search.state import Finished

Mode = Literal["max", "min"]

_NUMBER = r"(?P<number>\d+\.?\d*|\.\d+)"
_BEST = re.compile(rf"best (?P<metric>\S+) under {_NUMBER}(?: (?P<cost>\S+))?")
_CHEAPEST = re.compile(rf"cheapest(?: (?P<cost>\S+))? within {_NUMBER} ?% of full")
RULES = (
    '"best METRIC under NUMBER", "cheapest within NUMBER % of full", or, with several costs, '
    '"best METRIC under NUMBER COST", "cheapest COST within NUMBER % of full"'
)


def front(points: ArrayLike, modes: Sequence[Mode]) -> np.ndarray:
    """Indices of the points [n, m] that no other point dominates, best in the first column first.

    A point dominates another that it beats in one objective and is not worse than in any. Equal
    points do not dominate each other: all are there, the first index first.

    Raises:
        ValueError: points that are not [n, m] with a mode a column, or not finite.
    """
    losses = _losses(points, modes)
    not_worse = (losses[:, None] <= losses[None]).all(2)
    better = (losses[:, None] < losses[None]).any(2)
    found = np.flatnonzero(~(not_worse & better).any(0))
    return found[np.lexsort((found, *losses[found].T[::-1]))]


def hypervolume(points: ArrayLike, modes: Sequence[Mode], reference: ArrayLike) -> float:
    """The volume that points [n, m] dominate, as far as the reference point [m]. Exact.

    Slices along the last objective, each an m - 1 dimensional volume (While et al. 2006, HSO):
    n^(m-1) steps. A point that is not better than the reference in every objective adds nothing.
    Larger is better whatever the modes; two fronts are compared with one reference.

    Raises:
        ValueError: as `front`, or a reference of another length.
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
    """float64 [n, m], smaller is better."""
    values = np.asarray(points, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(modes) or not modes:
        raise ValueError(f"points must be [n, {len(modes)}], a column a mode, not {values.shape}")
    if not np.isfinite(values).all():
        bad = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"points must be finite; point {bad[0]} is {values[tuple(bad)]}")
    return values * [-1.0 if mode == "max" else 1.0 for mode in modes]


def operating_points(
    metrics: Mapping[str, float], objectives: Sequence[ObjectiveConfig]
) -> list[dict[str, float]]:
    """A trial's metrics at each budget, smallest first, if there are several objectives and all are
    known there; else the metrics as they are, which is one point."""
    first, *others = (objective.metric for objective in objectives)
    budgets = [
        name.removeprefix(f"{first}/")
        for name in metrics
        if others and name.startswith(f"{first}/")
    ]
    points = []
    for budget in budgets:
        ends = f"/{budget}"
        point = {n.removesuffix(ends): x for n, x in metrics.items() if n.endswith(ends)}
        if all(other in point for other in others):
            points.append(point | {"budget": float(budget)})
    return sorted(points, key=lambda point: point["budget"]) or [dict(metrics)]


def judged(finished: Sequence[Finished], objectives: Sequence[ObjectiveConfig]) -> list[Finished]:
    """The operating points that count: of trials that were trained to their end, with a finite
    number for each objective."""
    return [
        replace(trial, metrics=point)
        for trial in finished
        if trial.status == "done"
        for point in operating_points(trial.metrics, objectives)
        if all(math.isfinite(point.get(o.metric, math.nan)) for o in objectives)
    ]


def trial_points(trials: Sequence[Finished], objectives: Sequence[ObjectiveConfig]) -> np.ndarray:
    """float64 [n, m]: the objectives of trials that are `judged`."""
    values = [[trial.metrics[o.metric] for o in objectives] for trial in trials]
    return np.array(values, dtype=np.float64).reshape(len(trials), len(objectives))


def front_of(finished: Sequence[Finished], objectives: Sequence[ObjectiveConfig]) -> list[Finished]:
    """The operating points of the Pareto front, best in the first objective first."""
    trials = judged(finished, objectives)
    points = trial_points(trials, objectives)
    return [trials[index] for index in front(points, [o.mode for o in objectives])]


def rule_of(
    rule: str, objectives: Sequence[ObjectiveConfig]
) -> Callable[[Sequence[Finished]], Finished]:
    """Read a user's rule; what it returns picks from finished trials (see `recommend`).

    A search calls it before it starts, so that a wrong rule costs no training.

    Raises:
        ValueError: a rule of another form, or that names what is no objective of the search.
    """
    text = " ".join(rule.split())
    if found := _BEST.fullmatch(text):
        metric = _named(rule, found["metric"], objectives, "any")
        cost = _named(rule, found["cost"], [o for o in objectives if o is not metric], "min")
        limit = float(found["number"])
        return lambda finished: _best_under(rule, metric, cost, limit, finished)
    if found := _CHEAPEST.fullmatch(text):
        cost = _named(rule, found["cost"], objectives, "min")
        # `within .. of full` is said of the first objective that is not the cost
        others = [o for o in objectives if o is not cost]
        if not others:
            raise ValueError(f"recommend: {rule!r} needs a second objective beside {cost.metric}")
        share = float(found["number"]) / 100
        return lambda finished: _cheapest_within(rule, others[0], cost, share, finished)
    raise ValueError(f"recommend: {rule!r} is not a rule; the rules are {RULES}")


def recommend(
    rule: str, finished: Sequence[Finished], objectives: Sequence[ObjectiveConfig]
) -> Finished:
    """The operating point that a rule asks for.

    "best M under X": of the points whose cost (the objective to be made small) is at most X, the
    best in M. "cheapest within P % of full": full is the point that costs most (of equal ones the
    best in the first objective that is not the cost); of the points that reach its value up to P
    percent of it, the cheapest. Ties go to the better in the other objective, then to the smaller
    number. With several costs the rule names one: "best accuracy under 0.6 operations".

    Raises:
        ValueError: as `rule_of`, or no trial fits.
    """
    return rule_of(rule, objectives)(finished)


def _named(
    rule: str, name: str | None, objectives: Sequence[ObjectiveConfig], mode: str
) -> ObjectiveConfig:
    """The objective of that name, or, without one, the only one of the mode."""
    fitting = [o for o in objectives if mode in ("any", o.mode)]
    if name is not None:
        fitting = [o for o in fitting if o.metric == name]
    if len(fitting) == 1:
        return fitting[0]
    known = ", ".join(f"{o.metric} ({o.mode})" for o in objectives) or "none left"
    wanted = f"no objective {name!r}" if name is not None else f"{len(fitting)} costs (mode min)"
    raise ValueError(
        f"recommend: {rule!r}: there is {wanted} to go by; the objectives are {known}; the rules "
        f"are {RULES}"
    )


def _loss(trial: Finished, objective: ObjectiveConfig) -> float:
    value = trial.metrics[objective.metric]
    return -value if objective.mode == "max" else value


def _fitting(
    rule: str, finished: Sequence[Finished], metric: ObjectiveConfig, cost: ObjectiveConfig
) -> list[Finished]:
    trials = judged(finished, (metric, cost))
    if not trials:
        raise ValueError(
            f"recommend: {rule!r}: none of {len(finished)} trials was trained to its end with "
            f"finite {metric.metric} and {cost.metric}"
        )
    return trials


def _best_under(
    rule: str,
    metric: ObjectiveConfig,
    cost: ObjectiveConfig,
    limit: float,
    finished: Sequence[Finished],
) -> Finished:
    trials = _fitting(rule, finished, metric, cost)
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
    finished: Sequence[Finished],
) -> Finished:
    trials = _fitting(rule, finished, metric, cost)
    full = _loss(min(trials, key=lambda t: (-_loss(t, cost), _loss(t, metric))), metric)
    within = [trial for trial in trials if _loss(trial, metric) <= full + share * abs(full)]
    return min(within, key=lambda t: (_loss(t, cost), _loss(t, metric), t.number))

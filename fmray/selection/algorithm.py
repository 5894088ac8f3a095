"""Algorithm 1: consistency-diversity task selection (dissertation section 3.3.2).

In: the moments of a target and of candidate tasks. Out: a `Selection`: the names chosen, and the
whole curves that the choice was read from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fmray.selection.coverage import Covariance, Mixture, Weighting, similarity
from fmray.selection.moments import TaskMoments, check_names


@dataclass(frozen=True)
class Selection:
    """Which tasks were chosen.

    Attributes:
        names: the tasks chosen, most similar first.
        order: all candidates, most similar first.
        similarity: of each candidate in `order` to the target.
        coverage: of the target by the first 1, 2, ... candidates of `order`.
    """

    names: list[str]
    order: list[str]
    similarity: list[float]
    coverage: list[float]


def select_tasks(
    target: TaskMoments,
    candidates: Sequence[TaskMoments],
    threshold: float,
    covariance: Covariance = "oas",
    weighting: Weighting = "task",
) -> Selection:
    """Add tasks, the most similar first, while coverage grows by the share `threshold` (p) or more.

    It stops at the first task that fails, or when coverage is infinite: nothing adds to that.
    Coverage is not monotone, so the curve of all candidates is part of the result. Scatters are
    read one at a time, each once, in the order of similarity: held as memory maps they take no
    memory, and a curve over M tasks costs M factorizations of [d, d].

    Args:
        covariance, weighting: as in `coverage`.

    Raises:
        ValueError: no candidates, duplicate names, a zero mean, a threshold below 0, different d,
            or a covariance that has no inverse.
    """
    if not (threshold >= 0 and math.isfinite(threshold)):
        raise ValueError(f"threshold: a finite share of 0 or more, not {threshold}")
    if not candidates:
        raise ValueError("no candidate tasks to select from")
    check_names([task.name for task in candidates])
    similarities = {task.name: similarity(target, task) for task in candidates}
    # Equal up to rounding is equal: the names decide, the same on every machine.
    ordered = sorted(candidates, key=lambda task: (-round(similarities[task.name], 12), task.name))
    mixture = Mixture(target, covariance, weighting)
    curve: list[float] = []
    for task in ordered:
        mixture.add(task)
        curve.append(mixture.coverage())
    chosen = selected_count(curve, threshold)
    order = [task.name for task in ordered]
    return Selection(order[:chosen], order, [similarities[name] for name in order], curve)


def selected_count(coverage: Sequence[float], threshold: float) -> int:
    """How many tasks Algorithm 1 selects, by the coverage of the first 1, 2, ... of them."""
    chosen = 1
    while (
        chosen < len(coverage)
        and math.isfinite(coverage[chosen - 1])
        and coverage[chosen] >= (1 + threshold) * coverage[chosen - 1]
    ):
        chosen += 1
    return chosen

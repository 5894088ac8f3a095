"""Similarity and coverage: how consistent tasks are with a target, and how well they span it.

In: `TaskMoments` of tasks and of a target. Out: numbers (dissertation section 3.3.2). The tasks
together are one Gaussian, a mixture with equal task weights (or weighted by sample). Its covariance
is shrunk (OAS: Chen et al. 2010; Ledoit and Wolf 2004, both as scikit-learn has them), for with
fewer samples than features the plain one has no inverse, and its pseudo-inverse calls a target
that lies off the tasks' span near.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, solve_triangular
from scipy.linalg.lapack import dpocon

from fmray.selection.moments import CentralSums, TaskMoments, check_names

Covariance = Literal["oas", "ledoit_wolf", "ml", "diag"]
Weighting = Literal["task", "sample"]
_ZERO = 1e-12  # a mean this small beside the features themselves has no direction


def similarity(target: TaskMoments, task: TaskMoments) -> float:
    """The cosine of the two mean features, in [-1, 1]: consistency (section 3.3.2).

    Raises:
        ValueError: a mean of zero, or different numbers of features d.
    """
    if len(target.mean) != len(task.mean):
        raise ValueError(
            f"task {task.name!r} has {len(task.mean)} features, target {target.name!r}"
            f" {len(target.mean)}: one encoder must have made both"
        )
    for one in (target, task):
        spread = np.trace(one.scatter) / one.count
        if one.mean @ one.mean <= _ZERO**2 * (one.mean @ one.mean + spread):
            raise ValueError(
                f"task {one.name!r}: its mean feature is zero and has no direction, so it has no"
                " similarity; do not centre the features"
            )
    cosine = _unit(target.mean) @ _unit(task.mean)
    return float(min(1.0, max(-1.0, cosine)))


def coverage(
    tasks: Sequence[TaskMoments],
    target: TaskMoments,
    covariance: Covariance = "oas",
    weighting: Weighting = "task",
) -> float:
    """1 / (mu_D - mu_0)^T C_D^-1 (mu_D - mu_0) of the mixture D of tasks (section 3.3.2).

    Args:
        covariance: of D. `oas`, `ledoit_wolf` (needs moments made by `TaskMoments.of`), `ml`
            (plain, divided by n) or `diag` (its variances alone). Shrinkage counts D's samples; by
            task weight, its effective ones, (sum w)^2 / sum w^2, the same where counts are equal.
        weighting: each task counts the same, or each sample.

    Returns:
        inf where the means are the same.

    Raises:
        ValueError: no tasks, duplicate names, different d, or a covariance that has no inverse.
    """
    if not tasks:
        raise ValueError("coverage of no tasks: name one or more")
    check_names([task.name for task in tasks])
    mixture = Mixture(target, covariance, weighting)
    for task in tasks:
        mixture.add(task)
    return mixture.coverage()


class Mixture:
    """A mixture of tasks that grows one at a time, and its coverage of a target.

    A task's scatter is read once, when it is added; a step costs O(d^3 / 3), whatever the number of
    tasks before it.
    """

    def __init__(self, target: TaskMoments, covariance: Covariance, weighting: Weighting) -> None:
        for key, value, known in (
            ("covariance", covariance, get_args(Covariance)),
            ("weighting", weighting, get_args(Weighting)),
        ):
            if value not in known:
                raise ValueError(f"{key}: one of {', '.join(known)}, not {value!r}")
        self._target, self._kind, self._weighting = target, covariance, weighting
        self._sums = CentralSums(len(target.mean))
        self._work = np.empty_like(self._sums.scatter)

    def add(self, task: TaskMoments) -> None:
        """Add one task."""
        self._sums.add(task, 1.0 if self._weighting == "sample" else 1.0 / task.count)

    def coverage(self) -> float:
        """The coverage of what was added; see the function `coverage`."""
        distance = self._distance(self._sums.mean - self._target.mean)
        return 1.0 / distance if distance > 0 else math.inf

    def _distance(self, difference: np.ndarray) -> float:
        """difference^T C^-1 difference, by Cholesky: nothing is inverted."""
        sums = self._sums
        if self._kind == "diag":
            return self._diagonal_distance(difference, np.diagonal(sums.scatter) / sums.weight)
        if self._kind == "ml" and sums.count <= len(difference):
            raise ValueError(
                f"covariance 'ml' of {sums.count} samples with {len(difference)} features has no"
                " inverse: it needs more samples than features; 'oas' does with fewer"
            )
        shrinkage, variance = self._shrinkage()
        if not variance > 0:
            raise ValueError(
                "the features of the tasks do not vary (all are the same): coverage is undefined"
            )
        np.multiply(sums.scatter, (1 - shrinkage) / sums.weight, out=self._work)
        self._work.flat[:: len(difference) + 1] += shrinkage * variance
        # Symmetric, so the transposed view is the same matrix and LAPACK works in place.
        norm = np.abs(self._work).sum(axis=0).max() if self._kind == "ml" else 0.0
        try:
            factor, _ = cho_factor(self._work.T, lower=True, overwrite_a=True, check_finite=False)
        except LinAlgError:
            raise self._ill_conditioned() from None
        if self._kind == "ml":
            reciprocal, _ = dpocon(factor, norm, uplo="L")
            if reciprocal < len(difference) * np.finfo(np.float64).eps:
                raise self._ill_conditioned()
        half = solve_triangular(factor, difference, lower=True, check_finite=False)
        return float(half @ half)

    def _diagonal_distance(self, difference: np.ndarray, variances: np.ndarray) -> float:
        dead = (variances <= 0) & (difference != 0)
        if dead.any():
            raise ValueError(
                f"covariance 'diag': feature {np.flatnonzero(dead)[0]} does not vary over the"
                " tasks; use 'oas'"
            )
        alive = variances > 0
        return float((difference[alive] ** 2 / variances[alive]).sum())

    def _shrinkage(self) -> tuple[float, float]:
        """How far the covariance moves towards variance * identity, and that variance."""
        sums, d = self._sums, len(self._sums.mean)
        n = sums.effective_count
        variance = float(np.trace(sums.scatter)) / sums.weight / d
        if self._kind == "ml":
            return 0.0, variance
        flat = sums.scatter.reshape(-1)
        square = float(flat @ flat) / sums.weight**2  # squared Frobenius norm
        if self._kind == "ledoit_wolf" and sums.quartic is None:
            raise ValueError(
                "covariance 'ledoit_wolf' needs the third- and fourth-order sums of every task:"
                " make them with TaskMoments.of or a MomentStream"
            )
        excess = square - d * variance**2  # of the covariance over variance * identity
        if excess <= 0:
            return 1.0, variance
        if self._kind == "oas":  # Chen et al. eq. 23, without its 2 / d, as scikit-learn
            return min(1.0, (square + (d * variance) ** 2) / ((n + 1) * excess)), variance
        assert sums.quartic is not None
        error = max(0.0, (sums.quartic / sums.weight - square) / n)
        return min(1.0, error / excess), variance

    def _ill_conditioned(self) -> ValueError:
        return ValueError(
            f"covariance {self._kind!r} is ill-conditioned (features depend on each other):"
            " use 'oas', which shrinks it"
        )


def _unit(vector: np.ndarray) -> np.ndarray:
    scaled = vector / np.abs(vector).max()  # squares of very small or large means stay finite
    return scaled / np.sqrt(scaled @ scaled)


# Algorithm 1: consistency-diversity task selection (dissertation section 3.3.2).
#
# In: the moments of a target and of candidate tasks. Out: a `Selection`: the names chosen, and the
# whole curves that the choice was read from.


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

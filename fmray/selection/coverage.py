"""Similarity, coverage, and Algorithm 1, which selects tasks by both (dissertation section 3.3.2).

Similarity tells how consistent a task is with a target, coverage how well a set of tasks spans it.
Both are computed from `TaskMoments`. A set of tasks is one Gaussian: a mixture with equal weights
by task or by sample. Its covariance is shrunk (OAS: Chen et al. 2010; Ledoit and Wolf 2004; both as
in scikit-learn), because with fewer samples than features the plain covariance has no inverse, and
its pseudo-inverse makes a target outside the span of the tasks look near.
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
_ZERO = 1e-12  # a mean of this size, relative to the features, has no direction


def similarity(target: TaskMoments, task: TaskMoments) -> float:
    """Return the cosine of the two mean features, in [-1, 1]: consistency (section 3.3.2).

    Raises:
        ValueError: a mean of zero, or different numbers of features d.
    """
    if len(target.mean) != len(task.mean):
        raise ValueError(
            f"task {task.name!r} has {len(task.mean)} features, target {target.name!r}"
            f" {len(target.mean)}: one encoder must have made both"
        )
    for moments in (target, task):
        spread = np.trace(moments.scatter) / moments.count
        square = moments.mean @ moments.mean
        if square <= _ZERO**2 * (square + spread):
            raise ValueError(
                f"task {moments.name!r}: its mean feature is zero and has no direction, so its"
                " similarity is undefined; do not centre the features"
            )
    cosine = _unit(target.mean) @ _unit(task.mean)
    return float(min(1.0, max(-1.0, cosine)))


def coverage(
    tasks: Sequence[TaskMoments],
    target: TaskMoments,
    covariance: Covariance = "oas",
    weighting: Weighting = "task",
) -> float:
    """Return 1 / (mu_D - mu_0)^T C_D^-1 (mu_D - mu_0) of the mixture D of tasks (section 3.3.2).

    Args:
        covariance: estimator of C_D: `oas`, `ledoit_wolf` (needs moments made by
            `TaskMoments.of`), `ml` (plain, divided by n) or `diag` (the variances of `ml` only).
            Shrinkage depends on the number of samples; with weights by task, on the effective
            number (sum w)^2 / sum w^2, which is the same if all tasks have as many samples.
        weighting: each task has the same weight, or each sample.

    Returns:
        The coverage; inf where the means are equal.

    Raises:
        ValueError: no tasks, duplicate names, different d, or a covariance that has no inverse.
    """
    if not tasks:
        raise ValueError("coverage needs at least one task")
    check_names([task.name for task in tasks])
    mixture = Mixture(target, covariance, weighting)
    for task in tasks:
        mixture.add(task)
    return mixture.coverage()


class Mixture:
    """A mixture that grows task by task, and its coverage of a target.

    A task's scatter is read once, when it is added. A coverage costs O(d^3 / 3), whatever the
    number of tasks.
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
        """Return the coverage of the target by the tasks added so far; see the function."""
        distance = self._distance(self._sums.mean - self._target.mean)
        return 1.0 / distance if distance > 0 else math.inf

    def _distance(self, difference: np.ndarray) -> float:
        """Return difference^T C^-1 difference, by Cholesky instead of an inverse."""
        sums = self._sums
        if self._kind == "diag":
            return self._diagonal_distance(difference, np.diagonal(sums.scatter) / sums.weight)
        if self._kind == "ml" and sums.count <= len(difference):
            raise ValueError(
                f"covariance 'ml' of {sums.count} samples with {len(difference)} features has no"
                " inverse: it needs more samples than features; use 'oas'"
            )
        shrinkage, variance = self._shrinkage()
        if not variance > 0:
            raise ValueError(
                "the features of the tasks do not vary (all are the same): coverage is undefined"
            )
        np.multiply(sums.scatter, (1 - shrinkage) / sums.weight, out=self._work)
        self._work.flat[:: len(difference) + 1] += shrinkage * variance
        # the matrix is symmetric, so LAPACK can overwrite its transposed view
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
        constant = (variances <= 0) & (difference != 0)
        if constant.any():
            raise ValueError(
                f"covariance 'diag': feature {np.flatnonzero(constant)[0]} does not vary over the"
                " tasks; use 'oas'"
            )
        varying = variances > 0
        return float((difference[varying] ** 2 / variances[varying]).sum())

    def _shrinkage(self) -> tuple[float, float]:
        """Return (share, variance): how far the covariance moves towards variance * identity."""
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
        excess = square - d * variance**2  # distance to variance * identity
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


# --- Algorithm 1: consistency-diversity task selection ---


@dataclass(frozen=True)
class Selection:
    """The chosen tasks, and the curves of all candidates that the choice follows from."""

    names: list[str]  #: chosen tasks, most similar first
    order: list[str]  #: all candidates, most similar first
    similarity: list[float]  #: to the target, of each candidate in `order`
    coverage: list[float]  #: of the target by the first 1, 2, ... candidates of `order`


def select_tasks(
    target: TaskMoments,
    candidates: Sequence[TaskMoments],
    threshold: float,
    covariance: Covariance = "oas",
    weighting: Weighting = "task",
) -> Selection:
    """Add tasks, most similar first, while each raises coverage by the share `threshold` or more.

    Stops at the first task that does not, or when coverage is infinite. Coverage is not monotone,
    so the result has the curve of all candidates. Scatters are read one at a time, each once, in
    the order of similarity: as memory maps they take no memory. A curve over M tasks costs M
    factorizations of [d, d].

    Args:
        threshold: p of Algorithm 1, at least 0.
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
    # similarities equal up to rounding are ties; the names decide, so every machine agrees
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
    """Return how many tasks Algorithm 1 selects.

    Args:
        coverage: of the target by the first 1, 2, ... candidates.
    """
    chosen = 1
    while (
        chosen < len(coverage)
        and math.isfinite(coverage[chosen - 1])
        and coverage[chosen] >= (1 + threshold) * coverage[chosen - 1]
    ):
        chosen += 1
    return chosen

"""A non-negative, robust, forgetting least-squares fit of times.

In: rows of features and seconds. Out: `TimeRegression`, seconds = sum of coefficient x feature with
coefficients >= 0, fitted for small *relative* errors and refreshed one observation at a time.

Fit: non-negative least squares (Lawson and Hanson 1974) on features / scale and seconds / scale;
the scale is the seconds themselves at first and the prediction after (dividing by noisy seconds
favours the short ones), with Huber weights so that a stall counts like a small error.
Refresh: exponentially forgotten normal equations, joined to those of the first fit *at today's
speed* (the median of recent measured / first predicted). Traffic excites few directions, and
forgetting alone would lose the others.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

import numpy as np
from scipy.optimize import nnls

FOLDS = 5
ROUNDS = 4  # of reweighting
HUBER = 2.0  # in robust standard deviations
PRIOR = 50.0  # observations that the first fit counts as, beside the live ones
REFRESH = 8  # live observations between two solutions
SPEED = 48  # live observations that today's speed is the median of
RECENT = 256  # live observations that the error is the median of


class TimeRegression:
    """names: of the features, p of them. memory: live observations remembered (time constant)."""

    def __init__(self, names: tuple[str, ...], memory: float = 200.0) -> None:
        if memory <= REFRESH:
            raise ValueError(f"memory is {memory}; more than {REFRESH} observations are needed")
        self.names = names
        self.memory = memory
        self.coefficients = np.zeros(len(names))
        self.fitted = False
        self.fit_error = math.nan
        self.live_errors: deque[float] = deque(maxlen=RECENT)
        self.live_count = 0
        self._clear_live()

    def _clear_live(self) -> None:
        size = len(self.names)
        self._first = self.coefficients.copy()
        self._products, self._targets = np.zeros((size, size)), np.zeros(size)
        self._speeds: deque[float] = deque(maxlen=SPEED)

    def fit(self, features: np.ndarray, seconds: np.ndarray) -> None:
        """features [m, p], seconds [m] > 0. Forgets what was live. ValueError for no or bad rows.

        Its error is cross-validated: measured on rows whose features the fit has not seen.
        """
        features, seconds = np.asarray(features, float), np.asarray(seconds, float)
        if features.ndim != 2 or features.shape != (len(seconds), len(self.names)):
            raise ValueError(
                f"features are {list(features.shape)}, seconds {list(seconds.shape)}; "
                f"[m, {len(self.names)}] and [m] are needed"
            )
        sound = np.isfinite(features).all() and np.isfinite(seconds).all()
        if not len(seconds) or not sound or seconds.min() <= 0 or features.min() < 0:
            raise ValueError("timings must be finite, seconds positive, and there must be some")
        self.coefficients = _robust(features, seconds)
        self.fitted = True
        self.fit_error = _held_out_error(features, seconds, self.coefficients)
        self.live_errors.clear()
        self.live_count = 0
        self._clear_live()
        rows = features / np.maximum(features @ self.coefficients, 1e-12)[:, None]
        # Two solutions that fit alike must not be told apart by rounding: a whiff of ridge.
        products = rows.T @ rows / len(rows)
        products += np.diag(np.maximum(np.diag(products), 1e-30)) * 1e-8
        self._prior = PRIOR * products

    def update(self, features: np.ndarray, seconds: float) -> None:
        """One live observation: features [p]. One that is no positive time is a ValueError."""
        assert self.fitted, "fit comes first"
        if not math.isfinite(seconds) or seconds <= 0:
            raise ValueError(f"a step took {seconds!r} seconds; a positive time is needed")
        predicted = max(float(features @ self.coefficients), 1e-9)
        first = max(float(features @ self._first), 1e-9)
        self.live_errors.append(abs(predicted - seconds) / seconds)
        self._speeds.append(math.log(seconds / first))
        residual = seconds / predicted - 1
        limit = 3 * max(0.05, statistics.median(self.live_errors))
        weight = min(1.0, limit / abs(residual)) if residual else 1.0
        keep = 1 - 1 / self.memory
        row = features / predicted
        self._products = keep * self._products + weight * np.outer(row, row)
        self._targets = keep * self._targets + weight * row * (seconds / predicted)
        self.live_count += 1
        if self.live_count % REFRESH == 0:
            self._refresh()

    def _refresh(self) -> None:
        speed = math.exp(statistics.median(self._speeds))
        # The prior's rows say: first prediction x speed. Its targets follow from its coefficients.
        products = self._prior + self._products
        targets = self._prior @ self._first * speed + self._targets
        scale = 1 / np.sqrt(np.maximum(np.diag(products), 1e-30))
        scaled = products * np.outer(scale, scale)
        lower = np.linalg.cholesky(scaled + 1e-9 * np.eye(len(scale)))
        solution, _ = nnls(lower.T, np.linalg.solve(lower, targets * scale))
        self.coefficients = solution * scale

    @property
    def speed(self) -> float:
        """Recent measured / first predicted: 1.5 says the machine is now 1.5 times slower."""
        return math.exp(statistics.median(self._speeds)) if self._speeds else 1.0

    @property
    def error(self) -> float:
        """Median relative error: of live predictions made before they were learnt from (20 or
        more), else the fit's, cross-validated."""
        if len(self.live_errors) >= 20:
            return statistics.median(self.live_errors)
        return self.fit_error

    def state(self) -> dict[str, Any]:
        """Plain values for JSON: the fit as it stands now. Live figures are not kept."""
        assert self.fitted, "fit comes first"
        return {
            "names": list(self.names),
            "coefficients": self.coefficients.tolist(),
            "prior": self._prior.tolist(),
            "error": self.error,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave; ValueError if it is of other features or no numbers."""
        size = len(self.names)
        coefficients = np.asarray(state["coefficients"], float)
        prior = np.asarray(state["prior"], float)
        if tuple(state["names"]) != self.names or prior.shape != (size, size):
            raise ValueError(f"the stored fit has features {state['names']}, not {self.names}")
        if coefficients.shape != (size,) or not (coefficients >= 0).all():
            raise ValueError("the stored fit has coefficients that are no times")
        self.coefficients, self.fit_error, self.fitted = coefficients, float(state["error"]), True
        self.live_errors.clear()
        self.live_count = 0
        self._clear_live()
        self._prior = prior


def _robust(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Coefficients [p] >= 0 by reweighted non-negative least squares."""
    scale, weights = seconds, np.ones(len(seconds))
    coefficients = np.zeros(features.shape[1])
    for _ in range(ROUNDS):
        rows = features * (weights / scale)[:, None]
        size = np.sqrt((rows**2).sum(0))
        size[size == 0] = 1.0  # a feature nobody showed: its coefficient stays 0
        solution, _ = nnls(rows / size, weights * seconds / scale)
        coefficients = solution / size
        predicted = features @ coefficients
        if (predicted <= 0).any():
            break  # nothing explains some row: relative residuals make no sense
        residual = np.abs(seconds / predicted - 1)
        limit = HUBER * max(1.4826 * float(np.median(residual)), 1e-6)
        # weights multiply rows, so their square weighs the squared error
        scale, weights = predicted, np.sqrt(np.minimum(1.0, limit / np.maximum(residual, 1e-12)))
    return coefficients


def _held_out_error(features: np.ndarray, seconds: np.ndarray, coefficients: np.ndarray) -> float:
    """Median relative error over folds that split *distinct* feature rows; with too few of them,
    the error of the fit itself."""
    _, group = np.unique(features, axis=0, return_inverse=True)
    group = group.reshape(-1)
    groups = int(group.max()) + 1
    if groups < 2 * FOLDS:
        return float(np.median(np.abs(features @ coefficients / seconds - 1)))
    fold = np.random.default_rng(0).permutation(groups)[group] % FOLDS
    errors = np.zeros(len(seconds))
    for number in range(FOLDS):
        out = fold == number
        found = _robust(features[~out], seconds[~out])
        errors[out] = np.abs(features[out] @ found / seconds[out] - 1)
    return float(np.median(errors))

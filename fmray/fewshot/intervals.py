"""How sure a mean accuracy over tasks is: intervals over tasks, and of paired differences.

In: one accuracy per task (episode), or two methods' accuracies on the same tasks. Out: an
`Interval`. Two methods are compared by the paired interval: tasks differ in difficulty far more
than methods do, and pairing takes that out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its confidence interval, in the unit of the values.

    half_width is NaN for a single value: one task says nothing about the spread over tasks.
    """

    mean: float
    half_width: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def confidence_interval(
    values: ArrayLike, level: float = 0.95, kind: Literal["t", "meta_dataset"] = "t"
) -> Interval:
    """The mean of `values` [n] (one per task) and its two-sided interval.

    kind "t": half-width t_{(1+level)/2, n-1} s / sqrt(n), s with ddof 1 (Student). "meta_dataset":
    1.96 s / sqrt(n), s with ddof 0, as Meta-Dataset reports it; 95 % only. Raises ValueError for no
    values, values that are not finite, or a level outside (0, 1).
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"values must be [n] with n >= 1, not {list(array.shape)}")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"values must be finite; value {bad[0]} is {array[bad[0]]}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    count = len(array)
    if kind == "t":
        spread = array.std(ddof=1) if count > 1 else math.nan
        factor = float(stdtrit(count - 1, (1 + level) / 2)) if count > 1 else math.nan
    elif kind == "meta_dataset":
        if level != 0.95:
            raise ValueError(f"kind 'meta_dataset' is a 95 % interval, not {level:.0%}; use 't'")
        spread, factor = (array.std() if count > 1 else math.nan), 1.96
    else:
        raise ValueError(f"kind must be 't' or 'meta_dataset', not {kind!r}")
    return Interval(float(array.mean()), float(factor * spread / math.sqrt(count)), count)


def paired_interval(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Interval:
    """The interval of the mean of a - b, for two methods' accuracies [n] on the same n tasks.

    Zero outside the interval: the methods differ at this level. Raises ValueError for arrays of
    different lengths, and as `confidence_interval`.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"paired values must be of the same tasks: {list(first.shape)} against "
            f"{list(second.shape)}"
        )
    return confidence_interval(first - second, level)

"""The moments of a task: sufficient statistics of its features, which replace the features.

`TaskMoments` has count, mean and scatter in float64. They merge exactly (Chan, Golub and LeVeque
1983), so parts of a task can be computed on any machine and in any order. The OAS covariance needs
only the scatter; Ledoit and Wolf's also needs the fourth-order sum sum_k |x_k - mean|^4, which
merges only together with the third-order sum. Both are stored: d + 1 numbers more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BUFFER_ROWS = 64  # features of a task that a stream buffers before it adds their products


@dataclass(frozen=True, eq=False)
class TaskMoments:
    """A task as a Gaussian in the encoder's feature space: sufficient statistics, in float64.

    y_k = x_k - mean, for the task's features x_k. `cubic` and `quartic` are needed for
    `ledoit_wolf` only. `mean_rest` is what rounding cut off the mean: far from zero, the difference
    of two means needs it to be exact, and merging squares that difference.
    """

    name: str  #: id of the task
    count: int  #: number of features n
    mean: np.ndarray  #: [d]
    scatter: np.ndarray  #: [d, d], sum_k y_k y_k^T; may be memory-mapped
    cubic: np.ndarray | None = None  #: [d], sum_k |y_k|^2 y_k
    quartic: float | None = None  #: sum_k |y_k|^4
    mean_rest: np.ndarray | None = None  #: [d]

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"task {self.name!r} has no features: a task needs one or more")
        if self.mean.ndim != 1 or self.scatter.shape != 2 * self.mean.shape:
            raise ValueError(
                f"task {self.name!r}: mean {list(self.mean.shape)} and scatter"
                f" {list(self.scatter.shape)} should be [d] and [d, d]"
            )
        if not np.isfinite(self.mean).all():
            raise ValueError(f"task {self.name!r}: its mean is not finite")

    @classmethod
    def of(cls, name: str, features: Any) -> TaskMoments:
        """Return the moments of features [n, d]: an array, or a tensor on the CPU.

        Raises:
            ValueError: no features, another shape, or a row that is not finite.
        """
        values = np.asarray(features, dtype=np.float64)
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(
                f"task {name!r}: features {list(values.shape)} should be [n, d], n and d 1 or more"
            )
        _check_finite(values, name)
        # the mean in two passes: the second corrects the rounding of the first
        rough = values.mean(axis=0)
        centred = values - rough
        rest = centred.mean(axis=0)
        centred -= rest
        mean = rough + rest
        squares = np.einsum("nd,nd->n", centred, centred)
        return cls(
            name,
            len(values),
            mean,
            scatter=centred.T @ centred,
            cubic=squares @ centred,
            quartic=float(squares @ squares),
            mean_rest=rest - (mean - rough),
        )

    def merge(self, other: TaskMoments) -> TaskMoments:
        """Return the moments of both sets of features together, under this task's name.

        Raises:
            ValueError: the tasks have different numbers of features d.
        """
        sums = CentralSums(len(self.mean))
        sums.add(self)
        sums.add(other)
        return sums.moments(self.name)


class CentralSums:
    """Weighted sums about the running mean, to which tasks are added.

    Attributes:
        count: number of features.
        weight: sum of the weights of all features.
        spread: sum of their squared weights.
        mean, scatter, cubic, quartic: as in `TaskMoments`, weighted.
    """

    def __init__(self, dimension: int, scatter: np.ndarray | None = None) -> None:
        self.count, self.weight, self.spread = 0, 0.0, 0.0
        self.mean, self._rest = np.zeros(dimension), np.zeros(dimension)
        self.scatter = np.zeros((dimension, dimension)) if scatter is None else scatter
        self.cubic: np.ndarray | None = np.zeros(dimension)
        self.quartic: float | None = 0.0

    @property
    def effective_count(self) -> float:
        """Kish's effective sample size (sum w)^2 / sum w^2."""
        return self.weight**2 / self.spread

    def add(self, task: TaskMoments, scale: float = 1.0) -> None:
        """Add a task; each of its features has the weight `scale`.

        Raises:
            ValueError: the task has another number of features d than those before it.
        """
        if task.mean.shape != self.mean.shape:
            raise ValueError(
                f"task {task.name!r} has {len(task.mean)} features, the tasks before it have"
                f" {len(self.mean)}: one encoder must have made them all"
            )
        weight = scale * task.count
        total = self.weight + weight
        rest = np.zeros_like(self.mean) if task.mean_rest is None else task.mean_rest
        if self.weight == 0:
            self.mean, self._rest = task.mean, rest
        difference = (task.mean - self.mean) + (rest - self._rest)
        if self.cubic is not None and task.cubic is not None and task.quartic is not None:
            step = difference * (weight / total)
            cubic, quartic = _shifted(self.scatter, self.weight, self.cubic, self.quartic, step)
            added = _shifted(task.scatter, task.count, task.cubic, task.quartic, step - difference)
            self.cubic = cubic + scale * added[0]
            self.quartic = quartic + scale * added[1]
        else:
            self.cubic = self.quartic = None
        self.scatter += task.scatter if scale == 1.0 else scale * task.scatter
        self.scatter += np.outer(difference * (self.weight * weight / total), difference)
        # Knuth's two-sum: `_rest` collects what rounding cuts off the mean
        step = difference * (weight / total)
        moved = self.mean + step
        part = moved - self.mean
        self._rest = self._rest + ((self.mean - (moved - part)) + (step - part))
        self.mean = moved
        self.weight = total
        self.spread += scale * weight
        self.count += task.count

    def moments(self, name: str) -> TaskMoments:
        """Return the tasks added, all with the weight 1, as one task."""
        assert self.weight == self.count, "only sums with the weight 1 are a task"
        return TaskMoments(
            name, self.count, self.mean, self.scatter, self.cubic, self.quartic, self._rest
        )


class MomentStream:
    """Moments of many tasks in one pass over features in any order.

    Memory: tasks * (d^2 + 64 d) numbers, whatever the number of features.
    """

    def __init__(self, names: Sequence[str], dimension: int, scatters: np.ndarray | None = None):
        """Start with no features.

        Args:
            names: of the tasks.
            dimension: d.
            scatters: zeros [tasks, d, d] float64 to add into, such as a memory map.
        """
        self.names = check_names(names)
        if scatters is None:
            scatters = np.zeros((len(names), dimension, dimension))
        self._sums = [CentralSums(dimension, scatter) for scatter in scatters]
        self._waiting: list[list[np.ndarray]] = [[] for _ in names]

    def add(self, tasks: np.ndarray, features: np.ndarray) -> None:
        """Add features [n, d] of several tasks.

        Args:
            tasks: [n] positions in `names`.

        Raises:
            ValueError: a feature that is not finite, another d, or a task out of range.
        """
        if not len(tasks):
            return
        if tasks.min() < 0 or tasks.max() >= len(self.names):
            raise ValueError(
                f"tasks {tasks.min()} to {tasks.max()} should be positions in the names,"
                f" 0 to {len(self.names) - 1}"
            )
        dimension = len(self._sums[0].mean)
        if features.shape != (len(tasks), dimension):
            raise ValueError(
                f"features {list(features.shape)} should be {[len(tasks), dimension]}: a row for"
                " each entry of `tasks`"
            )
        order = np.argsort(tasks, kind="stable")
        starts = np.flatnonzero(np.diff(tasks[order], prepend=-1))
        for rows in np.split(order, starts[1:]):
            task = int(tasks[rows[0]])
            self._waiting[task].append(features[rows])
            if sum(map(len, self._waiting[task])) >= BUFFER_ROWS:
                self._flush(task)

    def moments(self) -> list[TaskMoments]:
        """Return the moments of all tasks in the order of `names`; do not add features afterwards.

        Raises:
            ValueError: a task without features.
        """
        for task in range(len(self.names)):
            self._flush(task)
        return [sums.moments(name) for name, sums in zip(self.names, self._sums, strict=True)]

    def _flush(self, task: int) -> None:
        if self._waiting[task]:
            features = np.concatenate(self._waiting[task])
            self._waiting[task] = []
            self._sums[task].add(TaskMoments.of(self.names[task], features))


def check_names(names: Sequence[str]) -> list[str]:
    """Return the names.

    Raises:
        ValueError: two tasks have the same name.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"two tasks are called {name!r}: names must be unique")
        seen.add(name)
    return list(names)


def _shifted(
    scatter: np.ndarray, weight: float, cubic: np.ndarray, quartic: float, step: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return third- and fourth-order sums about a mean moved by `step` (e).

    These are the sums of |y-e|^2 (y-e) and of |y-e|^4.
    """
    trace, length = np.trace(scatter), step @ step
    product = scatter @ step
    moved = cubic - trace * step - 2 * product - weight * length * step
    fourth = quartic - 4 * (step @ cubic) + 4 * (step @ product)
    return moved, float(fourth + 2 * length * trace + weight * length**2)


def _check_finite(values: np.ndarray, name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise ValueError(
            f"task {name!r}: the features of row {bad[0]} are not finite"
            + (f" (and of {len(bad) - 1} more)" if len(bad) > 1 else "")
            + "; an encoder in float16 may overflow"
        )

"""The moments of a task: what is kept of its features, and nothing else of them.

In: features [n, d] of a task, all at once or as they stream by. Out: `TaskMoments`: count, mean and
scatter in float64, which merge exactly (Chan, Golub and LeVeque 1983), so that parts of a task can
be measured anywhere and in any order. The scatter alone gives the OAS covariance; Ledoit and Wolf's
needs the fourth-order sum sum_k |x_k - mean|^4 as well, and that one merges only together with the
third-order sum, so both are kept: d + 1 numbers more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BUFFER_ROWS = 64  # rows of a task that a stream keeps before it adds their products


@dataclass(frozen=True, eq=False)
class TaskMoments:
    """A task as a Gaussian in the encoder's feature space: its sufficient statistics.

    With y_k = x_k - mean, over the task's features x_k:

    Attributes:
        name: id of the task.
        count: number of features n.
        mean: [d] float64.
        scatter: [d, d] float64, sum_k y_k y_k^T; may be memory-mapped.
        cubic: [d] float64, sum_k |y_k|^2 y_k.
        quartic: sum_k |y_k|^4. Without these two there is no `ledoit_wolf`.
        mean_rest: [d], what rounding left of the mean: far from zero, the difference of two means
            needs it to be exact, and merging squares that difference.
    """

    name: str
    count: int
    mean: np.ndarray
    scatter: np.ndarray
    cubic: np.ndarray | None = None
    quartic: float | None = None
    mean_rest: np.ndarray | None = None

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
        """The moments of features [n, d]: an array, or a tensor on the CPU.

        Raises:
            ValueError: no features, another shape, or a value that is not finite (says which row).
        """
        values = np.asarray(features, dtype=np.float64)
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(
                f"task {name!r}: features {list(values.shape)} should be [n, d], n and d 1 or more"
            )
        _check_finite(values, name)
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
        """The moments of both sets of features together, under this task's name.

        Raises:
            ValueError: another number of features d.
        """
        sums = CentralSums(len(self.mean))
        sums.add(self)
        sums.add(other)
        return sums.moments(self.name)


class CentralSums:
    """Running weighted sums about the running mean: tasks are added, one after the other.

    `weight` is the sum of the weights of all features, `spread` that of their squares.
    """

    def __init__(self, dimension: int, scatter: np.ndarray | None = None) -> None:
        self.count, self.weight, self.spread = 0, 0.0, 0.0
        self.mean, self._rest = np.zeros(dimension), np.zeros(dimension)
        self.scatter = np.zeros((dimension, dimension)) if scatter is None else scatter
        self.cubic: np.ndarray | None = np.zeros(dimension)
        self.quartic: float | None = 0.0

    @property
    def effective_count(self) -> float:
        """Kish's (sum w)^2 / sum w^2: as many equally weighted features would say as much."""
        return self.weight**2 / self.spread

    def add(self, task: TaskMoments, scale: float = 1.0) -> None:
        """Add a task, each of its features with the weight `scale`.

        Raises:
            ValueError: another number of features d.
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
            ours = _shifted(self.scatter, self.weight, self.cubic, self.quartic, step)
            theirs = _shifted(task.scatter, task.count, task.cubic, task.quartic, step - difference)
            self.cubic = ours[0] + scale * theirs[0]
            self.quartic = ours[1] + scale * theirs[1]
        else:
            self.cubic = self.quartic = None
        self.scatter += task.scatter if scale == 1.0 else scale * task.scatter
        self.scatter += np.outer(difference * (self.weight * weight / total), difference)
        # Knuth's two-sum: what rounding the moved mean loses is kept beside it.
        step = difference * (weight / total)
        moved = self.mean + step
        part = moved - self.mean
        self._rest = self._rest + ((self.mean - (moved - part)) + (step - part))
        self.mean = moved
        self.weight = total
        self.spread += scale * weight
        self.count += task.count

    def moments(self, name: str) -> TaskMoments:
        """What was added with the weight 1, as one task."""
        assert self.weight == self.count, "weighted sums are no task"
        return TaskMoments(
            name, self.count, self.mean, self.scatter, self.cubic, self.quartic, self._rest
        )


class MomentStream:
    """Moments of many tasks in one pass over features in any order.

    Memory: tasks * (d^2 + 64 d) numbers, whatever the number of features that pass.
    """

    def __init__(self, names: Sequence[str], dimension: int, scatters: np.ndarray | None = None):
        """scatters: zeros [tasks, d, d] float64 to add into, such as a memory map."""
        self.names = check_names(names)
        if scatters is None:
            scatters = np.zeros((len(names), dimension, dimension))
        self._sums = [CentralSums(dimension, scatter) for scatter in scatters]
        self._waiting: list[list[np.ndarray]] = [[] for _ in names]

    def add(self, tasks: np.ndarray, features: np.ndarray) -> None:
        """Add features [n, d]; tasks [n]: the position in `names` of each one's task.

        Raises:
            ValueError: a feature that is not finite, another d, or a task there is none of.
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
        """The moments of all tasks, in the order of `names`; nothing is added after that.

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
    """The names; ValueError where two tasks have the same one."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"two tasks are called {name!r}: each needs an id of its own")
        seen.add(name)
    return list(names)


def _shifted(
    scatter: np.ndarray, weight: float, cubic: np.ndarray, quartic: float, step: np.ndarray
) -> tuple[np.ndarray, float]:
    """Third- and fourth-order sums about a mean moved by `step`: of |y-e|^2 (y-e) and |y-e|^4."""
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
            + "; an encoder in float16, or an image of it, overflows"
        )

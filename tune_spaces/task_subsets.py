"""Which candidate tasks to train on: collections, groups of classes or episodes, as the base
recipe's `select.tasks` says; any subset of them, or only those that Algorithm 1 can select."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from fmray.config import Section
from fmray.fewshot_config import FewshotRecipe
from fmray.search.space import Choice, Parameter, Space, Subset, Tasks, Values, WarmStart, override
from fmray.selection import selected_count

TASKS = True  # `space` takes the candidate tasks


class Options(Section):
    """Which subsets there are."""

    subsets: Literal["any", "prefix", "threshold"] = Field(
        "any",
        description="any; the most similar tasks, however many; or those that Algorithm 1 selects,"
        " with whatever threshold p. All tasks and single ones are always among them",
    )
    singles: int | None = Field(
        None, ge=0, description="most similar tasks that are tried alone first; default: each"
    )


def space(base: FewshotRecipe, options: Options, tasks: Tasks) -> Space:
    """Warm starts: Algorithm 1's subset, all tasks and each single task.

    Raises ValueError for a base recipe that trains on no tasks.
    """
    if not isinstance(base, FewshotRecipe):
        raise ValueError(f"it varies the tasks of kind fewshot; the base is of kind {base.kind}")
    order = tuple(tasks.order)
    starts = {"Algorithm 1": tuple(tasks.names), "all tasks": order}
    starts |= {f"only {name}": (name,) for name in order[: options.singles]}
    parameter: Parameter = Subset("tasks", order)
    if options.subsets != "any":
        counts = range(1, len(order) + 1)
        if options.subsets == "threshold":
            counts = _counts(tasks.coverage)
        subsets = [order[:count] for count in counts] + [*starts.values()]
        parameter = Choice("tasks", tuple(dict.fromkeys(subsets)))
    return Space(
        (parameter,), _overrides, tuple(WarmStart(n, {"tasks": some}) for n, some in starts.items())
    )


def _overrides(values: Values) -> list[str]:
    return [override("select.only", tuple(sorted(values["tasks"])))]


def _counts(coverage: Sequence[float]) -> list[int]:
    """How many tasks Algorithm 1 can select from a curve: the choice changes where the threshold
    passes a ratio of neighbours."""
    ratios = [after / before for before, after in itertools.pairwise(coverage)]
    passed = [ratio - 1 + 1e-9 for ratio in ratios if 1 <= ratio < math.inf]
    return sorted({selected_count(coverage, threshold) for threshold in (0.0, *passed)})

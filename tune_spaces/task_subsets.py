"""Which candidate tasks to train on: collections, groups of classes or episodes, as the base
recipe's `select.tasks` says; any subset of them, or only those that Algorithm 1 can select;
and, if asked, how the tasks are mixed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from fmray.config import Section
from fmray.config.fewshot import FewshotRecipe
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
    weights: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="what a task's share of the episodes may be, such as [1, 2, 4]"
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
    weights = options.weights
    shares = [Choice(f"share of {name}", weights) for name in order if weights is not None]
    equal = {share.name: weights[0] for share in shares if weights}
    return Space(
        (parameter, *shares),
        _overrides,
        tuple(WarmStart(name, {"tasks": some, **equal}) for name, some in starts.items()),
    )


def _overrides(values: Values) -> list[str]:
    """Shares count among the tasks chosen: 2, 4 are 1, 2, and equal ones are none."""
    chosen = sorted(values["tasks"])
    found = [override("select.only", tuple(chosen))]
    shares = [values.get(f"share of {name}", 1) for name in chosen]
    if len(set(shares)) > 1:
        divisor = math.gcd(*shares)
        weights = {name: share // divisor for name, share in zip(chosen, shares, strict=True)}
        found.append(override("select.weights", weights))
    return found


def _counts(coverage: Sequence[float]) -> list[int]:
    """How many tasks Algorithm 1 can select from a curve: the choice changes where the threshold
    passes a ratio of neighbours."""
    ratios = [after / before for before, after in itertools.pairwise(coverage)]
    passed = [ratio - 1 + 1e-9 for ratio in ratios if 1 <= ratio < math.inf]
    return sorted({selected_count(coverage, threshold) for threshold in (0.0, *passed)})

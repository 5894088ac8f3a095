"""Which candidate tasks an encoder is finetuned on, and optionally how they are mixed.

The base recipe's `select.tasks` defines the candidates (collections, groups of classes or
episodes). The subsets are any, or only those that Algorithm 1 can select.
"""

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
    """The subsets to try, and the shares of their tasks."""

    subsets: Literal["any", "prefix", "threshold"] = Field(
        "any",
        description="any: all subsets; prefix: the n most similar tasks, for each n; threshold:"
        " what Algorithm 1 selects, for each threshold p. All tasks and the single ones are always"
        " included",
    )
    weights: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="values of a task's share of the episodes, such as [1, 2, 4]"
    )
    singles: int | None = Field(
        None, ge=0, description="number of most similar tasks to try alone first; default: all"
    )


def space(base: FewshotRecipe, options: Options, tasks: Tasks) -> Space:
    """Return the space; its warm starts are Algorithm 1's subset, all tasks and each single task.

    Raises:
        ValueError: the base recipe does not train on tasks.
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
        tuple(WarmStart(name, {"tasks": subset, **equal}) for name, subset in starts.items()),
    )


def _overrides(values: Values) -> list[str]:
    """Return the tasks chosen, and their shares in lowest terms unless they are equal."""
    chosen = sorted(values["tasks"])
    overrides = [override("select.only", tuple(chosen))]
    shares = [values.get(f"share of {name}", 1) for name in chosen]
    if len(set(shares)) > 1:
        divisor = math.gcd(*shares)
        weights = {name: share // divisor for name, share in zip(chosen, shares, strict=True)}
        overrides.append(override("select.weights", weights))
    return overrides


def _counts(coverage: Sequence[float]) -> list[int]:
    """Return the numbers of tasks that Algorithm 1 can select from a curve.

    Its choice changes where the threshold passes the ratio of two neighbours.
    """
    ratios = [after / before for before, after in itertools.pairwise(coverage)]
    passed = [ratio - 1 + 1e-9 for ratio in ratios if 1 <= ratio < math.inf]
    return sorted({selected_count(coverage, threshold) for threshold in (0.0, *passed)})

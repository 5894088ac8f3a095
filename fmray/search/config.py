"""Settings of a search: what is varied, how, for what, and on which recipe.

In: a recipe with `kind: search`, read by `fmray.config.load`. Out: a `SearchRecipe`. A trial is the
job of the `base` recipe with the values that the search suggests set on top.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from fmray.config import Job, Location, Section


class ObjectiveConfig(Section):
    """One number that a trial is judged by."""

    metric: str = Field(description="a trial's metric, such as `accuracy` or `operations`")
    mode: Literal["max", "min"] = "max"


class SchedulerConfig(Section):
    """Early stopping on intermediate evaluations (one objective only)."""

    kind: Literal["none", "asha", "median"] = "none"
    grace: int = Field(1, ge=1, description="evaluations before a trial may be stopped")
    reduction: int = Field(3, ge=2, description="asha: one in so many goes on at each rung")


class SearchRecipe(Job):
    """One search, whole."""

    kind: Literal["search"] = "search"
    base: Location = Field(description="recipe of a trial, relative to this file")
    base_set: tuple[str, ...] = Field((), description="KEY=VALUE overrides of the base recipe")
    space: str = Field(description="a file of tune_spaces/, without .py")
    options: dict[str, Any] = Field({}, description="of the space")
    objectives: tuple[ObjectiveConfig, ...] = Field(
        (ObjectiveConfig(metric="accuracy"),), min_length=1
    )
    algorithm: Literal["tpe", "nsga2", "random", "grid"] = "tpe"
    trials: int = Field(20, ge=1, description="distinct ones, warm starts included")
    evaluations: int = Field(4, ge=1, description="of a trial, evenly over its steps")
    scheduler: SchedulerConfig = SchedulerConfig()
    recommend: str | None = Field(
        None, description='such as "best accuracy under 0.6" or "cheapest within 1 % of full"'
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Settings that clash, as in `Job.conflicts`."""
        if self.scheduler.kind != "none" and len(self.objectives) > 1:
            yield "scheduler.kind", f"{self.scheduler.kind} needs one objective; use none"
        if self.algorithm == "nsga2" and len(self.objectives) < 2:
            yield "algorithm", "nsga2 is for several objectives; use tpe"

"""The recipes of searches: `kind: search` trains trials, `kind: plans` trains nothing.

A trial of a `SearchRecipe` is the job of its `base` recipe under the values that the search
suggests. A `PlansRecipe` searches static plans of a finished adaptive model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from fmray.config.base import BaseRecipe, Location, Section, Share


class ObjectiveConfig(Section):
    """One metric that trials are compared by."""

    metric: str = Field(description="a trial's metric, such as `accuracy` or `operations`")
    mode: Literal["max", "min"] = "max"


class SchedulerConfig(Section):
    """Early stopping on intermediate evaluations (one objective only)."""

    kind: Literal["none", "asha", "median"] = "none"
    grace: int = Field(1, ge=1, description="evaluations before a trial may be stopped")
    reduction: int = Field(
        3, ge=2, description="asha: one in so many trials continues at each rung"
    )


class SearchRecipe(BaseRecipe):
    """One search over the settings of a base recipe."""

    kind: Literal["search"] = "search"
    base: Location = Field(description="recipe of the trials, relative to this file")
    base_set: tuple[str, ...] = Field((), description="KEY=VALUE overrides of the base recipe")
    space: str = Field(description="name of a file in tune_spaces/, without .py")
    options: dict[str, Any] = Field({}, description="options of the space")
    objectives: tuple[ObjectiveConfig, ...] = Field(
        (ObjectiveConfig(metric="accuracy"),), min_length=1
    )
    algorithm: Literal["tpe", "nsga2", "random", "grid"] = "tpe"
    trials: int = Field(20, ge=1, description="distinct trials, warm starts included")
    evaluations: int = Field(4, ge=1, description="evaluations per trial, evenly over its steps")
    scheduler: SchedulerConfig = SchedulerConfig()
    recommend: str | None = Field(
        None, description='such as "best accuracy under 0.6" or "cheapest within 1 % of full"'
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """See `Section.conflicts`."""
        if self.scheduler.kind != "none" and len(self.objectives) > 1:
            yield "scheduler.kind", f"{self.scheduler.kind} needs one objective; use none"
        if self.algorithm == "nsga2" and len(self.objectives) < 2:
            yield "algorithm", "nsga2 is for several objectives; use tpe"
        yield from super().conflicts()


class PlansRecipe(BaseRecipe):
    """One search for static plans of a finished adaptive model; it runs in this process."""

    kind: Literal["plans"] = "plans"
    model: Location = Field(description="directory of the adaptive model")
    store: Location = Field(
        description="data store that the model was trained on, or a similar one"
    )
    budgets: tuple[Share, ...] = Field((0.5, 0.6, 0.7, 0.85), min_length=1)
    calibration_rows: int = Field(
        1024, ge=1, description="training rows that plans are searched on"
    )
    rows: int | None = Field(
        None, ge=1, description="validation rows that plans are measured on; default: all"
    )
    batch: int = Field(64, ge=1)
    population: int = Field(16, ge=2, description="plans scored in each generation")
    generations: int = Field(8, ge=0, description="after the first population")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """See `Section.conflicts`."""
        twice = [budget for budget in self.budgets if self.budgets.count(budget) > 1]
        if twice:
            yield "budgets", f"{twice[0]:g} is listed more than once; keep one of them"
        if self.tracking.register_as:
            yield "tracking.register_as", "a search for plans makes no model; set it to null"
        yield from super().conflicts()

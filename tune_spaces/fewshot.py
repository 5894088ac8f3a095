"""Settings of few-shot finetuning: ways, shots, number of tasks, learning rate, temperature."""

from __future__ import annotations

from pydantic import Field

from fmray.config import Section
from fmray.config.fewshot import FewshotRecipe
from fmray.search.space import Choice, Parameter, Real, Space, Values, override, warm_start


class Options(Section):
    """The values or the range of each setting; null: the value of the base recipe."""

    ways: tuple[int, ...] | None = Field((5, 10, 15), description="episodes.ways")
    shots: tuple[int, ...] | None = Field((1, 3, 5), description="episodes.shots")
    tasks: tuple[int, ...] | None = Field((50, 100, 200, 400), description="episodes.tasks")
    lr: tuple[float, float] | None = Field((1e-6, 1e-2), description="train.lr, logarithmic range")
    temperature: tuple[float, float] | None = Field(
        (1.0, 30.0), description="train.temperature, logarithmic range"
    )


def space(base: FewshotRecipe, options: Options) -> Space:
    """Return the space; its warm start is the base recipe, if that is inside the space.

    Raises:
        ValueError: the base recipe is of another kind.
    """
    if not isinstance(base, FewshotRecipe):
        raise ValueError(f"it varies recipes of kind fewshot; the base is of kind {base.kind}")
    lists = {"ways": options.ways, "shots": options.shots, "tasks": options.tasks}
    ranges = {"lr": options.lr, "temperature": options.temperature}
    parameters: list[Parameter] = [
        Choice(f"episodes.{name}", values) for name, values in lists.items() if values is not None
    ]
    parameters += [
        Real(f"train.{name}", *ends, log=True) for name, ends in ranges.items() if ends is not None
    ]
    base_values = {f"episodes.{name}": getattr(base.episodes, name) for name in lists}
    base_values |= {f"train.{name}": getattr(base.train, name) for name in ranges}
    return Space(
        tuple(parameters), _overrides, warm_start("the base recipe", parameters, base_values)
    )


def _overrides(values: Values) -> list[str]:
    return [override(key, value) for key, value in values.items()]

"""Settings of an adaptive model and of its training: units, latency token, range of the training
budgets, temperature, learning rates and LoRA rank."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fmray.config import AdaLlavaRecipe, Section
from fmray.search.space import Choice, Parameter, Real, Space, Values, override, warm_start


class Options(Section):
    """The values or the range of each setting; null: the value of the base recipe."""

    design: tuple[Literal["layers", "heads"], ...] | None = Field(
        ("layers", "heads"), description="adaptive.design"
    )
    first: tuple[int, ...] | None = Field(
        None, description="adaptive.first, the first switchable layers to try"
    )
    unit: tuple[int, ...] | None = Field(
        (4, 8), description="adaptive.unit; has an effect with design heads only"
    )
    latency_token: tuple[Literal["inline", "probe"], ...] | None = Field(
        ("inline", "probe"), description="adaptive.latency_token"
    )
    min_budget: tuple[float, float] | None = Field(
        None, description="range of adaptive.min_budget: training budgets are uniform from it to 1"
    )
    tau: tuple[float, float] | None = Field(
        (1.0, 10.0), description="adaptive.tau, logarithmic range"
    )
    lr: tuple[float, float] | None = Field((1e-6, 1e-3), description="train.lr, logarithmic range")
    scheduler_lr: tuple[float, float] | None = Field(
        (1e-5, 1e-2), description="train.scheduler_lr, logarithmic range"
    )
    lora_rank: tuple[int, ...] | None = Field(
        None, description="model.lora.rank, of a base recipe with model.lora"
    )


def space(base: AdaLlavaRecipe, options: Options) -> Space:
    """Return the space; its warm start is the base recipe, if that is inside the space.

    Raises:
        ValueError: the base recipe is of another kind, has no `adaptive`, or has no LoRA although
            its rank is varied.
    """
    if not isinstance(base, AdaLlavaRecipe):
        raise ValueError(f"it varies recipes of kind adallava; the base is of kind {base.kind}")
    if base.adaptive is None:
        raise ValueError("the base recipe has adaptive: null; give it a section adaptive")
    if options.lora_rank is not None and base.model.lora is None:
        raise ValueError("options.lora_rank: the base recipe has no model.lora; give it one")
    lists = {
        "adaptive.design": options.design,
        "adaptive.first": options.first,
        "adaptive.unit": options.unit,
        "adaptive.latency_token": options.latency_token,
        "model.lora.rank": options.lora_rank,
    }
    ranges = {
        "adaptive.min_budget": options.min_budget,
        "adaptive.tau": options.tau,
        "train.lr": options.lr,
        "train.scheduler_lr": options.scheduler_lr,
    }
    parameters: list[Parameter] = [
        Choice(name, values) for name, values in lists.items() if values is not None
    ]
    parameters += [
        Real(name, *ends, log=name != "adaptive.min_budget")
        for name, ends in ranges.items()
        if ends is not None
    ]
    base_values = {f"adaptive.{name}": value for name, value in base.adaptive} | {
        "train.lr": base.train.lr,
        "train.scheduler_lr": base.train.scheduler_lr or base.train.lr,
        "model.lora.rank": base.model.lora.rank if base.model.lora else None,
    }
    if base.adaptive.design == "layers" and options.unit:
        base_values["adaptive.unit"] = options.unit[0]  # any value: no effect

    def to_overrides(values: Values) -> list[str]:
        design = values.get("adaptive.design", base.adaptive.design)
        return [
            override(key, value)
            for key, value in values.items()
            if key != "adaptive.unit" or design == "heads"
        ]

    return Space(
        tuple(parameters), to_overrides, warm_start("the base recipe", parameters, base_values)
    )

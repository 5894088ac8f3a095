"""Plans that need no learned scheduler: by importance, and the best single plan for all inputs.

In: an `AdaptiveVLM` and calibration batches (mappings of its forward arguments, with labels). Out:
one score a switch, or one plan. These are what a learned scheduler must beat (dissertation section
5.3.3; `method/adallava.md` section 4).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from fmray.adallava.model import AdaptiveVLM
from fmray.adallava.placement import IGNORED

EXHAUSTIVE_LIMIT = 256  # plans tried one by one; beyond it, one switch is added at a time

Batch = Mapping[str, Tensor]


@torch.no_grad()
def importance_scores(model: AdaptiveVLM, batches: Iterable[Batch]) -> Tensor:
    """How much the loss grows when one switch alone is turned off: float32 [K], larger is more
    important.

    Training-free: `best_plan(scores.expand(B, -1), units_on)` gives the plans. Mean over supervised
    tokens.
    """
    units = model.layout.num_units
    plans = torch.cat((torch.ones(1, units), 1 - torch.eye(units))).bool()
    losses = _losses(model, list(batches), plans)
    return (losses[1:] - losses[0]).float()


@torch.no_grad()
def best_static_plan(model: AdaptiveVLM, batches: Iterable[Batch], units_on: int) -> Tensor:
    """The plan with `units_on` switches that loses least on the batches, the same for every input:
    bool [K].

    All C(K, k) plans are tried where they are at most 256; else switches are added one at a time,
    each the one that helps most (K * k plans). Raises ValueError when units_on is not in 0..K.
    """
    units = model.layout.num_units
    if not 0 <= units_on <= units:
        raise ValueError(f"units_on must lie in 0..{units}, not {units_on}")
    batches = list(batches)
    if math.comb(units, units_on) <= EXHAUSTIVE_LIMIT:
        plans = torch.zeros(math.comb(units, units_on), units, dtype=torch.bool)
        for row, on in enumerate(combinations(range(units), units_on)):
            plans[row, list(on)] = True
        return plans[int(_losses(model, batches, plans).argmin())] if len(plans) > 1 else plans[0]
    plan = torch.zeros(units, dtype=torch.bool)
    for _ in range(units_on):
        free = (~plan).nonzero()[:, 0]
        plans = plan.repeat(len(free), 1)
        plans[torch.arange(len(free)), free] = True
        plan = plans[int(_losses(model, batches, plans).argmin())]
    return plan


def _losses(model: AdaptiveVLM, batches: Sequence[Batch], plans: Tensor) -> Tensor:
    """Mean loss of each plan [P, K] over all supervised tokens of the batches: float64 [P]."""
    if not batches:
        raise ValueError("no calibration batch was given")
    was_training = model.training
    model.eval()
    total = torch.zeros(len(plans), dtype=torch.float64)
    tokens = 0
    try:
        for batch in batches:
            rows = batch["input_ids"].shape[0]
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            tokens += count
            for index, plan in enumerate(plans.to(batch["input_ids"].device)):
                total[index] += (
                    model(**batch, plan=plan.expand(rows, -1)).loss.double().cpu() * count
                )
    finally:
        model.train(was_training)
    return total / tokens

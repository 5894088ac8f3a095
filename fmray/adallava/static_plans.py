"""The best static plan of a trained model at a budget, found without training.

In: a door that scores plans (bool [P, K] -> float [P], larger is better) and how many switches may
be on (`CostModel.max_units`), so that every plan tried keeps the budget. Out: one plan for all
inputs, or for all inputs of one task. It is what a learned scheduler has to beat.

The talk asks for "training-free algorithms for component selection, specialized for different
tasks". The search here is a (mu + lambda) evolution over plans of equal size, begun at the most
important switches; where there are few plans, all of them are tried instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from fmray.adallava.model import AdaptiveVLM
from fmray.adallava.passes import IGNORED

# Plans that need no learned scheduler: by importance, and the best single plan for all inputs.
#
# In: an `AdaptiveVLM` and calibration batches (mappings of its forward arguments, with labels).
# Out: one score a switch, or one plan. These are what a learned scheduler must beat (dissertation
# section 5.3.3; `method/adallava.md` section 4).

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


Evaluate = Callable[[Tensor], Tensor]
_Plan = tuple[bool, ...]


@dataclass(frozen=True)
class FoundPlan:
    """plan: bool [K]. evaluations: plans that were scored. exhaustive: they were all there are."""

    plan: Tensor
    score: float
    evaluations: int
    exhaustive: bool


def search_plan(
    evaluate: Evaluate,
    importance: Tensor,
    units_on: int,
    *,
    population: int = 16,
    generations: int = 8,
    seed: int = 0,
    starts: Sequence[Tensor] = (),
) -> FoundPlan:
    """The best plan found with exactly `units_on` of K switches on.

    evaluate: the score of each plan, bool [P, K] -> float [P]; no plan is asked for twice.
    importance: [K], larger is more important: the search begins at its top `units_on`, at noisy
    copies of that, at the plans in `starts` (bool [K] each) and at random ones. At most population
    * (generations + 1) plans are scored; where there are no more than that, all of them are. Equal
    scores: the plan that was scored first. The same seed finds the same plan.

    Raises ValueError for a size outside 0..K, a start of another size, a population below 2, and
    scores that are not one number a plan.
    """
    units = importance.shape[0] if importance.dim() == 1 else 0
    if not units or not bool(importance.isfinite().all()):
        raise ValueError(
            f"importance must be K finite numbers, one a switch, not {list(importance.shape)} with "
            f"{int((~importance.isfinite()).sum())} that are not finite"
        )
    if not 0 <= units_on <= units:
        raise ValueError(f"units_on must lie in 0..{units}, not {units_on}")
    if population < 2 or generations < 0:
        raise ValueError(
            "a search needs a population of 2 or more and 0 or more generations, not "
            f"{population} and {generations}"
        )
    for number, start in enumerate(starts):
        if start.shape != (units,) or int(start.bool().sum()) != units_on:
            raise ValueError(
                f"starts[{number}] must have {units_on} of {units} switches on, not "
                f"{int(start.bool().sum())} of {list(start.shape)}"
            )
    scores: dict[_Plan, float] = {}
    exhaustive = math.comb(units, units_on) <= population * (generations + 1)
    if exhaustive:
        chosen = combinations(range(units), units_on)
        _score(evaluate, [tuple(unit in on for unit in range(units)) for on in chosen], scores)
    else:
        generator = np.random.default_rng(seed)
        first = _first(importance.double().cpu().numpy(), units_on, starts, population, generator)
        _score(evaluate, first, scores)
        for _ in range(generations):
            parents = _best(scores, population)
            children: list[_Plan] = []
            while len(children) < population:
                child = parents[generator.integers(len(parents))]
                if generator.random() < 0.5:
                    other = parents[generator.integers(len(parents))]
                    child = crossed(child, other, generator)
                children.append(_unseen(child, {*scores, *children}, generator))
            _score(evaluate, children, scores)
    [best] = _best(scores, 1)
    return FoundPlan(torch.tensor(best), scores[best], len(scores), exhaustive)


def plan_score(correct: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """How good plans are: the mean over questions of right (1 or 0) - loss / (1 + loss).

    correct: bool [..., Q]; loss: [..., Q] in nats, summed over an answer's tokens. The bounded loss
    tells apart plans that answer as many questions, and no single question decides.
    """
    return (correct - loss / (1 + loss)).mean(-1)


def swapped(plan: _Plan, generator: np.random.Generator) -> _Plan:
    """The plan with one switch that is on and one that is off exchanged."""
    states = np.array(plan)
    on, off = np.flatnonzero(states), np.flatnonzero(~states)
    states[generator.choice(on)], states[generator.choice(off)] = False, True
    return tuple(states.tolist())


def crossed(a: _Plan, b: _Plan, generator: np.random.Generator) -> _Plan:
    """Switches that are on in both plans, filled up with some that are on in one of the two."""
    first, second = np.array(a), np.array(b)
    states = first & second
    either = np.flatnonzero(first ^ second)
    states[generator.choice(either, int(first.sum() - states.sum()), replace=False)] = True
    return tuple(states.tolist())


def _first(
    importance: np.ndarray,
    units_on: int,
    starts: Sequence[Tensor],
    population: int,
    generator: np.random.Generator,
) -> list[_Plan]:
    """The first population: all starts and the most important switches, then noise and chance."""
    plans = [_top(importance, units_on)]
    plans += [tuple(start.bool().tolist()) for start in starts]
    plans = list(dict.fromkeys(plans))[:population]
    spread = importance.std()
    while len(plans) < population:
        noise = generator.normal(size=len(importance))
        near = len(plans) % 2 == 0
        plan = _top(importance + spread * noise if near else noise, units_on)
        plans.append(_unseen(plan, set(plans), generator))
    return plans


def _top(scores: np.ndarray, units_on: int) -> _Plan:
    states = np.zeros(len(scores), dtype=bool)
    states[np.argsort(-scores, kind="stable")[:units_on]] = True
    return tuple(states.tolist())


def _unseen(plan: _Plan, seen: set[_Plan], generator: np.random.Generator) -> _Plan:
    """The plan, or where it was seen, the first new one on a walk of swaps from it.

    The walk ends: swaps lead from each plan to every other of its size, and there are more plans
    than a search scores.
    """
    while plan in seen:
        plan = swapped(plan, generator)
    return plan


def _score(evaluate: Evaluate, plans: list[_Plan], scores: dict[_Plan, float]) -> None:
    """Score plans, none of which has been scored before."""
    found = evaluate(torch.tensor(plans, dtype=torch.bool))
    if found.shape != (len(plans),) or bool(found.isnan().any()):
        raise ValueError(
            f"evaluate must give one number for each of {len(plans)} plans, not "
            f"{list(found.shape)} with {int(found.isnan().sum())} NaN"
        )
    scores |= dict(zip(plans, found.tolist(), strict=True))


def _best(scores: dict[_Plan, float], count: int) -> list[_Plan]:
    """The plans with the largest scores; of equal ones those scored first."""
    return sorted(scores, key=lambda plan: -scores[plan])[:count]

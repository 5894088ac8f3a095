"""Plans that need no learned scheduler: by importance, or one static plan for all inputs.

A learned scheduler has to beat these (dissertation section 5.3.3). All of them score plans of one
size, so that every plan tried keeps the budget (`CostModel.max_units`):

* `leave_one_out`: how much the loss grows without a unit; its largest values are a plan.
* `best_static_plan`: all plans of a size where they are few, else units added one at a time.
* `search_plan`: all plans where they are few, else a (mu + lambda) evolution that starts at the
  most important units.
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

EXHAUSTIVE_LIMIT = 256  # `best_static_plan` scores at most so many plans one by one

Batch = Mapping[str, Tensor]
Evaluate = Callable[[Tensor], Tensor]  # plans, bool [P, K] -> one value per plan, [P, ...]


def leave_one_out(loss: Evaluate, units: int) -> Tensor:
    """Return how much the loss grows when one unit alone is off: [K, ...].

    Args:
        loss: plans of one size, bool [P, K] -> losses [P, ...].
    """
    full = loss(torch.ones(1, units, dtype=torch.bool))
    return loss(~torch.eye(units, dtype=torch.bool)) - full


def plans_of_size(units: int, units_on: int) -> Tensor:
    """Return all plans with `units_on` of K units on, in lexicographic order: bool [C(K, k), K]."""
    plans = torch.zeros(math.comb(units, units_on), units, dtype=torch.bool)
    for plan, on in zip(plans, combinations(range(units), units_on), strict=True):
        plan[list(on)] = True
    return plans


# --- On batches with labels ---


@torch.no_grad()
def importance_scores(model: AdaptiveVLM, batches: Iterable[Batch]) -> Tensor:
    """Return each unit's importance on calibration batches: float32 [K], larger is more important.

    `best_plan(scores.expand(B, -1), units_on)` gives the plans. The loss is the mean over
    supervised tokens.
    """
    batches = list(batches)
    return leave_one_out(
        lambda plans: _losses(model, batches, plans), model.layout.num_units
    ).float()


@torch.no_grad()
def best_static_plan(model: AdaptiveVLM, batches: Iterable[Batch], units_on: int) -> Tensor:
    """Return the plan with `units_on` units on that has the smallest loss on the batches: bool [K].

    Scores all C(K, k) plans where they are at most 256. Otherwise units are added one at a time,
    each time the one that helps most (at most K * k plans).

    Args:
        batches: forward arguments of the model, with labels.

    Raises:
        ValueError: units_on is not in 0..K, or there is no batch.
    """
    units = model.layout.num_units
    _check_size(units_on, units)
    batches = list(batches)
    if math.comb(units, units_on) <= EXHAUSTIVE_LIMIT:
        plans = plans_of_size(units, units_on)
        return plans[int(_losses(model, batches, plans).argmin())] if len(plans) > 1 else plans[0]
    plan = torch.zeros(units, dtype=torch.bool)
    for _ in range(units_on):
        free = (~plan).nonzero()[:, 0]
        plans = plan.repeat(len(free), 1)
        plans[torch.arange(len(free)), free] = True
        plan = plans[int(_losses(model, batches, plans).argmin())]
    return plan


def _check_size(units_on: int, units: int) -> None:
    if not 0 <= units_on <= units:
        raise ValueError(f"units_on must lie in 0..{units}, not {units_on}")


def _losses(model: AdaptiveVLM, batches: Sequence[Batch], plans: Tensor) -> Tensor:
    """Return each plan's mean loss over all supervised tokens of the batches: float64 [P]."""
    if not batches:
        raise ValueError("calibration needs at least one batch")
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
                loss = model(**batch, plan=plan.expand(rows, -1)).loss
                total[index] += loss.double().cpu() * count
    finally:
        model.train(was_training)
    return total / tokens


# --- On any score ---

_Plan = tuple[bool, ...]


@dataclass(frozen=True)
class SearchedPlan:
    """The best plan of a search."""

    plan: Tensor  # bool [K]
    score: float
    evaluations: int  # plans scored
    exhaustive: bool  # whether these are all plans of the size


def search_plan(
    evaluate: Evaluate,
    importance: Tensor,
    units_on: int,
    *,
    population: int = 16,
    generations: int = 8,
    seed: int = 0,
    starts: Sequence[Tensor] = (),
) -> SearchedPlan:
    """Search for the plan with exactly `units_on` of K units on and the largest score.

    At most population * (generations + 1) plans are scored, none twice. Where there are no more
    than that, all are scored. Of equal scores, the plan scored first wins. The same seed gives the
    same plan.

    Args:
        evaluate: plans, bool [P, K] -> scores [P], larger is better.
        importance: [K], larger is more important. The first population holds the `units_on` most
            important units, noisy copies of that plan, and random plans.
        starts: further plans of the first population, bool [K] each.

    Raises:
        ValueError: a size outside 0..K, a start of another size, a population below 2, or scores
            that are not one number per plan.
    """
    units = importance.shape[0] if importance.dim() == 1 else 0
    if not units or not bool(importance.isfinite().all()):
        raise ValueError(
            f"importance must be K finite numbers, one per unit, not {list(importance.shape)} with "
            f"{int((~importance.isfinite()).sum())} that are not finite"
        )
    _check_size(units_on, units)
    if population < 2 or generations < 0:
        raise ValueError(
            "a search needs a population of 2 or more and 0 or more generations, not "
            f"{population} and {generations}"
        )
    for number, start in enumerate(starts):
        if start.shape != (units,) or int(start.bool().sum()) != units_on:
            raise ValueError(
                f"starts[{number}] must have {units_on} of {units} units on, not "
                f"{int(start.bool().sum())} of {list(start.shape)}"
            )
    scores: dict[_Plan, float] = {}
    exhaustive = math.comb(units, units_on) <= population * (generations + 1)
    if exhaustive:
        plans = plans_of_size(units, units_on).tolist()
        _score(evaluate, [tuple(plan) for plan in plans], scores)
    else:
        generator = np.random.default_rng(seed)
        ranking = importance.double().cpu().numpy()
        _score(evaluate, _first_plans(ranking, units_on, starts, population, generator), scores)
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
    return SearchedPlan(torch.tensor(best), scores[best], len(scores), exhaustive)


def plan_score(correct: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Score plans by the mean over questions of correct (1 or 0) - loss / (1 + loss).

    The bounded loss separates plans that answer equally many questions, and no single question
    dominates.

    Args:
        correct: bool [..., Q].
        loss: [..., Q] in nats, summed over an answer's tokens.
    """
    return (correct - loss / (1 + loss)).mean(-1)


def swapped(plan: _Plan, generator: np.random.Generator) -> _Plan:
    """Return the plan with one unit that is on and one that is off exchanged."""
    states = np.array(plan)
    on, off = np.flatnonzero(states), np.flatnonzero(~states)
    states[generator.choice(on)], states[generator.choice(off)] = False, True
    return tuple(states.tolist())


def crossed(a: _Plan, b: _Plan, generator: np.random.Generator) -> _Plan:
    """Return the units on in both plans, filled up with random ones that are on in one of them."""
    left, right = np.array(a), np.array(b)
    states = left & right
    either = np.flatnonzero(left ^ right)
    states[generator.choice(either, int(left.sum() - states.sum()), replace=False)] = True
    return tuple(states.tolist())


def _first_plans(
    importance: np.ndarray,
    units_on: int,
    starts: Sequence[Tensor],
    population: int,
    generator: np.random.Generator,
) -> list[_Plan]:
    """Return the first population: most important units, starts, noisy copies, random plans."""
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
    """Return the plan, or if it was seen, the first new one on a random walk of swaps from it.

    The walk ends, because swaps connect all plans of a size and a search scores fewer than all.
    """
    while plan in seen:
        plan = swapped(plan, generator)
    return plan


def _score(evaluate: Evaluate, plans: list[_Plan], scores: dict[_Plan, float]) -> None:
    """Score plans and add them to `scores`."""
    values = evaluate(torch.tensor(plans, dtype=torch.bool))
    if values.shape != (len(plans),) or bool(values.isnan().any()):
        raise ValueError(
            f"evaluate must return one number for each of {len(plans)} plans, not "
            f"{list(values.shape)} with {int(values.isnan().sum())} NaN"
        )
    scores |= dict(zip(plans, values.tolist(), strict=True))


def _best(scores: dict[_Plan, float], count: int) -> list[_Plan]:
    """Return the plans with the largest scores; of equal ones those scored first."""
    return sorted(scores, key=lambda plan: -scores[plan])[:count]

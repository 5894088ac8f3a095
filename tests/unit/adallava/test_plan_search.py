"""The search for static plans: against brute force, and which plans it scores."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmray.adallava.static_plans import crossed, plan_score, search_plan, swapped


class Scorer:
    """Scores plans by a function of one plan, and records every plan it scored."""

    def __init__(self, score: Callable[[np.ndarray], float]) -> None:
        self.score = score
        self.scored: list[tuple[bool, ...]] = []

    def __call__(self, plans: Tensor) -> Tensor:
        assert plans.dtype == torch.bool
        self.scored += [tuple(plan) for plan in plans.tolist()]
        return torch.tensor([self.score(p) for p in plans.double().numpy()], dtype=torch.float64)


def additive(units: int, seed: int) -> Callable[[np.ndarray], float]:
    worth = np.random.default_rng(seed).normal(size=units)
    return lambda plan: float(worth @ plan)


def interacting(units: int, seed: int) -> Callable[[np.ndarray], float]:
    """Units are worth something in pairs only, so that importance is a weak guide."""
    generator = np.random.default_rng(seed)
    pairs = np.triu(generator.normal(size=(units, units)), 1)
    return lambda plan: float(plan @ pairs @ plan)


def leave_one_out(score: Callable[[np.ndarray], float], units: int) -> Tensor:
    full = np.ones(units)
    return torch.tensor([score(full) - score(full - row) for row in np.eye(units)])


def all_plans(units: int, units_on: int) -> list[np.ndarray]:
    plans = []
    for on in combinations(range(units), units_on):
        plan = np.zeros(units)
        plan[list(on)] = 1
        plans.append(plan)
    return plans


@pytest.mark.parametrize("make", [additive, interacting])
@pytest.mark.parametrize("units_on", [0, 1, 3, 6, 7])
def test_few_plans_are_all_scored(make, units_on: int) -> None:
    score = make(7, seed=units_on)
    scorer = Scorer(score)
    result = search_plan(scorer, torch.zeros(7), units_on, population=6, generations=5)
    best = max(all_plans(7, units_on), key=score)
    assert result.exhaustive and result.evaluations == comb(7, units_on) == len(set(scorer.scored))
    assert result.plan.tolist() == best.astype(bool).tolist()
    assert result.score == score(best)


def test_importance_alone_solves_additive_scores() -> None:
    score = additive(30, 0)
    result = search_plan(Scorer(score), leave_one_out(score, 30), 12, population=2, generations=0)
    order = leave_one_out(score, 30).argsort(descending=True)
    assert not result.exhaustive and result.evaluations == 2
    assert result.plan[order[:12]].all() and int(result.plan.sum()) == 12


@pytest.mark.parametrize("make", [additive, interacting])
def test_evolution_finds_the_best_plan_more_often_than_random_search(make) -> None:
    """144 of 924 plans, with uninformative importance: random search has the best one in 16 %."""
    exact = by_chance = 0
    for seed in range(12):
        score = make(12, seed)
        values = [score(plan) for plan in all_plans(12, 6)]
        result = search_plan(
            Scorer(score), torch.zeros(12), 6, population=12, generations=11, seed=seed
        )
        assert result.evaluations == 144 and not result.exhaustive
        exact += result.score == pytest.approx(max(values), abs=1e-12)
        drawn = np.random.default_rng(seed).choice(values, 144, replace=False)
        by_chance += drawn.max() == max(values)
    assert exact >= 9 and by_chance <= 6


def test_important_first_plans_help_under_interactions() -> None:
    """With equally few evaluations, starting at the important units is better on average."""
    gain = []
    for seed in range(20):
        score = interacting(16, seed)
        informed, blind = (
            search_plan(Scorer(score), start, 8, population=8, generations=2, seed=seed).score
            for start in (leave_one_out(score, 16), torch.zeros(16))
        )
        gain.append(informed - blind)
    assert np.mean(gain) > 2 * np.std(gain) / np.sqrt(len(gain))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 14).flatmap(lambda units: st.tuples(st.just(units), st.integers(0, units))),
    st.integers(2, 8),
    st.integers(0, 4),
    st.integers(0, 9),
)
def test_every_plan_has_the_size_and_none_is_scored_twice(
    sizes: tuple[int, int], population: int, generations: int, seed: int
) -> None:
    units, units_on = sizes
    scorer = Scorer(interacting(units, seed))
    result = search_plan(
        scorer,
        torch.arange(units).float(),
        units_on,
        population=population,
        generations=generations,
        seed=seed,
    )
    assert {sum(plan) for plan in scorer.scored} == {units_on}
    assert len(set(scorer.scored)) == len(scorer.scored) == result.evaluations
    assert result.evaluations == min(comb(units, units_on), population * (generations + 1))
    assert result.exhaustive == (result.evaluations == comb(units, units_on))
    assert result.score == max(map(scorer.score, np.array(scorer.scored, dtype=float)))


def test_the_seed_determines_the_plans_scored() -> None:
    def scored(seed: int) -> list[tuple[bool, ...]]:
        scorer = Scorer(interacting(14, 0))
        search_plan(scorer, torch.zeros(14), 7, population=6, generations=4, seed=seed)
        return scorer.scored

    assert scored(1) == scored(1) != scored(2)


def test_starts_are_in_the_first_population() -> None:
    needle = torch.zeros(20, dtype=torch.bool)
    needle[[1, 5, 9, 13, 17]] = True
    scorer = Scorer(lambda plan: float((plan.astype(bool) == needle.numpy()).all()))
    result = search_plan(scorer, torch.ones(20), 5, population=2, generations=0, starts=[needle])
    assert torch.equal(result.plan, needle) and result.score == 1.0
    assert scorer.scored[0] == (True,) * 5 + (False,) * 15  # the most important; ties: lower first


def test_a_tie_goes_to_the_plan_scored_first() -> None:
    result = search_plan(Scorer(lambda plan: 1.0), torch.tensor([0.0, 3.0, 2.0]), 1)
    assert result.plan.tolist() == [True, False, False]


@given(st.integers(2, 20), st.integers(0, 2**31), st.data())
def test_children_keep_the_units_that_parents_share(
    units: int, seed: int, data: st.DataObject
) -> None:
    units_on = data.draw(st.integers(1, units - 1))
    generator = np.random.default_rng(seed)
    a, b = (np.isin(np.arange(units), generator.choice(units, units_on, False)) for _ in range(2))
    child = np.array(crossed(tuple(a.tolist()), tuple(b.tolist()), generator))
    assert child.sum() == units_on and (child >= (a & b)).all() and (child <= (a | b)).all()
    mutant = np.array(swapped(tuple(a.tolist()), generator))
    assert mutant.sum() == units_on and (mutant != a).sum() == 2


def test_score_is_accuracy_minus_a_bounded_loss() -> None:
    correct = np.array([[True, False], [True, False], [False, False]])
    loss = np.array([[0.0, 1.0], [1.0, 1e9], [1.0, 1.0]])
    assert plan_score(correct, loss).tolist() == pytest.approx([0.25, -0.25, -0.5], abs=1e-6)


def test_wrong_arguments_are_errors() -> None:
    scorer, importance = Scorer(lambda plan: 0.0), torch.zeros(5)
    with pytest.raises(ValueError, match=r"units_on must lie in 0\.\.5, not 6"):
        search_plan(scorer, importance, 6)
    with pytest.raises(
        ValueError, match=r"population of 2 or more and 0 or more gen.* not 1 and 3"
    ):
        search_plan(scorer, importance, 2, population=1, generations=3)
    with pytest.raises(ValueError, match=r"starts\[0\] must have 2 of 5 units on, not 5"):
        search_plan(scorer, importance, 2, starts=[torch.ones(5)])
    with pytest.raises(ValueError, match="importance must be K finite numbers"):
        search_plan(scorer, torch.full((5,), torch.nan), 2)
    with pytest.raises(ValueError, match=r"one number for each of 10 plans, not \[10\] with 10"):
        search_plan(Scorer(lambda plan: float("nan")), importance, 2)
    with pytest.raises(ValueError, match=r"one number for each of 10 plans, not \[1\]"):
        search_plan(lambda plans: torch.zeros(1), importance, 2)
    assert scorer.scored == []

"""Static and importance plans against brute force over every plan."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from support.tiny_models import adaptive, batch, tiny_llava

from fmray.adallava.static_plans import best_static_plan, importance_scores


@pytest.fixture(scope="module")
def model():
    return adaptive(tiny_llava(layers=7), first=2)


@pytest.fixture(scope="module")
def batches():
    return [batch([9, 7, 8], answers=[3, 5, 4], seed=seed) for seed in range(2)]


def total_loss(model, batches, plan: torch.Tensor) -> float:
    """Sum of token losses, from the logits, one row at a time."""
    total = 0.0
    for data in batches:
        with torch.no_grad():
            logits = model(**data, plan=plan.expand(3, -1), execution="masked").logits.double()
        chosen = logits.log_softmax(-1)[:, :-1].gather(2, data["labels"][:, 1:, None].clamp(min=0))
        total -= float(chosen[..., 0][data["labels"][:, 1:] != -100].sum())
    return total


@pytest.mark.parametrize("k", [1, 2, 4])
def test_best_static_plan_has_the_smallest_loss_of_all_plans(model, batches, k: int) -> None:
    def plan_of(on: tuple[int, ...]) -> torch.Tensor:
        plan = torch.zeros(5, dtype=torch.bool)
        plan[list(on)] = True
        return plan

    expected = min(
        (plan_of(on) for on in combinations(range(5), k)),
        key=lambda p: total_loss(model, batches, p),
    )
    assert torch.equal(best_static_plan(model, batches, k), expected)


def test_best_static_plan_adds_units_one_at_a_time_beyond_the_limit(
    model, batches, monkeypatch
) -> None:
    monkeypatch.setattr("fmray.adallava.static_plans.EXHAUSTIVE_LIMIT", 1)
    single = best_static_plan(model, batches, 1)
    pair = best_static_plan(model, batches, 2)
    assert int(pair.sum()) == 2 and bool((pair & single).sum())
    assert best_static_plan(model, batches, 0).sum() == 0
    assert best_static_plan(model, batches, 5).sum() == 5


def test_importance_is_the_loss_added_by_leaving_one_unit_out(model, batches) -> None:
    scores = importance_scores(model, batches)
    tokens = sum(int((data["labels"][:, 1:] != -100).sum()) for data in batches)
    full = total_loss(model, batches, torch.ones(5).bool())
    for unit in range(5):
        plan = torch.ones(5).bool()
        plan[unit] = False
        expected = (total_loss(model, batches, plan) - full) / tokens
        assert float(scores[unit]) == pytest.approx(expected, abs=1e-5)


def test_wrong_arguments_are_errors(model, batches) -> None:
    with pytest.raises(ValueError, match=r"0\.\.5"):
        best_static_plan(model, batches, 6)
    with pytest.raises(ValueError, match="at least one batch"):
        importance_scores(model, [])

"""Sampling of plans against the Plackett-Luce law, brute force and a loop written out."""

from __future__ import annotations

from itertools import combinations, permutations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmray.adallava import best_plan, random_plan, sample_plan
from fmray.adallava.sampling import gumbel_noise, threshold_plan


def plackett_luce(logits: torch.Tensor, chosen: tuple[int, ...]) -> float:
    """Probability of a set: the sum over all orders of picking it."""
    weights = logits.double().exp()
    total = 0.0
    for order in permutations(chosen):
        left, probability = float(weights.sum()), 1.0
        for unit in order:
            probability *= float(weights[unit]) / left
            left -= float(weights[unit])
        total += probability
    return total


@pytest.mark.parametrize("k", [1, 2, 3])
def test_frequencies_follow_plackett_luce(k: int) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5, 2.0])
    draws = 100_000
    plans = sample_plan(
        logits.expand(draws, -1),
        torch.full((draws,), k),
        tau=0.7,  # the temperature shapes gradients, never the law
        generator=torch.Generator().manual_seed(0),
    )
    codes = (plans.long() * 2 ** torch.arange(5)).sum(1)
    counts = torch.bincount(codes, minlength=32)
    chi_square = 0.0
    sets = list(combinations(range(5), k))
    for chosen in sets:
        expected = draws * plackett_luce(logits, chosen)
        found = int(counts[sum(2**unit for unit in chosen)])
        chi_square += (found - expected) ** 2 / expected
    assert int(sum(counts[sum(2**u for u in c)] for c in sets)) == draws
    from scipy.stats import chi2

    assert chi_square < chi2.ppf(0.9999, len(sets) - 1)


def test_gradient_is_that_of_a_loop_over_picks() -> None:
    """A loop over picks, each a softmax over the remaining logits + noise, gives the same plan."""
    torch.manual_seed(0)
    logits = torch.randn(6, 7, requires_grad=True)
    units_on = torch.tensor([0, 1, 3, 5, 6, 7])
    noise = gumbel_noise((6, 7), torch.Generator().manual_seed(1))
    weights = torch.randn(6, 7)
    plan = sample_plan(logits, units_on, tau=2.0, noise=noise)
    (plan * weights).sum().backward()
    fast = logits.grad.clone()
    logits.grad = None
    total = torch.zeros(())
    expected = torch.zeros(6, 7)
    for row, k in enumerate(units_on.tolist()):
        left = torch.ones(7, dtype=torch.bool)
        for _ in range(k):
            perturbed = (logits[row] + noise[row]).masked_fill(~left, float("-inf"))
            pick = int(perturbed.argmax())
            total = total + ((perturbed / 2.0).softmax(0) * weights[row]).sum()
            left[pick] = False
            expected[row, pick] = 1
    total.backward()
    assert torch.equal(plan.detach(), expected)
    torch.testing.assert_close(fast, logits.grad, atol=1e-6, rtol=1e-5)


def test_every_logit_has_a_gradient_and_plans_are_exact() -> None:
    logits = torch.randn(64, 16, requires_grad=True)
    units_on = torch.randint(1, 16, (64,))
    plan = sample_plan(logits, units_on, generator=torch.Generator().manual_seed(0))
    assert set(plan.detach().unique().tolist()) == {0.0, 1.0}
    assert torch.equal(plan.detach().sum(1).long(), units_on)
    (plan * torch.randn(64, 16)).sum().backward()
    assert (logits.grad != 0).all()


def test_extreme_logits_keep_finite_gradients() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 50.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    plan = sample_plan(logits, torch.tensor([4, 0]), tau=0.01)
    assert plan.detach().tolist() == [[1] * 4, [0] * 4]
    (plan * torch.arange(4.0)).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_best_plan_is_the_most_probable_by_brute_force() -> None:
    """The most probable of all ordered draws."""
    generator = torch.Generator().manual_seed(0)
    for units, k in product((3, 5), (1, 2, 3)):
        for _ in range(5):
            logits = torch.randn(units, generator=generator)
            weights = logits.double().exp()

            def probability(order: tuple[int, ...], weights: torch.Tensor = weights) -> float:
                left, value = float(weights.sum()), 1.0
                for unit in order:
                    value *= float(weights[unit]) / left
                    left -= float(weights[unit])
                return value

            mode = max(permutations(range(units), k), key=probability)
            plan = best_plan(logits[None], torch.tensor([k]))[0]
            assert set(plan.nonzero()[:, 0].tolist()) == set(mode)
            likeliest = max(combinations(range(units), k), key=lambda c: plackett_luce(logits, c))
            assert set(likeliest) == set(mode)


@given(
    rows=st.lists(
        st.tuples(st.lists(st.floats(-20, 20), min_size=6, max_size=6), st.integers(0, 6)),
        min_size=1,
        max_size=8,
    )
)
def test_every_draw_has_exactly_k_units_on(rows: list[tuple[list[float], int]]) -> None:
    logits = torch.tensor([values for values, _ in rows])
    units_on = torch.tensor([k for _, k in rows])
    for plan in (
        sample_plan(logits, units_on),
        best_plan(logits, units_on),
        random_plan(units_on, 6),
    ):
        assert plan.long().sum(1).tolist() == units_on.tolist()


def test_ties_go_to_the_lower_index() -> None:
    assert best_plan(torch.zeros(1, 4), torch.tensor([2])).tolist() == [[True, True, False, False]]


def test_rows_do_not_depend_on_their_neighbours() -> None:
    logits, noise = torch.randn(8, 5), gumbel_noise((8, 5))
    units_on = torch.arange(8) % 6
    whole = sample_plan(logits, units_on, noise=noise)
    parts = [
        sample_plan(logits[i : i + 2], units_on[i : i + 2], noise=noise[i : i + 2])
        for i in (0, 2, 4, 6)
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_threshold_plan_is_hard_with_a_gradient() -> None:
    logits = torch.tensor([[1.0, -1.0]], requires_grad=True)
    plan = threshold_plan(logits)
    assert plan.tolist() == [[1.0, 0.0]]
    plan.sum().backward()
    assert (logits.grad > 0).all()


@pytest.mark.parametrize(
    ("logits", "units_on", "message"),
    [
        (torch.zeros(3), torch.tensor([1]), r"logits must be \[B, K\]"),
        (torch.zeros(2, 3), torch.tensor([1]), r"units_on must be \[2\]"),
        (torch.zeros(1, 3), torch.tensor([4]), r"0\.\.3"),
        (torch.zeros(1, 3), torch.tensor([-1]), r"0\.\.3"),
        (torch.zeros(1, 3), torch.tensor([1.0]), "integers"),
    ],
)
def test_wrong_shapes_and_sizes_are_errors(
    logits: torch.Tensor, units_on: torch.Tensor, message: str
) -> None:
    for function in (sample_plan, best_plan):
        with pytest.raises(ValueError, match=message):
            function(logits, units_on)


def test_wrong_tau_and_noise_are_errors() -> None:
    with pytest.raises(ValueError, match="tau"):
        sample_plan(torch.zeros(1, 3), torch.tensor([1]), tau=0.0)
    with pytest.raises(ValueError, match="noise"):
        sample_plan(torch.zeros(1, 3), torch.tensor([1]), noise=torch.zeros(2, 3))

"""Intervals, paired tests and mutual information against closed forms and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multinomial
from sklearn.metrics import mutual_info_score

from fmray.train.adallava.evaluate import dependence, paired_test, wilson_interval


def test_wilson_interval_solves_the_score_equation() -> None:
    """Its ends are the shares p at which |observed - p| is 1.96 standard errors under p."""
    for right, total in ((7, 10), (50, 400), (399, 400)):
        for end in wilson_interval(right, total):
            error = math.sqrt(end * (1 - end) / total)
            assert abs(right / total - end) == pytest.approx(1.959964 * error, rel=1e-5)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share(counts: tuple[int, int]) -> None:
    low, high = wilson_interval(*counts)
    assert 0 <= low <= counts[0] / counts[1] <= high <= 1 and low < high


def test_wilson_interval_refuses_what_is_no_share() -> None:
    for right, total in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="not a share"):
            wilson_interval(right, total)


def test_paired_test_counts_what_differs() -> None:
    a = np.array([True] * 9 + [False] * 1 + [True] * 90)
    b = np.array([False] * 9 + [True] * 1 + [True] * 90)
    found = paired_test(a, b)
    assert (found.only_a, found.only_b, found.difference) == (9, 1, pytest.approx(0.08))
    assert found.p_value == pytest.approx(2 * (1 + 10) / 2**10)  # binomial(10, 1/2), both tails
    assert paired_test(a, a).p_value == 1.0
    with pytest.raises(ValueError, match="two arrays"):
        paired_test(a, b[:-1])


def test_paired_interval_covers_the_difference() -> None:
    """Over all outcomes of 40 questions, by their multinomial law: 95 % of them hold the truth."""
    total = 40
    for only_a, only_b in ((0.1, 0.1), (0.25, 0.05), (0.02, 0.3)):
        covered = 0.0
        for a in range(total + 1):
            for b in range(total + 1 - a):
                outcome = np.zeros((2, total), dtype=bool)
                outcome[0, :a], outcome[1, a : a + b] = True, True
                found = paired_test(*outcome)
                law = multinomial.pmf(
                    (a, b, total - a - b), total, (only_a, only_b, 1 - only_a - only_b)
                )
                covered += law * (found.low <= only_a - only_b <= found.high)
        assert 0.93 < covered < 0.99
    same = paired_test(np.ones(100, dtype=bool), np.ones(100, dtype=bool))
    assert -0.04 < same.low < 0 < same.high < 0.04


def test_dependence_is_sklearns_mutual_information() -> None:
    generator = np.random.default_rng(0)
    labels = generator.choice(np.array(["color", "count", "place"]), 400)
    plans = np.where(labels == "count", "110", generator.choice(np.array(["011", "101"]), 400))
    found = dependence(labels, plans, shuffles=200)
    assert found.bits == pytest.approx(mutual_info_score(labels, plans) / math.log(2))
    assert found.p_value == pytest.approx(1 / 201)


def test_dependence_of_independent_plans_is_chance() -> None:
    generator = np.random.default_rng(1)
    p_values = [
        dependence(
            generator.integers(0, 4, 200), generator.integers(0, 8, 200), shuffles=99, seed=seed
        ).p_value
        for seed in range(40)
    ]
    # uniform p values: the chance of fewer than 5 or more than 35 of 40 below one half is 2e-7
    assert 5 <= sum(p < 0.5 for p in p_values) <= 35
    assert dependence(np.arange(5), np.zeros(5)).p_value == 1.0

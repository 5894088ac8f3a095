"""Rank correlations of scores with accuracies, against scipy and known answers."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from support.search import finished

from fmray.config.fewshot import FewshotRecipe, SelectConfig
from fmray.search.run import _task_notes
from fmray.search.verdict import rank_correlations, spearman
from fmray.selection import TaskMoments, coverage

GENERATOR = np.random.default_rng(5)
CENTRES = {name: 3 * GENERATOR.normal(size=4) + 4 for name in "abcd"}
TASKS = {
    name: TaskMoments.of(name, centre + GENERATOR.normal(size=(30, 4)))
    for name, centre in CENTRES.items()
}
TARGET = TaskMoments.of("target", CENTRES["a"] + GENERATOR.normal(size=(30, 4)))
SETS = [names for size in (1, 2, 3, 4) for names in itertools.combinations("abcd", size)]


def test_spearman_agrees_with_scipy_also_with_ties() -> None:
    for size in (3, 8, 40):
        first = GENERATOR.integers(0, 6, size).astype(float)
        second = GENERATOR.integers(0, 6, size).astype(float)
        assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert spearman(np.array([1.0, np.inf, 2.0]), np.array([1.0, 3.0, 2.0])) == pytest.approx(1.0)
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))


@pytest.mark.parametrize("covariance", ["oas", "diag"])
def test_accuracies_in_the_order_of_coverage_correlate_perfectly(covariance: str) -> None:
    config = SelectConfig(covariance=covariance)
    covered = [coverage([TASKS[n] for n in names], TARGET, covariance) for names in SETS]
    accuracies = stats.rankdata(covered) / 100
    correlations = {
        c.score: c for c in rank_correlations(SETS, accuracies, TARGET, TASKS, config, seed=0)
    }
    assert correlations["coverage"].rho == pytest.approx(1.0)
    assert correlations["coverage"].low == pytest.approx(1.0)
    sizes = [len(names) for names in SETS]
    expected = stats.spearmanr(sizes, accuracies).statistic
    assert correlations["the number of tasks"].rho == pytest.approx(expected)
    assert set(correlations) == {"coverage", "mean similarity", "the number of tasks"}
    assert all(c.sets == 15 and c.low <= c.rho <= c.high for c in correlations.values())
    assert "correlation of +1.00 [+1.00, +1.00]" in str(correlations["coverage"])


def test_the_interval_contains_zero_for_random_accuracies_and_is_reproducible() -> None:
    accuracies = np.random.default_rng(8).random(len(SETS))
    correlations, again = (
        rank_correlations(SETS, accuracies, TARGET, TASKS, SelectConfig(), seed=0) for _ in "12"
    )
    assert correlations == again
    assert all(c.low < 0 < c.high for c in correlations)
    few = rank_correlations(SETS[:4], accuracies[:4], TARGET, TASKS, SelectConfig(), seed=0)
    assert few == []


def test_a_search_ranks_sets_trained_to_the_end_with_equal_shares() -> None:
    trials = [
        finished(
            n, values={"tasks": names}, overrides=("select.only",), metrics={"accuracy": n / 9}
        )
        for n, names in enumerate(SETS[:6])
    ]
    shares = ("select.only", "select.weights")
    trials.append(finished(6, values={"tasks": SETS[9]}, overrides=shares))
    trials.append(finished(7, values={"tasks": SETS[8]}, overrides=(), status="stopped"))
    base = FewshotRecipe(name="a")
    embedded = SimpleNamespace(target=TARGET, moments=TASKS)
    accuracies = [n / 9 for n in range(6)]
    correlations = rank_correlations(SETS[:6], accuracies, TARGET, TASKS, base.select, base.seed)
    assert _task_notes(base, trials, lambda: embedded) == [str(c) for c in correlations]
    assert _task_notes(base, trials[:4], lambda: embedded) == []

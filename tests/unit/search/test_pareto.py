"""Pareto front, hypervolume and rules, against brute force, Monte Carlo and worked examples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.search import finished

from fmray.config.search import ObjectiveConfig
from fmray.search.pareto import front, front_of, hypervolume, recommend, rule_of
from fmray.search.state import FinishedTrial

ACCURACY = ObjectiveConfig(metric="accuracy", mode="max")
OPERATIONS = ObjectiveConfig(metric="operations", mode="min")
LATENCY = ObjectiveConfig(metric="latency", mode="min")
BOTH = (ACCURACY, OPERATIONS)


def trials(*pairs: tuple[float, float]) -> list:
    return [
        finished(number, metrics={"accuracy": a, "operations": o})
        for number, (a, o) in enumerate(pairs)
    ]


def dominates(a: np.ndarray, b: np.ndarray, modes: list[str]) -> bool:
    gains = [x - y if mode == "max" else y - x for x, y, mode in zip(a, b, modes, strict=True)]
    return min(gains) >= 0 and max(gains) > 0


@given(
    st.integers(1, 3).flatmap(
        lambda m: st.tuples(
            st.lists(st.tuples(*[st.integers(-3, 3)] * m), min_size=1, max_size=12),
            st.tuples(*[st.sampled_from(["max", "min"])] * m),
        )
    )
)
def test_front_is_the_set_of_points_that_no_point_dominates(case: tuple) -> None:
    points, modes = np.array(case[0], dtype=float), list(case[1])
    indices = front(points, modes).tolist()
    expected = [
        index
        for index, point in enumerate(points)
        if not any(dominates(other, point, modes) for other in points)
    ]
    assert sorted(indices) == expected
    first_column = points[indices, 0] * (-1 if modes[0] == "max" else 1)
    assert (np.diff(first_column) >= 0).all()


@given(
    st.integers(1, 4).flatmap(
        lambda m: st.lists(st.tuples(*[st.integers(0, 5)] * m), min_size=0, max_size=7).map(
            lambda rows: np.array(rows, dtype=float).reshape(-1, m)
        )
    )
)
def test_hypervolume_on_a_grid_is_the_number_of_dominated_cells(points: np.ndarray) -> None:
    """On a grid of integers the volume is a number of unit cells."""
    m = points.shape[1]
    modes = ["max", "min", "min", "max"][:m]
    signs = np.array([-1.0 if mode == "max" else 1.0 for mode in modes])
    reference = np.full(m, 4.0)  # of losses: some points lie beyond it
    cells = [
        cell
        for cell in itertools.product(range(4), repeat=m)
        if any((np.array(cell) >= point).all() for point in points)
    ]
    assert hypervolume(points * signs, modes, reference * signs) == pytest.approx(len(cells))


def test_hypervolume_agrees_with_monte_carlo() -> None:
    generator = np.random.default_rng(0)
    for m in (2, 3, 4):
        points = generator.random((15, m))
        volume = hypervolume(points, ["min"] * m, np.ones(m))
        samples = generator.random((40_000, m))
        hit = (samples[:, None] >= points[None]).all(2).any(1)
        assert volume == pytest.approx(hit.mean(), abs=4 * hit.std() / 200 + 1e-9)


def test_invalid_points_are_errors_that_name_them() -> None:
    with pytest.raises(ValueError, match=r"point 1 is nan"):
        front([[1.0, 2.0], [np.nan, 1.0]], ["max", "min"])
    with pytest.raises(ValueError, match=r"must be \[n, 1\]"):
        front([[1.0, 2.0]], ["max"])
    with pytest.raises(ValueError, match=r"must be \[n, 2\]"):
        hypervolume([[1.0, 2.0]], ["max", "min"], [0.0])


def test_stopped_failed_and_non_finite_trials_are_not_on_the_front() -> None:
    ended = trials((0.9, 1.0), (0.8, 0.5), (0.7, 0.6))
    odd = [
        finished(7, status="stopped", metrics={"accuracy": 1.0, "operations": 0.1}),
        finished(8, status="failed", metrics={}),
        finished(9, metrics={"accuracy": float("nan"), "operations": 0.1}),
    ]
    assert [trial.number for trial in front_of(ended + odd, BOTH)] == [0, 1]
    assert front_of(odd, BOTH) == []


def test_rule_best_under_a_limit() -> None:
    results = trials((0.95, 1.0), (0.90, 0.6), (0.90, 0.5), (0.85, 0.3), (0.99, 0.61))
    assert recommend("best accuracy under 0.6", results, BOTH).number == 2
    assert recommend("best  accuracy under 0.4 operations", results, BOTH).number == 3
    assert recommend("best accuracy under 1", results, BOTH).number == 4
    with pytest.raises(ValueError, match=r"no trial has operations of at most 0.2; .* 0.3"):
        recommend("best accuracy under 0.2", results, BOTH)


def test_rule_cheapest_within_a_percentage_of_full() -> None:
    results = trials((0.90, 1.0), (0.892, 0.6), (0.8909, 0.5), (0.85, 0.3), (0.88, 1.0))
    assert recommend("cheapest within 1 % of full", results, BOTH).number == 1
    assert recommend("cheapest within 1.2% of full", results, BOTH).number == 2
    assert recommend("cheapest within 0 % of full", results, BOTH).number == 0
    assert recommend("cheapest within 100 % of full", results, BOTH).number == 3


def test_a_rule_must_name_the_cost_if_there_are_several() -> None:
    three = (ACCURACY, OPERATIONS, LATENCY)
    metrics = [(0.9, 1.0, 5.0), (0.9, 0.5, 9.0)]
    results = [
        finished(n, metrics=dict(zip(("accuracy", "operations", "latency"), m, strict=True)))
        for n, m in enumerate(metrics)
    ]
    assert recommend("cheapest latency within 5 % of full", results, three).number == 0
    assert recommend("best accuracy under 0.6 operations", results, three).number == 1
    with pytest.raises(ValueError, match=r"exactly one cost \(mode min\) and there are 2"):
        rule_of("best accuracy under 0.6", three)


def curve(number: int, **by_budget: list[float]) -> FinishedTrial:
    """A trial with a value of each metric at budgets 0.5 and 1, and their means."""
    metrics = {name: sum(values) / 2 for name, values in by_budget.items()}
    for name, values in by_budget.items():
        metrics |= {f"{name}/1": values[1], f"{name}/0.5": values[0]}
    return finished(number, metrics=metrics)


def test_a_trial_counts_at_each_of_its_budgets() -> None:
    results = [
        curve(0, accuracy=[0.5, 0.9], operations=[0.48, 1.0]),
        curve(1, accuracy=[0.7, 0.85], operations=[0.5, 1.0]),
        finished(2, metrics={"accuracy": 0.75, "operations": 0.7}),  # no budgets
    ]
    points = [
        (trial.number, trial.metrics.get("budget"), trial.metrics["accuracy"])
        for trial in front_of(results, BOTH)
    ]
    assert points == [(0, 1.0, 0.9), (2, None, 0.75), (1, 0.5, 0.7), (0, 0.5, 0.5)]
    under = recommend("best accuracy under 0.6", results, BOTH)
    assert (under.number, under.metrics["budget"]) == (1, 0.5)
    # full is the point with the highest cost: trial 0 at budget 1, not a mean over budgets
    assert recommend("cheapest within 17 % of full", results, BOTH).number == 2
    assert recommend("cheapest within 25 % of full", results, BOTH).number == 1
    # with one objective, the mean over budgets counts
    assert [trial.number for trial in front_of(results, BOTH[:1])] == [1]


@pytest.mark.parametrize(
    "rule, objectives, message",
    [
        ("fastest", BOTH, r"'fastest' is not a rule; the rules are \"best METRIC under"),
        ("best accuracy under half", BOTH, r"is not a rule"),
        ("best speed under 0.6", BOTH, r"no objective 'speed'"),
        ("best accuracy under 0.6 accuracy", BOTH, r"no objective 'accuracy' fits"),
        ("best accuracy under 0.6", (ACCURACY,), r"there are 0; the objectives are none left"),
        ("cheapest within 1 % of full", (OPERATIONS,), r"needs a second objective"),
    ],
)
def test_an_invalid_rule_is_an_error(rule: str, objectives: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule_of(rule, objectives)


def test_a_rule_without_finished_trials_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"none of 0 trials was trained to the end"):
        recommend("best accuracy under 0.6", [], BOTH)

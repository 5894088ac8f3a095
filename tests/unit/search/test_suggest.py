"""Suggestions: reproducible, the same after an interruption, and no trial is trained twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from fmray.config.search import ObjectiveConfig
from fmray.search.space import (
    Choice,
    Integer,
    Real,
    Space,
    Subset,
    Values,
    WarmStart,
    override,
)
from fmray.search.state import FinishedTrial
from fmray.search.suggest import Algorithm, Suggester, Suggestion

ITEMS = tuple("abcdef")
ONE = (ObjectiveConfig(metric="accuracy"),)
TWO = (*ONE, ObjectiveConfig(metric="cost", mode="min"))
ALGORITHMS: list[Algorithm] = ["tpe", "nsga2", "random", "grid"]


def overrides(values: Values) -> list[str]:
    return [override(f"x.{name}", value) for name, value in values.items()]


def mixed(*more: Any) -> Space:
    parameters = (Subset("some", ITEMS), Integer("count", 1, 4), Choice("kind", ("p", "q")), *more)
    start = {"some": ITEMS, "count": 1, "kind": "p"} | {p.name: p.low for p in more}
    return Space(parameters, overrides, (WarmStart("all", start),))


def subsets(*starts: str) -> Space:
    warm_starts = tuple(WarmStart(f"only {s}", {"some": tuple(s)}) for s in starts)
    return Space((Subset("some", ITEMS[:5]),), overrides, warm_starts)


def measure(values: Values) -> dict[str, float]:
    some = values["some"]
    accuracy = sum(1 if item in "fbd" else -0.5 for item in some)
    rate = values.get("lr", 1e-3)
    return {"accuracy": accuracy - abs(math.log10(rate) + 3) / 4, "cost": float(len(some))}


def measure_curve(values: Values) -> dict[str, float]:
    """Like an adaptive model: accuracy and cost by budget, and overall."""
    metrics = measure(values)
    curve = {}
    for budget in (0.25, 0.5, 1):
        curve |= {f"accuracy/{budget:g}": metrics["accuracy"] * budget ** (0.1 * values["count"])}
        curve |= {f"cost/{budget:g}": metrics["cost"] * budget}
    return metrics | curve


def finished(suggestion: Suggestion, metrics: dict[str, float] | None) -> FinishedTrial:
    duplicate = suggestion.duplicate_of is not None
    status = "duplicate" if duplicate else "failed" if metrics is None else "done"
    return FinishedTrial(
        suggestion.number,
        suggestion.key,
        # as read from JSON
        {k: list(v) if isinstance(v, tuple) else v for k, v in suggestion.values.items()},
        (),
        metrics or {},
        (),
        status,
        None,
        1.0,
        0.0,
        1,
        suggestion.origin,
    )


def run_trials(
    suggester: Suggester, count: int, measure: Callable[[Values], dict[str, float]] = measure
) -> list[tuple[Suggestion, FinishedTrial]]:
    """Search, one trial at a time; every seventh trial fails."""
    trials = []
    for _ in range(count):
        suggestion = suggester.next()
        if suggestion is None:
            break
        metrics = None if suggestion.number % 7 == 6 else measure(suggestion.values)
        if suggestion.duplicate_of is None:
            suggester.tell(suggestion.number, metrics)
        trials.append((suggestion, finished(suggestion, metrics)))
    return trials


def parts(algorithm: Algorithm) -> tuple[Space, tuple[ObjectiveConfig, ...]]:
    continuous = () if algorithm == "grid" else (Real("lr", 1e-5, 1e-1, log=True),)
    return mixed(*continuous), TWO if algorithm == "nsga2" else ONE


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_seed_gives_the_same_suggestions(algorithm: Algorithm) -> None:
    space, objectives = parts(algorithm)
    first, again = (run_trials(Suggester(space, algorithm, objectives, 3), 35) for _ in range(2))
    assert [s for s, _ in first] == [s for s, _ in again]
    assert [s.number for s, _ in first] == list(range(35))
    assert (first[0][0].origin, first[1][0].origin) == ("warm: all", "suggested")
    other = run_trials(Suggester(space, algorithm, objectives, 4), 35)
    assert ([s.key for s, _ in other] == [s.key for s, _ in first]) == (algorithm == "grid")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("small", [True, False])
def test_a_rebuilt_search_continues_as_if_uninterrupted(algorithm: Algorithm, small: bool) -> None:
    space, objectives = parts(algorithm)
    if small:  # many duplicates
        space = subsets("ab", "a", "ba")
    uninterrupted = run_trials(Suggester(space, algorithm, objectives, 1), 45)
    for cut in (1, 2, 13, 31, 44):
        if cut >= len(uninterrupted):
            continue
        finished_trials = [trial for _, trial in reversed(uninterrupted[:cut])]  # in any order
        rest = run_trials(Suggester(space, algorithm, objectives, 1, finished_trials), 45 - cut)
        assert [s for s, _ in rest] == [s for s, _ in uninterrupted[cut:]], cut


@pytest.mark.parametrize("algorithm", ["tpe", "nsga2"])
def test_the_sampler_gets_every_operating_point_of_a_trial(algorithm: Algorithm) -> None:
    space, _ = parts(algorithm)
    suggester = Suggester(space, algorithm, TWO, 1)
    uninterrupted = run_trials(suggester, 40, measure_curve)
    completed = [t for t in suggester._study.trials if t.values is not None]
    trained = [(s, t) for s, t in uninterrupted if t.status == "done"]
    points = sorted((t.values[0], t.values[1]) for t in completed)
    expected = [
        (trial.metrics[f"accuracy/{b:g}"], trial.metrics[f"cost/{b:g}"])
        for _, trial in trained
        for b in (0.25, 0.5, 1)
    ]
    assert set(points) == set(expected) and len(points) >= len(expected)
    if algorithm == "nsga2":  # a generation counts trials, not points
        generations = [t.system_attrs["NSGAIISampler:generation"] for t in completed]
        assert 3 * 10 <= generations.count(0) <= 3 * 12
    for cut in (5, 23):
        finished_trials = [trial for _, trial in uninterrupted[:cut]]
        rest = run_trials(
            Suggester(space, algorithm, TWO, 1, finished_trials), 40 - cut, measure_curve
        )
        assert [s for s, _ in rest] == [s for s, _ in uninterrupted[cut:]], cut


@pytest.mark.parametrize("algorithm", ["tpe", "nsga2"])
def test_optuna_learns_from_results(algorithm: Algorithm) -> None:
    """Later suggestions are better than random ones of the same seeds, by mean accuracy."""
    space, _ = parts(algorithm)
    objectives = ONE if algorithm == "tpe" else TWO

    def late(which: Algorithm) -> float:
        runs = [run_trials(Suggester(space, which, objectives, seed), 60)[30:] for seed in range(3)]
        values = [measure(s.values)["accuracy"] for run in runs for s, _ in run]
        return sum(values) / len(values)

    assert late(algorithm) > late("random") + 0.3


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_subset_is_trained_once_and_then_the_search_ends(algorithm: Algorithm) -> None:
    space = subsets("ab", "ba", "c")
    suggester = Suggester(space, algorithm, TWO if algorithm == "nsga2" else ONE, 0)
    trials = run_trials(suggester, 5000)
    trained = [s for s, _ in trials if s.duplicate_of is None]
    assert len(trained) == 31 == len({s.key for s in trained})
    assert suggester.end_reason == "every point of the space has been tried"
    by_number = {s.number: s for s, _ in trials}
    for suggestion, _ in trials:
        if suggestion.duplicate_of is not None:
            original = by_number[suggestion.duplicate_of]
            assert original.key == suggestion.key and original.duplicate_of is None
            assert original.number < suggestion.number
    assert [s.duplicate_of for s, _ in trials[:3]] == [None, 0, None]  # warm starts too


def test_a_duplicate_gets_the_result_of_the_trial_it_equals() -> None:
    suggester = Suggester(subsets("ab", "ba", "c"), "tpe", ONE, 0)
    _, again, third = (suggester.next() for _ in range(3))
    assert again is not None and again.duplicate_of == 0 and third is not None
    suggester.tell(0, {"accuracy": 0.5})  # after the duplicate was suggested
    completed = [t.values for t in suggester._study.trials]
    assert completed == [[0.5], [0.5], None]
    suggester.tell(2, None)
    assert suggester._study.trials[2].values is None


def test_interrupted_trials_are_suggested_again_first() -> None:
    space, objectives = parts("random")
    suggester = Suggester(space, "random", objectives, 5)
    suggestions = [suggester.next() for _ in range(6)]
    finished_trials = [
        finished(s, measure(s.values)) for s in suggestions if s and s.number in (0, 2, 5)
    ]
    rebuilt = Suggester(space, "random", objectives, 5, finished_trials)
    assert [rebuilt.next() for _ in range(3)] == [suggestions[1], suggestions[3], suggestions[4]]
    following = rebuilt.next()
    assert following is not None and following.number == 6


def test_a_duplicate_does_not_hide_an_interrupted_trial() -> None:
    space = subsets("ab", "ba", "c")
    running = Suggester(space, "random", ONE, 0)
    first, again, third = (running.next() for _ in range(3))
    assert first and again and third
    finished_trials = [finished(again, None), finished(third, {"accuracy": 1.0})]
    rebuilt = Suggester(space, "random", ONE, 0, finished_trials)
    assert [rebuilt.next(), rebuilt.next()] == [first, again]


def test_unsuitable_spaces_metrics_and_trials_are_errors() -> None:
    real = Space((Real("lr", 0.1, 1),), overrides)
    with pytest.raises(ValueError, match=r"a grid cannot list all values of lr; use random or tpe"):
        Suggester(real, "grid", ONE, 0)
    suggester = Suggester(subsets(), "random", ONE, 0)
    suggester.next()
    with pytest.raises(ValueError, match=r"trials have no metric 'accuracy'; they have loss, time"):
        suggester.tell(0, {"time": 1.0, "loss": 2.0})
    [(_, trial)] = run_trials(Suggester(subsets(), "random", ONE, 0), 1)
    with pytest.raises(
        ValueError, match=r"trial 0 of this run id belongs to another space .* --run-id"
    ):
        Suggester(real, "random", ONE, 0, [trial])


def test_a_non_finite_result_counts_as_failed() -> None:
    suggester = Suggester(subsets("a"), "tpe", ONE, 0)
    suggester.next()
    suggester.tell(0, {"accuracy": math.nan})
    assert suggester._study.trials[0].values is None

"""Early stopping: Ray's rules with trials of earlier processes."""

from __future__ import annotations

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from support.search import finished

from fmray.config.search import SchedulerConfig, SearchRecipe
from fmray.search.state import FinishedTrial
from fmray.search.suggest import make_scheduler

EVERY, STEPS = 10, 40


def recipe(kind: str, mode: str = "max") -> SearchRecipe:
    values = {"name": "a", "base": "b.yaml", "space": "fewshot"}
    scheduler = SchedulerConfig(kind=kind, grace=1, reduction=2)
    objectives = [{"metric": "accuracy", "mode": mode}]
    return SearchRecipe.model_validate(values | {"scheduler": scheduler, "objectives": objectives})


def earlier(number: int, *accuracies: float) -> FinishedTrial:
    curve = [{"step": EVERY * (i + 1), "accuracy": a} for i, a in enumerate(accuracies)]
    return finished(number, curve=tuple(curve), metrics={"accuracy": accuracies[-1]})


def decide(scheduler: TrialScheduler, step: int, accuracy: float) -> str:
    trial = Trial("new", stub=True)
    scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(None, trial, {"step": step, "accuracy": accuracy})


@pytest.mark.parametrize("kind", ["asha", "median"])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_new_trial_is_compared_with_those_of_earlier_processes(kind: str, mode: str) -> None:
    sign = 1 if mode == "max" else -1
    before = [earlier(n, *(sign * (0.4 + n / 50 + i / 100) for i in range(4))) for n in range(5)]
    stop, proceed = TrialScheduler.STOP, TrialScheduler.CONTINUE
    resumed = make_scheduler(recipe(kind, mode), EVERY, STEPS, before)
    assert decide(resumed, EVERY, sign * 0.1) == stop
    assert decide(resumed, EVERY, sign * 0.9) == proceed
    new = make_scheduler(recipe(kind, mode), EVERY, STEPS, [])
    assert decide(new, EVERY, sign * 0.1) == proceed


def test_no_trial_is_stopped_without_a_rule_or_results() -> None:
    assert isinstance(make_scheduler(recipe("none"), EVERY, STEPS, []), FIFOScheduler)
    scheduler = make_scheduler(
        recipe("asha"), EVERY, STEPS, [finished(0, status="failed", curve=())]
    )
    assert decide(scheduler, EVERY, 0.1) == TrialScheduler.CONTINUE

"""Early stopping: what Ray's rules do with trials that ended before this process began."""

from __future__ import annotations

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from support.search import finished

from fmray.config.search import SchedulerConfig, SearchRecipe
from fmray.search.state import Finished
from fmray.search.suggest import make_scheduler

EVERY, STEPS = 10, 40


def recipe(kind: str, mode: str = "max") -> SearchRecipe:
    values = {"name": "a", "base": "b.yaml", "space": "fewshot"}
    scheduler = SchedulerConfig(kind=kind, grace=1, reduction=2)
    objectives = [{"metric": "accuracy", "mode": mode}]
    return SearchRecipe.model_validate(values | {"scheduler": scheduler, "objectives": objectives})


def earlier(number: int, *accuracies: float) -> Finished:
    curve = [{"step": EVERY * (i + 1), "accuracy": a} for i, a in enumerate(accuracies)]
    return finished(number, curve=tuple(curve), metrics={"accuracy": accuracies[-1]})


def decide(scheduler: TrialScheduler, step: int, accuracy: float) -> str:
    trial = Trial("new", stub=True)
    scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(None, trial, {"step": step, "accuracy": accuracy})


@pytest.mark.parametrize("kind", ["asha", "median"])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_trials_of_before_are_what_a_new_one_is_compared_with(kind: str, mode: str) -> None:
    sign = 1 if mode == "max" else -1
    before = [earlier(n, *(sign * (0.4 + n / 50 + i / 100) for i in range(4))) for n in range(5)]
    stop, go = TrialScheduler.STOP, TrialScheduler.CONTINUE
    remembers = make_scheduler(recipe(kind, mode), EVERY, STEPS, before)
    assert decide(remembers, EVERY, sign * 0.1) == stop
    assert decide(remembers, EVERY, sign * 0.9) == go
    forgets = make_scheduler(recipe(kind, mode), EVERY, STEPS, [])
    assert decide(forgets, EVERY, sign * 0.1) == go


def test_none_is_stopped_without_a_rule() -> None:
    assert isinstance(make_scheduler(recipe("none"), EVERY, STEPS, []), FIFOScheduler)
    later = make_scheduler(recipe("asha"), EVERY, STEPS, [finished(0, status="failed", curve=())])
    assert decide(later, EVERY, 0.1) == TrialScheduler.CONTINUE

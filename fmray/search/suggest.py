"""What to try next and what to stop early: suggestions by Optuna, stopping rules by Ray Tune.

The `Suggester` gives warm starts first, then Optuna's TPE, NSGA-II or random samples, or a grid. A
suggestion is a function of the seed, its number, and the results known before it. The same seed
therefore gives the same first suggestions, and a search that is rebuilt from its finished trials
continues as if it had not been interrupted. (With concurrent trials, the suggestions after Optuna's
random ones depend on which trials had finished.) A suggestion that equals an earlier one gets a
number but is not trained: it takes the result of the earlier one.

`make_scheduler` returns Ray's ASHA or median rule with the trials of earlier processes replayed.
Ray's rules know only what they saw themselves, and would be lenient again after every restart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial, TrialState, create_trial
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from fmray.config.search import ObjectiveConfig, SearchRecipe
from fmray.search.pareto import operating_points
from fmray.search.space import Choice, Integer, Parameter, Real, Space, Subset, Values
from fmray.search.state import FinishedTrial

Algorithm = Literal["tpe", "nsga2", "random", "grid"]
POPULATION = 10  # trials per generation of NSGA-II; Optuna's 50 would be most searches entirely
MAX_REPEATS = 20  # duplicates in a row, after which untried values are enumerated


@dataclass(frozen=True)
class Suggestion:
    """The values of one trial."""

    number: int  #: from 0
    values: Values
    key: str  #: `Space.key`
    duplicate_of: int | None  #: the earlier trial that it equals; not trained again
    origin: str  #: `warm: NAME` or `suggested`


class Suggester:
    """Suggests trials and learns from their results.

    Attributes:
        end_reason: why `next` returned None; None before that.
    """

    def __init__(
        self,
        space: Space,
        algorithm: Algorithm,
        objectives: Sequence[ObjectiveConfig],
        seed: int,
        finished: Sequence[FinishedTrial] = (),
    ) -> None:
        """Replay the finished trials of the same search.

        Args:
            finished: numbers missing among them are suggested first.

        Raises:
            ValueError: the space cannot be searched, or not by this algorithm, or a finished trial
                belongs to another space.
        """
        space.check()
        self.end_reason: str | None = None
        self._space, self._algorithm, self._seed = space, algorithm, seed
        self._objectives = tuple(objectives)
        self._numbers: dict[str, int] = {}  # key -> number of the first suggestion with it
        self._trials: dict[int, Trial] = {}  # by number, without a result so far
        self._results: dict[int, Mapping[str, float] | None] = {}
        self._duplicates: dict[int, list[int]] = {}  # original -> duplicates that wait for it
        self._repeats = 0
        self._points_each = 1  # operating points per trial, the most seen
        finite = not any(isinstance(parameter, Real) for parameter in space)
        self._points = space.points() if finite or algorithm == "grid" else iter(())
        if algorithm == "grid":
            next(space.points())  # raises for a continuous parameter
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # otherwise one line per trial
        self._study = optuna.create_study(
            directions=["maximize" if o.mode == "max" else "minimize" for o in objectives]
        )
        self._distributions: dict[str, BaseDistribution] = {}
        for parameter in space:
            self._distributions |= _distributions(parameter)
        known = self._known(finished)
        self._gaps = [number for number in range(max(known, default=-1)) if number not in known]
        self._count = max(known, default=-1) + 1
        for number in sorted(known):
            self._replay(*known[number])

    def next(self) -> Suggestion | None:
        """Return the next suggestion; None if the space is exhausted (see `end_reason`)."""
        # values: a warm start, else an untried point, else Optuna's
        number = self._gaps[0] if self._gaps else self._count
        origin = "suggested"
        if number < len(self._space.warm_starts):
            start = self._space.warm_starts[number]
            values, origin = self._space.read(start.values), f"warm: {start.name}"
        elif self._algorithm == "grid" or self._repeats >= MAX_REPEATS:
            unseen = self._unseen()
            if unseen is None:
                self.end_reason = "every point of the space has been tried"
                return None
            values = unseen
        else:
            values = self._draw(number)

        # the number is taken
        if self._gaps:
            del self._gaps[0]
        else:
            self._count += 1
        key = self._space.key(values)
        duplicate_of = self._record(number, key, values)
        return Suggestion(number, values, key, duplicate_of, origin)

    def tell(self, number: int, metrics: Mapping[str, float] | None) -> None:
        """Report the result of a trained suggestion, also for its duplicates.

        Args:
            metrics: None for a failed trial.

        Raises:
            ValueError: an objective is missing from the metrics.
        """
        if metrics is not None:
            for objective in self._objectives:
                if objective.metric not in metrics:
                    raise ValueError(
                        f"objectives: trials have no metric {objective.metric!r}; they have"
                        f" {', '.join(sorted(metrics))}"
                    )
        self._results[number] = metrics
        for equal in (number, *self._duplicates.pop(number, ())):
            self._tell(equal, metrics)

    def _known(
        self, finished: Sequence[FinishedTrial]
    ) -> dict[int, tuple[FinishedTrial, dict[str, Any]]]:
        """Return number -> (trial, values in the space's form).

        Leaves out duplicates of a missing trial, so that they are suggested again: that trial was
        still running when the search was interrupted.
        """
        known = {}
        for trial in sorted(finished, key=lambda trial: trial.status == "duplicate"):
            try:
                values = self._space.read(trial.values)
            except ValueError as error:
                raise ValueError(
                    f"trial {trial.number} of this run id belongs to another space ({error}); give"
                    " another --run-id"
                ) from error
            key = self._space.key(values)
            if trial.status != "duplicate":
                self._numbers[key] = trial.number
            if key in self._numbers:
                known[trial.number] = trial, values
        return known

    def _replay(self, trial: FinishedTrial, values: Values) -> None:
        """Repeat what `next` and `tell` did for a finished trial."""
        duplicate_of = self._record(trial.number, self._space.key(values), values)
        if duplicate_of is None:
            failed = trial.status == "failed" or not trial.metrics
            self.tell(trial.number, None if failed else trial.metrics)

    def _record(self, number: int, key: str, values: Values) -> int | None:
        """Enqueue a suggestion in the study; return the number of the trial it equals, or None."""
        sampler = self._study.sampler = self._sampler(number)
        self._study.enqueue_trial(_encode(self._space, values))
        self._trials[number] = self._study.ask(self._distributions)
        if isinstance(sampler, optuna.samplers.NSGAIISampler):
            # Optuna does this for its own samples only; an enqueued trial would have no generation.
            # The study stores the parents, and they come back in another order when read again.
            trial = self._study.get_trials(deepcopy=False)[-1]
            generation = sampler.get_trial_generation(self._study, trial)
            sampler.get_parent_population(self._study, generation)
        original = self._numbers.setdefault(key, number)
        if original == number:
            self._repeats = 0
            return None
        self._repeats += 1
        if original in self._results:
            self._tell(number, self._results[original])
        else:
            self._duplicates.setdefault(original, []).append(number)
        return original

    def _draw(self, number: int) -> dict[str, Any]:
        """Return Optuna's suggestion.

        `_record` enqueues the values again, as in a replay, so that the sampler sees both in the
        same form. The sampled trial itself is marked as failed.
        """
        self._study.sampler = self._sampler(number)
        trial = self._study.ask(self._distributions)
        self._study.tell(trial, state=TrialState.FAIL)
        return _decode(self._space, trial.params)

    def _tell(self, number: int, metrics: Mapping[str, float] | None) -> None:
        """Tell Optuna the result: one trial with the same values per operating point."""
        trial = self._trials.pop(number)
        points = [] if metrics is None else operating_points(metrics, self._objectives)
        self._points_each = max(self._points_each, len(points))
        values = [[point[o.metric] for o in self._objectives] for point in points]
        if not values or not np.isfinite(values).all():
            self._study.tell(trial, state=TrialState.FAIL)
            return
        self._study.tell(trial, values[0])
        completed = self._study.get_trials(deepcopy=False)[trial.number]
        self._study.add_trials(
            create_trial(
                params=completed.params,
                distributions=completed.distributions,
                values=point,
                system_attrs=completed.system_attrs,  # NSGA-II: the generation
            )
            for point in values[1:]
        )

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Return a new sampler for each number, so that a resumed search needs no sampler state."""
        [seed] = np.random.SeedSequence([self._seed, number]).generate_state(1).tolist()
        if self._algorithm == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        if self._algorithm == "nsga2":
            population = POPULATION * self._points_each
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=population)
        return optuna.samplers.RandomSampler(seed=seed)

    def _unseen(self) -> dict[str, Any] | None:
        """Return the next point of the space that has not been suggested; None: there is none."""
        for values in self._points:
            if self._space.key(values) not in self._numbers:
                return values
        return None


# --- Values of a space as Optuna's parameters ---


def _distributions(parameter: Parameter) -> dict[str, BaseDistribution]:
    """Return Optuna's parameters for one of a space: a choice by index, a subset as one boolean per
    item."""
    name = parameter.name
    match parameter:
        case Choice():
            return {name: CategoricalDistribution(tuple(range(len(parameter.values))))}
        case Integer():
            return {name: IntDistribution(parameter.low, parameter.high)}
        case Real():
            return {name: FloatDistribution(parameter.low, parameter.high, log=parameter.log)}
        case Subset():
            return {
                f"{name}/{item}": CategoricalDistribution((False, True)) for item in parameter.items
            }


def _encode(space: Space, values: Values) -> dict[str, Any]:
    """Return the values as Optuna's parameters."""
    encoded: dict[str, Any] = {}
    for parameter in space:
        value = values[parameter.name]
        match parameter:
            case Choice():
                encoded[parameter.name] = parameter.values.index(value)
            case Subset():
                encoded |= {f"{parameter.name}/{item}": item in value for item in parameter.items}
            case _:
                encoded[parameter.name] = value
    return encoded


def _decode(space: Space, encoded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of Optuna's parameters; the empty subset is read as the full one."""
    values: dict[str, Any] = {}
    for parameter in space:
        match parameter:
            case Choice():
                values[parameter.name] = parameter.values[encoded[parameter.name]]
            case Subset():
                items = parameter.items
                taken = tuple(item for item in items if encoded[f"{parameter.name}/{item}"])
                values[parameter.name] = taken or items
            case _:
                values[parameter.name] = encoded[parameter.name]
    return values


# --- Early stopping ---


def make_scheduler(
    recipe: SearchRecipe, every: int, steps: int, finished: Sequence[FinishedTrial]
) -> TrialScheduler:
    """Return the scheduler for Ray Tune that a recipe names.

    Args:
        every: steps between the evaluations of a trial.
        steps: steps of a trial.
        finished: trials of earlier processes in the order they finished; their curves are replayed.
    """
    config, [objective, *_] = recipe.scheduler, recipe.objectives
    if config.kind == "none":
        return FIFOScheduler()
    grace = min(config.grace * every, steps)
    measured_by = {"time_attr": "step", "metric": objective.metric, "mode": objective.mode}
    if config.kind == "median":
        # with a time slice, it would pause a trial for waiting ones, and a paused trial starts over
        rule = MedianStoppingRule(grace_period=grace, min_time_slice=math.inf, **measured_by)
    else:
        rule = AsyncHyperBandScheduler(
            grace_period=grace, max_t=steps, reduction_factor=config.reduction, **measured_by
        )
    for earlier in finished:
        trial = RayTrial("earlier", stub=True)
        rule.on_trial_add(None, trial)
        for point in earlier.curve:
            rule.on_trial_result(None, trial, dict(point))
    return rule

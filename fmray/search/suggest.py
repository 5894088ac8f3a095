"""Which values to try next: warm starts, then Optuna (TPE, NSGA-II, random) or a grid.

In: a `Space`, objectives and a seed; results as they are told. Out: `Suggestion`s, numbered.

A suggestion is a function of the seed, its number, and the results told before it: the same seed
gives the same first suggestions, and a search that is rebuilt from its finished trials goes on as
it would have. (With several trials at once, what is suggested after Optuna's first random ones
depends on which of them had ended.) A trial that equals an earlier one is numbered too, but not
trained: its result is the earlier one's.
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
from fmray.search.state import Finished

Algorithm = Literal["tpe", "nsga2", "random", "grid"]
POPULATION = 10  # trials, of NSGA-II; Optuna's 50 would be a search of some tens of trials whole
TRIES = 20  # suggestions in a row that equal earlier ones, then what is new is looked for


@dataclass(frozen=True)
class Suggestion:
    """number: from 0. key: `Space.key`. duplicate_of: the earlier trial that it equals, which makes
    training it needless. origin: `warm: NAME` or `suggested`."""

    number: int
    values: Values
    key: str
    duplicate_of: int | None
    origin: str


class Suggester:
    """Suggests trials, and learns from their results.

    Attributes: ended (why `next` gave None; None: it has not).
    """

    def __init__(
        self,
        space: Space,
        algorithm: Algorithm,
        objectives: Sequence[ObjectiveConfig],
        seed: int,
        finished: Sequence[Finished] = (),
    ) -> None:
        """Args:
            finished: trials of the same search so far; numbers they leave out are suggested first.

        Raises:
            ValueError: a space that cannot be searched, or not by this algorithm; or finished
                trials that are not of this space.
        """
        space.check()
        self.ended: str | None = None
        self._space, self._algorithm, self._seed = space, algorithm, seed
        self._objectives = tuple(objectives)
        self._numbers: dict[str, int] = {}  # of the first suggestion with a key
        self._trials: dict[int, Trial] = {}  # not yet told
        self._results: dict[int, Mapping[str, float] | None] = {}
        self._duplicates: dict[int, list[int]] = {}  # by the number they wait for
        self._repeats = 0
        self._points_each = 1  # operating points of a trial
        finite = not any(isinstance(parameter, Real) for parameter in space)
        self._points = space.points() if finite or algorithm == "grid" else iter(())
        if algorithm == "grid":
            next(space.points())  # a continuous parameter is refused here
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line for each trial otherwise
        self._study = optuna.create_study(
            directions=["maximize" if one.mode == "max" else "minimize" for one in objectives]
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
        """The next suggestion; None when there is nothing new to try (`ended` says why)."""
        number = self._gaps[0] if self._gaps else self._count
        origin = "suggested"
        if number < len(self._space.warm_starts):
            start = self._space.warm_starts[number]
            values, origin = self._space.read(start.values), f"warm: {start.name}"
        elif self._algorithm == "grid" or self._repeats >= TRIES:
            unseen = self._unseen()
            if unseen is None:
                self.ended = "there is nothing new to try in the space"
                return None
            values = unseen
        else:
            values = self._draw(number)
        if self._gaps:
            del self._gaps[0]
        else:
            self._count += 1
        key = self._space.key(values)
        duplicate_of = self._record(number, key, values)
        return Suggestion(number, values, key, duplicate_of, origin)

    def tell(self, number: int, metrics: Mapping[str, float] | None) -> None:
        """The result of a suggestion that was trained; None: it failed.

        Raises ValueError where an objective is not among the metrics.
        """
        if metrics is not None:
            for objective in self._objectives:
                if objective.metric not in metrics:
                    raise ValueError(
                        f"objectives: trials have no metric {objective.metric!r}; they have"
                        f" {', '.join(sorted(metrics))}"
                    )
        self._results[number] = metrics
        for waiting in (number, *self._duplicates.pop(number, ())):
            self._tell(waiting, metrics)

    def _known(self, finished: Sequence[Finished]) -> dict[int, tuple[Finished, dict[str, Any]]]:
        """By number, with their values. A duplicate of a trial that is not there counts as not
        suggested: that trial was still running when the search was interrupted."""
        known = {}
        for trial in sorted(finished, key=lambda trial: trial.status == "duplicate"):
            try:
                values = self._space.read(trial.values)
            except ValueError as error:
                raise ValueError(
                    f"trial {trial.number} of this run id is of another space ({error}); give"
                    " another --run-id"
                ) from error
            key = self._space.key(values)
            if trial.status != "duplicate":
                self._numbers[key] = trial.number
            if key in self._numbers:
                known[trial.number] = trial, values
        return known

    def _replay(self, trial: Finished, values: Values) -> None:
        duplicate_of = self._record(trial.number, self._space.key(values), values)
        if duplicate_of is None:
            failed = trial.status == "failed" or not trial.metrics
            self.tell(trial.number, None if failed else trial.metrics)

    def _record(self, number: int, key: str, values: Values) -> int | None:
        """Make the suggestion known to the sampler; the number of the trial it equals, if any."""
        sampler = self._study.sampler = self._sampler(number)
        self._study.enqueue_trial(_encode(self._space, values))
        self._trials[number] = self._study.ask(self._distributions)
        if isinstance(sampler, optuna.samplers.NSGAIISampler):
            # Optuna does this for what it draws; enqueued trials would be of no generation. The
            # parents are kept by the study, and their order is another when they are read again.
            trial = self._study.get_trials(deepcopy=False)[-1]
            generation = sampler.get_trial_generation(self._study, trial)
            sampler.get_parent_population(self._study, generation)
        first = self._numbers.setdefault(key, number)
        if first == number:
            self._repeats = 0
            return None
        self._repeats += 1
        if first in self._results:
            self._tell(number, self._results[first])
        else:
            self._duplicates.setdefault(first, []).append(number)
        return first

    def _draw(self, number: int) -> dict[str, Any]:
        """What Optuna suggests. It is enqueued again by `_record`, as it is in a replay: the
        sampler sees both in one form. The trial drawn is put aside as failed."""
        self._study.sampler = self._sampler(number)
        trial = self._study.ask(self._distributions)
        self._study.tell(trial, state=TrialState.FAIL)
        return _decode(self._space, trial.params)

    def _tell(self, number: int, metrics: Mapping[str, float] | None) -> None:
        """To the sampler, each operating point of a trial is a trial of the same values."""
        trial = self._trials.pop(number)
        points = [] if metrics is None else operating_points(metrics, self._objectives)
        self._points_each = max(self._points_each, len(points))
        values = [[point[o.metric] for o in self._objectives] for point in points]
        if not values or not np.isfinite(values).all():
            self._study.tell(trial, state=TrialState.FAIL)
            return
        self._study.tell(trial, values[0])
        told = self._study.get_trials(deepcopy=False)[trial.number]
        self._study.add_trials(
            create_trial(
                params=told.params,
                distributions=told.distributions,
                values=point,
                system_attrs=told.system_attrs,  # of NSGA-II: the generation
            )
            for point in values[1:]
        )

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """A new one for each number, so that a search that goes on needs no state of the last."""
        state = np.random.SeedSequence([self._seed, number]).generate_state(1)
        seed = int(state[0])
        if self._algorithm == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        if self._algorithm == "nsga2":
            population = POPULATION * self._points_each
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=population)
        return optuna.samplers.RandomSampler(seed=seed)

    def _unseen(self) -> dict[str, Any] | None:
        for values in self._points:
            if self._space.key(values) not in self._numbers:
                return values
        return None


def _distributions(parameter: Parameter) -> dict[str, BaseDistribution]:
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
    found: dict[str, Any] = {}
    for parameter in space:
        value = values[parameter.name]
        match parameter:
            case Choice():
                found[parameter.name] = parameter.values.index(value)
            case Subset():
                found |= {f"{parameter.name}/{item}": item in value for item in parameter.items}
            case _:
                found[parameter.name] = value
    return found


def _decode(space: Space, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Raises nothing: a subset without an item, which is none, is read as the one of all."""
    found: dict[str, Any] = {}
    for parameter in space:
        match parameter:
            case Choice():
                found[parameter.name] = parameter.values[drawn[parameter.name]]
            case Subset():
                items = parameter.items
                taken = tuple(item for item in items if drawn[f"{parameter.name}/{item}"])
                found[parameter.name] = taken or items
            case _:
                found[parameter.name] = drawn[parameter.name]
    return found


# Which trials are stopped early: Ray's ASHA or median rule, with a memory of earlier trials.
#
# In: a search's `scheduler` section, the evaluations of a trial, and the trials that ended before
# this process began. Out: a scheduler for Ray Tune. Ray's own know only what they saw themselves,
# so a search that goes on would be lenient again with every restart.


def make_scheduler(
    recipe: SearchRecipe, every: int, steps: int, finished: Sequence[Finished]
) -> TrialScheduler:
    """The scheduler that a recipe names.

    Args:
        every, steps: of a trial's evaluations, in the base recipe.
        finished: in the order they ended; their curves count as if they had just been seen.
    """
    config, [objective, *_] = recipe.scheduler, recipe.objectives
    if config.kind == "none":
        return FIFOScheduler()
    grace = min(config.grace * every, steps)
    judged = {"time_attr": "step", "metric": objective.metric, "mode": objective.mode}
    if config.kind == "median":
        # it would pause a trial for others that wait, and a paused one begins again
        rule = MedianStoppingRule(grace_period=grace, min_time_slice=math.inf, **judged)
    else:
        rule = AsyncHyperBandScheduler(
            grace_period=grace, max_t=steps, reduction_factor=config.reduction, **judged
        )
    for earlier in finished:
        trial = RayTrial("earlier", stub=True)
        rule.on_trial_add(None, trial)
        for point in earlier.curve:
            rule.on_trial_result(None, trial, dict(point))
    return rule

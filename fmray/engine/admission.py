"""Admission: the limits of each request on arrival, and estimates of its work.

`Admission` turns an `Ask` into a `RequestState`, or refuses it. `Estimates` predicts answer lengths
and image work from earlier requests, for the forecasts.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fmray.engine.calibration import image_values
from fmray.engine.controller import LoadTarget
from fmray.engine.fairness import Limits
from fmray.engine.forecast import Forecast, Work
from fmray.engine.policy import Ask, Budgets, DeadlineImpossible
from fmray.engine.requests import Milestone, Request

MAX_IMAGES = 256  # image keys that are remembered as cached
LEARNING_RATE = 0.02  # smallest weight of the latest answer's length


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of the policy.

    Raises:
        ValueError: a setting is out of range.
    """

    p95_seconds: float = 2.0  #: target of the load controller
    p95_of: Milestone = "first_token"
    #: smallest budget of `auto` (the always-on layers, if they need more)
    floor: str = "0.5"
    max_queue: int = 256  #: most requests that wait
    shed: bool = True  #: refuse requests that would be late even at the floor
    controller: bool = True  #: False: `auto` is the full budget
    #: deadlines are planned with predictions longer by this factor, until measured outcomes tell
    #: the necessary headroom
    margin: float = 1.1

    def __post_init__(self) -> None:
        LoadTarget(self.p95_seconds, self.p95_of)
        if self.max_queue < 1:
            raise ValueError(f"max_queue must be at least 1, not {self.max_queue!r}")
        if not 1 <= self.margin < 10:
            raise ValueError(f"margin must be in [1, 10), not {self.margin!r}")


@dataclass(eq=False)
class RequestState:
    """An ask from `submit` to its last event. Times are of the dispatcher's clock."""

    ask: Ask
    submitted_at: float
    max_units: int  #: most units that the caller's key and the KV memory allow
    units_on: int | None  #: None until it is decided
    operations: float = 0.0  #: charged to the caller's rate limit; 0 without one
    pixels: int = 0  #: values of `pixel_values`
    min_seconds: float = 0.0  #: time when alone with no unit on (strict deadlines only)
    charged_seconds: float = 0.0  #: machine time charged in the fair queue
    admitted_at: float = math.nan
    forecast_seconds: float = math.nan  #: from admission to `predicted_of`, by the forecast
    predicted_seconds: float = math.nan  #: the same, corrected, as the decision states it
    predicted_of: Milestone = "first_token"
    first_token_at: float | None = None
    tokens: int = 0  #: generated so far


# --- Estimates ------------------------------------------------------------------------------


class Estimates:
    """Expected work of requests, learned from the finished ones."""

    def __init__(self, forecast: Forecast) -> None:
        self.forecast = forecast
        self._image_keys: OrderedDict[str, None] = OrderedDict()
        self._length_ratio = 1.0  # answer length / max_new_tokens
        self._answers = 3  # prior: so many answers of full length

    def prefilled(self, image_key: str | None) -> None:
        """Record a prefill: the features of its image are cached now."""
        if image_key is None:
            return
        self._image_keys[image_key] = None
        self._image_keys.move_to_end(image_key)
        if len(self._image_keys) > MAX_IMAGES:
            self._image_keys.popitem(last=False)

    def answered(self, state: RequestState) -> None:
        """Record the length of a complete answer."""
        self._answers += 1
        ratio = min(1.0, state.tokens / state.ask.sampling.max_new_tokens)
        self._length_ratio += max(LEARNING_RATE, 1 / self._answers) * (ratio - self._length_ratio)

    def pixels(self, state: RequestState) -> int:
        """Image values that the prefill reads; 0 if the image was used recently."""
        return 0 if state.ask.image_key in self._image_keys else state.pixels

    def new_tokens(self, state: RequestState) -> float:
        """Expected answer length."""
        return max(1.0, self._length_ratio * state.ask.sampling.max_new_tokens)

    def waiting(self, state: RequestState, now: float | None = None) -> Work:
        """Expected work of a waiting request; now: to state its age."""
        return Work(
            context=state.ask.prompt_tokens,
            remaining=self.new_tokens(state),
            units_on=state.units_on,
            pixels=self.pixels(state),
            max_units=state.max_units,
            age=0.0 if now is None else now - state.submitted_at,
        )

    def running(self, state: RequestState) -> Work:
        """Expected work of a request that the engine holds."""
        most = state.ask.sampling.max_new_tokens - state.tokens
        return Work(
            context=state.ask.prompt_tokens + max(0, state.tokens - 1),
            remaining=max(self.new_tokens(state) - state.tokens, 0.1 * most, 1.0),
            units_on=state.units_on,
            prefilled=state.first_token_at is not None,
        )

    def min_seconds(self, state: RequestState) -> float:
        """Seconds to the deadline's milestone when alone with no unit on."""
        ask = state.ask
        alone = Work(ask.prompt_tokens, ask.sampling.max_new_tokens, 0, self.pixels(state))
        return float(self.forecast.play([], [alone], np.zeros(1), ask.deadline_of)[0, 0])

    def machine_seconds(self, state: RequestState, new_tokens: float) -> float:
        """Machine time of an answer of `new_tokens` with the request's units."""
        rows, tokens = self.forecast.max_rows, state.ask.prompt_tokens
        pixels = self.pixels(state)
        return float(self.forecast.cost.answer(tokens, state.units_on, new_tokens, rows, pixels))


# --- Admission ------------------------------------------------------------------------------


class MemoryCheck(Protocol):
    """The part of the engine that admission needs."""

    def fits(self, request: Request) -> bool: ...


class Admission:
    """Checks requests on arrival."""

    def __init__(
        self, engine: MemoryCheck, budgets: Budgets, limits: Limits, estimates: Estimates
    ) -> None:
        self.engine, self.budgets = engine, budgets
        self.limits, self.estimates = limits, estimates

    def admit(self, ask: Ask, submitted_at: float) -> RequestState:
        """Compute the most units that an ask may have, and the units it asks for.

        Raises:
            ValueError: the ask can never run: its plan or budget is not allowed, or its keys and
                values do not fit into the memory.
        """
        tokens, num_units = ask.prompt_tokens, self.budgets.num_units

        # Units allowed by the caller's key, and units fixed by the ask's budget or plan.
        max_budget = self.limits.of(ask.caller).max_budget
        max_units = num_units
        if max_budget is not None:
            max_units = self.budgets.max_units_or_zero(max_budget, tokens)
        units_on = None
        if ask.budget is not None:
            units_on = min(max_units, self.budgets.max_units(ask.budget, tokens))
        if ask.plan is not None:
            allowed = max_units if units_on is None else units_on
            units_on = self._plan_units(ask, allowed)

        # Lower the maximum until the keys and values fit; a fixed number must fit as it is.
        state = RequestState(
            ask, submitted_at, max_units, units_on, pixels=image_values(ask.inputs)
        )
        most = max_units if units_on is None else units_on
        while not self.engine.fits(ask.request(most)):
            if units_on is not None or most == 0:
                raise ValueError(
                    f"{tokens} prompt tokens and {ask.sampling.max_new_tokens} new tokens do not "
                    "fit into the KV memory"
                )
            most -= 1
        state.max_units = min(max_units, most)
        if self.limits.counts_operations(ask.caller):
            new_tokens = ask.sampling.max_new_tokens
            state.operations = self.budgets.operations(tokens, new_tokens, most)
        return state

    def _plan_units(self, ask: Ask, max_units: int) -> int:
        """Units of the ask's plan; ValueError if it has the wrong size or too many."""
        assert ask.plan is not None
        num_units = self.budgets.num_units
        if tuple(ask.plan.shape) != (num_units,):
            raise ValueError(f"plan must be bool [{num_units}], not {list(ask.plan.shape)}")
        units_on = int(ask.plan.sum())
        if units_on > max_units:
            raise ValueError(
                f"the plan has {units_on} units on; the budget of the request or of its key allows "
                f"{max_units}"
            )
        return units_on

    def check_deadline(self, state: RequestState, now: float) -> None:
        """Refuse a strict deadline that is too short even alone with no unit on.

        Raises:
            DeadlineImpossible: it is.
        """
        ask = state.ask
        if ask.deadline_ms is None or not ask.strict:
            return
        state.min_seconds = self.estimates.min_seconds(state)
        left = ask.deadline_ms - (now - state.submitted_at) * 1000
        if state.min_seconds * 1000 > left:
            raise DeadlineImpossible(
                f"the deadline of {ask.deadline_ms:.0f} ms to the {_name(ask.deadline_of)} is too "
                f"short: {max(0.0, left):.0f} ms are left, and at least "
                f"{state.min_seconds * 1000:.0f} ms are needed"
            )


def deadline_lost(state: RequestState) -> DeadlineImpossible:
    """The refusal of a strict deadline that expired in the queue."""
    ask = state.ask
    return DeadlineImpossible(
        f"the deadline of {ask.deadline_ms:.0f} ms to the {_name(ask.deadline_of)} can no longer "
        "be met: the request waited too long for other requests"
    )


def _name(milestone: Milestone) -> str:
    return milestone.replace("_", " ")

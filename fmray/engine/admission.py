"""What is looked at before a request may wait: can it ever be run, and what may it have at most.

In: an `Ask`, the caller's limits, the engine's memory. Out: an `Entry`; ValueError for what can
never be run, `DeadlineImpossible` for a strict deadline that certainly cannot be kept. Also
`WorkerSettings`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fmray.engine.calibration import picture_values
from fmray.engine.controller import LoadTarget
from fmray.engine.fairness import Limits
from fmray.engine.forecast import Forecast, Moment, Row, Waiting
from fmray.engine.policy import Ask, Budgets, DeadlineImpossible
from fmray.engine.requests import Request

# One request as the forecasts see it: how long its prompt, its answer and its turn will be.
#
# In: an `Entry` (an ask under way) and what answers and pictures have been like. Out: `Waiting`,
# `Row`, `Request`, seconds.

PICTURES = 256  # remembered as seen
LEARNING = 0.02  # weight of the latest answer's length, once many are known


@dataclass(eq=False)
class Entry:
    """One ask from `submit` to its end; times on the dispatcher's clock.

    cap: the most switches that its key and the memory allow; fixed: what it asked for, None if it
    is to be decided; units: decided. operations: counted against its key, 0 where they are not.
    pixels: picture values. least: seconds that it takes alone (strict deadlines); seconds: of the
    machine that its caller was charged. forecast, told: seconds from admission to `told_of`, as the
    forecast has them and as the decision said. first: when its first token came; tokens: so far.
    """

    ask: Ask
    submitted: float
    cap: int
    fixed: int | None
    operations: float
    pixels: int = 0
    units: int = 0
    least: float = 0.0
    seconds: float = 0.0
    admitted: float = math.nan
    forecast: float = math.nan
    told: float = math.nan
    told_of: Moment = "first_token"
    first: float | None = None
    tokens: int = 0


class Estimates:
    """What is expected of requests; learns from those that were answered."""

    def __init__(self, forecast: Forecast) -> None:
        self.forecast = forecast
        self._pictures: OrderedDict[str, None] = OrderedDict()
        self._length_ratio = 1.0  # of max_new_tokens that answers use
        self._answers = 3  # as if so many had used all

    def saw(self, image_key: str | None) -> None:
        """A prefill with this picture is done: its features are at hand for the next."""
        if image_key is None:
            return
        self._pictures[image_key] = None
        self._pictures.move_to_end(image_key)
        if len(self._pictures) > PICTURES:
            self._pictures.popitem(last=False)

    def answered(self, entry: Entry) -> None:
        """A request got its whole answer: so long do they become."""
        self._answers += 1
        used = min(1.0, entry.tokens / entry.ask.sampling.max_new_tokens)
        self._length_ratio += max(LEARNING, 1 / self._answers) * (used - self._length_ratio)

    def pixels(self, entry: Entry) -> int:
        """Picture values that its prefill will read: none if the picture was seen of late."""
        return 0 if entry.ask.image_key in self._pictures else entry.pixels

    def expected(self, entry: Entry) -> float:
        """Tokens its answer will have, by what answers have had."""
        return max(1.0, self._length_ratio * entry.ask.sampling.max_new_tokens)

    def waiting(self, entry: Entry, new_tokens: float | None = None) -> Waiting:
        """A request that is not admitted; new_tokens: of its answer, default as expected."""
        new_tokens = self.expected(entry) if new_tokens is None else new_tokens
        tokens = entry.ask.prompt_tokens
        return Waiting(tokens, new_tokens, entry.fixed, self.pixels(entry), entry.cap)

    def row(self, entry: Entry) -> Row:
        """A request that the engine holds."""
        most = entry.ask.sampling.max_new_tokens - entry.tokens
        remaining = max(self.expected(entry) - entry.tokens, 0.1 * most, 1.0)
        context = entry.ask.prompt_tokens + max(0, entry.tokens - 1)
        return Row(entry.units, context, remaining, entry.first is not None)

    def least(self, entry: Entry) -> float:
        """Seconds to the moment it asks for, alone and with no switch on."""
        ask = entry.ask
        alone = Waiting(ask.prompt_tokens, ask.sampling.max_new_tokens, 0, self.pixels(entry))
        return float(self.forecast.play([], [alone], np.zeros(1), ask.deadline_of)[0, 0])

    def seconds(self, entry: Entry, new_tokens: float) -> float:
        """Of the machine, for an answer of `new_tokens` with the switches that it was given."""
        rows = self.forecast.max_rows
        tokens, pixels = entry.ask.prompt_tokens, self.pixels(entry)
        return float(self.forecast.cost.answer(tokens, entry.units, new_tokens, rows, pixels))

    @staticmethod
    def request(entry: Entry, units_on: int) -> Request:
        """What the engine is given."""
        ask = entry.ask
        return Request(ask.id, ask.inputs, ask.image_key, units_on, ask.plan, ask.sampling)


@dataclass(frozen=True)
class WorkerSettings:
    """p95_seconds, p95_of: what `auto` holds. floor: the least budget it may have (the layers that
    always run, if that is more). max_queue: requests that may wait. shed: refuse what would come
    too late even at the floor. controller: False gives `auto` the full budget. margin: deadlines
    are planned with predictions this much longer, until enough outcomes tell how much is needed.
    """

    p95_seconds: float = 2.0
    p95_of: Moment = "first_token"
    floor: str = "0.5"
    max_queue: int = 256
    shed: bool = True
    controller: bool = True
    margin: float = 1.1

    def __post_init__(self) -> None:
        LoadTarget(self.p95_seconds, self.p95_of)
        if not isinstance(self.max_queue, int) or self.max_queue < 1:
            raise ValueError(f"max_queue is {self.max_queue!r}; a whole number from 1 is needed")
        if not 1 <= self.margin < 10:
            raise ValueError(f"margin is {self.margin!r}; a factor from 1 is needed")


class Memory(Protocol):
    """Of the engine's doors, the one that is asked here."""

    def fits(self, request: Request) -> bool: ...


class Intake:
    """See the module's text."""

    def __init__(
        self, engine: Memory, budgets: Budgets, limits: Limits, estimates: Estimates
    ) -> None:
        self.engine, self.budgets = engine, budgets
        self.limits, self.estimates = limits, estimates

    def entry(self, ask: Ask, submitted: float) -> Entry:
        """The ask with what it may have at most; ValueError if it can never be run."""
        tokens, units = ask.prompt_tokens, self.budgets.num_units
        limit = self.limits.of(ask.caller).max_budget
        cap = units if limit is None else self.budgets.units_within(limit, tokens)
        fixed = None
        if ask.budget is not None:
            fixed = min(cap, self.budgets.units(ask.budget, tokens))
        if ask.plan is not None:
            if tuple(ask.plan.shape) != (units,):
                raise ValueError(f"plan must be bool [{units}], not {list(ask.plan.shape)}")
            used = int(ask.plan.sum())
            if used > (cap if fixed is None else fixed):
                raise ValueError(
                    f"the plan has {used} switches on; {cap if fixed is None else fixed} are "
                    "allowed by the budget of the request or of its key"
                )
            fixed = used
        entry = Entry(ask, submitted, cap, fixed, 0.0, pixels=picture_values(ask.inputs))
        most = cap if fixed is None else fixed
        while not self.engine.fits(self.estimates.request(entry, most)):
            if fixed is not None or most == 0:
                raise ValueError(
                    f"{tokens} prompt tokens and {ask.sampling.max_new_tokens} new ones do not fit "
                    "into the memory for keys and values"
                )
            most -= 1
        entry.cap = min(cap, most)
        if self.limits.counts_operations(ask.caller):
            new_tokens = ask.sampling.max_new_tokens
            entry.operations = self.budgets.operations(tokens, new_tokens, most)
        return entry

    def check_deadline(self, entry: Entry, now: float) -> None:
        """What is certain at once: no switch on, nobody else there, and still too late."""
        ask = entry.ask
        if ask.deadline_ms is None or not ask.strict:
            return
        entry.least = self.estimates.least(entry)
        left = ask.deadline_ms - (now - entry.submitted) * 1000
        if entry.least * 1000 > left:
            raise DeadlineImpossible(
                f"{ask.deadline_ms:.0f} ms to the {ask.deadline_of.replace('_', ' ')} cannot be "
                f"kept; {max(0.0, left):.0f} ms are left, and {entry.least * 1000:.0f} ms is the "
                "least"
            )

    @staticmethod
    def impossible(entry: Entry) -> DeadlineImpossible:
        """A strict deadline that was lost in the queue."""
        return DeadlineImpossible(
            f"{entry.ask.deadline_ms:.0f} ms to the {entry.ask.deadline_of.replace('_', ' ')} "
            "cannot be kept now; others were first"
        )

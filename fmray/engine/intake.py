"""What is looked at before a request may wait: can it ever be run, and what may it have at most.

In: an `Ask`, the caller's limits, the engine's memory. Out: an `Entry`; ValueError for what can
never be run, `DeadlineImpossible` for a strict deadline that certainly cannot be kept. Also
`WorkerSettings`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fmray.engine.calibration import picture_values
from fmray.engine.controller import LoadTarget
from fmray.engine.estimates import Entry, Estimates
from fmray.engine.fairness import Limits
from fmray.engine.forecast import Moment
from fmray.engine.policy import Ask, Budgets, DeadlineImpossible
from fmray.engine.requests import Request


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

"""Number of units a request gets: from its budget, or the largest that meets its deadline.

Pure functions and values: no clock, no thread, no model; times are arguments.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

from torch import Tensor

from fmray.adallava.cost import CostModel, exact_number
from fmray.engine.requests import Milestone, Request, Sampling, check_input_ids

MAX_DEADLINE_MS = 24 * 3600 * 1000.0

# --- Refusals -------------------------------------------------------------------------------


class Refused(Exception):
    """The request gets no answer now. `str()` may be shown to the caller."""

    status = 503  #: HTTP status
    code = "refused"  #: one word, also a metric label

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        """retry_after: seconds, where a retry may succeed."""
        super().__init__(message)
        self.retry_after = retry_after


class Shed(Refused):
    """The engine is overloaded."""

    status, code = 429, "overloaded"


class RateLimited(Refused):
    """The caller exceeds its rate limit."""

    status, code = 429, "rate_limited"


class DeadlineImpossible(Refused):
    """No number of units meets a strict deadline."""

    status, code = 503, "deadline_impossible"


class Unavailable(Refused):
    """The engine is draining, closed, or has failed."""

    status, code = 503, "unavailable"


# --- Requests of callers --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Ask:
    """A caller's request before its number of units is decided.

    Compute comes from a budget, a deadline, or a plan (with or without a budget that the plan must
    keep). With none of them the load decides (`auto`).

    Raises:
        ValueError: the fields contradict each other, or a value is out of range.
    """

    id: str
    caller: str  #: name of the caller's key
    inputs: dict[str, Tensor]  #: as in `Request`
    image_key: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    budget: str | None = None  #: decimal text in (0, 1]
    deadline_ms: float | None = None  #: from `submit` to `deadline_of`
    #: an answer counts with all of its max_new_tokens
    deadline_of: Milestone = "first_token"
    strict: bool = False  #: refuse the request rather than answer it late
    plan: Tensor | None = None  #: bool [K]

    def __post_init__(self) -> None:
        check_input_ids(self.inputs)
        if self.deadline_of not in ("first_token", "answer"):
            raise ValueError(
                f"deadline_of must be 'first_token' or 'answer', not {self.deadline_of!r}"
            )
        if self.budget is not None and not 0 < exact_number(self.budget, "budget") <= 1:
            raise ValueError(f"budget must be in (0, 1], not {str(self.budget)[:64]}")
        if self.deadline_ms is None:
            if self.strict:
                raise ValueError("strict needs a deadline_ms")
            return
        if self.budget is not None:
            raise ValueError("budget and deadline_ms exclude each other; give one")
        if self.plan is not None:
            raise ValueError("plan and deadline_ms exclude each other; give one")
        if not 0 < self.deadline_ms <= MAX_DEADLINE_MS:
            raise ValueError(
                f"deadline_ms must be in (0, {MAX_DEADLINE_MS:.0f}], not {self.deadline_ms}"
            )

    @property
    def auto(self) -> bool:
        """Whether the load decides on the number of units."""
        return self.budget is None and self.deadline_ms is None and self.plan is None

    @property
    def prompt_tokens(self) -> int:
        """Prompt length, with image tokens."""
        return self.inputs["input_ids"].shape[1]

    def request(self, units_on: int) -> Request:
        """The engine's request for this ask with `units_on` units."""
        return Request(self.id, self.inputs, self.image_key, units_on, self.plan, self.sampling)


@dataclass(frozen=True)
class Decision:
    """Compute of an admitted request, and its predicted time."""

    request: str
    budget: str  #: exact decimal that allows `units_on` units for this prompt
    units_on: int
    predicted_ms: float  #: from `submit` to `predicted_of`, the wait included
    predicted_of: Milestone
    deadline_met: bool | None  #: whether the prediction meets the deadline; None without one
    waited_ms: float  #: in the queue


# --- Budgets and deadlines ------------------------------------------------------------------


class Budgets:
    """Conversion between budgets and numbers of units for one model."""

    def __init__(self, cost: CostModel, extra: int = 0) -> None:
        """extra: latency tokens that stay in the prompt."""
        self.cost = cost
        self.extra = extra
        self.num_units = cost.layout.num_units

    @classmethod
    def of(cls, model: Any) -> Budgets:
        """The budgets of an `AdaptiveVLM`; they agree with its `units_for`."""
        return cls(model.cost, int(model.latency_token == "inline"))

    def max_units(self, budget: str | float | Fraction, tokens: int) -> int:
        """Most units on that keep the budget; raises as `CostModel.max_units`."""
        return self.cost.max_units(budget, tokens + self.extra)

    def max_units_or_zero(self, budget: str | float | Fraction, tokens: int) -> int:
        """Like `max_units`, but 0 for a budget below the always-on layers."""
        if exact_number(budget, "budget") < exact_number(self.min_budget(tokens), "budget"):
            return 0
        return self.max_units(budget, tokens)

    def share(self, units_on: int, tokens: int) -> float:
        """Share of the decoder's operations on the prompt."""
        return _share(self.cost, tokens + self.extra, units_on)

    def budget(self, units_on: int, tokens: int) -> str:
        """The smallest decimal budget that allows `units_on` units."""
        return str(self.share(units_on, tokens))

    def min_budget(self, tokens: int) -> str:
        """The budget of the always-on layers."""
        return str(self.cost.min_budget(tokens + self.extra))

    def operations(self, tokens: int, new_tokens: int, units_on: int) -> float:
        """Operations of a complete answer: the prefill, and decoding at the mean context."""
        prompt = tokens + self.extra
        step = self.cost.decode(prompt + (new_tokens + 1) // 2, units_on)
        return float(self.cost.prefill(prompt, units_on) + (new_tokens - 1) * step)


@lru_cache(maxsize=8192)
def _share(cost: CostModel, tokens: int, units_on: int) -> float:
    # Exact fractions take half a millisecond, and many prompts have the same length.
    return cost.share(tokens, units_on)


def largest_within(seconds: Sequence[float], limit: float) -> tuple[int, bool]:
    """The largest number of units whose predicted time is within `limit`.

    Args:
        seconds: predicted times with 0, 1, ... units on, non-decreasing.
        limit: seconds left until the deadline.

    Returns:
        The number of units and True; 0 and False if no number of units is fast enough.
    """
    units_on = bisect_right(seconds, limit) - 1
    return (units_on, True) if units_on >= 0 else (0, False)

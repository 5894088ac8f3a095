"""What a request may have: its budget as written, or the largest that makes its deadline.

In: an `Ask` and a forecast. Out: a `Decision`, or a `Refused`. Pure: no clock, no thread, no model;
times come in as numbers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

from torch import Tensor

from fmray.adallava.cost import CostModel, exact_number
from fmray.engine.forecast import Moment
from fmray.engine.requests import Sampling

LONGEST_DEADLINE_MS = 24 * 3600 * 1000.0


class Refused(Exception):
    """No answer for this caller now. `str()` may be shown to the caller.

    status: of HTTP. code: one word. retry_after: seconds, where waiting may help.
    """

    status = 503
    code = "refused"

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Shed(Refused):
    """Too much is asked of the engine now."""

    status, code = 429, "overloaded"


class RateLimited(Refused):
    """Too much is asked by this caller."""

    status, code = 429, "rate_limited"


class DeadlineImpossible(Refused):
    """No budget makes a strict deadline."""

    status, code = 503, "deadline_impossible"


class Unavailable(Refused):
    """The engine drains, is closed, or has failed."""

    status, code = 503, "unavailable"


@dataclass(frozen=True, eq=False)
class Ask:
    """What a caller wants: inputs, image_key and sampling as in `Request`, and how much compute.

    caller: the name of its key. budget: decimal text in (0, 1]; or deadline_ms, from `submit` to
    the first token or the whole answer (of max_new_tokens), and with strict no answer rather than a
    late one; or plan [K], with a budget that it must keep or without; or nothing: `auto`. Raises
    ValueError for what contradicts itself.
    """

    id: str
    caller: str
    inputs: dict[str, Tensor]
    image_key: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    budget: str | None = None
    deadline_ms: float | None = None
    deadline_of: Moment = "first_token"
    strict: bool = False
    plan: Tensor | None = None

    def __post_init__(self) -> None:
        ids = self.inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
            raise ValueError("input_ids must be [1, n], one row of at least one token")
        if self.deadline_of not in ("first_token", "answer"):
            raise ValueError(
                f"deadline_of is {self.deadline_of!r}; 'first_token' or 'answer' is needed"
            )
        if self.budget is not None:
            exact = exact_number(self.budget, "budget")
            if not 0 < exact <= 1:
                raise ValueError(f"budget is {str(self.budget)[:64]}; a number in (0, 1] is needed")
        if self.deadline_ms is None:
            if self.strict:
                raise ValueError("strict is of deadlines, and there is no deadline_ms")
            return
        if self.budget is not None:
            raise ValueError("budget and deadline_ms exclude each other; give one")
        if self.plan is not None:
            raise ValueError("plan and deadline_ms exclude each other; give one")
        ms = self.deadline_ms
        if isinstance(ms, bool) or not isinstance(ms, int | float) or not math.isfinite(ms):
            raise ValueError(f"deadline_ms is {ms!r}; a number of milliseconds is needed")
        if not 0 < ms <= LONGEST_DEADLINE_MS:
            raise ValueError(f"deadline_ms is {ms}; from above 0 to {LONGEST_DEADLINE_MS:.0f}")

    @property
    def auto(self) -> bool:
        """Whether the load decides."""
        return self.budget is None and self.deadline_ms is None and self.plan is None

    @property
    def prompt_tokens(self) -> int:
        """n, image tokens included."""
        return self.inputs["input_ids"].shape[1]


@dataclass(frozen=True)
class Decision:
    """What an admitted ask was given.

    budget: exact decimal that allows `units_on` switches at this prompt. predicted_ms: from
    `submit`, the wait included, to `predicted_of`. deadline_met: whether that keeps the deadline;
    None without one. waited_ms: in the queue.
    """

    request: str
    budget: str
    units_on: int
    predicted_ms: float
    predicted_of: Moment
    deadline_met: bool | None
    waited_ms: float


class Budgets:
    """Budgets and numbers of switches of one model; `extra` latency tokens stay in the prompt."""

    def __init__(self, cost: CostModel, extra: int = 0) -> None:
        self.cost = cost
        self.extra = extra
        self.num_units = cost.layout.num_units

    @classmethod
    def of(cls, model: Any) -> Budgets:
        """Those of an `AdaptiveVLM`: equal to its `units_for`."""
        return cls(model.cost, int(model.latency_token == "inline"))

    def units(self, budget: str | float | Fraction, tokens: int) -> int:
        """Switches that a budget allows a prompt of `tokens`; errors as `max_units`"""
        return self.cost.max_units(budget, tokens + self.extra)

    def units_within(self, budget: str | float | Fraction, tokens: int) -> int:
        """The same, and 0 where the budget is below the layers that always run."""
        if exact_number(budget, "budget") < exact_number(self.smallest(tokens), "budget"):
            return 0
        return self.units(budget, tokens)

    def share(self, units_on: int, tokens: int) -> float:
        """Of the decoder's operations."""
        return _share(self.cost, tokens + self.extra, units_on)

    def budget(self, units_on: int, tokens: int) -> str:
        """The smallest decimal that allows `units_on` switches."""
        return str(self.share(units_on, tokens))

    def smallest(self, tokens: int) -> str:
        """The share of the layers that always run."""
        return str(self.cost.min_budget(tokens + self.extra))

    def operations(self, tokens: int, new_tokens: int, units_on: int) -> float:
        """Of a whole answer: prefill, and decoding at the mean context."""
        prompt = tokens + self.extra
        step = self.cost.decode(prompt + (new_tokens + 1) // 2, units_on)
        return float(self.cost.prefill(prompt, units_on) + (new_tokens - 1) * step)


@lru_cache(maxsize=8192)
def _share(cost: CostModel, tokens: int, units_on: int) -> float:
    """Exact fractions take half a millisecond, and prompts are often of one length."""
    return cost.share(tokens, units_on)


def largest_within(seconds: Sequence[float], allowed: float) -> tuple[int, bool]:
    """The deadline rule. seconds [k]: predicted with 0, 1, ... switches, never falling; allowed:
    what is left of the deadline. The largest number of switches that makes it, and True; else 0 and
    False."""
    units = bisect_right(seconds, allowed) - 1
    return (units, True) if units >= 0 else (0, False)

"""Fairness between callers: start-time fair queueing, rate limits and budget limits.

`FairQueue` implements Goyal, Vin and Cheng (1996), with predicted machine seconds as costs;
`Limits` has one set of token buckets per caller. No clock: the time is an argument.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fmray.adallava.cost import exact_number
from fmray.engine.policy import RateLimited

Item = TypeVar("Item", bound=Hashable)


@dataclass
class _Flow(Generic[Item]):
    """The waiting requests of one caller."""

    weight: float
    items: deque[Item] = field(default_factory=deque)
    start: float = 0.0  #: virtual start time of the first item
    finish: float = 0.0  #: virtual end of the item served last
    arrival: int = 0  #: arrival number of the first item, to break ties


class FairQueue(Generic[Item]):
    """First come first served within a caller; between callers, machine time by weight.

    While two callers f and g both have waiting requests, their served seconds, divided by their
    weights, differ by at most cost_f / weight_f + cost_g / weight_g (with the largest costs). An
    absence gives a caller no credit. `next` returns the due request, `serve` removes it and charges
    its cost, so the cost may be decided at the last moment. Not thread-safe.
    """

    def __init__(self) -> None:
        self._flows: dict[str, _Flow[Item]] = {}
        self._caller: dict[Item, str] = {}
        self._now = 0.0  # virtual time: start of the item served last
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._caller)

    def push(self, item: Item, caller: str, weight: float = 1.0) -> None:
        """Append `item` to the caller's requests; weight: the caller's share from now on."""
        if not 0 < weight < math.inf:
            raise ValueError(f"weight must be a positive number, not {weight!r}")
        if item in self._caller:
            raise ValueError(f"{item!r} is already in the queue")
        flow = self._flows.setdefault(caller, _Flow(weight))
        flow.weight = weight
        self._arrivals += 1
        if not flow.items:
            flow.start = max(self._now, flow.finish)
            flow.arrival = self._arrivals
        flow.items.append(item)
        self._caller[item] = caller

    def next(self, skip: Container[str] = ()) -> Item | None:
        """Return the due item; None if there is none.

        It belongs to the caller with the smallest start, at a tie to the earlier arrival.

        Args:
            skip: Callers whose turn it is not.
        """
        flow = self._due(skip)
        return flow.items[0] if flow else None

    def serve(self, cost: float, skip: Container[str] = ()) -> Item:
        """Remove and return the due item, and charge `cost` predicted seconds for it."""
        if not 0 <= cost < math.inf:
            raise ValueError(f"cost must be a number of seconds, not {cost!r}")
        flow = self._due(skip)
        assert flow is not None, "the queue is empty"
        item = flow.items.popleft()
        del self._caller[item]
        self._now = max(self._now, flow.start)
        flow.finish = flow.start + cost / flow.weight
        flow.start = flow.finish
        self._forget_idle()
        return item

    def settle(self, caller: str, difference: float) -> None:
        """Correct the charge of a served item by `difference` seconds, positive or negative."""
        flow = self._flows.get(caller)
        if flow is None:
            return
        flow.finish += difference / flow.weight
        if flow.items:
            # Never before virtual time: a refund cannot be saved up.
            flow.start = max(self._now, flow.start + difference / flow.weight)

    def remove(self, item: Item) -> bool:
        """Remove `item` without a charge; returns False if it is not in the queue."""
        caller = self._caller.pop(item, None)
        if caller is None:
            return False
        self._flows[caller].items.remove(item)
        self._forget_idle()
        return True

    def order(self, cost: float = 1.0) -> list[Item]:
        """Return all items in the order in which they would be served if each cost `cost`."""
        heads = {
            caller: [flow.start, flow.arrival, 0]
            for caller, flow in self._flows.items()
            if flow.items
        }
        order: list[Item] = []
        while heads:
            caller = min(heads, key=lambda name: heads[name][:2])
            head, flow = heads[caller], self._flows[caller]
            order.append(flow.items[head[2]])
            head[0] += cost / flow.weight
            head[2] += 1
            if head[2] == len(flow.items):
                del heads[caller]
        return order

    def _due(self, skip: Container[str]) -> _Flow[Item] | None:
        waiting = [flow for name, flow in self._flows.items() if flow.items and name not in skip]
        return min(waiting, key=lambda flow: (flow.start, flow.arrival)) if waiting else None

    def _forget_idle(self) -> None:
        """Forget callers without items and debt; with an empty queue, all of them.

        An empty queue ends a busy period, and virtual time restarts at 0.
        """
        if not self._caller:
            self._flows.clear()
            self._now = 0.0
            return
        if len(self._flows) > 2 * len(self._caller) + 16:
            idle = [
                name
                for name, flow in self._flows.items()
                if not flow.items and flow.finish <= self._now
            ]
            for name in idle:
                del self._flows[name]


@dataclass(frozen=True)
class CallerLimits:
    """Limits of one caller's key; None: no limit.

    Raises:
        ValueError: a limit is out of range.
    """

    weight: float = 1.0  #: share of the machine relative to other callers
    requests_per_second: float | None = None
    burst: float | None = None  #: requests at once; default: one second of the rate, at least 1
    operations_per_second: float | None = None  #: of the decoder, as `fmray cost` counts
    operations_burst: float | None = None  #: default: ten seconds of the rate
    max_budget: str | None = None  #: decimal text; larger budgets are lowered to it

    def __post_init__(self) -> None:
        for name in ("weight", "requests_per_second", "burst", "operations_per_second",
                     "operations_burst"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        if self.burst is not None and self.burst < 1:
            raise ValueError(f"burst must be at least 1, not {self.burst}")
        if self.max_budget is not None:
            exact = exact_number(self.max_budget, "max_budget")
            if not 0 < exact <= 1:
                raise ValueError(f"max_budget must be in (0, 1], not {self.max_budget}")


class TokenBucket:
    """Rate limiter that passes `rate` per second on average and `burst` at once.

    In any t seconds at most burst + rate * t passes, plus one amount larger than the burst: such an
    amount passes when the bucket is full, and leaves it in debt.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self._level = burst
        self._updated_at = -math.inf

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` may pass; 0 for now."""
        short = min(amount, self.burst) - self._filled(now)
        return max(0.0, short / self.rate)

    def take(self, amount: float, now: float) -> None:
        """Remove `amount`, after `wait` returned 0 for it."""
        self._level = self._filled(now) - amount
        self._updated_at = max(now, self._updated_at)

    def give(self, amount: float, now: float) -> None:
        """Return an amount that was taken and not used."""
        self._level = min(self.burst, self._filled(now) + amount)
        self._updated_at = max(now, self._updated_at)

    def full(self, now: float) -> bool:
        """Whether the bucket is full, and so holds no history."""
        return self._filled(now) >= self.burst

    def _filled(self, now: float) -> float:
        if self._updated_at == -math.inf:
            return self.burst
        return min(self.burst, self._level + self.rate * max(0.0, now - self._updated_at))


class Limits:
    """Limits of all callers: `named` ones, and `default` for all others. Not thread-safe."""

    def __init__(
        self,
        named: Mapping[str, CallerLimits] | None = None,
        default: CallerLimits = CallerLimits(),
    ) -> None:
        self.named = dict(named or {})
        self.default = default
        self._buckets: dict[str, dict[str, TokenBucket]] = {}

    def of(self, caller: str) -> CallerLimits:
        """Return the limits of `caller`."""
        return self.named.get(caller, self.default)

    def counts_operations(self, caller: str) -> bool:
        """Whether `caller` has a limit on operations; if not, nobody needs to compute them."""
        return self.of(caller).operations_per_second is not None

    def take(self, caller: str, operations: float, now: float) -> None:
        """Charge one request of at most `operations`.

        Raises:
            RateLimited: a limit is exceeded; nothing is charged.
        """
        buckets = self._buckets_of(caller, now)
        amounts = {"requests": 1.0, "operations": operations}
        waits = {name: bucket.wait(amounts[name], now) for name, bucket in buckets.items()}
        name = max(waits, key=lambda key: waits[key], default="")
        if name and waits[name] > 0:
            raise RateLimited(f"this key exceeds its limit of {name} per second", waits[name])
        for name, bucket in buckets.items():
            bucket.take(amounts[name], now)

    def refund(self, caller: str, operations: float, now: float) -> None:
        """Return operations that a request was charged for and did not use."""
        bucket = self._buckets.get(caller, {}).get("operations")
        if bucket is not None and operations > 0:
            bucket.give(operations, now)

    def _buckets_of(self, caller: str, now: float) -> dict[str, TokenBucket]:
        if caller in self._buckets:
            return self._buckets[caller]
        if len(self._buckets) > 1024:  # drop full buckets: they hold no history
            self._buckets = {
                name: buckets
                for name, buckets in self._buckets.items()
                if not all(bucket.full(now) for bucket in buckets.values())
            }
        limits, buckets = self.of(caller), {}
        if (rate := limits.requests_per_second) is not None:
            buckets["requests"] = TokenBucket(rate, limits.burst or max(1.0, rate))
        if (rate := limits.operations_per_second) is not None:
            buckets["operations"] = TokenBucket(rate, limits.operations_burst or 10 * rate)
        return self._buckets.setdefault(caller, buckets)

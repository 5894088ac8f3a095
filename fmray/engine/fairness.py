"""Who comes next, and who has had enough: fair queueing between callers, rate and budget limits.

In: requests with a caller's name and their cost in predicted seconds of the machine. Out:
`FairQueue`, start-time fair queueing (Goyal, Vin and Cheng 1996); `Limits`, token buckets a caller.
No clock of their own: the time is an argument.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fmray.adallava.cost import exact_number
from fmray.engine.policy import RateLimited

Item = TypeVar("Item", bound=Hashable)


@dataclass
class _Flow(Generic[Item]):
    """One caller's requests. start: virtual time at which the first of them may start. finish:
    where the last one served ends."""

    weight: float
    items: deque[Item] = field(default_factory=deque)
    start: float = 0.0
    finish: float = 0.0
    arrival: int = 0


class FairQueue(Generic[Item]):
    """First come first served within a caller; between callers, shares of the machine by weight.

    While two callers f and g both have requests waiting, the seconds served to them differ by at
    most cost_f / weight_f + cost_g / weight_g (their largest costs), each divided by its weight. A
    caller who was away gains nothing from it. `next` shows who is due, `serve` takes it and charges
    its cost, so the cost may be decided at the last moment. Not thread-safe.
    """

    def __init__(self) -> None:
        self._flows: dict[str, _Flow[Item]] = {}
        self._caller: dict[Item, str] = {}
        self._now = 0.0  # virtual time: start of the request served last
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._caller)

    def __contains__(self, item: Item) -> bool:
        return item in self._caller

    def push(self, item: Item, caller: str, weight: float = 1.0) -> None:
        """`item` waits, last of `caller`'s; weight: its share relative to others', from now on."""
        if not 0 < weight < math.inf:
            raise ValueError(f"weight is {weight!r}; a positive number is needed")
        if item in self._caller:
            raise ValueError(f"{item!r} waits already")
        flow = self._flows.setdefault(caller, _Flow(weight))
        flow.weight = weight
        self._arrivals += 1
        if not flow.items:
            flow.start = max(self._now, flow.finish)
            flow.arrival = self._arrivals
        flow.items.append(item)
        self._caller[item] = caller

    def next(self) -> Item | None:
        """The request that is due: of the caller with the smallest start (the earlier arrival at a
        tie). None if nothing waits."""
        flow = self._due()
        return flow.items[0] if flow else None

    def serve(self, cost: float) -> Item:
        """Take the request that is due, at `cost` predicted seconds."""
        if not 0 <= cost < math.inf:
            raise ValueError(f"cost is {cost!r}; a number of seconds is needed")
        flow = self._due()
        assert flow is not None, "nothing waits"
        item = flow.items.popleft()
        del self._caller[item]
        self._now = flow.start
        flow.finish = flow.start + cost / flow.weight
        flow.start = flow.finish
        self._rest()
        return item

    def settle(self, caller: str, difference: float) -> None:
        """A served request of `caller` took `difference` seconds more (less, if negative) than it
        was charged: it counts for what comes next."""
        flow = self._flows.get(caller)
        if flow is None:
            return
        flow.finish += difference / flow.weight
        if flow.items:
            # Never before virtual time: what was refunded may not be hoarded.
            flow.start = max(self._now, flow.start + difference / flow.weight)

    def remove(self, item: Item) -> bool:
        """`item` is withdrawn, and costs nothing; False if it does not wait."""
        caller = self._caller.pop(item, None)
        if caller is None:
            return False
        self._flows[caller].items.remove(item)
        self._rest()
        return True

    def order(self, cost: float = 1.0) -> list[Item]:
        """All that waits in the order in which it would be served, were all costs `cost`."""
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

    def _due(self) -> _Flow[Item] | None:
        waiting = [flow for flow in self._flows.values() if flow.items]
        return min(waiting, key=lambda flow: (flow.start, flow.arrival)) if waiting else None

    def _rest(self) -> None:
        """Forget callers who wait for nothing and owe nothing; with nobody waiting, all: the busy
        period is over."""
        if not self._caller:
            self._flows.clear()
            self._now = 0.0
            return
        if len(self._flows) > 2 * len(self._caller) + 16:
            gone = [
                name
                for name, flow in self._flows.items()
                if not flow.items and flow.finish <= self._now
            ]
            for name in gone:
                del self._flows[name]


@dataclass(frozen=True)
class CallerLimits:
    """What one key may do. None: no limit.

    weight: its share between callers. requests_per_second, burst (default: a second's worth, at
    least 1). operations_per_second (of the model's decoder, as `fmray cost` counts),
    operations_burst (default: ten seconds' worth). max_budget: decimal text; what asks for more is
    lowered to it. Raises ValueError for numbers that are no limits.
    """

    weight: float = 1.0
    requests_per_second: float | None = None
    burst: float | None = None
    operations_per_second: float | None = None
    operations_burst: float | None = None
    max_budget: str | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "requests_per_second", "burst", "operations_per_second",
                     "operations_burst"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}; a positive number is needed")
        if self.burst is not None and self.burst < 1:
            raise ValueError(f"burst is {self.burst}; below 1 nothing would ever pass")
        if self.max_budget is not None:
            exact = exact_number(self.max_budget, "max_budget")
            if not 0 < exact <= 1:
                raise ValueError(f"max_budget is {self.max_budget}; a number in (0, 1] is needed")


class TokenBucket:
    """Passes `rate` a second on average, and `burst` at once. In any span of t seconds at most
    burst + rate t passes, and one piece more where pieces larger than the burst occur (they pass
    when it is full, and run it into debt)."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self._level = burst
        self._at = -math.inf

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` would pass; 0: now."""
        short = min(amount, self.burst) - self._filled(now)
        return max(0.0, short / self.rate)

    def take(self, amount: float, now: float) -> None:
        """`amount` passes; `wait` has said that it may."""
        self._level = self._filled(now) - amount
        self._at = max(now, self._at)

    def give(self, amount: float, now: float) -> None:
        """Back what was taken and not used."""
        self._level = min(self.burst, self._filled(now) + amount)
        self._at = max(now, self._at)

    def full(self, now: float) -> bool:
        """Whether it has forgotten everything."""
        return self._filled(now) >= self.burst

    def _filled(self, now: float) -> float:
        if self._at == -math.inf:
            return self.burst
        return min(self.burst, self._level + self.rate * max(0.0, now - self._at))


class Limits:
    """The limits of all callers: `named`, and `default` for the rest. Not thread-safe."""

    def __init__(
        self,
        named: Mapping[str, CallerLimits] | None = None,
        default: CallerLimits = CallerLimits(),
    ) -> None:
        self.named = dict(named or {})
        self.default = default
        self._buckets: dict[str, dict[str, TokenBucket]] = {}

    def of(self, caller: str) -> CallerLimits:
        """What `caller` may do."""
        return self.named.get(caller, self.default)

    def counts_operations(self, caller: str) -> bool:
        """Whether `caller` has a limit of operations; where not, they need not be computed."""
        return self.of(caller).operations_per_second is not None

    def take(self, caller: str, operations: float, now: float) -> None:
        """Count one request of at most `operations`; RateLimited, and nothing counted, if that is
        too much now."""
        buckets = self._of(caller, now)
        amounts = {"requests": 1.0, "operations": operations}
        waits = {name: bucket.wait(amounts[name], now) for name, bucket in buckets.items()}
        name = max(waits, key=lambda key: waits[key], default="")
        if name and waits[name] > 0:
            raise RateLimited(f"this key's limit of {name} per second is reached", waits[name])
        for name, bucket in buckets.items():
            bucket.take(amounts[name], now)

    def refund(self, caller: str, operations: float, now: float) -> None:
        """Operations that a request was counted for and did not use."""
        bucket = self._buckets.get(caller, {}).get("operations")
        if bucket is not None and operations > 0:
            bucket.give(operations, now)

    def _of(self, caller: str, now: float) -> dict[str, TokenBucket]:
        if caller in self._buckets:
            return self._buckets[caller]
        if len(self._buckets) > 1024:  # callers come and go; a full bucket remembers nothing
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

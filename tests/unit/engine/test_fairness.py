"""Fair queueing against its published bound and a brute-force model; rate limits over all spans."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmray.engine.fairness import CallerLimits, FairQueue, Limits, TokenBucket
from fmray.engine.policy import RateLimited

costs = st.floats(0.01, 5.0)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(costs, min_size=1, max_size=25), min_size=2, max_size=4),
    st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=4, max_size=4),
)
def test_shares_of_waiting_callers_keep_the_published_bound(
    flows: list[list[float]], weights: list[float]
) -> None:
    """|W_f/w_f - W_g/w_g| <= c_f/w_f + c_g/w_g over every span in which callers f and g both wait
    (Goyal, Vin and Cheng 1996, theorem 1, with the largest costs c)."""
    queue: FairQueue[tuple[int, int]] = FairQueue()
    for flow, sizes in enumerate(flows):
        for number in range(len(sizes)):
            queue.push((flow, number), f"caller {flow}", weights[flow])
    served = []
    while (item := queue.next()) is not None:
        assert queue.serve(flows[item[0]][item[1]]) == item
        served.append(item)
    for flow, sizes in enumerate(flows):  # first come first served within a caller
        assert [number for one, number in served if one == flow] == list(range(len(sizes)))
    for f, g in itertools.combinations(range(len(flows)), 2):
        bound = sum(max(flows[flow]) / weights[flow] for flow in (f, g))
        last = {flow: max(i for i, item in enumerate(served) if item[0] == flow) for flow in (f, g)}
        both = served[: min(last.values()) + 1]
        work = {f: [0.0], g: [0.0]}
        for flow, number in both:
            for one in (f, g):
                gain = flows[one][number] / weights[one] if one == flow else 0.0
                work[one].append(work[one][-1] + gain)
        gaps = [a - b for a, b in zip(work[f], work[g], strict=True)]
        # The largest difference over any span is the one between two prefixes.
        assert max(gaps) - min(gaps) <= bound + 1e-9


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), costs, st.booleans(), st.booleans()),
        min_size=1,
        max_size=40,
    )
)
def test_the_order_is_that_of_the_start_tags(steps: list[tuple[str, float, bool, bool]]) -> None:
    """Against start tags computed on arrival, S = max(v, F of the caller's previous request), for
    mixed arrivals, services and removals."""
    queue: FairQueue[int] = FairQueue()
    waiting: list[tuple[int, str, float]] = []
    finish: dict[str, float] = {}
    virtual = 0.0

    def starts() -> dict[int, float]:
        """Start tags of all waiting items, from scratch."""
        tags, ends = {}, dict(finish)
        for number, caller, cost in waiting:
            tags[number] = ends.get(caller, 0.0)
            ends[caller] = tags[number] + cost
        return tags

    for number, (caller, cost, serve, withdraw) in enumerate(steps):
        if caller not in {one for _, one, _ in waiting}:
            finish[caller] = max(virtual, finish.get(caller, 0.0))
        waiting.append((number, caller, cost))
        queue.push(number, caller)
        if withdraw and number % 3 == 0:
            victim = waiting.pop(len(waiting) // 2)
            assert queue.remove(victim[0])
            assert not queue.remove(victim[0])
        elif serve:
            tags = starts()
            due = queue.next()
            assert tags[due] == pytest.approx(min(tags.values()))
            [index] = [i for i, one in enumerate(waiting) if one[0] == due]
            _, owner, amount = waiting.pop(index)
            queue.serve(amount)
            virtual = tags[due]
            finish[owner] = tags[due] + amount
        if not waiting:
            virtual, finish = 0.0, {}
        assert len(queue) == len(waiting)


def test_an_absent_caller_gets_no_credit() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(10):
        queue.push(f"a{number}", "a")
    for _ in range(8):
        queue.serve(1.0)
    for number in range(10):
        queue.push(f"b{number}", "b")
    order = []
    while queue.next() is not None:
        order.append(queue.serve(1.0)[0])
    assert order[:4].count("a") == 2  # b does not catch up for its absence


def test_order_predicts_the_order_of_service() -> None:
    queue: FairQueue[str] = FairQueue()
    for caller, weight in (("a", 1.0), ("b", 3.0), ("c", 1.0)):
        for number in range(5):
            queue.push(f"{caller}{number}", caller, weight)
    order = queue.order(2.0)
    assert [queue.serve(2.0) for _ in range(15)] == order
    assert queue.order() == [] and queue.next() is None


def test_settle_charges_the_real_cost() -> None:
    """A caller whose answers take three times the prediction gets fewer of them."""
    queue: FairQueue[str] = FairQueue()
    for number in range(40):
        queue.push(f"a{number}", "a")
        queue.push(f"b{number}", "b")
    served = {"a": 0, "b": 0}
    for _ in range(40):
        caller = queue.serve(1.0)[0]
        served[caller] += 1
        if caller == "a":
            queue.settle("a", 2.0)
    assert served["b"] == pytest.approx(30, abs=2)
    queue.settle("nobody", 1.0)


def test_idle_callers_are_forgotten() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.push(-1, "stays")
    for number in range(1000):
        queue.push(number, f"caller {number}")
        queue.push(-2 - number, "stays")
        queue.serve(1.0)
        queue.serve(1.0)
    assert len(queue._flows) < 30
    while queue.next() is not None:
        queue.serve(1.0)
    assert not queue._flows


def test_invalid_queue_operations_are_an_error() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("x", "a")
    with pytest.raises(ValueError, match="already"):
        queue.push("x", "b")
    with pytest.raises(ValueError, match="weight"):
        queue.push("y", "b", 0.0)
    with pytest.raises(ValueError, match="cost"):
        queue.serve(float("nan"))
    assert queue.order() == ["x"]


# --- Limits ---------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    st.floats(0.1, 20),
    st.floats(1, 10),
    st.lists(st.tuples(st.floats(0, 2), st.floats(0.1, 15)), min_size=1, max_size=40),
)
def test_a_bucket_keeps_its_rate_over_every_span(
    rate: float, burst: float, tries: list[tuple[float, float]]
) -> None:
    bucket, now, passed = TokenBucket(rate, burst), 100.0, []
    for gap, amount in tries:
        now += gap
        wait = bucket.wait(amount, now)
        if wait == 0:
            bucket.take(amount, now)
            passed.append((now, amount))
        else:  # the wait is exact
            assert bucket.wait(amount, now + 0.99 * wait) > 0
            assert bucket.wait(amount, now + wait + 1e-6) <= 1e-6
    largest = max((amount for _, amount in passed), default=0.0)
    for i, j in itertools.combinations_with_replacement(range(len(passed)), 2):
        total = sum(amount for _, amount in passed[i : j + 1])
        span = passed[j][0] - passed[i][0]
        extra = largest if largest > burst else 0.0
        assert total <= burst + rate * span + extra + 1e-6


def test_each_caller_has_its_own_limits() -> None:
    limits = Limits(
        {"fast": CallerLimits(requests_per_second=5, burst=5)},
        CallerLimits(requests_per_second=1),
    )
    for _ in range(5):
        limits.take("fast", 1.0, now=0.0)
    limits.take("other", 1.0, now=0.0)
    limits.take("third", 1.0, now=0.0)  # with a bucket of its own
    with pytest.raises(RateLimited, match="requests") as caught:
        limits.take("fast", 1.0, now=0.0)
    assert caught.value.retry_after == pytest.approx(0.2)
    assert (caught.value.status, caught.value.code) == (429, "rate_limited")
    with pytest.raises(RateLimited):
        limits.take("other", 1.0, now=0.5)
    limits.take("other", 1.0, now=1.0)


def test_operations_are_charged_and_refunded() -> None:
    limits = Limits(default=CallerLimits(operations_per_second=100, operations_burst=1000))
    limits.take("a", 900.0, now=0.0)
    with pytest.raises(RateLimited, match="operations") as caught:
        limits.take("a", 200.0, now=0.0)
    assert caught.value.retry_after == pytest.approx(1.0)
    limits.refund("a", 400.0, now=0.0)
    limits.take("a", 200.0, now=0.0)
    limits.take("b", 5000.0, now=0.0)  # more than the burst passes a full bucket, once
    with pytest.raises(RateLimited):
        limits.take("b", 1.0, now=30.0)
    limits.take("b", 1.0, now=41.0)


def test_a_refused_request_is_not_charged() -> None:
    limits = Limits(default=CallerLimits(requests_per_second=1, burst=3, operations_per_second=1.0))
    limits.take("a", 10.0, now=0.0)
    for _ in range(5):
        with pytest.raises(RateLimited, match="operations"):
            limits.take("a", 5.0, now=0.0)
    limits.refund("a", 10.0, now=0.0)
    limits.take("a", 5.0, now=0.0)
    limits.take("a", 5.0, now=0.0)


def test_full_buckets_are_forgotten() -> None:
    limits = Limits(default=CallerLimits(requests_per_second=100))
    for number in range(3000):
        limits.take(f"caller {number}", 1.0, now=number * 1.0)
    assert len(limits._buckets) < 1100


@pytest.mark.parametrize(
    "options",
    [
        {"weight": 0},
        {"weight": float("inf")},
        {"requests_per_second": -1},
        {"burst": 0.5},
        {"operations_per_second": float("nan")},
        {"max_budget": "0"},
        {"max_budget": "2"},
        {"max_budget": "most"},
    ],
)
def test_invalid_limits_are_an_error(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        CallerLimits(**options)

"""The worker's thread: every request ends exactly once, whatever fails, and no caller hangs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import tiny_llava

from fmray.adallava import AdaptiveVLM, SwitchLayout
from fmray.engine.calibration import calibrate
from fmray.engine.engine import Engine
from fmray.engine.fairness import CallerLimits
from fmray.engine.policy import (
    Ask,
    Budgets,
    Decision,
    RateLimited,
    Refused,
    Shed,
    Unavailable,
)
from fmray.engine.requests import Event, Sampling
from fmray.engine.simulation import (
    SimulatedEngine,
    VirtualClock,
    copy_of,
    reference_budgets,
    reference_cost,
)
from fmray.engine.stats import Histogram, HistogramBuilder
from fmray.engine.worker import EngineWorker, WorkerSettings

TIMEOUT = 20.0  # seconds


class GatedEngine(SimulatedEngine):
    """Steps take no time; each waits for `gate`."""

    def __init__(self, max_rows: int = 4) -> None:
        super().__init__(reference_cost(), VirtualClock(), max_rows=max_rows)
        self.gate = threading.Event()
        self.gate.set()
        self.stepping = threading.Event()
        self.broken: BaseException | None = None  # raised by the next step
        self.steps = 0

    def step(self) -> list[Event]:
        self.stepping.set()
        assert self.gate.wait(TIMEOUT)
        self.steps += 1
        if self.broken is not None:
            raise self.broken
        return super().step()


class Listener:
    """Collects the deliveries of one request."""

    def __init__(self) -> None:
        self.deliveries: list[Decision | Event | Refused] = []
        self.threads: set[str] = set()
        self.has_token = threading.Event()
        self.over = threading.Event()

    def __call__(self, delivery: Decision | Event | Refused) -> None:
        assert not self.over.is_set(), f"{delivery} after the end"
        self.deliveries.append(delivery)
        self.threads.add(threading.current_thread().name)
        if isinstance(delivery, Event) and delivery.tokens:
            self.has_token.set()
        if isinstance(delivery, Refused) or (
            isinstance(delivery, Event) and delivery.finished is not None
        ):
            self.over.set()

    def end(self) -> Any:
        """Wait for the last delivery; returns its reason, or the refusal."""
        assert self.over.wait(TIMEOUT), "no last delivery"
        last = self.deliveries[-1]
        return last if isinstance(last, Refused) else last.finished


def ask(name: str, new_tokens: int = 5, **options: Any) -> Ask:
    options.setdefault("caller", "a")
    inputs = {"input_ids": torch.zeros(1, 50, dtype=torch.long)}
    return Ask(name, inputs=inputs, sampling=Sampling(new_tokens), **options)


Make = Callable[..., EngineWorker]


@pytest.fixture
def make() -> Iterator[Make]:
    """A factory of workers, which are closed after the test."""
    workers: list[tuple[GatedEngine, EngineWorker]] = []

    def build(engine: GatedEngine, **options: Any) -> EngineWorker:
        # The clock is real and the steps are faster than any model, so the target is days.
        settings = WorkerSettings(**{"p95_seconds": 1e6, **options.pop("settings", {})})
        worker = EngineWorker(
            engine, copy_of(reference_cost()), reference_budgets(), settings, **options
        )
        workers.append((engine, worker))
        return worker

    yield build
    for engine, worker in workers:
        engine.gate.set()
        worker.close()
        assert not worker._thread.is_alive()


def submit(worker: EngineWorker, request: Ask) -> Listener:
    listener = Listener()
    worker.submit(request, listener)
    return listener


def test_a_request_is_decided_and_answered(make: Make) -> None:
    worker = make(GatedEngine())
    listener = submit(worker, ask("one", budget="0.75"))
    assert listener.end() == "length"
    decision, *events = listener.deliveries
    assert isinstance(decision, Decision)
    assert (decision.budget, decision.units_on, decision.deadline_met) == ("0.75", 8, None)
    assert [len(event.tokens) for event in events] == [1] * 5
    assert listener.threads == {"fmray-engine"}


def test_requests_from_many_threads_end_once(make: Make) -> None:
    """200 requests from 8 threads; a third of them is cancelled at some time."""
    worker = make(GatedEngine(), settings={"max_queue": 1000})
    listeners: dict[str, Listener] = {}
    random = np.random.default_rng(0)
    cancelled = {f"{thread}-{n}" for thread in range(8) for n in range(25) if random.random() < 0.3}

    def client(thread: int) -> None:
        for number in range(25):
            name = f"{thread}-{number}"
            options = [{}, {"budget": "0.6"}, {"deadline_ms": 1e6}][number % 3]
            listeners[name] = submit(worker, ask(name, caller=f"caller {thread}", **options))
            if name in cancelled:
                worker.cancel(name)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert worker.drain(TIMEOUT)
    ends = {name: listener.end() for name, listener in listeners.items()}
    assert len(ends) == 200
    assert {end for name, end in ends.items() if name not in cancelled} == {"length"}
    assert {end for name, end in ends.items() if name in cancelled} <= {"cancelled", "length"}
    stats = worker.stats()
    assert sum(stats.finished.values()) == stats.submitted == 200
    assert (stats.queued, stats.active) == (0, 0)
    assert worker._listeners == {}


def test_a_running_request_is_cancelled_within_a_step(make: Make) -> None:
    engine = GatedEngine()
    worker = make(engine)
    listener = submit(worker, ask("long", 10_000))
    assert listener.has_token.wait(TIMEOUT)
    engine.gate.clear()
    engine.stepping.clear()
    assert engine.stepping.wait(TIMEOUT)
    before = engine.steps
    assert worker.cancel("long")
    engine.gate.set()
    assert listener.end() == "cancelled"
    assert engine.steps - before <= 2  # the running one, and the one with the last event
    assert not worker.cancel("long")
    assert not worker.cancel("never there")
    assert engine.active == 0


def test_a_waiting_request_is_cancelled(make: Make) -> None:
    engine = GatedEngine(max_rows=1)
    worker = make(engine)
    first = submit(worker, ask("first", 10_000))
    assert first.has_token.wait(TIMEOUT)
    second = submit(worker, ask("second"))
    assert worker.cancel("second")
    assert second.end() == "cancelled"
    assert [type(delivery) for delivery in second.deliveries] == [Event]
    assert not first.over.is_set()
    assert worker.stats().finished == {"cancelled": 1}


def test_a_failing_engine_ends_all_requests(make: Make) -> None:
    """Running and waiting requests get an error, health reports it, new requests are refused."""
    engine = GatedEngine(max_rows=2)
    worker = make(engine)
    listeners = [submit(worker, ask(f"{number}", 100_000)) for number in range(5)]
    assert listeners[0].has_token.wait(TIMEOUT)
    assert worker.health().alive and worker.health().busy
    engine.broken = RuntimeError("out of memory")
    for listener in listeners:
        assert listener.end() == "error"
        assert "out of memory" in listener.deliveries[-1].error
    health = worker.health()
    assert (health.alive, health.busy) == (False, False)
    assert "out of memory" in health.error
    with pytest.raises(Unavailable, match="out of memory") as caught:
        submit(worker, ask("late"))
    assert caught.value.status == 503
    assert worker.drain(TIMEOUT)
    assert worker.stats().finished == {"error": 5}


def test_health_reports_a_hanging_step(make: Make) -> None:
    engine = GatedEngine()
    worker = make(engine)
    assert worker.health().idle_seconds == 0
    engine.gate.clear()
    listener = submit(worker, ask("one"))
    assert engine.stepping.wait(TIMEOUT)
    time.sleep(0.3)
    health = worker.health()  # does not wait for the step
    assert health.alive and health.busy and health.idle_seconds >= 0.25
    assert worker.stats().active == 1
    engine.gate.set()
    assert listener.end() == "length"
    assert worker.health().idle_seconds == 0


def test_a_request_that_the_engine_rejects_fails_alone(make: Make) -> None:
    class Picky(GatedEngine):
        def start(self, request: Any) -> None:
            if request.id == "bad":
                raise ValueError("image tokens and images do not match")
            super().start(request)

    worker = make(Picky())
    bad, good = submit(worker, ask("bad")), submit(worker, ask("good"))
    assert bad.end() == "error" and "do not match" in bad.deliveries[-1].error
    assert good.end() == "length"
    assert worker.health().alive


def test_a_request_without_room_in_an_idle_engine_is_an_error(make: Make) -> None:
    class Full(GatedEngine):
        def can_start(self, request: Any) -> bool:
            return False

    worker = make(Full())
    listener = submit(worker, ask("one"))
    assert listener.end() == "error" and "room" in listener.deliveries[-1].error
    assert not worker.health().busy


def test_drain_finishes_requests_and_refuses_new_ones(make: Make) -> None:
    engine = GatedEngine(max_rows=1)
    worker = make(engine)
    engine.gate.clear()
    listeners = [submit(worker, ask(f"{number}")) for number in range(4)]
    assert not worker.drain(0.1)  # requests are still running
    assert worker.health().draining and worker.stats().draining
    with pytest.raises(Unavailable, match="no new"):
        submit(worker, ask("late"))
    engine.gate.set()
    assert worker.drain(TIMEOUT)
    assert [listener.end() for listener in listeners] == ["length"] * 4


def test_close_cancels_all_requests(make: Make) -> None:
    engine = GatedEngine(max_rows=1)
    worker = make(engine)
    listeners = [submit(worker, ask(f"{number}", 100_000)) for number in range(3)]
    worker.close()
    assert [listener.end() for listener in listeners] == ["cancelled"] * 3
    assert not worker._thread.is_alive()
    worker.close()
    with pytest.raises(Unavailable):
        submit(worker, ask("late"))


def test_close_from_a_listener(make: Make) -> None:
    worker = make(GatedEngine())
    listener = Listener()

    def closing(delivery: Any) -> None:
        listener(delivery)
        if isinstance(delivery, Decision):
            worker.close()

    worker.submit(ask("one", 100_000), closing)
    assert listener.end() == "cancelled"


def test_a_dead_listener_ends_its_own_request_only(make: Make) -> None:
    worker = make(GatedEngine())
    calls = []
    loop = asyncio.new_event_loop()
    loop.close()

    def gone(delivery: Any) -> None:
        calls.append(delivery)
        loop.call_soon_threadsafe(calls.append, delivery)

    worker.submit(ask("bad", 100_000), gone)
    good = submit(worker, ask("good"))
    assert good.end() == "length"
    assert worker.drain(TIMEOUT)
    assert len(calls) == 1
    stats = worker.stats()
    assert stats.callback_errors == 1
    assert stats.finished == {"length": 1, "cancelled": 1}


def test_refusals_on_submit(make: Make) -> None:
    engine = GatedEngine(max_rows=1)
    limits = {"slow": CallerLimits(requests_per_second=0.01)}
    worker = make(engine, limits=limits, settings={"max_queue": 2})
    engine.gate.clear()
    first = submit(worker, ask("first"))
    assert engine.stepping.wait(TIMEOUT)
    with pytest.raises(ValueError, match="already queued"):
        submit(worker, ask("first"))
    with pytest.raises(ValueError, match="smallest budget"):
        submit(worker, ask("low", budget="0.1"))
    waiting = [submit(worker, ask("slow", caller="slow")), submit(worker, ask("third"))]
    with pytest.raises(RateLimited) as limited:
        submit(worker, ask("again", caller="slow"))
    assert limited.value.retry_after > 50
    with pytest.raises(Shed, match="queue is full") as shed:
        submit(worker, ask("fourth"))
    assert shed.value.retry_after > 0
    engine.gate.set()
    assert {listener.end() for listener in (first, *waiting)} == {"length"}
    assert worker.stats().refused == {"rate_limited": 1, "overloaded": 1}


def test_the_units_of_auto_rise_while_the_worker_is_idle(make: Make) -> None:
    worker = make(GatedEngine(), settings={"p95_seconds": 0.2})
    with worker._changed:
        worker._dispatcher.controller.units_on = 0
        worker._changed.notify_all()
    submit(worker, ask("wake")).end()
    end = time.monotonic() + TIMEOUT
    while worker.stats().auto_units < 16 and time.monotonic() < end:
        time.sleep(0.05)
    assert worker.stats().auto_units == 16


def test_stats_count_requests_deadlines_and_times(make: Make) -> None:
    worker = make(GatedEngine())
    for number in range(30):
        submit(worker, ask(f"{number}", budget="0.75" if number % 2 else "1")).end()
    for name, deadline in (("easy", 1e7), ("hard", 1e-3)):
        submit(worker, ask(name, deadline_ms=deadline)).end()
    stats = worker.stats()
    assert (stats.submitted, stats.admitted, stats.finished) == (32, 32, {"length": 32})
    assert stats.tokens_out == 160
    assert (stats.deadlines_promised, stats.deadlines_met, stats.deadlines_missed) == (1, 1, 1)
    assert stats.mean_budget == pytest.approx((15 * 0.75 + 15 + 1 + 0.5) / 32)
    for histogram in (stats.first_token_seconds, stats.answer_seconds, stats.queue_seconds):
        assert histogram.count == sum(histogram.counts) == 32
    assert stats.budget.counts[stats.budget.bounds.index(0.75)] == 15
    assert stats.first_token_error >= 0
    assert (stats.auto_units, stats.auto_budget) == (16, 1.0)


def test_histogram_buckets_include_their_upper_bound() -> None:
    builder = HistogramBuilder((1.0, 2.0, 5.0))
    assert builder.snapshot() == Histogram((1.0, 2.0, 5.0), (0, 0, 0, 0), 0.0, 0)
    for value in (0.5, 1.0, 1.5, 4.0, 9.0):
        builder.add(value)
    histogram = builder.snapshot()
    assert histogram.counts == (2, 1, 1, 1)
    assert (histogram.sum, histogram.count, histogram.mean) == (16.0, 5, 3.2)


# --- The real engine ------------------------------------------------------------------------


def test_the_real_engine_answers_as_the_model_does() -> None:
    """Calibration; requests by budget, deadline, plan and load; cancellation."""
    base = tiny_llava(layers=6)
    torch.manual_seed(1)
    model = AdaptiveVLM.from_base(base, SwitchLayout.layers(base.config)).eval()
    engine = Engine(model, None, max_rows=3, eos=())
    cost = calibrate(engine, model, seconds=0.5, longest=60)
    random = np.random.default_rng(0)
    with EngineWorker(engine, cost, Budgets.of(model), WorkerSettings(600.0)) as worker:
        asks, listeners = {}, {}
        for number in range(12):
            ids = torch.from_numpy(random.integers(4, 60, (1, int(random.integers(5, 30)))))
            plan = torch.tensor([True, False, True])
            options = [{}, {"budget": "0.7"}, {"deadline_ms": 1e6}, {"plan": plan}][number % 4]
            name = str(number)
            asks[name] = Ask(
                name, f"caller {number % 2}", {"input_ids": ids}, sampling=Sampling(6), **options
            )
            listeners[name] = submit(worker, asks[name])
        cancelled = Ask("cancelled", "a", asks["0"].inputs, sampling=Sampling(150))
        listeners["cancelled"] = submit(worker, cancelled)
        worker.cancel("cancelled")
        assert worker.drain(TIMEOUT)
        assert listeners.pop("cancelled").end() == "cancelled"
        for name, listener in listeners.items():
            assert listener.end() == "length"
            decision, *events = listener.deliveries
            tokens = [token for event in events for token in event.tokens]
            result = events[-1].result
            assert result.units_on <= decision.units_on
            ids = asks[name].inputs["input_ids"]
            expected = model.generate(
                ids, torch.ones_like(ids), plan=torch.tensor([result.plan]), max_new_tokens=6,
                eos_token_id=(),
            )  # fmt: skip
            assert tokens == expected[0, -6:].tolist()
        stats = worker.stats()
        assert stats.deadlines_met == 3 and stats.engine.finished >= 12
        assert stats.finished == {"length": 12, "cancelled": 1}

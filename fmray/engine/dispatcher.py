"""Dispatcher between callers and the engine: who runs next, with how many units, and the outcome.

Each turn is `admit`, `engine.step`, `settle`. The number of units is decided in `admit`, when a
request gets its row and its wait is known; one request per turn, so that each decision sees the
current rows.

Not thread-safe, without a thread of its own, and with the clock as an argument: `EngineWorker` runs
it in a thread, `fmray.engine.simulation` in virtual time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np

from fmray.engine.admission import (
    Admission,
    Estimates,
    RequestState,
    WorkerSettings,
    deadline_lost,
)
from fmray.engine.calibration import CostToTime
from fmray.engine.controller import LoadController, LoadTarget
from fmray.engine.fairness import FairQueue, Limits
from fmray.engine.forecast import Forecast, Work
from fmray.engine.policy import (
    Ask,
    Budgets,
    Decision,
    Refused,
    Shed,
    Unavailable,
    largest_within,
)
from fmray.engine.requests import EngineStats, Event, Milestone, Request, StepTiming
from fmray.engine.stats import StatsCollector, WorkerStats

LOOK_AHEAD = 256  # waiting requests that the load controller considers
Delivery = tuple[str, Decision | Event | Refused]


class EngineProtocol(Protocol):
    """The part of `fmray.engine.engine.Engine` that the dispatcher uses."""

    max_rows: int

    def can_start(self, request: Request) -> bool: ...
    def fits(self, request: Request) -> bool: ...
    def start(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def step(self) -> list[Event]: ...
    @property
    def active(self) -> int: ...
    @property
    def timing(self) -> StepTiming | None: ...
    @property
    def stats(self) -> EngineStats: ...


class Dispatcher:
    """Queues requests, decides on their units, and learns from the outcomes."""

    def __init__(
        self,
        engine: EngineProtocol,
        cost: CostToTime,
        budgets: Budgets,
        settings: WorkerSettings,
        limits: Limits,
        clock: Callable[[], float],
    ) -> None:
        """clock: monotonic seconds."""
        self.engine, self.cost, self.budgets = engine, cost, budgets
        self.settings, self.limits, self.clock = settings, limits, clock
        self.forecast = Forecast(cost, engine.max_rows)
        self.estimates = Estimates(self.forecast)
        self.admission = Admission(engine, budgets, limits, self.estimates)
        min_units = budgets.num_units
        if settings.controller:
            min_units = budgets.max_units_or_zero(settings.floor, 1)
        target = LoadTarget(settings.p95_seconds, settings.p95_of)
        self.controller = LoadController(target, self.forecast, min_units, budgets.num_units)
        self.draining = False
        self._queue: FairQueue[str] = FairQueue()
        self._waiting: dict[str, RequestState] = {}
        self._running: dict[str, RequestState] = {}
        self._cancelled: list[str] = []
        self._turn_began = clock()
        self._controlled_at = -math.inf
        self._decoded = True  # whether the last step was a decode step
        self._vision_misses = engine.stats.vision_misses
        self._stats = StatsCollector(settings.margin)

    # --- Submitting and cancelling ----------------------------------------------------------

    def submit(self, ask: Ask, at: float | None = None) -> None:
        """Queue a request.

        Args:
            at: arrival time, if earlier than now; deadlines and the p95 count from it.

        Raises:
            ValueError: the request can never run.
            Refused: it cannot run now. The refusal is counted and leaves no other trace.
        """
        self._stats.counts["submitted"] += 1
        now = self.clock()
        try:
            self._submit(ask, now, now if at is None else at)
        except Refused as refusal:
            self._stats.refused[refusal.code] += 1
            raise

    def _submit(self, ask: Ask, now: float, at: float) -> None:
        if self.draining:
            raise Unavailable("this replica takes no new requests", retry_after=1.0)
        if ask.id in self._waiting or ask.id in self._running:
            raise ValueError(f"request {ask.id!r} is already queued or running")
        state = self.admission.admit(ask, at)
        self.limits.take(ask.caller, state.operations, now)
        try:
            self.admission.check_deadline(state, now)
            self._enqueue(state, now)
        except Refused:
            self.limits.refund(ask.caller, state.operations, now)
            raise

    def _enqueue(self, state: RequestState, now: float) -> None:
        ask = state.ask
        self.controller.arrived(now, self.estimates.waiting(state))
        if len(self._queue) >= self.settings.max_queue:
            raise Shed(
                f"the queue is full ({len(self._queue)} requests)", self.settings.p95_seconds
            )
        self._waiting[ask.id] = state
        self._queue.push(ask.id, ask.caller, self.limits.of(ask.caller).weight)
        if not self.settings.shed:
            return
        # Shed the request if it would be late even with the fewest units for everyone.
        order = self._queue.order()
        late = self.controller.shed(
            self._running_work(),
            self._waiting_work(order, now),
            order.index(ask.id),
            (ask.deadline_ms or 0.0) / 1000,
        )
        if late > 0:
            self._queue.remove(ask.id)
            del self._waiting[ask.id]
            raise Shed("overloaded: the answer would be too late", late)

    def cancel(self, request_id: str) -> bool:
        """Cancel a request; its last event comes with the next turn. False if it is unknown."""
        if request_id not in self._waiting and request_id not in self._running:
            return False
        self._cancelled.append(request_id)
        return True

    # --- Turns ------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a turn has something to do."""
        return bool(self._waiting or self._running)

    @property
    def running(self) -> int:
        """Number of requests that the engine holds."""
        return len(self._running)

    @property
    def wake_after(self) -> float | None:
        """Seconds after which an idle dispatcher needs a turn, to raise the units of `auto`.

        None if they are at the maximum.
        """
        if self.controller.units_on == self.controller.max_units:
            return None
        return self.controller.hold

    def admit(self) -> list[Delivery]:
        """Process cancellations and lost deadlines, and start at most one request.

        Starts none while another one waits for its prefill, or without a free row.
        """
        now = self._turn_began = self.clock()
        deliveries = self._process_cancelled()
        deliveries += self._refuse_lost_deadlines(now)
        self._update_controller(now)
        started = any(state.first_token_at is None for state in self._running.values())
        while not started and len(self._running) < self.engine.max_rows:
            name = self._queue.next()
            if name is None:
                break
            state = self._waiting[name]
            decision = self._decide(state, now)
            if isinstance(decision, Refused):
                deliveries.append((name, self._drop(state, decision)))
                continue
            request = state.ask.request(decision.units_on)
            if not self.engine.can_start(request):
                if self._running:
                    break  # no overtaking: a request that needs much memory would starve
                deliveries.append(self._fail_waiting(state, "the engine has no room for it"))
                continue
            deliveries += self._start(state, request, decision, now)
            started = name in self._running
        return deliveries

    def settle(self, events: list[Event]) -> list[Delivery]:
        """Learn from the events of `engine.step`, and return them for delivery."""
        now = self.clock()
        self._learn(self.engine.timing, events, now - self._turn_began)
        deliveries: list[Delivery] = []
        for event in events:
            state = self._running.get(event.request)
            if state is None:
                continue  # already delivered as cancelled or failed
            self._record(state, event, now)
            deliveries.append((event.request, event))
        return deliveries

    def turn(self) -> list[Delivery]:
        """Run `admit`, a step, and `settle`, for single-threaded use."""
        deliveries = self.admit()
        if self._running:
            deliveries += self.settle(self.engine.step())
        return deliveries

    def fail(self, message: str) -> list[Delivery]:
        """End all requests with an error event, after the engine failed."""
        self.draining = True
        names = [*self._running, *self._waiting]
        self._stats.finished["error"] += len(names)
        for name in self._waiting:
            self._queue.remove(name)
        self._running.clear()
        self._waiting.clear()
        self._cancelled.clear()
        return [(name, Event(name, (), "", "error", error=message)) for name in names]

    # --- Steps of `admit` -------------------------------------------------------------------

    def _process_cancelled(self) -> list[Delivery]:
        names, self._cancelled = self._cancelled, []
        deliveries: list[Delivery] = []
        for name in names:
            if name in self._waiting:
                self._stats.finished["cancelled"] += 1
                self._remove_waiting(self._waiting[name])
                deliveries.append((name, Event(name, (), "", "cancelled")))
            elif name in self._running:
                self.engine.cancel(name)
        return deliveries

    def _remove_waiting(self, state: RequestState) -> None:
        """Take a request out of the queue, at no cost to its caller."""
        name = state.ask.id
        self._queue.remove(name)
        del self._waiting[name]
        self.limits.refund(state.ask.caller, state.operations, self.clock())

    def _fail_waiting(self, state: RequestState, message: str) -> Delivery:
        """End a waiting request with an error."""
        self._stats.finished["error"] += 1
        self._remove_waiting(state)
        return state.ask.id, Event(state.ask.id, (), "", "error", error=message)

    def _drop(self, state: RequestState, refusal: Refused) -> Refused:
        self._remove_waiting(state)
        self._stats.refused[refusal.code] += 1
        return refusal

    def _refuse_lost_deadlines(self, now: float) -> list[Delivery]:
        """Refuse waiting requests whose strict deadline can no longer be met."""
        deliveries: list[Delivery] = []
        for name, state in list(self._waiting.items()):
            if state.ask.strict:
                left = state.ask.deadline_ms / 1000 - (now - state.submitted_at)
                if left < state.min_seconds:
                    deliveries.append((name, self._drop(state, deadline_lost(state))))
        return deliveries

    def _update_controller(self, now: float) -> None:
        # 50 times per target is often enough; a forecast for a long queue takes milliseconds.
        if not self.settings.controller:
            return
        if now - self._controlled_at < self.settings.p95_seconds / 50:
            return
        self._controlled_at = now
        order = self._queue.order()[:LOOK_AHEAD]
        self.controller.update(now, self._running_work(), self._waiting_work(order, now))

    def _decide(self, state: RequestState, now: float) -> Decision | Refused:
        """Number of units for the next request, and its predicted time."""
        ask, tokens, waited = state.ask, state.ask.prompt_tokens, now - state.submitted_at
        milestone = ask.deadline_of
        correction = self._stats.corrections[milestone]
        met = None
        if ask.deadline_ms is not None:
            # The largest number of units that meets the deadline.
            times = self._forecast(state, np.arange(state.max_units + 1))
            left = ask.deadline_ms / 1000 - waited
            units_on, met = largest_within(times * correction.headroom, left)
            # Without headroom, no unit on may still meet it.
            met = met or float(times[0]) * correction.usual <= left
            if not met and ask.strict:
                return deadline_lost(state)
            forecast = float(times[units_on])
        else:
            if ask.auto:
                units_on = min(self.controller.units_on, state.max_units)
            else:
                assert state.units_on is not None, "budget and plan fix the number of units"
                units_on = state.units_on
            forecast = float(self._forecast(state, np.array([units_on]))[0])
        state.forecast_seconds, state.predicted_of = forecast, milestone
        state.predicted_seconds = forecast * correction.usual

        # The requested budget, as written, unless the caller's key lowers it.
        budget = None
        if ask.budget is not None and self.budgets.max_units(ask.budget, tokens) <= state.max_units:
            budget = ask.budget
        return Decision(
            request=ask.id,
            budget=budget or self.budgets.budget(units_on, tokens),
            units_on=units_on,
            predicted_ms=(waited + state.predicted_seconds) * 1000,
            predicted_of=milestone,
            deadline_met=met,
            waited_ms=waited * 1000,
        )

    def _forecast(self, state: RequestState, units_on: np.ndarray) -> np.ndarray:
        """Seconds from now until the request's milestone, for each number of units."""
        new_tokens = state.ask.sampling.max_new_tokens
        work = replace(
            self.estimates.waiting(state), remaining=new_tokens, units_on=None, max_units=None
        )
        others = []
        if state.ask.deadline_of == "answer":  # requests that join during its answer
            auto_units = self.controller.units_on
            for name in self._queue.order()[: 2 * self.engine.max_rows]:
                other = self._waiting[name]
                if other is not state:
                    units = other.units_on
                    if units is None:
                        units = min(auto_units, other.max_units)
                    others.append(replace(self.estimates.waiting(other), units_on=units))
        return self.forecast.play(
            self._running_work(),
            [work, *others],
            units_on,
            state.ask.deadline_of,
            watch=0,
            decoded=self._decoded,
        )[0]

    def _start(
        self, state: RequestState, request: Request, decision: Decision, now: float
    ) -> list[Delivery]:
        name, tokens = state.ask.id, state.ask.prompt_tokens
        try:
            self.engine.start(request)
        except ValueError as error:  # this request's fault; the others are not affected
            return [self._fail_waiting(state, str(error))]
        state.units_on, state.admitted_at = decision.units_on, now
        new_tokens = self.estimates.new_tokens(state)
        state.charged_seconds = self.estimates.machine_seconds(state, new_tokens)
        served = self._queue.serve(state.charged_seconds)
        assert served == name, "the queue changed under a decision"
        self._running[name] = self._waiting.pop(name)
        self._stats.admitted(decision, self.budgets.share(decision.units_on, tokens))
        return [(name, decision)]

    # --- Steps of `settle` ------------------------------------------------------------------

    def _learn(self, timing: StepTiming | None, events: list[Event], seconds: float) -> None:
        """Update the cost model with the time of the complete turn, which is what callers see."""
        if timing is None or seconds <= 0:
            return
        self._decoded = timing.kind == "decode"
        pixels = 0
        if timing.kind == "prefill":
            misses = self.engine.stats.vision_misses
            if misses > self._vision_misses:
                states = (self._running.get(event.request) for event in events)
                pixels = sum(
                    state.pixels
                    for state in states
                    if state is not None and state.first_token_at is None
                )
            self._vision_misses = misses
        self.cost.update(replace(timing, seconds=seconds), pixels)

    def _record(self, state: RequestState, event: Event, now: float) -> None:
        """Record one event of a running request."""
        ask = state.ask
        state.tokens += len(event.tokens)
        self._stats.counts["tokens_out"] += len(event.tokens)
        answered = event.finished in ("stop", "length")
        if state.first_token_at is None and (event.tokens or answered):
            state.first_token_at = now
            self._stats.histograms["first_token_seconds"].add(now - state.submitted_at)
            self.estimates.prefilled(ask.image_key)
            self._record_milestone(state, "first_token", now)
        if event.finished is None:
            return

        # The request ends: charge its caller for the time and the operations it really took.
        self._stats.finished[event.finished] += 1
        del self._running[ask.id]
        tokens = max(1, state.tokens)
        seconds = self.estimates.machine_seconds(state, tokens)
        self._queue.settle(ask.caller, seconds - state.charged_seconds)
        if state.operations:
            assert state.units_on is not None
            operations = self.budgets.operations(ask.prompt_tokens, tokens, state.units_on)
            self.limits.refund(ask.caller, state.operations - operations, now)
        if answered:
            self._stats.histograms["answer_seconds"].add(now - state.submitted_at)
            self.estimates.answered(state)
            self._record_milestone(state, "answer", now, full=event.finished == "length")

    def _record_milestone(
        self, state: RequestState, milestone: Milestone, now: float, full: bool = True
    ) -> None:
        """Compare a reached milestone with its prediction and its deadline.

        full: an answer used all its tokens, as the prediction assumes.
        """
        ask, seconds = state.ask, now - state.submitted_at
        if ask.auto and milestone == self.settings.p95_of:
            self.controller.measured(seconds)
        if state.predicted_of != milestone:
            return
        if full:
            self._stats.corrections[milestone].add(
                now - state.admitted_at, state.forecast_seconds, state.predicted_seconds
            )
        if ask.deadline_ms is not None:
            met = seconds * 1000 <= ask.deadline_ms
            self._stats.counts["deadlines_met" if met else "deadlines_missed"] += 1

    # --- Views ------------------------------------------------------------------------------

    def _waiting_work(self, order: list[str], now: float) -> list[Work]:
        return [self.estimates.waiting(self._waiting[name], now) for name in order]

    def _running_work(self) -> list[Work]:
        return [self.estimates.running(state) for state in self._running.values()]

    def stats(self, callback_errors: int = 0) -> WorkerStats:
        """A snapshot of all counters and the current state."""
        auto_units = self.controller.units_on
        error = self.cost.error
        return self._stats.snapshot(
            callback_errors=callback_errors,
            queued=len(self._waiting),
            active=len(self._running),
            draining=self.draining,
            auto_units=auto_units,
            auto_budget=self.budgets.share(auto_units, 1),
            calibration_error=(error.prefill, error.decode),
            speed=self.cost.speed,
            engine=self.engine.stats,
        )

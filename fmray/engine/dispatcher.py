"""Between callers and the engine: who is next, with how many switches, and what came of it.

In: asks, and an engine's events and timings. Out: what each caller is to be told. One thread at a
time, no thread of its own, and the clock is an argument of the constructor: `EngineWorker` runs it
for real, `fmray.engine.simulation` in virtual time.

A turn is `admit` - `engine.step` - `settle`. Budgets are decided in `admit`, when a request gets
its row and its wait is known; one request at a time, so that each sees the rows as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np

from fmray.engine.admission import Entry, Estimates, Intake, WorkerSettings
from fmray.engine.calibration import CostToTime
from fmray.engine.controller import LoadController, LoadTarget, Queued
from fmray.engine.fairness import FairQueue, Limits
from fmray.engine.forecast import Forecast, Moment, Row
from fmray.engine.policy import (
    Ask,
    Budgets,
    Decision,
    Refused,
    Shed,
    Unavailable,
    largest_within,
)
from fmray.engine.requests import EngineStats, Event, Request, StepTiming
from fmray.engine.stats import Ledger, WorkerStats

LOOK_AHEAD = 256  # requests in line that the level is set for
Delivery = tuple[str, Decision | Event | Refused]


class Steps(Protocol):
    """The engine's doors (`fmray.engine.engine.Engine`)."""

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
    """See the module's text. `clock`: seconds, monotonic."""

    def __init__(
        self,
        engine: Steps,
        cost: CostToTime,
        budgets: Budgets,
        settings: WorkerSettings,
        limits: Limits,
        clock: Callable[[], float],
    ) -> None:
        self.engine, self.cost, self.budgets = engine, cost, budgets
        self.settings, self.limits, self.clock = settings, limits, clock
        self.forecast = Forecast(cost, engine.max_rows)
        self.estimates = Estimates(self.forecast)
        self.intake = Intake(engine, budgets, limits, self.estimates)
        floor = budgets.num_units
        if settings.controller:
            floor = budgets.units_within(settings.floor, 1)
        target = LoadTarget(settings.p95_seconds, settings.p95_of)
        self.controller = LoadController(target, self.forecast, floor, budgets.num_units)
        self.draining = False
        self._queue: FairQueue[str] = FairQueue()
        self._waiting: dict[str, Entry] = {}
        self._running: dict[str, Entry] = {}
        self._cancelled: list[str] = []
        self._turn_began = clock()
        self._level_at = -math.inf
        self._decoded = True  # the last step
        self._vision_misses = engine.stats.vision_misses
        self._ledger = Ledger(settings.margin)

    # -- asking ----------------------------------------------------------------------------

    def submit(self, ask: Ask, at: float | None = None) -> None:
        """`ask` waits. at: when it was asked, if before now: deadlines and the p95 count from then.
        Raises ValueError for what can never be run, and `Refused` for what cannot be now; then it
        is as if nothing had been asked (but counted)."""
        self._ledger.counts["submitted"] += 1
        now = self.clock()
        try:
            self._submit(ask, now, now if at is None else at)
        except Refused as refusal:
            self._ledger.refused[refusal.code] += 1
            raise

    def _submit(self, ask: Ask, now: float, at: float) -> None:
        if self.draining:
            raise Unavailable("this replica takes no new requests", retry_after=1.0)
        if ask.id in self._waiting or ask.id in self._running:
            raise ValueError(f"a request {ask.id!r} is under way")
        entry = self.intake.entry(ask, at)
        self.limits.take(ask.caller, entry.operations, now)
        try:
            self.intake.check_deadline(entry, now)
            self._enqueue(entry, now)
        except Refused:
            self.limits.refund(ask.caller, entry.operations, now)
            raise

    def _enqueue(self, entry: Entry, now: float) -> None:
        ask = entry.ask
        self.controller.arrived(now, self.estimates.waiting(entry))
        if len(self._queue) >= self.settings.max_queue:
            raise Shed(f"{len(self._queue)} requests wait already", self.settings.p95_seconds)
        self._waiting[ask.id] = entry
        self._queue.push(ask.id, ask.caller, self.limits.of(ask.caller).weight)
        if self.settings.shed:
            order = self._queue.order()
            late = self.controller.shed(
                self._rows(),
                self._queued(order, now),
                order.index(ask.id),
                (ask.deadline_ms or 0.0) / 1000,
            )
            if late > 0:
                self._queue.remove(ask.id)
                del self._waiting[ask.id]
                raise Shed("more is asked than can be answered in time", late)

    def cancel(self, request_id: str) -> bool:
        """End a request; its event comes with the next turn. False if it is not known (any more)"""
        if request_id not in self._waiting and request_id not in self._running:
            return False
        self._cancelled.append(request_id)
        return True

    # -- turns -----------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a turn has something to do."""
        return bool(self._waiting or self._running)

    @property
    def rest(self) -> float | None:
        """Seconds after which an idle dispatcher wants a turn all the same: while the level of
        `auto` is still to rise."""
        if self.controller.level == self.controller.num_units:
            return None
        return self.controller.hold

    def admit(self) -> list[Delivery]:
        """Cancel, refuse what has become impossible, and start the request that is due, if there is
        room and no other waits for its prefill."""
        now = self._turn_began = self.clock()
        deliveries = self._cancel()
        deliveries += self._refuse_impossible(now)
        self._set_level(now)
        started = next((one for one in self._running.values() if one.first is None), None)
        while started is None and len(self._running) < self.engine.max_rows:
            name = self._queue.next()
            if name is None:
                break
            entry = self._waiting[name]
            decision = self._decide(entry, now)
            if isinstance(decision, Refused):
                deliveries.append((name, self._drop(entry, decision)))
                continue
            request = self.estimates.request(entry, decision.units_on)
            if not self.engine.can_start(request):
                if self._running:
                    break  # nobody overtakes: who needs much memory would wait for ever
                deliveries.append(self._failed(entry, "the engine has no room for it"))
                continue
            deliveries += self._start(entry, request, decision, now)
            started = self._running.get(name)
        return deliveries

    def settle(self, events: list[Event]) -> list[Delivery]:
        """Learn from what `engine.step` returned, and pass it on."""
        now = self.clock()
        self._learn(self.engine.timing, events, now - self._turn_began)
        deliveries: list[Delivery] = []
        for event in events:
            entry = self._running.get(event.request)
            if entry is None:
                continue  # e.g. cancelled while its step ran, and told so
            self._progress(entry, event, now)
            deliveries.append((event.request, event))
        return deliveries

    def turn(self) -> list[Delivery]:
        """`admit`, a step, `settle`: what a single thread needs."""
        deliveries = self.admit()
        if self._running:
            deliveries += self.settle(self.engine.step())
        return deliveries

    @property
    def running(self) -> int:
        """Requests the engine holds."""
        return len(self._running)

    def fail(self, message: str) -> list[Delivery]:
        """The engine is lost: everyone is told, and nothing is left."""
        self.draining = True
        names = [*self._running, *self._waiting]
        self._ledger.finished["error"] += len(names)
        for name in self._waiting:
            self._queue.remove(name)
        self._running.clear()
        self._waiting.clear()
        self._cancelled.clear()
        return [(name, Event(name, (), "", "error", error=message)) for name in names]

    # -- parts of a turn -------------------------------------------------------------------

    def _cancel(self) -> list[Delivery]:
        names, self._cancelled = self._cancelled, []
        deliveries: list[Delivery] = []
        for name in names:
            if name in self._waiting:
                event = Event(name, (), "", "cancelled")
                self._ledger.finished["cancelled"] += 1
                self._forget(self._waiting[name])
                deliveries.append((name, event))
            elif name in self._running:
                self.engine.cancel(name)
        return deliveries

    def _forget(self, entry: Entry) -> None:
        """A request that waits leaves, at no cost to its caller."""
        name = entry.ask.id
        self._queue.remove(name)
        del self._waiting[name]
        self.limits.refund(entry.ask.caller, entry.operations, self.clock())

    def _failed(self, entry: Entry, message: str) -> Delivery:
        """A request that waits ends with an error."""
        self._ledger.finished["error"] += 1
        self._forget(entry)
        return entry.ask.id, Event(entry.ask.id, (), "", "error", error=message)

    def _drop(self, entry: Entry, refusal: Refused) -> Refused:
        self._forget(entry)
        self._ledger.refused[refusal.code] += 1
        return refusal

    def _refuse_impossible(self, now: float) -> list[Delivery]:
        """Strict deadlines that can no longer be kept are told so while they still wait."""
        deliveries: list[Delivery] = []
        for name, entry in list(self._waiting.items()):
            if entry.ask.strict:
                left = entry.ask.deadline_ms / 1000 - (now - entry.submitted)
                if left < entry.least:
                    deliveries.append((name, self._drop(entry, self.intake.impossible(entry))))
        return deliveries

    def _set_level(self, now: float) -> None:
        """Often enough for the target; a forecast for a long queue takes milliseconds."""
        if not self.settings.controller:
            return
        if now - self._level_at < self.settings.p95_seconds / 50:
            return
        self._level_at = now
        order = self._queue.order()[:LOOK_AHEAD]
        self.controller.update(now, self._rows(), self._queued(order, now))

    def _decide(self, entry: Entry, now: float) -> Decision | Refused:
        ask, tokens, waited = entry.ask, entry.ask.prompt_tokens, now - entry.submitted
        rows, of = self._rows(), ask.deadline_of
        met, outcomes = None, self._ledger.outcomes[of]
        if ask.deadline_ms is not None:
            times = self._play(rows, entry, np.arange(entry.cap + 1))
            left = ask.deadline_ms / 1000 - waited
            units, met = largest_within(times * outcomes.headroom, left)
            # Without headroom the least budget may still make it.
            met = met or float(times[0]) * outcomes.usual <= left
            if not met and ask.strict:
                return self.intake.impossible(entry)
            forecast = float(times[units])
        else:
            units = min(self.controller.level, entry.cap) if ask.auto else entry.fixed
            forecast = float(self._play(rows, entry, np.array([units]))[0])
        entry.forecast, entry.told, entry.told_of = forecast, forecast * outcomes.usual, of
        allowed = None
        if ask.budget is not None and self.budgets.units(ask.budget, tokens) <= entry.cap:
            allowed = ask.budget
        return Decision(
            ask.id,
            allowed or self.budgets.budget(units, tokens),
            units,
            (waited + entry.told) * 1000,
            of,
            met,
            waited * 1000,
        )

    def _play(self, rows: list[Row], entry: Entry, units: np.ndarray) -> np.ndarray:
        """Seconds from now until the moment that `entry` asks for, per number of switches."""
        own = self.estimates.waiting(entry, entry.ask.sampling.max_new_tokens)
        own = replace(own, units=None, cap=None)  # here `units` say
        others = []
        if entry.ask.deadline_of == "answer":  # those who join while it is answered
            level = self.controller.level
            for name in self._queue.order()[: 2 * self.engine.max_rows]:
                other = self._waiting[name]
                if other is not entry:
                    units_on = min(level, other.cap) if other.fixed is None else other.fixed
                    others.append(replace(self.estimates.waiting(other), units=units_on))
        moments = self.forecast.play(
            rows, [own, *others], units, entry.ask.deadline_of, watch=0, decoded=self._decoded
        )
        return moments[0]

    def _start(
        self, entry: Entry, request: Request, decision: Decision, now: float
    ) -> list[Delivery]:
        name, tokens = entry.ask.id, entry.ask.prompt_tokens
        try:
            self.engine.start(request)
        except ValueError as error:  # this one request's fault, found late
            return [self._failed(entry, str(error))]
        entry.units, entry.admitted = decision.units_on, now
        entry.seconds = self.estimates.seconds(entry, self.estimates.expected(entry))
        assert self._queue.serve(entry.seconds) == name, "the queue changed under a decision"
        self._running[name] = self._waiting.pop(name)
        share = self.budgets.share(decision.units_on, tokens)
        self._ledger.decided(decision, share)
        return [(name, decision)]

    def _learn(self, timing: StepTiming | None, events: list[Event], seconds: float) -> None:
        """From a step, by the time of the whole turn: this is what callers wait for."""
        if timing is None or seconds <= 0:
            return
        self._decoded = timing.kind == "decode"
        pixels = 0
        if timing.kind == "prefill":
            misses = self.engine.stats.vision_misses
            if misses > self._vision_misses:
                running = (self._running.get(event.request) for event in events)
                pixels = sum(one.pixels for one in running if one is not None and one.first is None)
            self._vision_misses = misses
        self.cost.update(replace(timing, seconds=seconds), pixels)

    def _progress(self, entry: Entry, event: Event, now: float) -> None:
        """Count one event of a running request."""
        ask = entry.ask
        entry.tokens += len(event.tokens)
        self._ledger.counts["tokens_out"] += len(event.tokens)
        answered = event.finished in ("stop", "length")
        if entry.first is None and (event.tokens or answered):
            entry.first = now
            self._ledger.tallies["first_token_seconds"].add(now - entry.submitted)
            self.estimates.saw(ask.image_key)
            self._measured(entry, "first_token", now)
        if event.finished is None:
            return
        self._ledger.finished[event.finished] += 1
        del self._running[ask.id]
        used = self.estimates.seconds(entry, max(1, entry.tokens))
        self._queue.settle(ask.caller, used - entry.seconds)
        if entry.operations:
            spent = self.budgets.operations(ask.prompt_tokens, max(1, entry.tokens), entry.units)
            self.limits.refund(ask.caller, entry.operations - spent, now)
        if answered:
            self._ledger.tallies["answer_seconds"].add(now - entry.submitted)
            self.estimates.answered(entry)
            self._measured(entry, "answer", now, full=event.finished == "length")

    def _measured(self, entry: Entry, of: Moment, now: float, full: bool = True) -> None:
        """A request reached its first token, or its end (full: with all tokens it was given)."""
        ask, seconds = entry.ask, now - entry.submitted
        if ask.auto and of == self.settings.p95_of:
            self.controller.measured(seconds)
        if entry.told_of != of:
            return
        if full:
            self._ledger.outcomes[of].add(now - entry.admitted, entry.forecast, entry.told)
        if ask.deadline_ms is not None:
            self._ledger.counts[
                "deadlines_met" if seconds * 1000 <= ask.deadline_ms else "deadlines_missed"
            ] += 1

    # -- views -----------------------------------------------------------------------------

    def _queued(self, order: list[str], now: float) -> list[Queued]:
        entries = [self._waiting[name] for name in order]
        return [Queued(now - entry.submitted, self.estimates.waiting(entry)) for entry in entries]

    def _rows(self) -> list[Row]:
        return [self.estimates.row(entry) for entry in self._running.values()]

    def stats(self, callback_errors: int = 0) -> WorkerStats:
        """Everything counted, and what is so now."""
        level = self.controller.level
        error = self.cost.error
        return self._ledger.snapshot(
            callback_errors=callback_errors,
            queued=len(self._waiting),
            active=len(self._running),
            draining=self.draining,
            level=level,
            level_budget=self.budgets.share(level, 1),
            calibration_error=(error.prefill, error.decode),
            speed=self.cost.speed,
            engine=self.engine.stats,
        )

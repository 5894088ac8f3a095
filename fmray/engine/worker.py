"""The thread that owns an engine: asks come in from any thread, answers go out by callback.

In: asks and cancellations. Out: per ask one `Decision` and then its `Event`s, or one `Refused`;
health and figures. All the deciding is `Dispatcher`'s; here are the lock, the thread, and what
happens when something breaks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fmray.engine.admission import WorkerSettings
from fmray.engine.calibration import CostToTime
from fmray.engine.dispatcher import Delivery, Dispatcher, Steps
from fmray.engine.fairness import CallerLimits, Limits
from fmray.engine.policy import Ask, Budgets, Decision, Refused, Unavailable
from fmray.engine.requests import Event
from fmray.engine.stats import WorkerStats

__all__ = ["EngineWorker", "Health", "WorkerSettings"]

log = logging.getLogger(__name__)
Listener = Callable[[Decision | Event | Refused], None]


@dataclass(frozen=True)
class Health:
    """alive: the thread runs. error: what ended it. busy: something is asked for. idle_seconds:
    since the last sign of progress while busy, 0 when not busy; a large one means a stuck step.
    draining: no new requests are taken."""

    alive: bool
    error: str | None
    busy: bool
    idle_seconds: float
    draining: bool


class EngineWorker:
    """Starts its thread at once; `close` ends it.

    engine: an `Engine`, used by nobody else from now on. cost: calibrated on it. limits: by the
    caller's name; default_limits: of those not named. Usable as a context manager.
    """

    def __init__(
        self,
        engine: Steps,
        cost: CostToTime,
        budgets: Budgets,
        settings: WorkerSettings | None = None,
        *,
        limits: Mapping[str, CallerLimits] | None = None,
        default_limits: CallerLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._dispatcher = Dispatcher(
            engine,
            cost,
            budgets,
            settings or WorkerSettings(),
            Limits(limits, default_limits or CallerLimits()),
            clock,
        )
        self._engine, self._clock = engine, clock
        # Guards the dispatcher and the listeners; never held while the engine computes or a
        # listener runs.
        self._changed = threading.Condition()
        self._listeners: dict[str, Listener] = {}
        self._error: str | None = None
        self._closing = False
        self._progress = clock()
        self._callback_errors = 0
        self._thread = threading.Thread(target=self._run, name="fmray-engine", daemon=True)
        self._thread.start()

    # -- any thread ------------------------------------------------------------------------

    def submit(self, ask: Ask, on_event: Listener, at: float | None = None) -> None:
        """`ask` is queued; what becomes of it is told to `on_event`, in order, from the worker's
        thread: a `Decision` and `Event`s up to a finished one; or, while it still waits, a finished
        `Event` or a `Refused` alone. `on_event` must return at once; if nobody is there any more
        it raises RuntimeError, as a closed event loop does: its request is cancelled and it hears
        no more. at: when it was asked, on this worker's clock (now).

        Raises ValueError for what can never be run, and `Shed`, `RateLimited`, `DeadlineImpossible`
        or `Unavailable` for what cannot be now; then `on_event` is never called.
        """
        with self._changed:
            self._check()
            if ask.id in self._listeners:
                raise ValueError(f"a request {ask.id!r} is under way")
            if not self._dispatcher.busy:
                self._progress = self._clock()
            self._dispatcher.submit(ask, at)
            self._listeners[ask.id] = on_event
            self._changed.notify_all()

    def cancel(self, request_id: str) -> bool:
        """End a request that waits or runs, within one step; its last event says "cancelled" (or
        that it was finished in this step). False if it is over or was never there."""
        with self._changed:
            known = self._dispatcher.cancel(request_id)
            self._changed.notify_all()
        return known

    def drain(self, seconds: float) -> bool:
        """Take nothing new, and wait up to `seconds` until all that was accepted is answered: True.
        False: some of it is still under way (`close` cancels it)."""
        end = time.monotonic() + seconds
        with self._changed:
            self._dispatcher.draining = True
            while self._dispatcher.busy or self._listeners:
                left = end - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def close(self, seconds: float = 10.0) -> None:
        """Take nothing new, cancel the rest, end the thread (after the step that it is in; waits up
        to `seconds` for it). May be called again."""
        with self._changed:
            self._closing = True
            self._dispatcher.draining = True
            for name in list(self._listeners):
                self._dispatcher.cancel(name)
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(seconds)

    def health(self) -> Health:
        """Does not wait for the engine."""
        with self._changed:
            busy = self._dispatcher.busy
            return Health(
                alive=self._thread.is_alive() and self._error is None,
                error=self._error,
                busy=busy,
                idle_seconds=max(0.0, self._clock() - self._progress) if busy else 0.0,
                draining=self._dispatcher.draining,
            )

    def stats(self) -> WorkerStats:
        """One consistent snapshot."""
        with self._changed:
            return self._dispatcher.stats(self._callback_errors)

    def __enter__(self) -> EngineWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        if self._error is not None:
            raise Unavailable(f"the engine has failed: {self._error}")
        if self._closing:
            raise Unavailable("this replica is closed")

    # -- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait():
                with self._changed:
                    deliveries = self._dispatcher.admit()
                    stepping = self._dispatcher.running > 0
                self._deliver(deliveries)
                if stepping:
                    events = self._engine.step()
                    with self._changed:
                        deliveries = self._dispatcher.settle(events)
                    self._deliver(deliveries)
        except BaseException as error:
            log.exception("the engine's thread ends")
            self._fail(f"{type(error).__name__}: {error}")

    def _wait(self) -> bool:
        """Until there is something to do; False: the end."""
        with self._changed:
            while not self._dispatcher.busy:
                if self._closing:
                    return False
                rest = self._dispatcher.rest
                if not self._changed.wait(rest) and rest is not None:
                    break  # nothing was asked: the level of `auto` may rise
            self._progress = self._clock()
            return True

    def _deliver(self, deliveries: list[Delivery]) -> None:
        """Tell the listeners, without the lock; drain's waiters hear of it after they did."""
        for name, delivery in deliveries:
            last = isinstance(delivery, Refused) or (
                isinstance(delivery, Event) and delivery.finished is not None
            )
            with self._changed:
                listener = self._listeners.get(name)
            if listener is not None and not self._tell(listener, delivery):
                with self._changed:
                    self._listeners.pop(name, None)
                    self._dispatcher.cancel(name)
            if last:
                with self._changed:
                    self._listeners.pop(name, None)
                    self._changed.notify_all()

    def _tell(self, listener: Listener, delivery: Delivery) -> bool:
        """Whether the listener took it. One that has gone ends its own request and no other's."""
        try:
            listener(delivery)
        except RuntimeError as error:
            log.warning("a listener has gone, its request is cancelled: %s", error)
            with self._changed:
                self._callback_errors += 1
            return False
        return True

    def _fail(self, message: str) -> None:
        with self._changed:
            self._error = message
            deliveries = self._dispatcher.fail(message)
        self._deliver(deliveries)
        with self._changed:
            left, self._listeners = self._listeners, {}
            self._changed.notify_all()
        # Those whose end the failing turn had in hand but did not deliver.
        for name, listener in left.items():
            self._tell(listener, Event(name, (), "", "error", error=message))

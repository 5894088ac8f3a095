"""The thread that owns an engine: any thread submits requests, a callback receives their events.

A request gets one `Decision` and then its `Event`s, or one `Refused`. `Dispatcher` decides; this
module adds the lock, the thread, and the handling of failures.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fmray.engine.admission import WorkerSettings
from fmray.engine.calibration import CostToTime
from fmray.engine.dispatcher import Delivery, Dispatcher, EngineProtocol
from fmray.engine.fairness import CallerLimits, Limits
from fmray.engine.policy import Ask, Budgets, Decision, Refused, Unavailable
from fmray.engine.requests import Event
from fmray.engine.stats import WorkerStats

__all__ = ["EngineWorker", "Health", "WorkerSettings"]

log = logging.getLogger(__name__)
Listener = Callable[[Decision | Event | Refused], None]


@dataclass(frozen=True)
class Health:
    """State of a worker's thread."""

    alive: bool  #: the thread runs
    error: str | None  #: the error that ended it
    busy: bool  #: requests are queued or running
    #: since the last progress while busy, else 0; a large value means that a step hangs
    idle_seconds: float
    draining: bool  #: no new requests are taken


class EngineWorker:
    """An engine in a thread of its own, which runs from construction to `close`.

    Usable as a context manager.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        cost: CostToTime,
        budgets: Budgets,
        settings: WorkerSettings | None = None,
        *,
        limits: Mapping[str, CallerLimits] | None = None,
        default_limits: CallerLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the thread.

        Args:
            engine: an `Engine`, for the exclusive use of this worker.
            cost: a cost model calibrated on the engine.
            limits: limits by caller name.
            default_limits: limits of all other callers.
        """
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
        self._progress_at = clock()
        self._callback_errors = 0
        self._thread = threading.Thread(target=self._run, name="fmray-engine", daemon=True)
        self._thread.start()

    # --- Called from any thread -------------------------------------------------------------

    def submit(self, ask: Ask, on_event: Listener, at: float | None = None) -> None:
        """Queue a request.

        The worker's thread calls `on_event` in order: with a `Decision` and then `Event`s up to a
        finished one; or, if the request ends in the queue, with a finished `Event` or a `Refused`
        alone.

        Args:
            on_event: must return at once. If it raises RuntimeError, as a closed event loop does,
                the request is cancelled and `on_event` is not called again.
            at: arrival time on this worker's clock; default: now.

        Raises:
            ValueError: the request can never run. `on_event` is not called.
            Refused: `Shed`, `RateLimited`, `DeadlineImpossible` or `Unavailable`: the request
                cannot run now. `on_event` is not called.
        """
        with self._changed:
            self._check()
            if ask.id in self._listeners:
                raise ValueError(f"request {ask.id!r} is already queued or running")
            if not self._dispatcher.busy:
                self._progress_at = self._clock()
            self._dispatcher.submit(ask, at)
            self._listeners[ask.id] = on_event
            self._changed.notify_all()

    def cancel(self, request_id: str) -> bool:
        """Cancel a waiting or running request within one step.

        Its last event has the reason "cancelled", or another one if it ended in the same step.
        Returns False if the request is unknown or finished.
        """
        with self._changed:
            known = self._dispatcher.cancel(request_id)
            self._changed.notify_all()
        return known

    def drain(self, seconds: float) -> bool:
        """Take no new requests and wait up to `seconds` until all accepted ones are answered.

        Returns False on timeout; `close` cancels the remaining requests.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            self._dispatcher.draining = True
            while self._dispatcher.busy or self._listeners:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def close(self, seconds: float = 10.0) -> None:
        """Take no new requests, cancel all others, and end the thread after its current step.

        Waits up to `seconds` for the thread. Further calls have no effect.
        """
        with self._changed:
            self._closing = True
            self._dispatcher.draining = True
            for name in list(self._listeners):
                self._dispatcher.cancel(name)
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(seconds)

    def health(self) -> Health:
        """Return the state of the thread without waiting for the engine."""
        with self._changed:
            busy = self._dispatcher.busy
            return Health(
                alive=self._thread.is_alive() and self._error is None,
                error=self._error,
                busy=busy,
                idle_seconds=max(0.0, self._clock() - self._progress_at) if busy else 0.0,
                draining=self._dispatcher.draining,
            )

    def stats(self) -> WorkerStats:
        """Return one consistent snapshot of the statistics."""
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

    # --- The thread -------------------------------------------------------------------------

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
            log.exception("engine thread failed")
            self._fail(f"{type(error).__name__}: {error}")

    def _wait(self) -> bool:
        """Wait until there is something to do; returns False when the worker is closed."""
        with self._changed:
            while not self._dispatcher.busy:
                if self._closing:
                    return False
                timeout = self._dispatcher.wake_after
                if not self._changed.wait(timeout) and timeout is not None:
                    break  # no request for a while: the units of `auto` may rise
            self._progress_at = self._clock()
            return True

    def _deliver(self, deliveries: list[Delivery]) -> None:
        """Call the listeners without the lock, then wake up the waiters of `drain`."""
        for name, delivery in deliveries:
            last = isinstance(delivery, Refused) or (
                isinstance(delivery, Event) and delivery.finished is not None
            )
            with self._changed:
                listener = self._listeners.get(name)
            if listener is not None and not self._call(listener, delivery):
                with self._changed:
                    self._listeners.pop(name, None)
                    self._dispatcher.cancel(name)
            if last:
                with self._changed:
                    self._listeners.pop(name, None)
                    self._changed.notify_all()

    def _call(self, listener: Listener, delivery: Decision | Event | Refused) -> bool:
        """Call a listener; returns False if it is gone, which ends its own request only."""
        try:
            listener(delivery)
        except RuntimeError as error:
            log.warning("listener is gone, cancelling its request: %s", error)
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
        # Requests that ended in the failing turn, before their last event was delivered.
        for name, listener in left.items():
            self._call(listener, Event(name, (), "", "error", error=message))

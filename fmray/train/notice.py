"""Whether a worker has been told to stop soon: its node is drained, or its process got SIGTERM.

In: Ray's notice of a drain (spot machines that are taken back, `ray drain-node`), and SIGTERM where
training runs in this process; in a Ray worker SIGTERM is Ray's, and ends it. Out: one line for all
ranks at the same step, after which they write a checkpoint and return.

Asking Ray is a broadcast from rank 0 over an actor, milliseconds; so rank 0 decides when it is time
to ask, and says so in the sum over the ranks that ends each step anyway.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

import ray.train

# how often Ray's own watcher looks
ASK_SECONDS = float(os.environ.get("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "5"))


class Notice:
    """A context manager: it takes SIGTERM while it is open, in a process of one rank."""

    def __init__(self, rank: int) -> None:
        self._rank, self._asked = rank, time.monotonic()
        self._terminated = False
        # Ray's workers train in a thread of their own
        self._alone = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Notice:
        if self._alone:
            self._kept = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(self, *error: object) -> None:
        if self._alone:
            signal.signal(signal.SIGTERM, self._kept)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True

    def due(self) -> float:
        """1.0 on rank 0 when it is time to ask, else 0.0; the ranks call `given` if any has 1.0."""
        return float(
            self._terminated or (self._rank == 0 and time.monotonic() - self._asked >= ASK_SECONDS)
        )

    def given(self) -> str | None:
        """Why to stop, or None; every rank must call this."""
        self._asked = time.monotonic()
        if self._terminated:
            return "told to stop (SIGTERM)"
        info = ray.train.get_preemption_info()
        if info is None:
            return None
        nodes = ", ".join(node[:8] for node in info.preempted_node_ids)
        return f"node {nodes} (rank {', '.join(map(str, info.preempted_ranks))}) is drained"

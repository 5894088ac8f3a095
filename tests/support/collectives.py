"""Count and time the calls of torch.distributed's collectives.

`Collectives()` replaces the functions for the rest of the process. Create it before DeepSpeed
starts, which keeps references to two of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

NAMES = {
    "all_reduce": "all_reduce",
    "reduce": "reduce",
    "broadcast": "broadcast",
    "all_gather": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "barrier": "barrier",
}


class Collectives:
    """Bytes by collective, and the seconds in which callers were blocked."""

    def __init__(self) -> None:
        #: Bytes of the larger one of input and output, by collective.
        self.bytes: Counter[str] = Counter()
        #: Seconds in calls and in waiting for asynchronous calls. Includes waiting for slower
        #: ranks, not communication that overlaps with computation.
        self.seconds = 0.0
        for name, kind in NAMES.items():
            setattr(dist, name, self._counted(getattr(dist, name), kind))

    def _counted(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.bytes[kind] += max(map(_bytes, [*args, *kwargs.values()]), default=0)
            with self.timed():
                work = function(*args, **kwargs)
            return work if work is None else _Work(work, self)

        return call

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the seconds of a block."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begun


class _Work:
    """The handle of an asynchronous call, with a timed `wait`."""

    def __init__(self, work: Any, collectives: Collectives) -> None:
        self._work, self._collectives = work, collectives

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._collectives.timed():
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list):
        return sum(map(_bytes, value))
    return 0

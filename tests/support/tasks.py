"""Run ingest tasks in this process instead of on Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any


def run_here(
    function: Callable[[Any], Any], tasks: Sequence[Any], cluster: Any
) -> Iterator[tuple[Any, Any]]:
    """Replace `fmray.data.ray_tasks.run_tasks`; `cluster` is ignored."""
    for task in tasks:
        yield task, function(task)

"""Ingest tasks in this process, in place of Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any


def run_here(
    function: Callable[[Any], Any], tasks: Sequence[Any], cluster: Any
) -> Iterator[tuple[Any, Any]]:
    """As `fmray.data.ray_tasks.run_tasks`."""
    for task in tasks:
        yield task, function(task)

"""Run one function over many independent tasks with Ray Data.

The tasks are the rows of a `ray.data.Dataset`, one per block. Ray Data's streaming executor limits
how many run at once, retries those that are lost with a node, waits for nodes that the autoscaler
adds, and shows the run in the dashboard. Tasks write their files themselves, so that a file is the
same wherever it is written; only small results travel back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import ray

from fmray.config import ClusterConfig
from fmray.errors import raised_by_fmray
from fmray.runtime.cluster import start_or_join

T = TypeVar("T")
R = TypeVar("R")


def run_tasks(
    function: Callable[[T], R], tasks: Sequence[T], cluster: ClusterConfig
) -> Iterator[tuple[T, R]]:
    """Yield each task with its result in the order in which they finish.

    Starts Ray if none is running in this process.

    Raises:
        ValueError: the cluster has no CPU.
        ValueError, OSError: a task found a user's mistake, such as an unreadable file; the error
            that it raised, without Ray's traceback around it.
    """

    def run(row: dict[str, Any]) -> dict[str, Any]:
        result, error = None, None
        try:
            result = function(row["task"])
        except (FileNotFoundError, PermissionError) as mistake:
            error = mistake
        except ValueError as mistake:
            if not raised_by_fmray(mistake):
                raise  # a bug, which needs its traceback
            error = mistake
        return {"index": row["index"], "result": result, "error": error}

    if not tasks:
        return
    with nullcontext() if ray.is_initialized() else start_or_join(cluster):
        if ray.cluster_resources().get("CPU", 0) < 1:
            raise ValueError("ingest needs one CPU, and this Ray cluster has none")
        # tasks and results are dataclasses; without this setting Ray Data warns about such columns
        ray.data.DataContext.get_current().enable_fallback_to_arrow_object_ext_type = True
        rows = [{"index": index, "task": task} for index, task in enumerate(tasks)]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(run)
        dataset.context.enable_progress_bars = False  # the caller shows the progress
        for row in dataset.iter_rows():
            if row["error"] is not None:
                raise row["error"]
            yield tasks[row["index"]], row["result"]

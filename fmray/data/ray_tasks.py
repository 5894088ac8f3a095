"""Many independent tasks that write files, through Ray Data.

In: a function and its tasks, both picklable. Out: each task with its result, as they are done.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import ray

from fmray.config import ClusterConfig
from fmray.runtime.cluster import start_or_join

T = TypeVar("T")
R = TypeVar("R")


def run_tasks(
    function: Callable[[T], R], tasks: Sequence[T], cluster: ClusterConfig
) -> Iterator[tuple[T, R]]:
    """One Ray Data task for each; starts Ray only where none runs in this process.

    Raises:
        ValueError: the cluster has no CPU.
    """

    def run(row: dict[str, Any]) -> dict[str, Any]:
        result = function(pickle.loads(row["task"]))
        return {"number": row["number"], "result": pickle.dumps(result)}

    items = [{"number": n, "task": pickle.dumps(task)} for n, task in enumerate(tasks)]
    if not items:
        return
    with nullcontext() if ray.is_initialized() else start_or_join(cluster):
        if ray.cluster_resources().get("CPU", 0) < 1:
            raise ValueError("ingest needs one CPU, and this Ray cluster has none")
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(run)
        dataset.context.enable_progress_bars = False  # the caller counts tasks
        for row in dataset.iter_rows():
            yield tasks[row["number"]], pickle.loads(row["result"])

"""The training loop on several ranks without Ray: one process per rank, connected by gloo.

The processes are `forked`, so a run takes seconds. A substitute for Ray's context returns rank and
world size; there is no preemption notice.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import ray.train
import torch.distributed as dist
from support.forked import forked

import fmray.train.loop
from fmray.config import LoadedRecipe
from fmray.train.engine import import_deepspeed
from fmray.train.method import TrainJob

import_deepspeed()
SECONDS = 300


def train_on(
    world_size: int,
    loaded: LoadedRecipe,
    run_id: str,
    before: Callable[[int], None] | None = None,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Run `fmray.train.loop.train_worker` on `world_size` ranks; return the result of rank 0.

    Args:
        before: called on each rank at the start, with its number.
        seconds: timeout.

    Raises:
        RuntimeError: a rank failed; contains its traceback.
    """
    config = {"job": TrainJob(loaded.recipe, loaded.dump(), run_id)}
    context = forked()
    with TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            context.Process(
                target=_rank,
                args=(rank, world_size, Path(folder), config, pipe, dict(os.environ), before),
                daemon=True,
            )
            for rank, (_, pipe) in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
        try:
            results = []
            for rank, (pipe, _) in enumerate(pipes):
                if not pipe.poll(seconds):
                    raise RuntimeError(f"rank {rank} of {world_size} does not finish")
                results.append(pipe.recv())
                if isinstance(results[-1], str):
                    raise RuntimeError(f"rank {rank} of {world_size}: {results[-1]}")
        finally:
            for process in ranks:
                process.kill()
                process.join()
    return results[0]


def _rank(
    rank: int,
    world_size: int,
    folder: Path,
    config: dict[str, Any],
    answer: Connection,
    environment: dict[str, str],
    before: Callable[[int], None] | None,
) -> None:
    os.environ.update(environment)  # the fork server may be older than a change by the test
    if before is not None:
        before(rank)
    try:
        answer.send(run_rank(rank, world_size, folder, config))
    except Exception:  # noqa: BLE001 -- the test reports it
        answer.send(traceback.format_exc())


def run_rank(
    rank: int, world_size: int, folder: Path, config: dict[str, Any]
) -> dict[str, Any] | None:
    """Run `train_worker` as one rank in this process, which cannot be reused afterwards.

    Args:
        folder: empty and visible to all ranks, for the rendezvous.
    """
    os.environ["LOCAL_RANK"] = str(rank)
    context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: world_size)
    ray.train.get_context = lambda: context
    ray.train.get_preemption_info = lambda: None
    ray.train.report = lambda metrics: None
    store = dist.FileStore(str(folder / "store"), world_size)
    timeout = timedelta(seconds=config["job"].recipe.cluster.timeout_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    return fmray.train.loop.train_worker(config)

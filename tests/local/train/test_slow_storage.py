"""Ranks wait for files longer than for each other: a slow disk does not end training."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.ranks import train_on
from support.training import load_recipe, make_store

from fmray.runtime.run_log import read_status

TIMEOUT, SLOW = 10, 15  # seconds


def slow_file(name: str, slow: int, rank: int) -> None:
    """Make the first `torch.save` or `torch.load` of one rank take longer than the timeout."""
    work, seconds = getattr(torch, name), [SLOW] if rank == slow else []

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds.pop() if seconds else 0)
        return work(*arguments, **options)

    setattr(torch, name, slowly)


def test_a_rank_may_write_and_read_slowly(tmp_path: Path) -> None:
    cluster = {"workers": 2, "timeout_s": TIMEOUT}
    settings = {"steps": 2, "micro_batch": 4, "checkpoint_every": 1, "eval_rows": 4}
    loaded = load_recipe(
        make_store(tmp_path), tmp_path, train=settings, zero={"stage": 1}, cluster=cluster
    )
    for name, slow, start in (("save", 0, 0), ("load", 1, 1)):
        began = time.monotonic()
        train_on(2, loaded, "run", partial(slow_file, name, slow))
        assert time.monotonic() - began > SLOW
        status = read_status(tmp_path / "run")
        assert (status.state, status.start) == ("ended", start)
        shutil.rmtree(tmp_path / "run" / "checkpoint-00000002")

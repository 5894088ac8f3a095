"""Processes that start fast: forked from a server that has imported what ranks need.

multiprocessing's fork server imports the preload modules from the interpreter's path, which does
not contain this folder, and ignores failures silently; each process would then take nine seconds.
"""

from __future__ import annotations

import multiprocessing
import os
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

TESTS = str(Path(__file__).parents[1])


@cache
def forked() -> ForkServerContext:
    """Return the multiprocessing context, and start its server, which ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.ranks", "support.deepspeed_calls"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", TESTS, prepend=os.pathsep)
        forkserver.ensure_running()
    return context

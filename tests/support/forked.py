"""Processes that begin in moments: forked from a server that has imported what ranks need.

multiprocessing's server looks for what it shall import on the interpreter's own path, where this
folder is not, and says nothing when it finds nothing: each process then takes nine seconds.
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
    """The context of such processes; starts the server, which ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.ranks", "support.deepspeed_calls"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", TESTS, prepend=os.pathsep)
        forkserver.ensure_running()
    return context

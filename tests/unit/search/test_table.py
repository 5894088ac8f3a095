"""The table of trials: live in a terminal, lines elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from fmray.search.watch import TrialRow, TrialTable

RUNNING = TrialRow(0, "random", {"tasks": ["[/red]", "b"], "lr": 1e-3}, "running", 0, {})
HALF = replace(RUNNING, step=4, metrics={"accuracy": 0.25})
FAILED = replace(HALF, status="failed", reason="ValueError: [no] room")


def test_without_a_terminal_each_event_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with TrialTable(["accuracy"], trials=2) as table:
        for row in (RUNNING, HALF, FAILED):
            table.show(row)
    assert capsys.readouterr().out.splitlines() == [
        "trial 0: running, random, tasks={[/red] b} lr=0.001",
        "trial 0: running, step 4, accuracy 0.25",
        "trial 0: failed, step 4, accuracy 0.25: ValueError: [no] room",
    ]


def test_a_terminal_shows_a_live_table() -> None:
    reader, writer = os.openpty()
    script = (
        "from test_table import *\n"
        "with TrialTable(['accuracy'], trials=2) as table:\n"
        "    table.show(RUNNING)\n"
        "    table._live.refresh()\n"  # as it does twice a second
        "    table.show(FAILED)\n"
        "    table.show(replace(HALF, number=1))\n"
    )
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "COLUMNS": "120", "TERM": "xterm"}
    with os.fdopen(reader, "rb") as screen:
        child = subprocess.Popen([sys.executable, "-c", script], stdout=writer, env=environment)
        os.close(writer)
        output = b""
        while True:
            try:
                chunk = os.read(screen.fileno(), 65536)
            except OSError:  # the other end is closed
                break
            output += chunk
        assert child.wait(60) == 0
    last = output.decode().rpartition("trials finished")[2].splitlines()
    assert "0 of 2" in output.decode() and "1 of 2" in output.decode()
    rows = [line for line in last if "random" in line]
    assert len(rows) == 2
    assert "{[/red] b}" in rows[0] and "ValueError: [no] room" in rows[0] and "0.25" in rows[0]
    assert "running" in rows[1] and "0.25" in rows[1]

"""What reaches the terminal, and what only the log file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fmray.config import load
from fmray.runtime import console
from fmray.runtime.console import Step, changed_settings, open_log, say, track

PROGRAM = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
from fmray.errors import exit_code
from fmray.runtime.console import open_log, say

def main():
    old_stderr = sys.stderr
    with open_log(Path("run/log.txt"), verbose="--verbose" in sys.argv):
        say("started")
        print("chatter in Python")
        warnings.warn("chatter of warnings")
        print("chatter to the old stderr", file=old_stderr)
        os.write(1, b"chatter of C++\\n")
        subprocess.run(["echo", "chatter of a process"])
        print("(RayTrainWorker pid=7) fmray| a worker's line")
        for step in range(1, 6):
            print(f"(RayTrainWorker pid=7) fmray~ run: step {step} of 5 ({step * 20}%), loss 0.5")
        logging.getLogger("fmray.some.module").warning("tracking fails")
        exec(sys.argv[1])
        say("ended")
    print("after")

sys.exit(exit_code(main))
"""
CHATTER = ("in Python", "of warnings", "to the old stderr", "of C++", "of a process")


def run(
    folder: Path, statement: str, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `PROGRAM` in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, statement, *words]
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_only_fmrays_lines_are_shown_and_the_log_has_everything(tmp_path: Path) -> None:
    done = run(tmp_path, "pass")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "started",
        "a worker's line",
        "run: step 5 of 5 (100%), loss 0.5",
        "warning: tracking fails",
        "ended",
        "after",
    ]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert all(f"chatter {text}" in log for text in CHATTER)
    assert "started" in log and "ended" in log and "after" not in log
    run(tmp_path, "pass")
    assert (tmp_path / "run" / "log.txt").read_text().count("started") == 2


def test_verbose_shows_everything(tmp_path: Path) -> None:
    done = run(tmp_path, "pass", "--verbose")
    assert all(f"chatter {text}" in done.stdout + done.stderr for text in CHATTER)


def test_a_submitted_job_marks_its_lines(tmp_path: Path) -> None:
    done = run(tmp_path, "pass", FMRAY_CONSOLE="1")
    assert done.stdout.splitlines() == [
        "fmray| started",
        "fmray| a worker's line",
        *(f"fmray~ run: step {step} of 5 ({step * 20}%), loss 0.5" for step in range(1, 6)),
        "fmray| warning: tracking fails",
        "fmray| ended",
        "after",
    ]


@pytest.mark.parametrize(
    ("statement", "code", "lines"),
    [
        ("open('missing.yaml')", 2, ["fmray: [Errno 2] No such file or directory: 'missing.yaml'"]),
        ("import fmray.errors as e; raise e.GaveUp('no room')", 1, ["fmray: no room"]),
        ("raise SystemExit(143)", 143, []),
        ("raise KeyboardInterrupt", 130, ["fmray: interrupted"]),
    ],
)
def test_errors_reach_stderr(tmp_path: Path, statement: str, code: int, lines: list[str]) -> None:
    done = run(tmp_path, statement)
    note = [] if code > 2 else [" (full log: run/log.txt)"]
    assert done.returncode == code
    assert done.stderr.splitlines() == [line + "".join(note) for line in lines]


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    done = run(tmp_path, "1 / 0")
    assert done.returncode == 1 and "chatter" not in done.stderr.replace(PROGRAM, "")
    assert done.stderr.splitlines()[-2:] == [
        "ZeroDivisionError: division by zero",
        "full log: run/log.txt",
    ]
    assert "ZeroDivisionError" in (tmp_path / "run" / "log.txt").read_text()


def test_a_full_disk_does_not_end_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open_log(Path("/dev/full")):
        print("lost")
        say("shown")
    assert capsys.readouterr().out == "shown\n"


def test_a_closed_pipe_ends_the_program(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    words = f"{sys.executable} program.py 'while True: say(str(1))'"
    command = f"{words} | head -n 3; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (141, "")


def test_progress_without_a_log_is_a_line_in_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: seconds)
    for item in track(range(30), "ingest", "shard", total=40, done=10):
        seconds += 1.0
        assert 0 <= item < 30
    assert capsys.readouterr().out.splitlines() == [
        "ingest: shard 11 of 40 (28%), 0:00 left",
        "ingest: shard 21 of 40 (52%), 0:17 left",
        "ingest: shard 31 of 40 (78%), 0:08 left",
        "ingest: shard 40 of 40 (100%)",
    ]


def test_a_progress_line_is_parsed_as_it_is_written() -> None:
    for step in (
        Step("a: run", "step", 3, 40, "0:01 left, loss 1.0"),
        Step("b", "shard", 4, 4, ""),
    ):
        assert Step.parse(str(step)) == step
    assert Step.parse("something else: 3 of 4") is None


def test_changed_settings_leave_the_defaults_out(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text("train: {lr: 1.0e-3, weight_decay: 0.25}\n")
    (tmp_path / "child.yaml").write_text("extends: parent.yaml\nname: child\nseed: 0\n")
    overrides = ["cluster.workers=2", "train.lr=0.5", "evaluate.budgets=[" + "0.5, " * 40 + "1.0]"]
    text = changed_settings(load(tmp_path / "child.yaml", overrides), tmp_path / "recipe.yaml")
    title, *lines = text.splitlines()
    assert title.endswith(f"(full recipe: {tmp_path / 'recipe.yaml'}):")
    assert lines[0] == "  child.yaml: name=child"
    assert lines[1].startswith("  --set: cluster.workers=2, train.lr=0.5, evaluate.budgets=[")
    assert lines[-1] == "  parent.yaml: train.weight_decay=0.25"
    assert "...\n" in text and max(map(len, lines)) <= 120

    # many of a parent are counted
    keys = ("lr: 1", "steps: 9", "epochs: 2", "gradient_clip: 2", "global_batch: 2", "eval_rows: 2")
    more = ("micro_batch: 1", "checkpoint_every: 7", "keep_checkpoints: 5")
    (tmp_path / "parent.yaml").write_text(f"train: {{{', '.join(keys + more)}}}\n")
    text = changed_settings(load(tmp_path / "child.yaml"))
    assert text.splitlines()[-1] == "  parent.yaml, which it extends: 9 settings"


def test_progress_lines_of_short_and_long_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: seconds)
    with open_log(tmp_path / "log.txt"):
        for _ in track(range(100), "short", "step", total=100):
            seconds += 1.0
        for _ in track(range(1000), "long", "step", total=1000):
            seconds += 1.0
    lines = capsys.readouterr().out.splitlines()
    steps = [int(line.split()[2]) for line in lines if line.startswith("short")]
    assert steps == [26, 51, 76]  # a summary follows
    steps = [int(line.split()[2]) for line in lines if line.startswith("long")]
    assert len(steps) == 16 and steps[:2] == [61, 121]

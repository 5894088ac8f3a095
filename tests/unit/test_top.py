"""`fmray top` on the folders of imaginary runs: what it reads, the state it infers, its output."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from fmray.cli import main
from fmray.commands.top import duration, render
from fmray.runtime.run_log import STATUS_FILE, RunReader, Status, Worker, birth, judge, read_status

HERE = Worker(0, platform.node(), None, os.getpid(), birth(os.getpid()), 0.5, None)
FAR = Worker(1, "another.machine", "ab12cd34ef", 4242, 17, 1.0, "cuda:3")
RUNNING = Status("train", "running", 1, 1000.0, 0, 100, None, (HERE,))


def step(number: int, **metrics: float) -> str:
    values = {"step": number, "loss": 9.0 / number, "tokens_per_s": 100.0 * number} | metrics
    return json.dumps(values | {"waiting_share": 0.25}) + "\n"


def write(folder: Path, status: Status | None, log: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text(log)
    if status is not None:
        (folder / STATUS_FILE).write_text(json.dumps(asdict(status)))
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that logged 40 of 100 steps in 80 seconds, the last one 10 seconds ago."""
    now = time.time()
    status = replace(RUNNING, started=now - 90, workers=(HERE, FAR), groups=3)
    lines = "".join(step(n, budget=0.6) for n in range(1, 41))
    evaluation = json.dumps({"step": 40, "accuracy/0.5": 0.75, "loss/0.5": 1.5}) + "\n"
    folder = write(tmp_path / "mine", status, lines + evaluation)
    for number in (20, 40, 60):
        (folder / f"checkpoint-000000{number}").mkdir()
        if number != 60:  # the newest one is incomplete
            made = folder / f"checkpoint-000000{number}" / "manifest.json"
            made.write_text("{}")
            os.utime(made, (now - 3600 / number, now - 3600 / number))
    event = {"time": now - 7, "text": "worker 1 died; resuming from step 20"}
    (folder / "events.jsonl").write_text(json.dumps({"time": 1.0, "text": "old"}) + "\n")
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    for name in ("log.jsonl", STATUS_FILE, "events.jsonl"):
        os.utime(folder / name, (now - 10, now - 10))
    return folder


def test_view_holds_what_the_run_wrote(run_dir: Path) -> None:
    view = RunReader(run_dir).read()
    assert (view.run, view.job, view.state, view.step, view.total) == (
        "mine", "train", "running", 40, 100,
    )  # fmt: skip
    assert view.metrics == {"loss": 9 / 40, "budget": 0.6}
    assert view.speed == ("tokens", 3050.0)  # the median of steps 21 to 40
    assert view.waiting_share == 0.25
    assert view.left == pytest.approx(60 * 80 / 40, abs=2)
    assert view.checkpoint == (40, pytest.approx(90, abs=5))
    assert view.evaluation == (40, {"accuracy/0.5": 0.75, "loss/0.5": 1.5})
    assert (view.restarts, view.event[1]) == (2, "worker 1 died; resuming from step 20")
    assert view.quiet == pytest.approx(10, abs=5)
    assert [worker.alive for worker in view.workers] == [True, None]


def test_a_value_that_is_not_finite_is_null(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (run_dir / "log.jsonl").open("a") as file:
        file.write(step(41, loss=None, grad_norm=None) + '{"step": 41, "accuracy/0.5": null}\n')
        file.write(step(42, loss=float("nan")))  # as the previous release wrote it
    for expected in ("loss             nan", "loss             not finite"):
        assert main(["top", str(run_dir), "--once"]) == 0
        out = capsys.readouterr().out
        assert expected in out and "step 41: accuracy/0.5 not finite" in out
        assert main(["top", str(run_dir), "--json"]) == 0
        values = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert values["metrics"]["loss"] is None
        with (run_dir / "log.jsonl").open("a") as file:
            file.write(step(43, loss=None))


def test_reader_follows_a_log_that_grows_or_is_replaced(run_dir: Path) -> None:
    reader, log = RunReader(run_dir), run_dir / "log.jsonl"
    assert reader.read().step == 40
    with log.open("a") as file:
        file.write(step(41) + step(42)[:-20])
    assert reader.read().step == 41  # the last line is incomplete
    with log.open("a") as file:
        file.write(step(42)[-20:])
    assert reader.read().step == 42
    other = run_dir / "other"  # as a run that resumes from step 20 does
    other.write_text("".join(step(n) for n in range(1, 21)))
    other.replace(log)
    view = reader.read()
    assert (view.step, view.evaluation) == (20, None)


@pytest.mark.parametrize(
    ("state", "done", "alive", "quiet", "pace", "wanted"),
    [
        ("running", 5, [True, True], 9e9, 1.0, "running"),  # a long evaluation
        ("running", 5, [True, False], 0.0, 1.0, "dead"),
        ("running", 5, [True, None], 60.0, 1.0, "running"),
        ("running", 5, [True, None], 121.0, 1.0, "silent"),
        ("running", 5, [None], 121.0, 30.0, "running"),  # a step takes half a minute
        ("running", 5, [None], 601.0, 30.0, "silent"),
        ("ended", 100, [False], 9e9, None, "finished"),
        ("ended", 99, [False], 9e9, None, "stopped"),
        ("failed", 99, [True], 0.0, 1.0, "failed"),
    ],
)
def test_state_of_a_run(state, done, alive, quiet, pace, wanted: str) -> None:
    assert judge(replace(RUNNING, state=state), done, alive, quiet, pace) == wanted


def test_ray_decides_which_workers_are_alive(run_dir: Path) -> None:
    assert RunReader(run_dir).read([("ab12cd34ef", 4242)]).state == "running"
    view = RunReader(run_dir).read([("ab12cd34ef", 4243)])
    assert (view.state, [worker.alive for worker in view.workers]) == ("dead", [True, False])


def test_a_dead_process_is_noticed_even_if_its_pid_is_reused(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    worker = replace(HERE, pid=child.pid, born=birth(child.pid))
    folder = write(tmp_path / "run", replace(RUNNING, workers=(worker,)), step(5))
    assert RunReader(folder).read().state == "running"
    child.kill()
    while birth(child.pid) is not None:  # a zombie is dead too
        time.sleep(0.01)
    assert RunReader(folder).read().state == "dead"
    child.wait()
    later = replace(RUNNING, workers=(replace(HERE, born=HERE.born - 1),))
    assert RunReader(write(folder, later, step(5))).read().state == "dead"


def test_command_prints_a_snapshot(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "mine", "--storage", str(run_dir.parent), "--once"]) == 0
    text = capsys.readouterr().out
    for words in ("40 of 100 (40%)", "tokens/s         3050", "25.00%", "step 40, 1 min 3"):
        assert words in text
    assert text.splitlines()[-1].split() == [
        "1", "another.machine", "(ab12cd34)", "4242", "1", "cuda:3", "unknown",
    ]  # fmt: skip
    assert main(["top", str(run_dir), "--json"]) == 0
    view = json.loads(capsys.readouterr().out)
    assert (view["step"], view["workers"][1]["worker"]["gpu"]) == (40, "cuda:3")
    assert main(["top", "none", "--storage", str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fmray: no run at none or ") and error.count("\n") == 1


def test_command_without_a_terminal_ends_with_the_run(tmp_path: Path, capsys) -> None:
    ended = replace(RUNNING, state="ended", total=5)
    assert main(["top", str(write(tmp_path / "run", ended, step(5)))]) == 0
    assert "state            finished" in capsys.readouterr().out
    # a run without a status, by an older fmray, and one without steps
    assert main(["top", str(write(tmp_path / "old", None, step(5))), "--once"]) == 0
    assert "state            unknown" in capsys.readouterr().out
    assert main(["top", str(write(tmp_path / "new", RUNNING, "")), "--once"]) == 0
    assert "0 of 100" in capsys.readouterr().out
    (tmp_path / "new" / STATUS_FILE).write_text('{"state": "running"}')
    assert main(["top", str(tmp_path / "new"), "--once"]) == 2
    assert "another version of fmray" in capsys.readouterr().err


def test_live_view_in_a_terminal(run_dir: Path) -> None:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render(RunReader(run_dir).read()))
    text = console.export_text()
    assert "40 of 100" in text and "another.machine (ab12cd34)" in text and "━" in text


def test_durations_and_status_round_trip(tmp_path: Path) -> None:
    assert [duration(s) for s in (0, 59.9, 61, 3600, 86399)] == [
        "0 s", "59 s", "1 min 01 s", "1 h 00 min", "23 h 59 min",
    ]  # fmt: skip
    assert read_status(write(tmp_path / "run", RUNNING, "")) == RUNNING
    assert birth(2**30) is None

"""One Ray session, started as `fmray quickstart` does: jobs, their exit codes, and doctor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from fmray.cli import main
from fmray.config import ClusterConfig
from fmray.runtime.cluster import Session, check_answers, start_or_join, submit
from fmray.runtime.console import open_log
from fmray.runtime.placement import machines_of_cluster

JOB = """
import os, sys, time
print("folder", os.getcwd(), "words", sys.argv[1:], flush=True)
time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[1]))
"""

FAILING_JOB = """
import sys
from fmray.runtime.console import say
say("step 1 is done")
print("chatter of a library")
print("fmray: no room", file=sys.stderr)
sys.exit(1)
"""


@pytest.fixture(scope="module")
def session(ray_cluster: str) -> Iterator[Session]:
    with start_or_join(ClusterConfig()) as session:
        assert session.address == ray_cluster
        yield session


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "a job.py"
    path.write_text(JOB)
    return path


def test_jobs_run_in_this_folder_and_return_their_exit_codes(
    session: Session, script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert session.on_head_node
    assert submit(session, script, ["0", "0", "a b"], "passes") == 0
    assert f"folder {os.getcwd()} words ['0', '0', 'a b']" in capsys.readouterr().out
    assert submit(session, script, ["3", "0"], "fails") == 3


def test_with_an_open_log_only_the_jobs_own_lines_and_its_error_are_shown(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "job.py"
    script.write_text(FAILING_JOB)
    with open_log(tmp_path / "log.txt"):
        assert submit(session, script, [], "reports") == 1
    assert capsys.readouterr().out == "step 1 is done\nfmray: no room\n"
    assert "chatter of a library" in (tmp_path / "log.txt").read_text()


def test_joining_leaves_the_cluster_running(session: Session) -> None:
    with start_or_join(ClusterConfig()) as joined:
        assert joined.address == session.address
    assert ray.is_initialized()
    assert [machine.gpus for machine in machines_of_cluster()] == [0]


def test_a_job_that_runs_elsewhere_gets_the_folder(
    session: Session, script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = Session(session.address, session.dashboard, on_head_node=False)
    assert submit(elsewhere, script, ["4", "0"], "uploaded") == 4
    folder = capsys.readouterr().out.partition("folder ")[2].partition(" words")[0]
    assert folder != str(script.parent)


def test_interrupting_stops_the_job(session: Session, script: Path) -> None:
    program = (
        "import signal\nfrom pathlib import Path\n"
        "from fmray.runtime.cluster import Session, submit\n"
        # otherwise the background jobs of a shell, such as a CI, ignore the signal
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"session = Session({session.address!r}, {session.dashboard!r}, True)\n"
        f"submit(session, Path({str(script)!r}), ['0', '600'], 'interrupted')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    assert any("folder" in line for line in process.stdout), "the job did not start"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    client = JobSubmissionClient(session.dashboard)
    deadline = time.monotonic() + 30
    while client.get_job_status("interrupted") == JobStatus.RUNNING:
        assert time.monotonic() < deadline, "the job kept running"
        time.sleep(0.2)
    assert client.get_job_status("interrupted") == JobStatus.STOPPED


def test_doctor_sees_the_cluster(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: a\ndata: {{shapes: {{}}, max_length: 128, store: {tmp_path}}}\n"
        f"cluster: {{storage: {tmp_path}, cpus_per_worker: 0.5, data_cpus: 0.5}}\n"
    )
    assert main(["doctor", "--config", str(recipe)]) == 0
    assert "ok   a Ray cluster is running" in capsys.readouterr().out
    assert ray.is_initialized(), "doctor keeps an existing connection"


def test_a_cluster_without_dashboard_accepts_no_jobs(script: Path) -> None:
    with pytest.raises(ValueError, match="has no dashboard and so accepts no jobs"):
        submit(Session("127.0.0.1:1", None, on_head_node=False), script, [], "none")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
        ("ray://127.0.0.1:10001", "should be HOST:PORT of a Ray head node"),
        ("127.0.0.1:99999", "no Ray cluster answers"),
        ("somewhere", "should be HOST:PORT"),
    ],
)
def test_an_address_without_a_cluster_is_an_error(address: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_answers(address)


def test_ray_address_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ValueError, match="RAY_ADDRESS: no Ray cluster answers"):
        check_answers(None)
    check_answers("local")

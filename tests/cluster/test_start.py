"""A Ray that fmray starts listens on this machine only; what keeps it from starting is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, subprocess, sys
from pathlib import Path
import psutil
from fmray.config import ClusterConfig
from fmray.errors import exit_code
from fmray.runtime.cluster import start_or_join, submit
from fmray.runtime.exposure import listening, token_file

def run(address=None):
    with start_or_join(ClusterConfig(address=address)) as session:
        if address:
            return
        import ray
        ray.get(ray.remote(lambda: 1).options(num_cpus=0).remote())  # a worker
        me = psutil.Process()
        tree = {me.pid: me} | {child.pid: child for child in me.children(recursive=True)}
        for connection in psutil.net_connections("tcp"):
            if connection.status == "LISTEN" and connection.pid in tree:
                print("listens", connection.laddr.ip, connection.laddr.port)
        print("mode", oct(token_file().stat().st_mode & 0o777), session.address)
        print(*listening(), sep="\\n")
        sys.stdout.flush()
        for changes in ({}, {"RAY_AUTH_MODE": "token"}, {"HOME": "/nowhere"}):
            keep = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"}
            command = [sys.executable, "-c", open(sys.argv[1]).read(), sys.argv[1], session.address]
            done = subprocess.run(command, env=keep | changes, capture_output=True, text=True)
            print("joined", done.returncode, done.stderr.strip().splitlines(), done.stdout.strip())

        job = Path(sys.argv[1]).with_name("job.py")
        job.write_text(
            "import ray\\n"
            "from fmray.config import ClusterConfig\\n"
            "from fmray.runtime.cluster import start_or_join\\n"
            "with start_or_join(ClusterConfig()) as session:\\n"
            "    print('in the job', ray.get(ray.remote(lambda: 6).remote()))\\n"
        )
        print("submitted", submit(session, job, [], "job"))

sys.exit(exit_code(run, *sys.argv[2:]))
"""


@pytest.mark.usefixtures("no_ray_cluster")
def test_it_listens_on_loopback_and_asks_for_its_token(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    names = ("RAY_ADDRESS", "RAY_AUTH_MODE")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run(
        [sys.executable, program, program],
        env=environment | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    addresses = {
        line.split()[1].removeprefix("::ffff:") for line in lines if line.startswith("listens")
    }
    assert addresses == {"127.0.0.1"}, done.stdout
    assert any(line.startswith("mode 0o600 127.0.0.1:") for line in lines)
    assert any("Ray's raylet listens on 127.0.0.1" in line for line in lines), done.stdout
    without, with_token, elsewhere = (line for line in lines if line.startswith("joined"))
    refused = 'joined 2 ["fmray: the Ray cluster at 127.0.0.1:'
    assert without.startswith(refused), without
    assert "asks for a token: set RAY_AUTH_MODE=token" in without
    assert with_token.startswith("joined 0 []"), with_token
    assert "in the job 6" in lines and "submitted 0" in lines, done.stdout
    assert elsewhere.startswith(refused), elsewhere


@pytest.mark.usefixtures("no_ray_cluster")
def test_a_long_folder_is_one_line(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    folder = tmp_path / ("x" * 110)
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, program, program],
        env=environment | {"HOME": str(tmp_path), "RAY_TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("fmray: RAY_TMPDIR: the path") and done.stderr.count("\n") == 1

"""A training whose storage fills up or hangs, and whose MLflow server is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from support.chaos import INTERVAL, MEGABITS, Training, same
from support.machines import Machines, until

Train = Callable[..., Training]
Figure = Callable[[str], None]
MLFLOW_PORT = 5000


def test_the_storage_is_full_for_a_while(
    machines: Machines, train: Train, calm: list[float], figure: Figure, small_storage: Path
) -> None:
    """The job logs the reason, retries, and resumes once there is space."""
    ballast = small_storage / "ballast"
    training = train("full", storage=small_storage)
    training.until_step(INTERVAL + 2)
    # fill it
    subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=4096"], check=False)
    training.until_said("; resuming from step")
    output = training.job.text()
    ballast.unlink()
    same(training.finish(), calm)
    training.leaves_nothing()
    assert "with 0.0 MiB free" in output or "No space left on device" in output
    assert max(training.watch.repeated) <= INTERVAL
    figure(
        f"recovered in {training.watch.recovered(training.fault):.1f} s,"
        f" repeated {training.watch.repeated}"
    )


def test_the_storage_hangs_longer_than_the_timeout_between_workers(
    machines: Machines, train: Train, calm: list[float], figure: Figure, slow_storage: Path
) -> None:
    """The file system is frozen while a checkpoint is written: no write returns before it thaws."""
    timeout = 30
    training = train("slow", storage=slow_storage, cluster={"timeout_s": timeout})
    folder = training.storage / "slow"
    until(lambda: any(folder.glob(".checkpoint-*.partial")), 600, "a checkpoint to be written")
    training.fault = time.monotonic()
    subprocess.run(["fsfreeze", "--freeze", slow_storage], check=True)
    try:
        time.sleep(timeout + 5)
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", slow_storage], check=True)
    same(training.finish(), calm)
    training.leaves_nothing()
    assert training.watch.repeated == []
    figure(f"continued {training.watch.recovered(training.fault) - timeout - 5:.1f} s after it")


def test_the_mlflow_server_stops_and_returns(
    machines: Machines, train: Train, calm: list[float], figure: Figure, folder: Path
) -> None:
    """Training does not wait for it, and at the end no metric is missing."""
    uri = f"http://{machines.head.address}:{MLFLOW_PORT}"

    def listens() -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection((machines.head.address, MLFLOW_PORT), timeout=1).close()
            return True
        return False

    def serve(number: int) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(folder / "mlartifacts")]
        command += ["--host", machines.head.address, "--port", str(MLFLOW_PORT)]
        machines.run(command, f"mlflow-{number}")

    def kill() -> None:
        for pid in machines.head.find("mlflow"):
            os.kill(pid, signal.SIGKILL)

    serve(1)
    try:
        until(listens, 600, "the MLflow server")
        training = train("tracked", tracking={"uri": uri, "experiment": "served"})
        training.until_step(INTERVAL + 2)
        kill()
        until(lambda: not listens(), 30, "the MLflow server to stop")
        training.until_step(INTERVAL + 6)
        machines.cap(1)  # it is slow to start
        serve(2)
        until(listens, 600, "the MLflow server")
        seconds = time.monotonic() - training.fault
        figure(f"unreachable for {seconds:.1f} s, {training.watch.step} steps")
        machines.cap(MEGABITS)
        same(training.finish(), calm)
    finally:
        kill()
    training.leaves_nothing()
    assert training.watch.repeated == []
    assert "tracking of run tracked fails, training continues" in training.job.text()

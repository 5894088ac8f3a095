"""Three machines for all fault tests, storage that fills up or hangs, and the cost of faults."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.chaos import MEGABITS, Training, write_recipe
from support.machines import PREFIX, Machines, made
from support.training import make_store

FIGURES = pytest.StashKey[list[str]]()
SMALL_BYTES = 48 * 2**20


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """A folder with a short path, for Ray's sockets; its name contains its owner."""
    path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def small_storage(folder: Path) -> Iterator[Path]:
    """A separate file system in memory."""
    yield from _mounted(folder / "small", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "tmpfs")


@pytest.fixture(scope="session")
def slow_storage(folder: Path) -> Iterator[Path]:
    """A separate file system that can be frozen (`fsfreeze`): writes wait until it thaws."""
    image = folder / "slow.img"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(2 * SMALL_BYTES)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    yield from _mounted(folder / "slow", "-o", "loop", str(image))


def _mounted(path: Path, *arguments: str) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", *arguments, path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture(scope="session")
def cluster(folder: Path, small_storage: Path, slow_storage: Path) -> Iterator[Machines]:
    """Machines for the session; created after the file systems, to see them."""
    with made(folder / "m") as machines:
        machines.cap(MEGABITS)
        yield machines
        left = machines
    assert not any(machine.pids() for machine in left.machines)


@pytest.fixture
def machines(cluster: Machines) -> Machines:
    """The machines, with all faults repaired."""
    cluster.mend()
    cluster.cap(MEGABITS)
    return cluster


@pytest.fixture(scope="session")
def store(folder: Path) -> Path:
    return make_store(folder)


@pytest.fixture
def train(folder: Path, store: Path, machines: Machines) -> Callable[..., Training]:
    """Submits a training."""
    return submitter(folder, store, machines)


@pytest.fixture(scope="session")
def calm(folder: Path, store: Path, cluster: Machines) -> list[float]:
    """Losses of the training that nothing disturbs."""
    cluster.mend()
    undisturbed = submitter(folder, store, cluster)("calm")
    losses = undisturbed.finish()
    undisturbed.leaves_nothing()
    assert undisturbed.watch.repeated == []
    return losses


def submitter(folder: Path, store: Path, machines: Machines) -> Callable[..., Training]:
    def submit(run_id: str, storage: Path | None = None, **changes: Any) -> Training:
        database, storage = folder / "mlflow.db", storage or folder / "runs"
        recipe = write_recipe(folder / f"{run_id}.yaml", store, storage, database, **changes)
        return Training(machines, run_id, storage, recipe, database)

    return submit


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Record a line for the end of the tests' output."""
    lines = request.config.stash.setdefault(FIGURES, [])
    return lambda text: lines.append(f"{request.node.name}: {text}")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    lines = config.stash.get(FIGURES, [])
    if lines:
        terminalreporter.section("cost of faults")
        for line in lines:
            terminalreporter.write_line(line)

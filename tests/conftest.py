"""Shared setup: one marker per folder, skip reasons for what a machine lacks, and fixtures."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from support.s3 import S3

COST_CLASSES = {"unit", "fuzz", "local", "cluster", "serve", "chaos", "gpu"}
TESTS = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before any test imports DeepSpeed or starts Ray."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # machines are shared: how long an example takes says nothing of the code
    settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its folder, so that `pytest -m unit` runs one cost class."""
    folders = {item.path.relative_to(TESTS).parts[0] for item in items}
    no_machines = _no_machines() if "chaos" in folders else None
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in COST_CLASSES:
            item.add_marker(getattr(pytest.mark, folder))
        if folder == "gpu" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="this machine has no GPU"))
        if folder == "chaos":  # 25 minutes
            item.add_marker(pytest.mark.slow)
        if folder == "chaos" and no_machines is not None:
            item.add_marker(pytest.mark.skip(reason=no_machines))
    # with `-n 2`, the long groups start first
    items.sort(key=lambda item: (_group(item.nodeid) != "ray", "/unit/" in item.nodeid))


def _group(nodeid: str) -> str:
    """Return the group that one process of `pytest -n 2` runs: all with Ray, or all of one file."""
    path = nodeid.partition("::")[0]
    return "ray" if path.startswith("tests/cluster/") or path.endswith("/test_ray.py") else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Keep each group in one process: two Ray sessions on a machine get in each other's way."""

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return Groups(config, log)


def _no_machines() -> str | None:
    """Return why this machine cannot simulate three machines, or None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc", "losetup", "mkfs.ext4", "fsfreeze"):
        if shutil.which(tool) is None:
            return f"there is no `{tool}`"
    name = f"fmray-probe-{os.getpid()}"
    for command in (["losetup", "--find"], ["ip", "netns", "add", name]):
        tried = subprocess.run(command, capture_output=True, text=True, check=False)
        if tried.returncode:
            return f"`{' '.join(command[:2])}` fails: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    """An S3 server on loopback with an empty bucket; skips where moto is not installed."""
    from support.s3 import s3_server  # few tests have use for what it imports

    with s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real photographs and questions; skips where FMRAY_TEST_DATA is not set."""
    folder = os.environ.get("FMRAY_TEST_DATA")
    if not folder:
        pytest.skip("FMRAY_TEST_DATA is not set")
    path = Path(folder)
    assert path.is_dir(), f"FMRAY_TEST_DATA names {path}, which is not a folder"
    return path

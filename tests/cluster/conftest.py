"""One Ray session for the folder: two CPUs, a dashboard, workers that find the tests' modules.

Modules that train, search or submit on it use the fixture `ray_cluster`; modules that start a Ray
of their own use `no_ray_cluster`. Tests without Ray run first, those with a Ray of their own last,
so that the session starts once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.ray_session import ray_session

FOLDER = Path(__file__).parent


class SharedRay:
    """The session, started at its first use."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._address: str | None = None

    def start(self) -> str:
        """Return the address, of the running session or of a new one."""
        if self._address is None:
            patch = self._open.enter_context(pytest.MonkeyPatch.context())
            patch.delenv("RAY_ADDRESS", raising=False)
            patch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.2")
            folders = [FOLDER / "train", FOLDER / "search"]
            self._address = self._open.enter_context(ray_session(*folders, dashboard=True))
        return self._address

    def stop(self) -> None:
        """End the session, if it runs."""
        self._open.close()
        self._address = None


@pytest.fixture(scope="package")
def shared_ray() -> Iterator[SharedRay]:
    shared = SharedRay()
    yield shared
    shared.stop()


@pytest.fixture(scope="module")
def ray_cluster(shared_ray: SharedRay) -> str:
    """This process is connected to the folder's Ray; its address."""
    return shared_ray.start()


@pytest.fixture(scope="module")
def no_ray_cluster(shared_ray: SharedRay) -> None:
    """The folder's Ray does not run: the module starts its own."""
    shared_ray.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order this folder's tests: without Ray, with the folder's, with one of their own."""

    def turn(item: pytest.Item) -> int:
        names = item.fixturenames
        return 2 if "no_ray_cluster" in names else int("ray_cluster" in names)

    places = [n for n, item in enumerate(items) if FOLDER in item.path.parents]
    ordered = sorted((items[n] for n in places), key=turn)
    for place, item in zip(places, ordered, strict=True):
        items[place] = item

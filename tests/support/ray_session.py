"""A local Ray session with two CPUs, whose workers can import fmray and the tests' modules."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

TESTS = Path(__file__).parents[1]


@contextmanager
def ray_session(*folders: Path, dashboard: bool = False) -> Iterator[str]:
    """Its address. folders: more of them for the workers' path."""
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS, *folders)))
    context = ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=dashboard,
        log_to_driver=not dashboard,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()

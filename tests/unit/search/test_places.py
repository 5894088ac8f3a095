"""Number of concurrent trials on made-up clusters."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmray.config import ClusterConfig
from fmray.runtime.placement import Machine, concurrency


def trials(machines: list[Machine], **cluster: Any) -> int:
    return concurrency(ClusterConfig.model_validate(cluster), machines)[0]


@pytest.mark.parametrize(
    ("machines", "cluster", "expected"),
    [
        # a laptop: two workers of 0.75 CPUs and 0.5 CPUs for data fill two cores
        ([(2, 0)], {"workers": 2, "cpus_per_worker": 0.75, "data_cpus": 0.5}, 1),
        ([(4, 0)], {"workers": 2, "cpus_per_worker": 0.75, "data_cpus": 0.5}, 2),
        ([(2, 0)], {"workers": 0, "cpus_per_worker": 1}, 2),
        ([(2, 0)], {"workers": 1, "cpus_per_worker": 0.1, "data_cpus": 0}, 20),
        # four nodes of 8 GPUs: 32 trials of 1 GPU, 8 of 4, 4 of 5 (a worker sits on one node)
        ([(64, 8)] * 4, {"workers": 1, "gpus_per_worker": 1, "data_cpus": 1}, 32),
        ([(64, 8)] * 4, {"workers": 4, "gpus_per_worker": 1, "data_cpus": 1}, 8),
        ([(64, 8)] * 4, {"workers": 1, "gpus_per_worker": 5, "data_cpus": 1}, 4),
        # CPUs are scarce: 5 workers and 2 CPUs on one node, 4 and 8 on the other
        ([(32, 8)] * 2, {"workers": 1, "cpus_per_worker": 6, "gpus_per_worker": 1}, 9),
        # GPUs on one node, the CPUs for data on another
        ([(4, 4), (8, 0)], {"workers": 1, "gpus_per_worker": 1, "data_cpus": 2}, 4),
    ],
)
def test_number_of_trials(
    machines: list[tuple[float, float]], cluster: dict[str, Any], expected: int
) -> None:
    nodes = [Machine(f"n{i}", *room) for i, room in enumerate(machines)]
    assert trials(nodes, **cluster) == expected


def test_the_explanation_is_one_line() -> None:
    config = ClusterConfig(workers=2, cpus_per_worker=0.75, data_cpus=0.5)
    assert concurrency(config, [Machine("here", 4, 0)]) == (
        2,
        "2 trials at once: each needs 2 workers of 0.75 CPU and 0.5 CPU for data, of 1 node"
        " with 4 CPUs and 0 GPUs",
    )


@pytest.mark.parametrize(
    ("machines", "cluster"),
    [
        ([], {"workers": 1}),
        ([(2, 0)], {"workers": 2}),  # no CPU left for data
        ([(2, 0)], {"workers": 1, "gpus_per_worker": 1}),
        ([(2, 0), (2, 0)], {"workers": 1, "cpus_per_worker": 3}),
        ([(0.5, 0)], {"workers": 0}),
    ],
)
def test_a_search_that_cannot_be_placed_is_an_error(machines, cluster) -> None:
    nodes = [Machine(f"n{i}", *room) for i, room in enumerate(machines)]
    with pytest.raises(ValueError, match=r"\Acluster: a trial needs .*base_set\)\Z"):
        trials(nodes, **cluster)


@given(
    st.lists(st.tuples(st.integers(0, 16), st.integers(0, 4)), max_size=4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 1),
)
def test_number_of_trials_agrees_with_placing_worker_by_worker(
    machines, workers, cpus, gpus
) -> None:
    """Brute force without CPUs for data: workers are placed one at a time where they fit."""
    room = [list(machine) for machine in machines]
    placed = 0
    while free := [m for m in room if m[0] >= cpus and m[1] >= gpus]:
        free[0][0] -= cpus
        free[0][1] -= gpus
        placed += 1
    nodes = [Machine(f"n{i}", *machine) for i, machine in enumerate(machines)]
    cluster = {
        "workers": workers,
        "cpus_per_worker": cpus,
        "gpus_per_worker": gpus,
        "data_cpus": 0,
    }
    if placed < workers:
        with pytest.raises(ValueError, match="does not fit on"):
            trials(nodes, **cluster)
    else:
        assert trials(nodes, **cluster) == placed // workers

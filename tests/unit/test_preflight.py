"""Placement on invented machines."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmray.config import AdaLlavaRecipe
from fmray.runtime.placement import Machine, preflight


def recipe(**cluster: Any) -> AdaLlavaRecipe:
    train = {"global_batch": 32 * 27 * 5 * 7, "micro_batch": 1}
    return AdaLlavaRecipe.model_validate({"name": "a", "cluster": cluster, "train": train})


def levels(recipe: AdaLlavaRecipe, *machines: Machine) -> list[str]:
    return [finding.level for finding in preflight(recipe, machines)]


def two_cores() -> Machine:
    return Machine("here", 2, 0)


def test_two_workers_on_two_cores_leave_no_cpu_for_the_data() -> None:
    findings = preflight(recipe(workers=2), [two_cores()])
    assert [finding.level for finding in findings] == ["ok", "FAIL"]
    assert str(findings[1]) == (
        "FAIL the workers leave 0 CPUs for Ray Data and cluster.data_cpus is 1: data tasks would"
        " wait forever; cluster.cpus_per_worker: 0.5 would fit"
    )
    assert levels(recipe(workers=2, cpus_per_worker=0.5), two_cores()) == ["ok", "ok"]


def test_local_mode_places_nothing() -> None:
    assert levels(recipe(workers=0), two_cores()) == ["ok"]


def test_a_worker_needs_its_cpus_and_gpus_on_one_machine() -> None:
    machines = [Machine("a", 3, 1), Machine("b", 3, 1)]
    assert levels(recipe(workers=2, cpus_per_worker=2, gpus_per_worker=1), *machines) == [
        "ok",
        "ok",
    ]
    assert levels(recipe(workers=1, cpus_per_worker=4), *machines) == ["FAIL"]
    assert levels(recipe(workers=1, gpus_per_worker=2), *machines) == ["FAIL"]
    findings = preflight(recipe(workers=4, gpus_per_worker=1), machines)
    assert "there is room for 2; cluster.workers: 2 would fit" in findings[0].text


def test_a_task_cannot_use_halves_of_two_cpus() -> None:
    machines = [Machine("a", 2.5, 0), Machine("b", 2.5, 0)]
    assert levels(recipe(workers=2, cpus_per_worker=2), *machines) == ["ok", "FAIL"]


def test_tenths_add_up() -> None:
    assert levels(recipe(workers=3, cpus_per_worker=0.1, data_cpus=0), Machine("a", 0.3, 0)) == [
        "ok",
        "ok",
    ]


@given(
    workers=st.integers(1, 8),
    cpus=st.sampled_from([0.25, 0.5, 1, 2, 3]),
    data_cpus=st.sampled_from([0, 0.5, 1, 3]),
    machines=st.lists(st.integers(1, 6), min_size=1, max_size=3),
)
def test_a_suggested_setting_can_be_placed(
    workers: int, cpus: float, data_cpus: float, machines: list[int]
) -> None:
    """With the setting that a failure names, the recipe passes."""
    nodes = [Machine(f"m{i}", count, 0) for i, count in enumerate(machines)]
    wrong = recipe(workers=workers, cpus_per_worker=cpus, data_cpus=data_cpus)
    failures = [f.text for f in preflight(wrong, nodes) if f.level == "FAIL"]
    for text in failures:
        if not text.endswith(" would fit"):
            continue
        key, value = text.removesuffix(" would fit").rpartition("cluster.")[2].split(": ")
        changed = {**wrong.cluster.model_dump(), key: float(value)}
        assert "FAIL" not in levels(recipe(**changed), *nodes)


def test_no_suggestion_if_nothing_would_fit() -> None:
    [finding] = preflight(recipe(workers=1, gpus_per_worker=1), [two_cores()])
    assert finding.text.endswith("there is room for 0")


@pytest.mark.parametrize("workers", [1, 2])
def test_counts_agree_with_their_nouns(workers: int) -> None:
    text = preflight(recipe(workers=workers, cpus_per_worker=0.5), [two_cores()])[0].text
    assert text.startswith("1 worker of" if workers == 1 else "2 workers of")

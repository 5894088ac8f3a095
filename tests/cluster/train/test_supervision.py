"""The supervisor on real workers: notices, mistakes, and workers that cannot be placed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train import PreemptionInfo
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from support.training import ADAPTIVE, load_recipe, losses, make_store

from fmray.errors import GaveUp
from fmray.runtime.ray_private import get_or_create_autoscaling_coordinator
from fmray.runtime.run_log import read_log
from fmray.train import supervise
from fmray.train.launch import train

pytestmark = pytest.mark.usefixtures("ray_cluster")
TESTS = Path(__file__).parents[2]
TRAIN = {"lr": 2e-3, "steps": 12, "global_batch": 16, "micro_batch": 4, "eval_rows": 4}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The `callbacks` of each trainer that is started."""
    real, calls = supervise._trainer, []

    def count(*arguments: Any) -> Any:
        calls.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(supervise, "_trainer", count)
    return calls


class Drain(WorkerGroupCallback):
    """Sends the first worker group the notice that Ray's watcher sends when a node is drained."""

    def __init__(self, told: Path) -> None:
        self.told = told

    def after_worker_group_start(self, worker_group: Any) -> None:
        if not self.told.exists():
            self.told.write_text(os.environ["RAY_ADDRESS"])  # of the controller
            info = PreemptionInfo(None, {"0123456789abcdef": [1]})
            ray.get([w.actor.mark_preempt.remote(info) for w in worker_group.get_workers()])


def test_a_drained_node_costs_no_step(
    store: Path, tmp_path: Path, started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {"adaptive": ADAPTIVE, "train": TRAIN, "zero": {"stage": 2}}
    elastic = {"workers": (1, 2), "max_failures": 0}
    loaded = load_recipe(store, tmp_path, cluster=elastic, **sections)
    result = train(loaded, "drained", [Drain(tmp_path / "told")])
    out = capsys.readouterr().out
    text = (
        r"node 01234567 \(rank 1\) is being drained: checkpoint at step (\d+);"
        r" resuming from step (\d+)"
    )
    saved, resumed = map(int, re.search(text, out).groups())
    assert saved == resumed < 12
    assert len(started) == 2
    assert (tmp_path / "told").read_text() == ray.get_runtime_context().gcs_address
    assert "RAY_ADDRESS" not in os.environ
    assert "restarts: 1 (last: node 01234567" in out
    lines = [line for line in read_log(result.run_dir / "log.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    alone = train(load_recipe(store, tmp_path, **sections), "alone")
    assert losses(result.run_dir) == pytest.approx(losses(alone.run_dir), rel=1e-3)


def test_a_users_mistake_is_not_retried(store: Path, tmp_path: Path, started: list[Any]) -> None:
    sections = {"adaptive": ADAPTIVE, "train": TRAIN | {"eval_budgets": (0.1, 1.0)}}
    loaded = load_recipe(store, tmp_path, cluster={"workers": 2}, **sections)
    with pytest.raises(ValueError, match=r"budget is 0\.1, less than .* smallest budget here is"):
        train(loaded, "mistake")
    assert len(started) == 1


def test_elastic_workers_without_resources_do_not_wait_forever(tmp_path: Path) -> None:
    cluster = {"workers": (1, 2), "cpus_per_worker": 3, "timeout_s": 10, "max_failures": 0}
    recipe = load_recipe(tmp_path, tmp_path, train=TRAIN, cluster=cluster).recipe
    run: Any = type("Run", (), {"tag": lambda *_: None})()
    with pytest.raises(GaveUp, match=r"1 worker could not be placed within cluster\.timeout_s"):
        supervise.fit(recipe, "waiting", {}, dict, run)


def test_the_reservation_of_a_killed_controller_is_released() -> None:
    """Elastic workers could not be placed until it expired (found by the soak)."""
    coordinator = get_or_create_autoscaling_coordinator()
    for name in ("train-killed", "train-other"):
        ray.get(coordinator.request_resources.remote(name, [{"CPU": 1}], expire_after_s=300))
        assert ray.get(coordinator.get_reserved_resources.remote(name))
    context = SimpleNamespace(run_id="killed")
    supervise._release_reservation(SimpleNamespace(train_run_context=context))
    assert ray.get(coordinator.get_reserved_resources.remote("train-killed")) == {}
    assert ray.get(coordinator.get_reserved_resources.remote("train-other"))
    ray.get(coordinator.cancel_request.remote("train-other"))

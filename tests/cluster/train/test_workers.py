"""Real workers against one process: ZeRO stages, a killed worker, another number of workers."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
import ray
from support.training import ADAPTIVE, FULL, forget_after, load_recipe, losses, make_store

from fmray.errors import exit_code
from fmray.runtime.run_log import read_log, read_status
from fmray.train.checkpoint import find_checkpoint, read_state
from fmray.train.launch import Result, train

pytestmark = pytest.mark.usefixtures("ray_cluster")
TWO = {"workers": 2}
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


def recipe_sections(stage: int, **train_settings: Any) -> dict[str, Any]:
    """Two parameter groups with their own learning rates, checkpoints at steps 3, 6 and 8."""
    return {
        "adaptive": ADAPTIVE,
        "zero": {"stage": stage, "parameter_persistence": 0},
        "train": {
            "lr": 2e-3,
            "scheduler_lr": 5e-3,
            "steps": 8,
            "global_batch": 16,
            "micro_batch": 4,
            "eval_rows": 8,
            "checkpoint_every": 3,
            "keep_checkpoints": 9,
        }
        | train_settings,
    }


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The same training in one process, without accumulation."""
    sections = recipe_sections(0, micro_batch=16)
    return train(load_recipe(store, tmp_path_factory.mktemp("alone"), **sections), "alone")


@pytest.mark.parametrize(  # without Ray, tests/local/train/test_world_sizes.py tries all stages
    "stage", [pytest.param(1, marks=FULL), pytest.param(2, marks=FULL), 3]
)
def test_two_workers_compute_the_same_as_one_and_one_can_resume(
    store: Path, tmp_path: Path, alone: Result, stage: int
) -> None:
    sections = recipe_sections(stage)
    together = train(load_recipe(store, tmp_path, cluster=TWO, **sections), "run")
    assert losses(together.run_dir) == pytest.approx(losses(alone.run_dir), rel=1e-4)
    for name in ("accuracy/0.5", "loss/0.5", "loss/1", "budget"):
        assert together.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-3)
    # one worker resumes with the optimizer state, which shows over five steps
    forget_after(together.run_dir, step=3)
    assert read_state(find_checkpoint(together.run_dir)).world_size == 2
    resumed = train(load_recipe(store, tmp_path, **sections), "run")
    assert losses(resumed.run_dir) == pytest.approx(losses(alone.run_dir), rel=1e-4)


def test_a_killed_worker_resumes_in_the_same_mlflow_run(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After SIGKILL of a worker at step 5, the group resumes from the last checkpoint, which is at
    most an interval of four steps old."""
    log = tmp_path / "killed" / "log.jsonl"
    killed: list[int] = []
    done: list[int] = []

    def kill_one() -> None:
        while not killed:
            if len(read_log(log)) >= 5:
                actors = ray._private.state.actors().values()
                pids = [
                    actor["Address"].get("pid") or actor["Pid"]
                    for actor in actors
                    if "RayTrainWorker" in actor["ActorClassName"] and actor["State"] == "ALIVE"
                ]
                os.kill(pids[-1], signal.SIGKILL)
                killed.append(pids[-1])
                done.append(max(line["step"] for line in read_log(log)))
            time.sleep(0.005)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    result = train(
        load_recipe(
            store,
            tmp_path,
            cluster=TWO,
            tracking={"enabled": True, "experiment": "killed"},
            **recipe_sections(2, steps=24, checkpoint_every=4, eval_rows=4),
        ),
        "killed",
    )
    thread.join(timeout=10)
    assert len(killed) == 1
    text = r"worker \d died \(node \S+, process (\d+)\).*; resuming from step (\d+) \(attempt 2"
    process, resumed = map(int, re.search(text, capsys.readouterr().out).groups())
    assert process == killed[0]
    assert 0 <= done[0] - resumed <= 4
    steps = [line["step"] for line in read_log(log) if "loss" in line]
    assert steps == list(range(1, 25))
    wanted = train(
        load_recipe(store, tmp_path, **recipe_sections(0, steps=24, micro_batch=16)), "wanted"
    )
    assert losses(result.run_dir) == pytest.approx(losses(wanted.run_dir), rel=1e-3)

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == "killed"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == result.mlflow_run_id
    assert run.info.status == "FINISHED"
    assert run.data.tags["fmray.restarts"] == "1"
    assert run.data.tags["fmray.last_failure"].startswith("worker ")
    history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train/loss")}
    assert sorted(history) == steps


def test_a_run_that_diverges_stops_at_once(store: Path, tmp_path: Path, capsys: Any) -> None:
    """One line, no restart, no model, and a failed MLflow run."""
    loaded = load_recipe(
        store,
        tmp_path,
        cluster=TWO,
        tracking={"enabled": True, "experiment": "diverged"},
        **recipe_sections(2, lr=1e30, gradient_clip=0, checkpoint_every=1),
    )
    assert exit_code(lambda: train(loaded, "run")) == 1
    out, err = capsys.readouterr()
    assert re.search(r"^fmray: run run: step \d: .* not finite.*; lower train\.lr", err, re.M)
    assert "attempt" not in out and "Traceback" not in err
    assert not (tmp_path / "run" / "model").exists()
    assert read_status(tmp_path / "run").state == "failed"
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == "diverged"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"

"""Searches on real workers: killed and resumed, with stopped trials and with failing ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
import ray
import yaml
from ray.util.placement_group import placement_group_table
from ray.util.state import list_actors
from support.fewshot import ENCODER, EPISODES, start_encoder
from support.selection import color_store
from support.training import ADAPTIVE, load_recipe, make_store

from fmray.config import LoadedRecipe, load
from fmray.config.search import SearchRecipe
from fmray.search.run import search
from fmray.search.state import read_finished

ROOT = Path(__file__).parents[3]
PATIENCE = 300  # seconds, on a busy machine
# actors of Ray's own that live as long as the cluster: autoscaling requests, statistics of Ray Data
DETACHED = {"_AutoscalingCoordinatorActor", "_StatsActor", "DatasetManager"}


@pytest.fixture(scope="module", autouse=True)
def address(ray_cluster: str) -> str:
    return ray_cluster


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four steps on a store of colours, from the same weights."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "colors").mkdir()
    store = color_store(folder / "colors")
    start_encoder(folder / "it")
    return {
        "kind": "fewshot",
        "name": "trial",
        "images": {"store": str(store.path)},
        "target": {"collection": "target", "unlabelled": 30},
        "encoder": ENCODER | {"checkpoint": str(folder / "it")},
        "episodes": EPISODES,
        "train": {"steps": 4, "episodes_per_step": 2, "lr": 0.02},
        "select": {"method": "all", "images_per_class": 10},
        "evaluate": {"tasks": 20, "ways": 3, "shots": [1], "queries": 4},
        "cluster": {"workers": 1, "cpus_per_worker": 0.5, "data_cpus": 0.5, "max_failures": 0},
    }


def write_search(folder: Path, base: dict[str, Any], address: str, **values: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    recipe = {
        "kind": "search",
        "name": "tries",
        "base": "base.yaml",
        "space": "task_subsets",
        "algorithm": "random",
        "trials": 4,
        "evaluations": 2,
        "cluster": {"address": address, "storage": str(folder / "runs")},
        "tracking": {"experiment": "tries"},
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(recipe | values))
    return path


def load_search(path: Path, *overrides: str) -> LoadedRecipe[SearchRecipe]:
    return load(path, overrides, (SearchRecipe,))


def nothing_left() -> bool:
    """Whether no placement group and no actor is left; they end within seconds of their owner."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
        alive = list_actors(
            ray.get_runtime_context().gcs_address,  # not another Ray on this machine
            filters=[("state", "=", "ALIVE")],
        )
        actors = [actor for actor in alive if actor.class_name not in DETACHED]
        if not groups and not actors:
            return True
        time.sleep(0.5)
    print(groups, actors)
    return False


def mlflow_runs(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the parent run and its children by name."""
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == "tries"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("run")
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    return parent, runs


def test_a_killed_search_resumes_and_keeps_its_finished_trials(
    base, address: str, tmp_path: Path
) -> None:
    path = write_search(tmp_path, base, address, trials=3)
    trials = tmp_path / "runs" / "run" / "trials.jsonl"
    command = [sys.executable, str(ROOT / "jobs" / "search.py"), "--config", str(path)]
    driver = subprocess.Popen([*command, "--run-id", "run"], env=os.environ | {"PYTHONPATH": ROOT})
    end = time.monotonic() + PATIENCE
    while not any(trial.status == "done" for trial in read_finished(trials)):
        assert driver.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before_kill = read_finished(trials)

    result = search(load_search(path), "run")
    written = read_finished(trials)
    assert written[: len(before_kill)] == before_kill
    assert [trial.number for trial in written] == [trial.number for trial in result.finished]
    assert sorted(trial.number for trial in written) == [0, 1, 2, 3]
    [duplicate] = [trial for trial in written if trial.status == "duplicate"]
    assert duplicate.origin == "warm: all tasks" and duplicate.steps == 0
    assert [duplicate.metrics] == [trial.metrics for trial in written if trial.number == 0]
    trained = [trial for trial in result.finished if trial.status != "duplicate"]
    assert len(trained) == 3
    assert len({trial.key for trial in trained}) == 3
    assert {trial.status for trial in trained} == {"done"}
    origins = {trial.origin for trial in result.finished}
    assert {"warm: Algorithm 1", "warm: all tasks", "warm: only crimson"} <= origins
    for trial in trained:
        steps = [point["step"] for point in trial.curve]
        # a trial that resumes from a checkpoint does not repeat an evaluation
        assert steps == [2, 4] or steps == [4]
        assert trial.curve[-1]["accuracy"] == trial.metrics["accuracy"]
        assert trial.metrics["tasks"] == len(trial.values["tasks"])
        assert (result.run_dir / "trials" / f"run-{trial.number:03d}" / "model").is_dir()
    assert [2, 4] in [[point["step"] for point in trial.curve] for trial in trained]
    best = max(trial.metrics["accuracy"] for trial in trained)
    assert result.recommended.metrics["accuracy"] == best
    report = (result.run_dir / "report.html").read_text()
    number = result.recommended.number
    against = f"trial {number} against all tasks (trial 0) on 20 1-shot"
    assert (against if number else "trial 0 is that of all tasks") in report
    assert list((result.run_dir / "tune").rglob("events.out.tfevents*"))
    assert nothing_left()

    parent, children = mlflow_runs(tmp_path)
    assert parent.info.status == "FINISHED"
    assert set(children) == {f"run-{trial.number:03d}" for trial in trained}
    for trial in trained:
        child = children[f"run-{trial.number:03d}"]
        assert child.info.status == "FINISHED"
        assert child.data.metrics["trial/accuracy"] == trial.metrics["accuracy"]
        assert "train/loss" in child.data.metrics
    # a finished search has nothing to do, and rejects other settings
    assert search(load_search(path), "run").finished == written
    with pytest.raises(ValueError, match=r"search\.json cannot be resumed: seed was 0 and is 1"):
        search(load_search(path, "seed=1"), "run")


def test_asha_stops_trials_and_a_failing_trial_is_recorded(
    base, address: str, tmp_path: Path
) -> None:
    """Episodes of three classes, or of more than the data have (these trials fail).

    The search minimizes accuracy: the base recipe is good at it, so a higher learning rate is
    stopped.
    """
    options = {"ways": [3, 9], "shots": None, "tasks": None, "temperature": None}
    scheduler = {"kind": "asha", "grace": 1, "reduction": 2}
    base = base | {"cluster": base["cluster"] | {"cpus_per_worker": 1.5}}  # one at a time
    path = write_search(
        tmp_path,
        base,
        address,
        space="fewshot",
        options=options | {"lr": [0.02, 100.0]},
        objectives=[{"metric": "accuracy", "mode": "min"}],
        scheduler=scheduler,
        seed=6,
    )
    result = search(load_search(path), "run")
    by_number = {trial.number: trial for trial in result.finished}
    assert sorted(by_number) == [0, 1, 2, 3]
    assert by_number[0].origin == "warm: the base recipe" and by_number[0].status == "done"
    for trial in result.finished:
        if trial.values["episodes.ways"] == 9:
            assert trial.status == "failed" and "9-way episode" in trial.reason
            assert not trial.metrics
    stopped = [trial for trial in result.finished if trial.status == "stopped"]
    assert stopped and all(trial.steps == 2 for trial in stopped)
    assert {"failed", "stopped", "done"} == {trial.status for trial in result.finished}
    assert nothing_left()
    _, children = mlflow_runs(tmp_path)
    statuses = {number: children[f"run-{number:03d}"].info.status for number in by_number}
    assert len(children) == 4
    for number, trial in by_number.items():
        assert statuses[number] == ("FAILED" if trial.status == "failed" else "FINISHED")


def test_an_adaptive_model_is_judged_at_each_budget(address: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    train_settings = {"steps": 2, "eval_budgets": [0.5, 1.0]}
    cluster = {"workers": 1, "cpus_per_worker": 1.0}
    recipe = load_recipe(
        make_store(tmp_path / "data"),
        tmp_path,
        adaptive=ADAPTIVE | {"design": "heads"},
        train=train_settings,
        cluster=cluster,
    ).recipe
    names = ["accuracy", "share", "latency"]
    path = write_search(
        tmp_path,
        recipe.model_dump(mode="json"),
        address,
        space="budgets",
        options={"design": ["layers", "heads"], "latency_token": None, "tau": None, "lr": None},
        objectives=[{"metric": n, "mode": "max" if n == "accuracy" else "min"} for n in names],
        algorithm="nsga2",
        trials=2,
        evaluations=1,
        recommend="best accuracy under 0.6 share",
    )
    result = search(load_search(path), "run")
    assert [trial.status for trial in result.finished] == ["done", "done"]
    for trial in result.finished:
        metrics = trial.metrics
        for name in names:
            values = [metrics[f"{name}/0.5"], metrics[f"{name}/1"]]
            assert metrics[name] == pytest.approx(sum(values) / 2)
        assert metrics["share/0.5"] <= 0.5 < metrics["share/1"] == 1
        assert min(metrics["latency/0.5"], metrics["latency/1"]) > 0
    assert result.recommended.metrics["budget"] == 0.5
    best = max(trial.metrics["accuracy/0.5"] for trial in result.finished)
    assert result.recommended.metrics["accuracy"] == best
    assert (
        f"trial {result.recommended.number} at budget 0.5 (accuracy"
        in (result.run_dir / "report.html").read_text()
    )
    assert nothing_left()


def test_an_impossible_search_is_an_error_before_any_trial(
    base, address: str, tmp_path: Path
) -> None:
    path = write_search(tmp_path, base, address)
    for overrides, message in (
        (["base_set=[cluster.workers=50, train.episodes_per_step=50]"], "a trial needs 50 workers"),
        (["base_set=[cluster.workers=0]"], "cluster.workers: 0 trains in the driver itself"),
        (["space=nothing"], "tune_spaces/ has no 'nothing'"),
        (["objectives=[{metric: acuracy}]"], "trials report no 'acuracy'"),
        (["objectives=[{metric: latency}]"], "trials report no 'latency'; they report accuracy"),
        (["recommend=the best one"], "is not a rule"),
    ):
        with pytest.raises(ValueError, match=message):
            search(load_search(path, *overrides), f"run-{message.split()[0].strip('.:')}")
    assert not list((tmp_path / "runs").rglob("trials.jsonl"))
    assert json.dumps(list((tmp_path / "runs").rglob("tune"))) == "[]"

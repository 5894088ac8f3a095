"""Finetuning by two workers against one: gradients, checkpoints, and a table by Ray tasks."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from support.fewshot import TRAIN, fewshot_recipe, start_encoder, weights
from support.selection import color_store
from support.training import FULL, forget_after, losses

from fmray.data.image_store import ImageStore
from fmray.train.fewshot.compare import compare
from fmray.train.launch import train

pytestmark = pytest.mark.usefixtures("ray_cluster")
TWO = {"workers": 2, "cpus_per_worker": 0.5, "data_cpus": 0.5}
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return color_store(tmp_path_factory.mktemp("colors"))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start_encoder(tmp_path_factory.mktemp("start"))


@pytest.mark.parametrize(
    ("method", "strategy"),
    [("multitask", "ddp"), pytest.param("maml", "ddp", marks=FULL), ("lp_ft", "zero")],
)
def test_two_workers_learn_the_same_as_one_and_one_can_resume(
    store, start: Path, tmp_path: Path, method: str, strategy: str
) -> None:
    """Three episodes per step, which two workers cannot divide evenly."""
    steps = TRAIN | {"method": method, "checkpoint_every": 2, "keep_checkpoints": 9}
    steps |= {"episodes_per_step": 3}
    if strategy == "zero":
        # at 1e-3 the loss diverges (0.007, 163, 82, ...) and amplifies rounding
        steps |= {"optimizer": "adamw", "lr": 1e-4}
    encoder = {"checkpoint": start}
    alone = train(fewshot_recipe(store, tmp_path / "alone", train=steps, encoder=encoder), "run")
    steps |= {"strategy": strategy}
    sections = {"train": steps, "encoder": encoder}
    loaded = fewshot_recipe(store, tmp_path, cluster=TWO | {"workers": [1, 2]}, **sections)
    together = train(loaded, "run")
    assert "2 ranks, each 2 episodes a step" in (together.run_dir / "events.jsonl").read_text()
    assert losses(together.run_dir) == pytest.approx(losses(alone.run_dir), rel=1e-4)
    wanted = weights(alone.model_dir)
    for name, tensor in weights(together.model_dir).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-5)
    # one worker resumes from the checkpoint of two, momentum included
    forget_after(together.run_dir, step=2)
    resumed = train(fewshot_recipe(store, tmp_path, **sections), "run")
    assert losses(resumed.run_dir) == pytest.approx(losses(alone.run_dir), rel=1e-4)


def test_ray_tasks_compute_the_table_of_one_process(store, start: Path, tmp_path: Path) -> None:
    sections = {
        "encoder": {"checkpoint": start},
        "train": TRAIN | {"steps": 2},
        "compare": {
            "targets": [{"collection": "target"}],
            "methods": ["direct", "multitask"],
            "selections": ["all", "no_diversity"],
        },
    }
    here = compare(fewshot_recipe(store, tmp_path / "here", **sections), "table")
    tracked = {"enabled": True, "experiment": "table"}
    loaded = fewshot_recipe(store, tmp_path, cluster=TWO, tracking=tracked, **sections)
    there = compare(loaded, "table")
    for line, columns in here.accuracies.items():
        for column, accuracy in columns.items():
            np.testing.assert_array_equal(there.accuracies[line][column], accuracy)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == "table"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("table").info.run_id
    cells = ("direct", "multitask-all", "multitask-no_diversity")
    assert set(runs) == {f"table-target-test-{cell}" for cell in cells}
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent
        assert run.info.status == "FINISHED"
    accuracy = runs["table-target-test-direct"].data.metrics["accuracy/1-shot"]
    assert accuracy == pytest.approx(here.accuracies["direct"]["target", 1].mean())
    shutil.rmtree(tmp_path / "mlartifacts")

"""Selection by Ray actors, against one process, and the job with MLflow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mlflow import MlflowClient
from support.selection import color_encoder, color_recipe, color_store

from fmray.config import ClusterConfig
from fmray.data.image_store import ImageStore
from fmray.runtime import tracking
from fmray.train.fewshot import select as selection
from fmray.train.fewshot.encoder import open_pool
from fmray.train.fewshot.select import choose, embed_tasks, select_run

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return color_store(tmp_path_factory.mktemp("colors"))


def test_actors_and_one_process_embed_the_same(store, capsys):
    recipe = color_recipe(store, store.path.parent).recipe
    there = recipe.model_copy(update={"cluster": ClusterConfig(workers=9)})
    here, spread = (embed_tasks(one, store, color_encoder(), one.target) for one in (recipe, there))
    assert "embedding with 2 actors, not 9" in capsys.readouterr().out
    assert spread.choice == here.choice  # bit for bit: chunks are merged in the same order
    for name, centroids in here.centroids.items():
        np.testing.assert_array_equal(spread.centroids[name], centroids)
    np.testing.assert_array_equal(spread.support, here.support)


def test_error_in_an_actor_is_one_line(store):
    encoder = color_encoder()
    encoder.model.scale.data.fill_(np.inf)
    with (
        pytest.raises(ValueError, match=r"^task 'sea': the features of row 0 are not finite.*$"),
        open_pool(store, encoder, ClusterConfig(workers=1)) as pool,
    ):
        pool.task_features([("sea", np.arange(3), np.zeros(3, dtype=int))])
    with (
        pytest.raises(ValueError, match="no node of this Ray cluster has 3 CPU for an actor"),
        open_pool(store, color_encoder(), ClusterConfig(workers=1, cpus_per_worker=3)),
    ):
        pass


def test_selection_job_logs_its_choice(store, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "load_encoder", lambda settings: color_encoder())
    loaded = color_recipe(
        store,
        tmp_path,
        cluster={"workers": 1, "cpus_per_worker": 1},
        tracking={"enabled": True},
        select={"threshold": 0.2, "covariance": "ledoit_wolf"},
    )
    selected = select_run(loaded, "run")
    alone = loaded.recipe.model_copy(update={"cluster": ClusterConfig(workers=0)})
    expected = choose(alone, store, color_encoder(), alone.target, "selected", 0)
    assert replace(selected, tasks=[]) == replace(expected, tasks=[])

    client = MlflowClient(tracking.tracking_uri(loaded.recipe.tracking, tmp_path))
    [run] = client.search_runs([client.get_experiment_by_name("fmray").experiment_id])
    assert run.data.tags["fmray.job"] == "select_tasks"
    assert run.data.metrics["select/tasks"] == len(selected.names)
    curve = client.get_metric_history(run.info.run_id, "select/coverage")
    assert [point.value for point in sorted(curve, key=lambda point: point.step)] == pytest.approx(
        selected.coverage
    )
    files = {entry.path for entry in client.list_artifacts(run.info.run_id, "selection")}
    assert files == {f"selection/{n}" for n in ("tasks.parquet", "similarity.png", "coverage.png")}

"""Runs that resume from a mirror in an S3 store: losses, skipped checkpoints, failed copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.fewshot import fewshot_recipe, start_encoder
from support.s3 import MIRRORED, NAMES, S3
from support.selection import color_store
from support.training import ADAPTIVE, load_recipe, losses, make_store

from fmray.config import ClusterConfig
from fmray.runtime.run_log import RunReader
from fmray.train.checkpoint import TrainState
from fmray.train.launch import Result, train
from fmray.train.mirror import CheckpointManager, Mirror, find_model

TRAIN = MIRRORED | {"micro_batch": 8}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


def run(store: Path, storage: Path, mirror: str | None) -> Result:
    cluster = {"storage": str(storage), "workers": 0, "data_cpus": 0, "mirror": mirror}
    sections = {"train": TRAIN, "adaptive": ADAPTIVE, "zero": {"stage": 2}, "cluster": cluster}
    return train(load_recipe(store, storage, **sections), "run")


def complete(s3: S3, prefix: str) -> list[str]:
    names = s3.names(f"{prefix}/run")
    return sorted(name.partition("/")[0] for name in names if name.endswith("manifest.json"))


@pytest.fixture(scope="module")
def wanted(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The result of the run without a mirror."""
    return run(store, tmp_path_factory.mktemp("alone"), None)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Interrupt the training once the checkpoint of `step` is mirrored."""
    save = CheckpointManager.save

    def save_and_stop(
        manager: CheckpointManager, engine: Any, state: TrainState, *rest: Any
    ) -> None:
        save(manager, engine, state, *rest)
        if state.step == step:
            manager.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointManager, "save", save_and_stop)


def test_a_run_resumes_from_the_mirror_on_another_machine(
    s3: S3, store: Path, tmp_path: Path, wanted: Result, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The machine is lost after step 6, with its disk."""
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            run(store, tmp_path / "first", s3.uri("lost"))
    folders = {name.partition("/")[0] for name in s3.names("lost/run")}
    assert folders == {*NAMES[:2], "log.jsonl", "recipe.yaml", ".owner"}
    view = RunReader(tmp_path / "first" / "run").read()
    assert (view.state, view.step, view.total, view.checkpoint[0]) == ("failed", 6, 8, 6)
    shutil.rmtree(tmp_path / "first")

    result = run(store, tmp_path / "second", s3.uri("lost"))
    assert losses(result.run_dir) == losses(wanted.run_dir)
    assert result.metrics["loss/0.5"] == wanted.metrics["loss/0.5"]
    assert complete(s3, "lost") == [*NAMES[1:], "model"]  # as many as in the run's folder
    for name in ("model/config.json", "recipe.yaml", "log.jsonl"):
        assert s3.read(f"lost/run/{name}") == (result.run_dir / name).read_bytes()
    view = RunReader(result.run_dir).read()
    assert (view.state, view.job, view.step, view.workers[0].alive) == (
        "finished",
        "train",
        8,
        True,
    )
    assert "checkpoint-00000008 copied to s3://" in view.event[1]

    # the model alone, on a machine without the run's folder; an interrupted fetch is completed
    cluster = ClusterConfig(storage=tmp_path / "other", mirror=s3.uri("lost"))
    half = tmp_path / "other" / "run" / ".model.partial" / "model" / "config.json"
    half.parent.mkdir(parents=True)
    half.write_text("{", encoding="utf-8")
    model = find_model(cluster, cluster.storage / "run", "train_adallava.py")
    for path in result.model_dir.iterdir():
        assert (model / path.name).read_bytes() == path.read_bytes()
    assert [path.name for path in model.parent.iterdir()] == ["model"]
    with pytest.raises(
        ValueError, match=r"none: no model/ to evaluate; .* or cluster\.mirror s3://"
    ):
        find_model(cluster, cluster.storage / "none", "train_adallava.py")

    # a truncated file of the newest checkpoint is named, and the previous checkpoint is used
    name = next(n for n in s3.names("lost/run") if n.startswith(NAMES[2]) and "optim" in n)
    s3.write(f"lost/run/{name}", s3.read(f"lost/run/{name}")[:-100])
    capsys.readouterr()
    again = run(store, tmp_path / "third", s3.uri("lost"))
    out = capsys.readouterr().out
    assert f"{name} has" in out and "skipped, trying the previous checkpoint" in out
    assert losses(again.run_dir) == losses(wanted.run_dir)
    # the altered copy is replaced
    size = json.loads(s3.read(f"lost/run/{NAMES[2]}/manifest.json"))["files"][name[20:]]["bytes"]
    assert len(s3.read(f"lost/run/{name}")) == size


def test_a_failed_copy_is_logged_and_the_last_one_must_succeed(
    s3: S3, store: Path, tmp_path: Path, wanted: Result, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    put = Mirror.put
    failing = {NAMES[1], NAMES[2]}

    def fail(mirror: Mirror, names: Any) -> None:
        names = list(names)
        put(mirror, names[:1])
        if names[0].partition("/")[0] in failing:
            raise OSError("the cable was cut")
        put(mirror, names[1:])

    monkeypatch.setattr(Mirror, "put", fail)
    with pytest.raises(OSError, match=r"checkpoint-00000008 could not be copied to s3://"):
        run(store, tmp_path / "first", s3.uri("cable"))
    out = capsys.readouterr().out
    line = "checkpoint-00000006 was not copied to s3://"
    assert line in out and "rank 0: the cable was cut" in out
    assert complete(s3, "cable") == NAMES[:1]
    assert {name.partition("/")[0] for name in s3.names("cable/run")} >= set(NAMES)
    # another machine resumes from the previous checkpoint
    failing.clear()
    shutil.rmtree(tmp_path / "first")
    first = run(store, tmp_path / "second", s3.uri("cable"))
    assert losses(first.run_dir) == losses(wanted.run_dir)
    assert complete(s3, "cable") == [NAMES[1], NAMES[2], "model"]


def test_fewshot_training_resumes_from_the_mirror(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = color_store(tmp_path)
    start_encoder(tmp_path / "from")
    encoder = {"checkpoint": tmp_path / "from"}
    steps = {"steps": 6, "episodes_per_step": 2, "lr": 0.02, "checkpoint_every": 2}
    sections = {"train": steps, "encoder": encoder}
    alone = train(fewshot_recipe(images, tmp_path / "alone", **sections), "run")

    def mirrored(storage: Path) -> Any:
        cluster = {"workers": 0, "storage": str(storage), "mirror": s3.uri("fewshot")}
        return fewshot_recipe(images, storage, cluster=cluster, **sections)

    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train(mirrored(tmp_path / "first"), "run")
    shutil.rmtree(tmp_path / "first")
    result = train(mirrored(tmp_path / "second"), "run")
    assert losses(result.run_dir) == losses(alone.run_dir)
    assert result.tasks == alone.tasks
    assert "selection.json" in s3.names("fewshot/run")

"""Checkpoints in an S3 store: what resumes from there, what is refused, what is said when it fails."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ranks import train_on
from support.s3 import S3, s3_server
from support.training import ADAPTIVE, load_recipe, make_store

from fmray.train.copies import Copies
from fmray.train.job import Result, train
from fmray.train.mirror import Mirror
from fmray.train.progress import read_log

TRAIN = {
    "lr": 2e-3,
    "steps": 8,
    "global_batch": 16,
    "micro_batch": 8,
    "eval_rows": 8,
    "checkpoint_every": 3,
    "keep_checkpoints": 2,
}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


def recipe(store: Path, storage: Path, mirror: str | None, **sections: Any) -> Any:
    cluster = {"storage": str(storage), "workers": 0, "data_cpus": 0, "mirror": mirror}
    sections = {"train": TRAIN, "adaptive": ADAPTIVE, "zero": {"stage": 2}} | sections
    return load_recipe(store, storage, cluster=cluster, **sections)


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_log(run_dir / "log.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def wanted(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The run without a mirror."""
    return train(recipe(store, tmp_path_factory.mktemp("alone"), None), "run")


def test_a_run_goes_on_elsewhere_as_it_would_here(
    s3: S3, store: Path, tmp_path: Path, wanted: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine is lost after step 6, with what it had; the losses are those of one that was
    not."""
    mirror = s3.uri("elsewhere")

    def die(copies: Copies, *_: Any) -> None:
        copies.wait()
        if {"checkpoint-00000003", "checkpoint-00000006"} <= copies._there:
            raise KeyboardInterrupt

    keep = Copies.keep

    def keep_and_die(copies: Copies, *arguments: Any) -> None:
        keep(copies, *arguments)
        die(copies)

    with monkeypatch.context() as patch:
        patch.setattr(Copies, "keep", keep_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(store, tmp_path / "first", mirror), "run")
    found = {name.partition("/")[0] for name in s3.names("elsewhere/run")}
    assert found == {"checkpoint-00000003", "checkpoint-00000006", "log.jsonl", "recipe.yaml"}
    shutil.rmtree(tmp_path / "first")

    result = train(recipe(store, tmp_path / "second", mirror), "run")
    assert losses(result.run_dir) == losses(wanted.run_dir)
    assert result.metrics == pytest.approx(wanted.metrics, nan_ok=True)
    names = s3.names("elsewhere/run")
    assert {name.partition("/")[0] for name in names if name.endswith("manifest.json")} == {
        "checkpoint-00000006",
        "checkpoint-00000008",
        "model",
    }
    for name in ("model/config.json", "recipe.yaml", "log.jsonl"):
        assert s3.read(f"elsewhere/run/{name}") == (result.run_dir / name).read_bytes()

"""`fmray doctor` without a cluster: what it says, and its exit code."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from fmray.cli import main
from fmray.commands import doctor


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """A small recipe that can run anywhere; `address: local` keeps running clusters out of it."""
    return {
        "name": "a",
        "data": {"store": str(tmp_path / "store"), "shapes": {}, "max_length": 128},
        "cluster": {"address": "local", "storage": str(tmp_path / "runs"), "cpus_per_worker": 0.5,
                    "data_cpus": 0.5},
    }  # fmt: skip


def ask(
    job: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str
) -> tuple[int, str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(job))
    words = [word for override in overrides for word in ("--set", override)]
    code = main(["doctor", "--config", str(recipe), *words])
    return code, capsys.readouterr().out


def test_a_small_job_fits(
    job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = ask(job, tmp_path, capsys)
    assert code == 0, said
    assert all(line[:5] in ("ok   ", "note ", "FAIL ") for line in said.splitlines())
    assert "note no Ray cluster is running" in said
    assert "run jobs/prepare_data.py first" in said
    assert "memory per worker:" in said
    assert not (tmp_path / "runs").exists(), "doctor looks and makes nothing"
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    assert "holds prepared data" in ask(job, tmp_path, capsys)[1]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cluster.workers=4096", "FAIL 4096 workers of 0.5 CPU cannot be placed"),
        ("cluster.data_cpus=4096", "CPUs for Ray Data and cluster.data_cpus is 4096"),
        ("data={train: none.json, shapes: null}", "FAIL data.train: none.json is not there"),
        ("data.shapes=null", "is empty; set data.train or data.shapes"),
        ("data.max_length=100000000", "FAIL memory per worker:"),
        ("model={attention: flash_attention_2, dtype: bfloat16}", "needs the package flash-attn"),
    ],
)
def test_what_cannot_run_exits_with_2(
    override: str,
    words: str,
    job: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    extra = ["train.global_batch=65536"] if "workers" in override else []
    code, said = ask(job, tmp_path, capsys, override, *extra)
    assert code == 2
    assert any(words in line for line in said.splitlines() if line.startswith("FAIL")), said


def test_a_gpu_that_is_too_small_gets_a_remedy(
    job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = ["model={source: llava-hf/llava-1.5-7b-hf, dtype: bfloat16}", "data.max_length=2048",
             "cluster.gpus_per_worker=1", "cluster.workers=8", "train.micro_batch=4"]  # fmt: skip
    said = ask(job, tmp_path, capsys, *large, "cluster.gpu_memory_gib=48")[1]
    assert "of 48; train.gradient_checkpointing: true would fit" in said
    said = ask(job, tmp_path, capsys, *large, "cluster.gpu_memory_gib=12")[1]
    assert "of 12; more workers, a shorter data.max_length or model.lora: {} use less" in said
    said = ask(job, tmp_path, capsys, *large, "cluster.gpu_memory_gib=80", "zero.stage=3")[1]
    assert any(line.startswith("ok   memory per GPU") for line in said.splitlines()), said


def test_a_full_or_read_only_disk(
    job: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, said = ask(job, tmp_path, capsys)
    assert code == 2
    assert "FAIL checkpoints: 3 of" in said
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: mode != os.W_OK)
    assert "FAIL cluster.storage:" in ask(job, tmp_path, capsys)[1]


def test_an_unknown_model_is_a_note(
    job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = ask(job, tmp_path, capsys, f"model.source={tmp_path / 'none' / 'model'}")
    assert code == 0
    assert "so the memory is not estimated" in said


def test_versions_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        doctor, "requires", lambda _: ["numpy<1", "no-such-package>=2", 'ruff>=1; extra == "test"']
    )
    texts = [str(finding) for finding in doctor._installed()]
    assert texts[0].startswith("FAIL numpy")
    assert "fmray needs <1" in texts[0]
    assert texts[1] == "FAIL no-such-package is not installed; fmray needs no-such-package>=2"
    assert all("ruff" not in text for text in texts)


def test_set_without_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--set", "seed=1"]) == 2
    assert (
        capsys.readouterr().err == "fmray: doctor: --set changes a recipe; name one with --config\n"
    )


def test_a_cluster_that_does_not_answer_is_given_up(
    job: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "JOIN_SECONDS", 10)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(job | {"cluster": {"address": address}}))
        code = main(["doctor", "--config", str(recipe)])
    assert code == 2
    wanted = f"fmray: the Ray cluster at {address} could not be joined within 10 s"
    assert wanted in capsys.readouterr().err

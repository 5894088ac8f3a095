"""`fmray doctor` without a cluster: findings and exit code."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.data_store import make_store

from fmray.cli import main
from fmray.commands import doctor
from fmray.config import ScratchConfig
from fmray.config.arguments import job_path
from fmray.data.processor import scratch_processor


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """A small recipe that runs anywhere; `address: local` ignores running clusters."""
    return {
        "name": "a",
        "data": {"store": str(tmp_path / "store"), "shapes": {}, "max_length": 128},
        "cluster": {"address": "local", "storage": str(tmp_path / "runs"), "cpus_per_worker": 0.5,
                    "data_cpus": 0.5},
    }  # fmt: skip


def check(
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
    code, output = check(job, tmp_path, capsys)
    assert code == 0, output
    assert all(line[:5] in ("ok   ", "note ", "FAIL ") for line in output.splitlines())
    assert "note no Ray cluster is running" in output
    assert "run jobs/prepare_data.py first" in output
    assert "memory per worker:" in output
    assert not (tmp_path / "runs").exists(), "doctor creates nothing"
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    output = check(job, tmp_path, capsys)[1]
    assert "contains prepared data" in output
    assert f"FAIL data.store: {tmp_path}/store/manifest.json: no data store manifest" in output


def test_samples_of_a_store_are_counted_as_the_job_counts_them(
    job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "say one"}, {"from": "gpt", "value": "one"}]
    records = [{"id": "a", "conversations": turns * 10}, {"id": "b", "conversations": turns}]
    processor = scratch_processor(["say one"], ScratchConfig())
    store = make_store(tmp_path / "store", records, tmp_path, processor)
    shutil.copytree(store / "train", store / "validation")
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["counts"]["validation"] = manifest["counts"]["train"]
    (store / "manifest.json").write_text(json.dumps(manifest))
    code, output = check(job, tmp_path, capsys, "data.max_length=16", "train.eval_rows=1")
    assert code == 0, output
    wanted = "ok   training on 4 samples of 2 rows (7 answers of more than 16 tokens left out); "
    wanted += "evaluation on 3 samples of 1 row (7 answers of more than 16 tokens left out)"
    assert wanted in output
    output = check(job, tmp_path, capsys, "data.max_length=8", "data.samples=conversation")[1]
    assert "training on 2 samples of 2 rows" in output


def test_the_memory_of_an_evaluation_is_estimated(
    job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "ok   memory of jobs/evaluate.py: " in check(job, tmp_path, capsys)[1]
    large = ["model={source: llava-hf/llava-1.5-7b-hf, dtype: bfloat16}", "data.max_length=2048",
             "cluster.gpus_per_worker=1", "cluster.gpu_memory_gib=40"]  # fmt: skip
    output = check(job, tmp_path, capsys, *large)[1]
    line = next(line for line in output.splitlines() if "jobs/evaluate.py" in line)
    assert line.startswith("note ") and "of 40; evaluate.batch: 16 fits" in line, line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cluster.workers=4096", "FAIL 4096 workers of 0.5 CPU cannot be placed"),
        ("cluster.data_cpus=4096", "CPUs for Ray Data and cluster.data_cpus is 4096"),
        ("data={train: none.json, shapes: null}", "FAIL data.train: none.json is missing"),
        ("data.shapes=null", "is empty; set data.train or data.shapes"),
        ("data.max_length=100000000", "FAIL memory per worker:"),
        ("model={attention: flash_attention_2, dtype: bfloat16}", "needs the package flash-attn"),
    ],
)
def test_a_job_that_cannot_run_exits_with_2(
    override: str,
    words: str,
    job: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    extra = ["train.global_batch=65536"] if "workers" in override else []
    code, output = check(job, tmp_path, capsys, override, *extra)
    assert code == 2
    assert any(words in line for line in output.splitlines() if line.startswith("FAIL")), output


def test_a_job_too_large_for_the_gpu_gets_a_remedy(
    job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = ["model={source: llava-hf/llava-1.5-7b-hf, dtype: bfloat16}", "data.max_length=2048",
             "cluster.gpus_per_worker=1", "cluster.workers=8", "train.micro_batch=4"]  # fmt: skip
    output = check(job, tmp_path, capsys, *large, "cluster.gpu_memory_gib=48")[1]
    assert "of 48; train.gradient_checkpointing: true would fit" in output
    output = check(job, tmp_path, capsys, *large, "cluster.gpu_memory_gib=12")[1]
    assert "of 12; more workers, a shorter data.max_length or model.lora: {} use less" in output
    output = check(job, tmp_path, capsys, *large, "cluster.gpu_memory_gib=80", "zero.stage=3")[1]
    assert any(line.startswith("ok   memory per GPU") for line in output.splitlines()), output


def test_a_full_or_read_only_disk_is_a_failure(
    job: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, output = check(job, tmp_path, capsys)
    assert code == 2
    assert "FAIL checkpoints: 3 of" in output
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: mode != os.W_OK)
    assert "FAIL cluster.storage:" in check(job, tmp_path, capsys)[1]


def test_an_unknown_model_is_a_note(
    job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = check(job, tmp_path, capsys, f"model.source={tmp_path / 'none' / 'model'}")
    assert code == 0
    assert "the memory is not estimated" in output


def shipped(
    name: str, capsys: pytest.CaptureFixture[str], *overrides: str
) -> tuple[int, list[str]]:
    """Check a shipped recipe; return the exit code and the lines below the machine's."""
    recipe = str(job_path("recipes") / name)
    words = [word for text in ("cluster.address=local", *overrides) for word in ("--set", text)]
    code = main(["doctor", "--config", recipe, *words])
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("ok   this machine"))
    return code, lines[start + 1 :]


ROOM = ("cluster.cpus_per_worker=0.25", "cluster.data_cpus=0.25")


def test_a_shipped_adallava_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, lines = shipped("shapes_base.yaml", capsys, *ROOM)
    assert code == 0, lines
    assert "note data.store: runs/shapes-store is empty; run jobs/prepare_data.py first" in lines
    assert any(line.startswith("ok   memory per worker: ") for line in lines)


def test_a_shipped_fewshot_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, lines = shipped("fewshot_small.yaml", capsys, *ROOM)
    assert code == 2
    assert "FAIL images.collections.mnist: images/mnist.parquet is missing" in lines
    (tmp_path / "images").mkdir()
    for line in lines:
        if line.startswith("FAIL images.collections."):
            (tmp_path / line.split()[2]).touch()
    code, lines = shipped("fewshot_small.yaml", capsys, *ROOM)
    assert code == 0, lines
    assert "note images.store: runs/images is empty; run jobs/prepare_data.py first" in lines
    assert "ok   small/conv: 886,432 parameters, all train" in lines
    assert any("activations of 90 images" in line for line in lines)
    code, lines = shipped("fewshot_small.yaml", capsys, *ROOM, "episodes.ways=1000000")
    assert any(line.startswith("FAIL memory per worker") for line in lines), lines
    code, lines = shipped("fewshot_small.yaml", capsys, *ROOM, "train.method=maml")
    assert code == 0, lines
    assert "note the memory of train.method: maml is not estimated" in lines


@pytest.mark.parametrize("recipe", ["search_budgets.yaml", "search_fewshot.yaml"])
def test_a_shipped_search_recipe_checks_its_base_recipe(
    recipe: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, lines = shipped(recipe, capsys)
    output = "\n".join(lines)
    if recipe == "search_budgets.yaml":
        assert code == 0, output
        assert "shapes_tiny.yaml is a recipe of kind adallava that trials can run" in output
        assert "ok   space: budgets varies adaptive.design, adaptive.first," in output
    else:
        assert code == 2
        assert "space: task_subsets varies tasks; the search checks it at start" in output
        assert "FAIL base: images.collections.mnist: images/mnist.parquet is missing" in output
        assert f"FAIL base: encoder.checkpoint: {tmp_path}/runs/pretraining/model is" in output
    assert "trials at once" in output
    code, lines = shipped(recipe, capsys, "base_set=[cluster.workers=0]")
    assert code == 2 and "FAIL base: " in lines[-1] and "cluster.workers: 0 trains" in lines[-1]
    code, lines = shipped(recipe, capsys, "space=none")
    assert code == 2 and any(line.startswith("FAIL space: tune_spaces/ has no") for line in lines)


def test_a_shipped_plans_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, lines = shipped("search_plans.yaml", capsys)
    assert code == 2
    assert "FAIL model: fmray-quickstart/adaptive/model is missing" in lines
    model, store = Path("fmray-quickstart/adaptive/model"), Path("fmray-quickstart/store")
    for path in (model, store):
        path.mkdir(parents=True)
    assert any("is no adaptive model" in line for line in shipped("search_plans.yaml", capsys)[1])
    (model / "adaptive.json").write_text("{}")
    (store / "manifest.json").write_text("{}")
    code, lines = shipped("search_plans.yaml", capsys)
    assert code == 0, lines


def test_wrong_versions_are_failures(
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


def test_set_without_a_recipe_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--set", "seed=1"]) == 2
    assert (
        capsys.readouterr().err == "fmray: doctor: --set changes a recipe; name one with --config\n"
    )


def test_a_cluster_that_does_not_answer_is_an_error(
    job: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "JOIN_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(job | {"cluster": {"address": address}}))
        code = main(["doctor", "--config", str(recipe)])
    assert code == 2
    message = f"fmray: the Ray cluster at {address} could not be joined within 2 s"
    assert message in capsys.readouterr().err

"""The README's first command, in its fast form, and a question to the model it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def fmray(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`fmray ...` in a process of its own, as a user runs it."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [
        sys.executable,
        "-c",
        "import sys; from fmray.cli import main; sys.exit(main())",
        *words,
    ]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def quickstart(no_ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a fast quickstart, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    done = fmray("quickstart", "--fast", "--folder", "quick", folder=folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder, done.stdout


def test_it_leaves_what_it_promises(quickstart: tuple[Path, str]) -> None:
    folder, printed = quickstart
    evaluation = folder / "quick" / "adaptive" / "evaluation"
    assert (evaluation / "budget_curve.png").stat().st_size > 1000
    assert (evaluation / "plans.png").stat().st_size > 1000
    for kind in ("learned", "random", "static"):
        assert kind in printed
    assert "fmray ask" in printed and "mlflow ui" in printed


def test_runs_and_model_are_in_mlflow(quickstart: tuple[Path, str]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{quickstart[0] / 'quick' / 'mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == "shapes"]
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.tags["fmray.run_id"] for run in runs} == {"base", "adaptive"}
    assert {run.info.status for run in runs} == {"FINISHED"}
    adaptive = next(run for run in runs if run.data.tags["fmray.run_id"] == "adaptive")
    assert len(client.get_metric_history(adaptive.info.run_id, "train/loss")) == 20
    assert int(client.get_model_version_by_alias("fmray-shapes", "production").version) == 1


@pytest.mark.parametrize(("budget", "units"), [("0.5", 3), ("1.0", 7)])
def test_the_model_answers_under_a_budget(
    quickstart: tuple[Path, str], budget: str, units: int
) -> None:
    folder, _ = quickstart
    picture = next((folder / "quick" / "store" / "source" / "images" / "validation").rglob("*.png"))
    words = ("ask", str(picture), "what color topleft ?", "--budget", budget, "--storage", "quick")
    done = fmray(*words, "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["units_on"] == units == sum(answer["plan"])
    assert answer["share"] <= float(budget)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{picture}", "what ?", "--budget", "0.05", "--storage", "quick"), "smallest budget"),
        (("missing.png", "what ?", "--storage", "quick"), "missing.png"),
        (("quick/quickstart.json", "what ?", "--storage", "quick"), "not a readable image"),
        (("{picture}", "what ?", "--storage", "elsewhere"), "no storage folder elsewhere"),
        (("{picture}", "what ?", "--storage", "quick", "--model", "other"), "'other'"),
    ],
)
def test_mistakes_in_asking(
    quickstart: tuple[Path, str], words: tuple[str, ...], message: str
) -> None:
    folder, _ = quickstart
    picture = next((folder / "quick" / "store" / "source" / "images").rglob("*.png"))
    done = fmray("ask", *(word.format(picture=picture) for word in words), folder=folder)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and message in done.stderr


def test_a_real_quickstart_does_not_go_on_from_a_fast_one(quickstart: tuple[Path, str]) -> None:
    done = fmray("quickstart", "--folder", "quick", folder=quickstart[0])
    assert done.returncode == 2 and "another --folder" in done.stderr

"""The README's first command, in its fast form, and questions to the model it trains."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# what libraries write: Ray's log lines and prefixes, reports, C++ logs, progress bars, warnings
OTHER_CODE = (
    r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+",
    r"\(\w+ pid=\d+",
    r"TrainingReport|Reported metrics",
    r"^\[\d{4}-\d\d-\d\d|\b\w+\.(cc|py):\d+",
    r"\dit/s|s/it|━|█|\r|\x1b",
    r"Warning|Traceback|DeepSpeed|\bINFO\b",
    r"^fmray[|~]",
)


def fmray(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `fmray ...` in a process of its own, as a user does."""
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
    """Return the folder of a fast quickstart, and its output."""
    folder = tmp_path_factory.mktemp("quickstart")
    done = fmray("quickstart", "--fast", "--folder", "quick", folder=folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stderr == ""
    return folder, done.stdout


def test_output_is_short_and_only_fmrays(quickstart: tuple[Path, str]) -> None:
    folder, output = quickstart
    lines = output.splitlines()
    assert len(lines) <= 60, output
    assert [line for line in lines if any(re.search(p, line) for p in OTHER_CODE)] == []
    # each phase: its title, the settings, progress; then one table
    assert [line[3:6] for line in lines if line.startswith("== ")] == ["1/4", "2/4", "3/4", "4/4"]
    assert output.count("settings that differ from the defaults (full recipe: ") == 2
    for run, steps in (("base", 40), ("adaptive", 20)):
        assert f"{run}: step " in output
        assert f"run {run}: {steps} steps" in output
    head = next(i for i, line in enumerate(lines) if "learned" in line and "random" in line)
    table = lines[head : head + 9]  # seven budgets and the base model
    assert table[-1].startswith("base model") and max(map(len, table)) <= 80
    # everything else is in the log files that the output names
    assert "quick/quickstart.log" in output and "quick/adaptive/log.txt" in output
    logs = [
        (folder / "quick" / name).read_text() for name in ("quickstart.log", "adaptive/log.txt")
    ]
    assert "Started a local Ray instance" in logs[0] and "(RayTrainWorker pid=" in logs[1]
    assert all("adaptive: step 20 of 20" in log for log in logs)


def test_output_names_the_results(quickstart: tuple[Path, str]) -> None:
    folder, output = quickstart
    evaluation = folder / "quick" / "adaptive" / "evaluation"
    assert (evaluation / "budget_curve.png").stat().st_size > 1000
    assert (evaluation / "plans.png").stat().st_size > 1000
    for kind in ("learned", "random", "static"):
        assert kind in output
    assert "fmray ask" in output and "mlflow ui" in output


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
    image = next((folder / "quick" / "store" / "source" / "images" / "validation").rglob("*.png"))
    words = ("ask", str(image), "what color topleft ?", "--budget", budget, "--storage", "quick")
    done = fmray(*words, "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["units_on"] == units == sum(answer["plan"])
    assert answer["share"] <= float(budget)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{image}", "what ?", "--budget", "0.05", "--storage", "quick"), "smallest budget"),
        (("missing.png", "what ?", "--storage", "quick"), "missing.png"),
        (("quick/quickstart.json", "what ?", "--storage", "quick"), "not a readable image"),
        (("{image}", "what ?", "--storage", "elsewhere"), "no storage folder elsewhere"),
        (("{image}", "what ?", "--storage", "quick", "--model", "other"), "'other'"),
    ],
)
def test_mistakes_in_asking_are_one_line(
    quickstart: tuple[Path, str], words: tuple[str, ...], message: str
) -> None:
    folder, _ = quickstart
    image = next((folder / "quick" / "store" / "source" / "images").rglob("*.png"))
    done = fmray("ask", *(word.format(image=image) for word in words), folder=folder)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and message in done.stderr


def test_a_real_quickstart_does_not_resume_a_fast_one(quickstart: tuple[Path, str]) -> None:
    done = fmray("quickstart", "--folder", "quick", folder=quickstart[0])
    assert done.returncode == 2 and "another --folder" in done.stderr

"""`fmray quickstart`: trains a model that obeys a budget, from nothing, on this machine.

Makes a folder with a data store, a base model, an adaptive model finetuned by a submitted Ray job,
accuracy against budget as table and plot, example plans, MLflow runs and a registered model. If
interrupted, the same command resumes it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fmray.commands.ask import MODEL, STORAGE
from fmray.runtime.console import open_log, say

if TYPE_CHECKING:
    from fmray.config import LoadedRecipe
    from fmray.runtime.cluster import Session

LOG = "quickstart.log"
RECIPES = {"base": "shapes_base.yaml", "adaptive": "shapes_tiny.yaml"}
FAST = (
    "data.shapes.pictures=400",
    "data.shapes.validation_pictures=50",
    "train.global_batch=32",
    "train.micro_batch=16",
    "train.eval_every=null",
    "train.eval_rows=64",
)
FAST_STEPS = {"base": 40, "adaptive": 20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fmray quickstart`."""
    parser.add_argument(
        "--folder",
        type=Path,
        default=STORAGE,
        help=f"where everything is written (default {STORAGE}); an unfinished quickstart in it is "
        "resumed",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="smoke test of about 90 seconds: every phase, too little training",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--verbose",
        action="store_true",
        help=f"show everything that {LOG} gets, Ray's lines too",
    )


def run(options: argparse.Namespace) -> int:
    """Prepare the data, train both models, evaluate and register.

    Returns:
        The exit code of the submitted job if it fails, else 0.
    """
    folder = options.folder.absolute()
    _claim(folder, options.fast, options.seed)
    log = options.folder / LOG
    with open_log(log, options.verbose):
        code = _run(options, folder)
    if code != 0:
        print(
            f"fmray: the finetuning job failed with exit code {code} (full log: {log} and "
            f"{options.folder / 'adaptive' / 'log.txt'}); the same command resumes it",
            file=sys.stderr,
        )
    return code


@dataclass(frozen=True)
class _Stage:
    """One of the two trainings: its recipe and the overrides."""

    recipe: Path
    overrides: list[str]
    loaded: LoadedRecipe
    run_dir: Path

    def trained(self) -> bool:
        """Return whether an earlier quickstart has finished it, and report that."""
        finished = (self.run_dir / "model").is_dir()
        if finished:
            say(f"already trained: {self.run_dir / 'model'}")
        return finished


class _Phases:
    """Announces the phases, with the time since the start."""

    def __init__(self) -> None:
        self._began, self._number = time.monotonic(), 0

    def start(self, title: str) -> None:
        """Announce the next phase."""
        self._number += 1
        say(f"== {self._number}/4 [{self.elapsed()}] {title}")

    def elapsed(self) -> str:
        """Return the time since the start as M:SS."""
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        return f"{minutes}:{seconds:02d}"


def _run(options: argparse.Namespace, folder: Path) -> int:
    from fmray.runtime.cluster import start_or_join

    phases = _Phases()
    base, adaptive = _stages(folder, options.fast, options.seed)
    with start_or_join(adaptive.loaded.recipe.cluster) as session:
        ray = f"Ray at {session.address}, dashboard {session.dashboard}"
        say(f"{ray}; full log: {options.folder / LOG}")
        # Call the jobs' functions in this process: a process per job would import everything again.
        from fmray.data.ingest import prepare
        from fmray.train.adallava.evaluate import measure_run
        from fmray.train.launch import train

        phases.start("generate images and questions")
        prepare(base.loaded.recipe)
        phases.start("train a small base model from scratch")
        if not base.trained():
            train(base.loaded, "base")
        phases.start("finetune it to obey budgets: a Ray job, 2 workers, ZeRO-2")
        if not adaptive.trained():
            code = _submit(session, adaptive, folder)
            if code != 0:
                return code
        phases.start("measure accuracy at every budget")
        evaluation = measure_run(adaptive.loaded, "adaptive")
    say(evaluation.accuracy_table())
    _finish(options.folder, adaptive, phases.elapsed())
    return 0


def _stages(folder: Path, fast: bool, seed: int) -> tuple[_Stage, _Stage]:
    """Return the base and the adaptive training."""
    from fmray.config import load
    from fmray.config.arguments import job_path

    overrides = {name: [f"cluster.storage={folder}"] for name in RECIPES}
    overrides["adaptive"].append(f"model.source={folder / 'base' / 'model'}")
    for name, values in overrides.items():
        values += [f"seed={seed}", f"data.store={folder / 'store'}"]
        if fast:
            values += [*FAST, f"train.steps={FAST_STEPS[name]}"]
    if fast:
        overrides["base"].append("cluster.workers=0")  # in this process: no workers to start
        overrides["adaptive"].append("evaluate.calibration_rows=64")
    stages = []
    for name, file in RECIPES.items():
        path = job_path("recipes") / file
        stages.append(_Stage(path, overrides[name], load(path, overrides[name]), folder / name))
    return stages[0], stages[1]


def _submit(session: Session, stage: _Stage, folder: Path) -> int:
    """Train a stage in a submitted job; return its exit code."""
    from fmray.config.arguments import job_path
    from fmray.runtime.cluster import submit

    arguments = ["--config", str(stage.recipe), "--run-id", stage.run_dir.name]
    for override in stage.overrides:
        arguments += ["--set", override]
    job = f"fmray-{folder.name}-{int(time.time())}"
    return submit(session, job_path("train.py"), arguments, job)


def _finish(folder: Path, adaptive: _Stage, elapsed: str) -> None:
    """Register the model, and report the results and what to do next."""
    from fmray.runtime.tracking import register, tracking_uri

    tracking, storage = adaptive.loaded.recipe.tracking, adaptive.run_dir.parent
    version = register(tracking, storage, MODEL, adaptive.run_dir / "model", "adaptive")
    image, question = _example(folder)
    options = "" if folder == STORAGE else f" --storage {folder}"
    say(
        f"""Done in {elapsed}. The model is registered as {MODEL}, version {version}, in production.
  results   {folder / "adaptive" / "evaluation"}: budget_curve.png, plans.png, results.json
  full log  {folder / LOG}
Next:
  mlflow ui --backend-store-uri {tracking_uri(tracking, storage)}
  fmray ask {image} {question!r} --budget 0.5{options}
  fmray serve{options}"""
    )


def _claim(folder: Path, fast: bool, seed: int) -> None:
    """Mark the folder as this quickstart's.

    Raises:
        ValueError: it holds something else, or a quickstart with other options: a fast run is no
            start for a real one.
    """
    from fmray.runtime.files import write_json

    marker = folder / "quickstart.json"
    wanted = {"fast": fast, "seed": seed}
    if marker.is_file():
        existing = json.loads(marker.read_text())
        if existing != wanted:
            raise ValueError(
                f"{folder} holds a quickstart with {existing}, and this one has {wanted}; "
                "give another --folder"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no quickstart; give another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(marker, wanted)


def _example(folder: Path) -> tuple[Path, str]:
    """Return a held-out image and its first question."""
    source = folder / "store" / "source"
    record = json.loads((source / "validation.json").read_text())[0]
    question = record["conversations"][0]["value"].replace("<image>", "").strip()
    return source / record["image"], question

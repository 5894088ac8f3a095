"""`fmray quickstart`: from nothing to a model that obeys a budget, on this machine, in some
minutes.

In: nothing but a folder to work in. Out: a base model and an adaptive one, which a submitted Ray
job finetunes; a table and a plot of accuracy against budget; example plans; the runs in MLflow; the
model in the registry. Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

from fmray.commands.ask import MODEL, STORAGE

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
    """The options of `fmray quickstart`."""
    parser.add_argument(
        "--folder",
        type=Path,
        default=STORAGE,
        help=f"where everything goes (default {STORAGE}); an unfinished one there is continued",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="a smoke run of 90 seconds or so: every step, too little training",
    )
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    """Prepare, train the base, finetune it in a submitted job, evaluate, register.

    Returns the exit code of the job when it fails.
    """
    from fmray.config import load
    from fmray.config.arguments import job_path
    from fmray.runtime.cluster import start_or_join, submit

    # the small models load at once: their bars would drown what is worth reading
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    folder = options.folder.absolute()
    _claim(folder, options.fast, options.seed)
    recipes = job_path("recipes")
    settings = [
        f"seed={options.seed}",
        f"data.store={folder / 'store'}",
        f"cluster.storage={folder}",
        *(FAST if options.fast else ()),
    ]
    stages = {
        "base": list(settings),
        "adaptive": [*settings, f"model.source={folder / 'base' / 'model'}"],
    }
    if options.fast:
        for stage, steps in FAST_STEPS.items():
            stages[stage].append(f"train.steps={steps}")
        stages["base"].append("cluster.workers=0")  # in this process: nothing has to start
        stages["adaptive"].append("evaluate.calibration_rows=64")
    files = {"base": recipes / "shapes_base.yaml", "adaptive": recipes / "shapes_tiny.yaml"}
    loaded = {stage: load(files[stage], stages[stage]) for stage in files}
    begun = time.monotonic()

    def announce(number: int, what: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - begun), 60)
        print(f"\n== {number}/4 [{minutes}:{seconds:02d}] {what}", flush=True)

    def trained(stage: str) -> bool:
        done = (folder / stage / "model").is_dir()
        if done:
            print(f"done before: {folder / stage / 'model'}")
        return done

    with start_or_join(loaded["adaptive"].recipe.cluster) as session:
        print(f"Ray at {session.address}, dashboard {session.dashboard}", flush=True)
        # what the job scripts do, in this process: each job of its own would import it all again
        from fmray.data.ingest import prepare
        from fmray.train.adallava.evaluate import evaluate_run
        from fmray.train.launch import train

        announce(1, "make the pictures and questions")
        prepare(loaded["base"].recipe)
        announce(2, "train a small base model from scratch")
        if not trained("base"):
            train(loaded["base"], "base")
        announce(3, "finetune it to obey budgets: a Ray job, 2 workers, ZeRO-2")
        if not trained("adaptive"):
            arguments = ["--config", str(files["adaptive"]), "--run-id", "adaptive"]
            for setting in stages["adaptive"]:
                arguments += ["--set", setting]
            job = f"fmray-{folder.name}-{int(time.time())}"
            code = submit(session, job_path("train_adallava.py"), arguments, job)
            if code != 0:
                print(f"\nthe job failed with exit code {code}; the same command goes on")
                return code
        announce(4, "measure accuracy at every budget")
        evaluate_run(loaded["adaptive"], "adaptive")
    from fmray.runtime.tracking import register, tracking_uri

    tracking = loaded["adaptive"].recipe.tracking
    version = register(tracking, folder, MODEL, folder / "adaptive" / "model", "adaptive")
    example = _example(options.folder)
    elsewhere = "" if options.folder == STORAGE else f" --storage {options.folder}"
    seconds = int(time.monotonic() - begun)
    print(f"\nDone in {seconds // 60} min {seconds % 60} s.")
    print(f"Model {MODEL} version {version} is registered, and in production.\n")
    evaluation = options.folder / "adaptive" / "evaluation"
    print(f"  curve     {evaluation / 'budget_curve.png'}")
    print(f"  plans     {evaluation / 'plans.png'}")
    print(f"  MLflow    mlflow ui --backend-store-uri {tracking_uri(tracking, folder)}")
    print(f"  ask it    fmray ask {example[0]} {example[1]!r} --budget 0.5{elsewhere}")
    return 0


def _claim(folder: Path, fast: bool, seed: int) -> None:
    """Make the folder ours, or check that it is, and of the same kind: a fast run is no start for a
    real one.
    """
    marker = folder / "quickstart.json"
    wanted = {"fast": fast, "seed": seed}
    if marker.is_file():
        found = json.loads(marker.read_text())
        if found != wanted:
            raise ValueError(
                f"{folder} holds a quickstart with {found}, and this one is {wanted}; "
                "give another --folder"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no quickstart; give another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = marker.with_suffix(".tmp")
    temporary.write_text(json.dumps(wanted))
    shutil.move(temporary, marker)


def _example(folder: Path) -> tuple[Path, str]:
    """A held-out picture and its first question, for the command that is suggested at the end."""
    source = folder / "store" / "source"
    record = json.loads((source / "validation.json").read_text())[0]
    return source / record["image"], record["conversations"][0]["value"].replace(
        "<image>", ""
    ).strip()

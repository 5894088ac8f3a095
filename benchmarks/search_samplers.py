"""Compares samplers on the same space, number of trials and seeds, by hypervolume.

    python benchmarks/search_samplers.py --config jobs/recipes/search_budgets.yaml \\
        --folder runs/samplers --samplers random nsga2 tpe --seeds 0 1 2 --trials 20

The search is of kind adallava with several objectives, and its data must be prepared. The trials
are the search's own, but trained in this process (Ray Train's local mode) and one at a time, so
that each suggestion knows all earlier results; `--processes` searches run in parallel. Each writes
a trials.jsonl in `--folder`, from which the same command resumes. Prints the hypervolume after half
of the trials and after all; the reference is 0 for objectives to maximize and 1.05 times the
largest value for those to minimize.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import time
from pathlib import Path

import numpy as np
import torch

from fmray.config import AdaLlavaRecipe, LoadedRecipe, load
from fmray.config.search import ObjectiveConfig, SearchRecipe
from fmray.search.pareto import hypervolume, objective_values, valid_points
from fmray.search.run import base_path
from fmray.search.space import load_space
from fmray.search.state import FinishedTrial, append_trial, read_finished
from fmray.search.suggest import Suggester
from fmray.search.trial import is_metric, trial_metrics
from fmray.train.launch import train

IN_PROCESS = ("cluster.workers=0", "tracking.enabled=false")


def run_search(config: Path, settings: list[str], sampler: str, seed: int, folder: Path) -> None:
    """Run the missing trials of one search, one at a time."""
    torch.set_num_threads(1)
    loaded = load(config, [*settings, f"algorithm={sampler}", f"seed={seed}"], (SearchRecipe,))
    recipe, path = loaded.recipe, folder / f"{sampler}-{seed}" / "trials.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)

    def trial_recipe(overrides: list[str]) -> LoadedRecipe[AdaLlavaRecipe]:
        storage = f"cluster.storage={path.parent}"
        trial = load(base_path(loaded), [*recipe.base_set, *overrides, *IN_PROCESS, storage])
        return LoadedRecipe(trial.recipe.with_absolute_paths(), trial.origins)

    space = load_space(recipe.space, trial_recipe([]).recipe, recipe.options)
    finished = read_finished(path)
    suggester = Suggester(space, recipe.algorithm, recipe.objectives, seed, finished)
    while sum(trial.status != "duplicate" for trial in finished) < recipe.trials:
        suggestion = suggester.next()
        overrides, started = space.to_overrides(suggestion.values), time.time()
        if suggestion.duplicate_of is None:
            name = f"trial-{suggestion.number}"
            shutil.rmtree(path.parent / name, ignore_errors=True)
            result = train(trial_recipe(overrides), name)
            metrics = trial_metrics(result)
            suggester.tell(suggestion.number, metrics)
            shutil.rmtree(path.parent / name)
        else:
            [metrics] = [t.metrics for t in finished if t.number == suggestion.duplicate_of]
        steps = int(metrics["step"])
        point = {n: value for n, value in metrics.items() if is_metric(n) or n == "step"}
        trial = FinishedTrial(
            suggestion.number,
            suggestion.key,
            suggestion.values,
            tuple(overrides),
            point,
            (point,),
            "done" if suggestion.duplicate_of is None else "duplicate",
            None,
            time.time() - started,
            started,
            steps,
            suggestion.origin,
        )
        append_trial(path, trial)
        finished.append(trial)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="recipe of kind search")
    parser.add_argument("--folder", type=Path, required=True, help="of the searches")
    parser.add_argument("--samplers", nargs="+", default=["random", "nsga2", "tpe"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    options = parser.parse_args()
    settings = [*options.settings, f"trials={options.trials}"]
    runs = [(sampler, seed) for seed in options.seeds for sampler in options.samplers]
    folder = options.folder.absolute()
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        arguments = [(options.config, settings, sampler, seed, folder) for sampler, seed in runs]
        pool.starmap(run_search, arguments, chunksize=1)
    objectives = load(options.config, settings, (SearchRecipe,)).recipe.objectives
    report(
        {run: read_finished(folder / "{}-{}".format(*run) / "trials.jsonl") for run in runs},
        objectives,
    )


def report(
    trials_of: dict[tuple[str, int], list[FinishedTrial]], objectives: tuple[ObjectiveConfig, ...]
) -> None:
    """Print hypervolumes by sampler and seed, and their means over seeds."""
    modes = [objective.mode for objective in objectives]

    def points(trials: list[FinishedTrial]) -> np.ndarray:
        return objective_values(valid_points(trials, objectives), objectives)

    every = np.concatenate([points(trials) for trials in trials_of.values()])
    reference = [
        0.0 if mode == "max" else 1.05 * column.max()
        for mode, column in zip(modes, every.T, strict=True)
    ]
    volumes: dict[str, list[list[float]]] = {}
    for (sampler, seed), trials in trials_of.items():
        half, full = (
            hypervolume(points(part), modes, reference)
            for part in (trials[: len(trials) // 2], trials)
        )
        volumes.setdefault(sampler, []).append([half, full])
        steps = sum(trial.steps for trial in trials if trial.status == "done")
        print(
            f"{sampler:>8} seed {seed}: {steps} steps, hypervolume {half:.4f} after half of the"
            f" trials, {full:.4f} after all"
        )
    for sampler, values in volumes.items():
        half, full = np.mean(values, axis=0)
        print(f"{sampler:>8} mean of {len(values)}: {half:.4f}, {full:.4f}")


if __name__ == "__main__":
    main()

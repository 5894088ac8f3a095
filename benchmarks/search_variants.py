"""Compares variants of a search, such as NSGA-II and random, or with and without early stopping.

    python benchmarks/search_variants.py --config jobs/recipes/search_budgets.yaml \\
        --folder runs/variants --vary algorithm=nsga2 --vary algorithm=random --seeds 0 1 2

The data of the search must be prepared. Each variant and seed is a search in `--folder`; the same
command resumes them. Prints one line each: trials, steps trained and their share of training all
trials to the end, seconds, the best value of the first objective, and with several objectives the
hypervolume (the reference is 0 for objectives to maximize and 1.05 times the largest value for
those to minimize). For few-shot searches, also compares the best encoders of a seed on held-out
tasks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fmray.config import load
from fmray.config.fewshot import FewshotRecipe
from fmray.config.search import SearchRecipe
from fmray.search.pareto import hypervolume, objective_values, valid_points
from fmray.search.run import SearchResult, base_path, search
from fmray.search.trial import load_base
from fmray.search.verdict import held_out_gains


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="recipe of kind search")
    parser.add_argument("--folder", type=Path, required=True, help="of the searches")
    parser.add_argument("--vary", action="append", required=True, metavar="KEY=VALUE[,KEY=VALUE]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    options = parser.parse_args()
    settings = [*options.settings, f"cluster.storage={options.folder}"]
    results: dict[tuple[str, int], SearchResult] = {}
    for seed in options.seeds:
        for vary in options.vary:
            overrides = [*settings, *vary.split(","), f"seed={seed}"]
            loaded = load(options.config, overrides, (SearchRecipe,))
            name = "-".join(part.rpartition("=")[2] for part in vary.split(","))
            results[vary, seed] = search(loaded, f"{name}-{seed}")

    recipe = loaded.recipe
    base = load_base(
        base_path(loaded), recipe.base_set, options.folder, recipe.tracking, recipe.evaluations
    ).recipe
    objectives, full_steps = recipe.objectives, base.train.steps
    points = {
        key: objective_values(valid_points(r.finished, objectives), objectives)
        for key, r in results.items()
    }
    reference = [
        0.0 if o.mode == "max" else 1.05 * max(p[:, i].max() for p in points.values())
        for i, o in enumerate(objectives)
    ]
    modes = [objective.mode for objective in objectives]
    for (vary, seed), result in results.items():
        trained = [t for t in result.finished if t.status != "duplicate"]
        steps, seconds = sum(t.steps for t in trained), sum(t.seconds for t in trained)
        column = points[vary, seed][:, 0]
        best = column.max() if modes[0] == "max" else column.min()
        line = (
            f"{vary}, seed {seed}: {len(trained)} trials, {steps} steps"
            f" ({steps / (full_steps * len(trained)):.0%} of all), {seconds:.0f} trial seconds,"
            f" {objectives[0].metric} {best:.4f}"
        )
        if len(objectives) > 1:
            line += f", hypervolume {hypervolume(points[vary, seed], modes, reference):.4f}"
        print(line)
    if isinstance(base, FewshotRecipe):
        for seed in options.seeds:
            models = {
                f"{vary}, seed {seed}": result.run_dir
                / "trials"
                / f"{result.run_dir.name}-{result.recommended.number:03d}"
                / "model"
                for (vary, other), result in results.items()
                if other == seed
            }
            print("\n".join(held_out_gains(base, models)))


if __name__ == "__main__":
    main()

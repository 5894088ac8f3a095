"""The learned scheduler against its rivals, over seeds, by paired tests on held-out questions.

    python benchmarks/schedulers.py --base fmray-quickstart [--seeds 0 1 2]

Uses the data store and the base model of a finished quickstart. For each seed it finetunes the base
with the learned scheduler, with random plans and with one static order, all else equal, and
evaluates each. The runs are stored in `--folder`; finished ones are not repeated. Prints accuracy
by budget, and McNemar's exact test of the learned scheduler against random plans of the same model,
the best static plan of the same model (chosen on training questions), a model trained with random
plans, and a model trained with a static order.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from fmray.config import load
from fmray.config.arguments import job_path
from fmray.train.adallava.evaluate import evaluate_run, paired_test
from fmray.train.launch import train

RIVALS = (
    ("random plans, same model", "learned", "random"),
    ("best static plan, same model", "learned", "static"),
    ("trained with random plans", "random", "learned"),
    ("trained with a static order", "static", "learned"),
)


def correct(folder: Path, run_id: str, plans: str, budget: float) -> np.ndarray:
    """Return whether each question was answered right, bool [n], in validation order."""
    table = pq.read_table(folder / run_id / "evaluation" / "questions.parquet")
    kinds, budgets = np.array(table["plans"].to_pylist()), table["budget"].to_numpy()
    return np.array(table["correct"].to_pylist())[(kinds == plans) & (budgets == budget)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="folder of a finished quickstart")
    parser.add_argument("--folder", type=Path, default=Path("runs/schedulers"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    options = parser.parse_args()
    recipe = None
    for seed in options.seeds:
        for scheduler in ("learned", "random", "static"):
            run_id = f"{scheduler}-{seed}"
            loaded = load(
                job_path("recipes") / "shapes_tiny.yaml",
                [
                    f"seed={seed}",
                    f"adaptive.scheduler={scheduler}",
                    f"model.source={options.base / 'base' / 'model'}",
                    f"data.store={options.base / 'store'}",
                    f"cluster.storage={options.folder}",
                    "train.eval_every=null",
                    *options.settings,
                ],
            )
            recipe = loaded.recipe
            if not (options.folder / run_id / "model").is_dir():
                train(loaded, run_id)
            if not (options.folder / run_id / "evaluation" / "results.json").is_file():
                evaluate_run(loaded, run_id)

    print(f"\n{'budget':>7}  {'learned':>8}  " + "  ".join(f"{name:>34}" for name, *_ in RIVALS))
    for budget in recipe.evaluate.budgets:
        ours = [
            correct(options.folder, f"learned-{seed}", "learned", budget) for seed in options.seeds
        ]
        cells = []
        for _, trained, plans in RIVALS:
            theirs = [
                correct(options.folder, f"{trained}-{seed}", plans, budget)
                for seed in options.seeds
            ]
            test = paired_test(np.concatenate(ours), np.concatenate(theirs))
            by_seed = " ".join(
                f"{a.mean() - b.mean():+.3f}" for a, b in zip(ours, theirs, strict=True)
            )
            cells.append(f"{np.mean(theirs):.3f} [{by_seed}] p={test.p_value:.1g}")
        print(f"{budget:>7g}  {np.mean(ours):>8.3f}  " + "  ".join(f"{cell:>34}" for cell in cells))


if __name__ == "__main__":
    main()

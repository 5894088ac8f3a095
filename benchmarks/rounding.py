"""How far the losses of two runs differ that differ only in the number of workers.

    PYTHONPATH=tests python benchmarks/rounding.py [--steps 1800] [--lr 2e-3 3e-4] [--workers 3 2]

Trains the recipe of `benchmarks/soak.py`, without faults and without Ray, once for each number of
workers and learning rate. Sums in another order change the last bits; training amplifies that, more
at higher learning rates. Prints a table of the relative difference of the losses to those of the
first number in `--workers`, the largest in each stretch of steps. A run takes minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import pairwise
from pathlib import Path

from support.chaos import write_recipe
from support.ranks import train_on
from support.training import losses as run_losses
from support.training import make_store

from fmray.config import load

STRETCHES = 9
SECONDS_A_STEP = 5.0  # at most, on a busy machine


def losses(folder: Path, store: Path, workers: int, lr: float, steps: int) -> list[float]:
    """Train; return the loss of each step."""
    name = f"{lr:g}-{workers}"
    recipe = write_recipe(
        folder / f"{name}.yaml",
        store,
        folder,
        folder / "mlflow.db",
        steps,
        cluster={"workers": [1, 3]},
        train={"lr": lr, "checkpoint_every": None},
        tracking={"enabled": False},
    )
    train_on(workers, load(recipe), name, seconds=SECONDS_A_STEP * steps)
    return run_losses(folder / name)


def main() -> None:
    """Parse the command line, train, and print the table."""
    parser = argparse.ArgumentParser(description="Effect of the number of workers on the losses.")
    parser.add_argument("--steps", type=int, default=1800, help="default 1800")
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3, 3e-4])
    parser.add_argument("--workers", type=int, nargs="+", default=[3, 2])
    options = parser.parse_args()
    lines = []
    ends = [round(options.steps * n / STRETCHES) for n in range(STRETCHES + 1)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = make_store(folder)
        for lr in options.lr:
            runs = [losses(folder, store, n, lr, options.steps) for n in options.workers]
            for workers, other in zip(options.workers[1:], runs[1:], strict=True):
                errors = [abs(a - b) / abs(b) for a, b in zip(other, runs[0], strict=True)]
                worst = [max(errors[a:b]) for a, b in pairwise(ends)]
                lines.append(f"| {lr:g}, {workers} | " + " | ".join(f"{w:.1e}" for w in worst))
    print(f"| lr, workers, to step | {' | '.join(map(str, ends[1:]))}")
    print("| --- " * (STRETCHES + 1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

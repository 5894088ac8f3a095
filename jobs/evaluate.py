r"""Measure a trained model at several budgets: its own plans beside random, static and others.

    ray job submit --working-dir . -- \
        python jobs/evaluate.py --config jobs/recipes/shapes_tiny.yaml --run-id RUN

In: the recipe and the run id of a finished training. Out: a table, and in the run's folder
`evaluation/`: results.json, questions.parquet, budget_curve.png, plans.png; they go to MLflow too.
"""

from __future__ import annotations

import sys

from fmray.cli import exit_code
from fmray.config import job_arguments
from fmray.train.evaluate import evaluate_run


def main() -> None:
    """Parse, and evaluate."""
    loaded, run_id = job_arguments(None, "Evaluate a trained model at several budgets.")
    evaluate_run(loaded, run_id)


if __name__ == "__main__":
    sys.exit(exit_code(main))

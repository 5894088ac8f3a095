r"""Measure a trained model at several budgets: its own plans beside random, static and others.

    ray job submit --working-dir . -- \
        python jobs/evaluate.py --config jobs/recipes/shapes_tiny.yaml --run-id RUN

In: the recipe and the run id of a finished training. Out: a table, and in the run's folder
`evaluation/` with results.json, questions.parquet and budget_curve.png; they go to MLflow too.
"""

from __future__ import annotations

import sys

from fmray.config import job_arguments
from fmray.train.evaluate import evaluate_run


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 for a mistake in recipe, store or run id."""
    try:
        loaded, run_id = job_arguments(argv, "Evaluate a trained model at several budgets.")
        evaluate_run(loaded, run_id)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

r"""Evaluate what a run trained: a multimodal model at several budgets, or an encoder on test tasks.

    ray job submit --working-dir . -- \
        python jobs/evaluate.py --config jobs/recipes/shapes_tiny.yaml --run-id mine

Prints a table, and writes `<storage>/<run id>/evaluation/`, which goes to MLflow too: results.json
and, for a model, questions.parquet, budget_curve.png and plans.png, for an encoder tasks.parquet.
"""

import sys

from fmray.commands.jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job("evaluate"))

r"""Measure what a run trained: a multimodal model at several budgets, or an encoder on test tasks.

    ray job submit --working-dir . -- \
        python jobs/evaluate.py --config jobs/recipes/shapes_tiny.yaml --run-id RUN

In: the recipe and the run id of a finished training. Out: a table, and in the run's folder
`evaluation/`, which goes to MLflow too. For a model: results.json, questions.parquet,
budget_curve.png, plans.png. For an encoder: results.json, tasks.parquet.
"""

from __future__ import annotations

import sys

from fmray.config import AdaLlavaRecipe
from fmray.config.arguments import job_arguments
from fmray.config.fewshot import FewshotRecipe
from fmray.errors import exit_code


def main() -> None:
    """Parse, and evaluate by the recipe's kind."""
    loaded, run_id = job_arguments(
        None, "Evaluate a trained model, or encoder.", (AdaLlavaRecipe, FewshotRecipe)
    )
    # each kind's imports take seconds, and the other has no use for them
    if isinstance(loaded.recipe, FewshotRecipe):
        from fmray.train.fewshot.evaluate import evaluate_encoder

        evaluate_encoder(loaded, run_id)
    else:
        from fmray.train.adallava.evaluate import evaluate_run

        evaluate_run(loaded, run_id)


if __name__ == "__main__":
    sys.exit(exit_code(main))

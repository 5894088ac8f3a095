r"""Compare ways to adapt an encoder: target x method x task selection, with paired intervals.

    python jobs/compare_fewshot.py --config jobs/recipes/fewshot_small.yaml --run-id table

In: a recipe with `compare.targets`. What it lacks is made first: the image store, and the
pretraining of a small encoder. Out: the table, and `<storage>/<run id>/` with results.json,
tasks.parquet and comparison.png; the same `--run-id` computes only the cells that are missing.
"""

from __future__ import annotations

import sys

from fmray.config.arguments import job_arguments
from fmray.config.fewshot import FewshotRecipe
from fmray.errors import exit_code
from fmray.train.fewshot.compare import compare


def main() -> None:
    """Parse, and compare."""
    loaded, run_id = job_arguments(
        None, "Compare methods and task selections over targets.", (FewshotRecipe,)
    )
    compare(loaded, run_id)


if __name__ == "__main__":
    sys.exit(exit_code(main))

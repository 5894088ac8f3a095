r"""Choose which candidate tasks to finetune on for a target: Algorithm 1, or one of its peers.

    ray job submit --working-dir . -- \
        python jobs/select_tasks.py --config jobs/recipes/fewshot_small.yaml

In: a recipe with a target, whose image store is prepared (`jobs/prepare_data.py`). Out: a table,
and in `<storage>/<run id>/selection/`: tasks.parquet, similarity.png, coverage.png; also in MLflow.
"""

from __future__ import annotations

import sys

from fmray.config.arguments import job_arguments
from fmray.config.fewshot import FewshotRecipe
from fmray.errors import exit_code
from fmray.train.fewshot.select import select_run


def main() -> None:
    """Parse, and choose."""
    loaded, run_id = job_arguments(
        None, "Choose the tasks to finetune on for a target.", kinds=(FewshotRecipe,)
    )
    select_run(loaded, run_id)


if __name__ == "__main__":
    sys.exit(exit_code(main))

r"""Choose which candidate tasks to finetune on for a target: Algorithm 1, or a baseline.

    ray job submit --working-dir . -- \
        python jobs/select_tasks.py --config jobs/recipes/fewshot_small.yaml

Prints a table, and writes `<storage>/<run id>/selection/`, which goes to MLflow too: tasks.parquet,
similarity.png and coverage.png.
"""

import sys

from fmray.commands.jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job("select"))

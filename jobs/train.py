r"""Train the model of a recipe, whatever its kind; needs the store of `prepare_data.py`.

    ray job submit --working-dir . -- \
        python jobs/train.py --config jobs/recipes/shapes_tiny.yaml --run-id mine

Writes `<storage>/<run id>/model`. The same `--run-id` resumes the run.
"""

import sys

from fmray.commands.jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job("train"))

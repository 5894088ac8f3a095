r"""Train a multimodal model to obey a budget (or, with `adaptive: null`, the base model).

    ray job submit --working-dir . -- \
        python jobs/train_adallava.py --config jobs/recipes/shapes_tiny.yaml

In: a recipe whose data store is prepared (`jobs/prepare_data.py`). Out: `<storage>/<run id>/model`;
the same `--run-id` goes on where a run stopped.
"""

from __future__ import annotations

import sys

from fmray.config.arguments import job_arguments
from fmray.errors import exit_code
from fmray.train.job import train


def main() -> None:
    """Parse, and train."""
    loaded, run_id = job_arguments(None, "Train a model under Ray Train and DeepSpeed.")
    train(loaded, run_id)


if __name__ == "__main__":
    sys.exit(exit_code(main))

r"""Choose tasks for a target, and finetune an image encoder on them.

    ray job submit --working-dir . -- \
        python jobs/train_fewshot.py --config jobs/recipes/fewshot_clip_vitb32.yaml

In: a recipe whose image store is prepared (`jobs/prepare_data.py`). Out: the encoder as a model
directory, `<storage>/<run id>/model`; the same `--run-id` goes on where a run stopped.
"""

from __future__ import annotations

import sys

from fmray.config.arguments import job_arguments
from fmray.config.fewshot import FewshotRecipe
from fmray.errors import exit_code
from fmray.train.fewshot.job import train_fewshot


def main() -> None:
    """Parse, and train."""
    loaded, run_id = job_arguments(
        None, "Finetune an image encoder on tasks chosen for a target.", (FewshotRecipe,)
    )
    train_fewshot(loaded, run_id)


if __name__ == "__main__":
    sys.exit(exit_code(main))

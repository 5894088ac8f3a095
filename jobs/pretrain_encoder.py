r"""Pretrain a small image encoder from scratch: SimCLR, MoCo, or supervised.

    python jobs/pretrain_encoder.py --config jobs/recipes/fewshot_small.yaml --run-id small

In: the `pretrain` section of a recipe whose image store is prepared. Out: a model directory for
`encoder.checkpoint`, `<storage>/<run id>/model`; the same `--run-id` goes on where a run stopped.
"""

from __future__ import annotations

import sys

from fmray.config.arguments import job_arguments
from fmray.config.fewshot import FewshotRecipe
from fmray.errors import exit_code
from fmray.train.fewshot.pretrain import pretrain_encoder


def main() -> None:
    """Parse, and pretrain."""
    loaded, run_id = job_arguments(
        None, "Pretrain a small image encoder from scratch.", (FewshotRecipe,)
    )
    pretrain_encoder(loaded, run_id)


if __name__ == "__main__":
    sys.exit(exit_code(main))

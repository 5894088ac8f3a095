r"""Make the data store of a recipe: LLaVA files, or generated shapes, to Parquet.

    ray job submit --working-dir . -- \
        python jobs/prepare_data.py --config jobs/recipes/shapes_base.yaml

In: the `data` section of a recipe. Out: `data.store`; run again, it does what is missing.
"""

from __future__ import annotations

import sys

from fmray.cli import exit_code
from fmray.config import job_arguments
from fmray.data.ingest import prepare


def main() -> None:
    """Parse, and prepare."""
    loaded, _ = job_arguments(None, "Read or generate instruction data into a Parquet store.")
    prepare(loaded.recipe)


if __name__ == "__main__":
    sys.exit(exit_code(main))

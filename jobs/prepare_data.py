"""Make the data store of a recipe: `python jobs/prepare_data.py --config RECIPE.yaml`."""

from __future__ import annotations

import sys

from fmray.config import job_arguments
from fmray.data.ingest import prepare


def main() -> int:
    """0: the store is there; 2: the recipe or its data is wrong (one line says where)."""
    try:
        loaded, _ = job_arguments(None, "Read or generate instruction data into a Parquet store.")
        prepare(loaded.recipe)
    except ValueError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

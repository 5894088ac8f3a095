r"""Make the store of a recipe: instructions, generated shapes or image collections to Parquet.

    ray job submit --working-dir . -- \
        python jobs/prepare_data.py --config jobs/recipes/shapes_base.yaml

The store is the one that the recipe names (`data.store`, `images.store`; of a search, its base
recipe's). A second run does only what is missing.
"""

import sys

from fmray.commands.jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job("prepare"))

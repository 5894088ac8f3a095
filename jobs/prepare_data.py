r"""Make the store of a recipe: instructions, generated shapes or image collections to Parquet.

    ray job submit --working-dir . -- \
        python jobs/prepare_data.py --config jobs/recipes/shapes_base.yaml

In: the `data` section of a recipe, or the `images` section of one of kind fewshot. Out: the store
named there; run again, it does what is missing.
"""

from __future__ import annotations

import sys

from fmray.cli import exit_code
from fmray.config import Job, Recipe
from fmray.data.image_ingest import prepare_images
from fmray.data.ingest import prepare
from fmray.fewshot_config import FewshotRecipe
from fmray.job_arguments import job_arguments


def main() -> None:
    """Parse, and prepare."""
    kinds: tuple[type[Job], ...] = (Recipe, FewshotRecipe)
    loaded, _ = job_arguments(None, "Read or generate data into a Parquet store.", kinds)
    if isinstance(loaded.recipe, FewshotRecipe):
        prepare_images(loaded.recipe)
    else:
        prepare(loaded.recipe)


if __name__ == "__main__":
    sys.exit(exit_code(main))

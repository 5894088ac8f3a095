r"""Make the store of a recipe: instructions, generated shapes or image collections to Parquet.

    ray job submit --working-dir . -- \
        python jobs/prepare_data.py --config jobs/recipes/shapes_base.yaml

In: the `data` section of a recipe, or the `images` section of one of kind fewshot. Out: the store
named there; run again, it does what is missing.
"""

from __future__ import annotations

import sys

from fmray.config import AdaLlavaRecipe, BaseRecipe
from fmray.config.arguments import job_arguments
from fmray.config.fewshot import FewshotRecipe
from fmray.data.image_ingest import prepare_images
from fmray.data.ingest import prepare
from fmray.errors import exit_code


def main() -> None:
    """Parse, and prepare."""
    kinds: tuple[type[BaseRecipe], ...] = (AdaLlavaRecipe, FewshotRecipe)
    loaded, _ = job_arguments(None, "Read or generate data into a Parquet store.", kinds)
    if isinstance(loaded.recipe, FewshotRecipe):
        prepare_images(loaded.recipe)
    else:
        prepare(loaded.recipe)


if __name__ == "__main__":
    sys.exit(exit_code(main))

r"""Search the static plans of an adaptive model that lose least at each budget, without training.

    python jobs/search_plans.py --config jobs/recipes/search_plans.yaml --run-id plans

In: a recipe of kind plans, which names an adaptive model and a data store. Out: a table of accuracy
on held-out questions beside the learned scheduler's, and `<storage>/<run id>/` with plans.json,
answers.jsonl and evaluation/; the same `--run-id` goes on where a search stopped.
"""

from __future__ import annotations

import sys

from fmray.config.arguments import job_arguments
from fmray.config.search import PlansRecipe
from fmray.errors import exit_code
from fmray.search.plans import search_plans


def main() -> None:
    """Parse, and search."""
    loaded, run_id = job_arguments(
        None, "Search the static plans of an adaptive model.", (PlansRecipe,)
    )
    search_plans(loaded, run_id)


if __name__ == "__main__":
    sys.exit(exit_code(main))

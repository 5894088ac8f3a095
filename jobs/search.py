r"""Search which tasks to train on, or where on the accuracy-compute curve to live.

    python jobs/search.py --config jobs/recipes/search_fewshot.yaml --run-id search

In: a recipe of kind search; its base recipe says what a trial is, and the data are prepared
(`jobs/prepare_data.py`). Out: the table of trials, and `<storage>/<run id>/` with trials.jsonl,
report.html and a folder a trial; the same `--run-id` goes on where a search stopped.
"""

from __future__ import annotations

import sys

from fmray.config.arguments import job_arguments
from fmray.config.search import SearchRecipe
from fmray.errors import exit_code
from fmray.search.run import search


def main() -> None:
    """Parse, and search."""
    loaded, run_id = job_arguments(
        None, "Search values of a recipe by trials on Ray Tune.", (SearchRecipe,)
    )
    search(loaded, run_id)


if __name__ == "__main__":
    sys.exit(exit_code(main))

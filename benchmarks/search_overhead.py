"""Measures the overhead of a search: its trials under Ray Tune, and the same trainings one by one.

    python benchmarks/search_overhead.py --config jobs/recipes/search_fewshot.yaml --folder NEW

The data of the search must be prepared; short trials show the overhead best. Prints the seconds of
Ray's start, of the search and of the single runs, their ratio, and the overhead per trial (negative
if the search runs trials concurrently). The runs are in `--folder`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from timing import seconds

from fmray.config import load
from fmray.config.search import SearchRecipe
from fmray.runtime.cluster import start_or_join
from fmray.search.run import base_path, search
from fmray.search.trial import load_base
from fmray.train.launch import train


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="recipe of kind search")
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(
            f"--folder {options.folder} exists; its runs would be resumed: give a new folder"
        )
    settings = [*options.settings, f"cluster.storage={options.folder}", "scheduler.kind=none"]
    loaded = load(options.config, settings, (SearchRecipe,))
    session = start_or_join(loaded.recipe.cluster, log_to_driver=False)
    started = seconds(session.__enter__)
    try:
        results = []
        searched = seconds(lambda: results.append(search(loaded, "search")))
        trained = [trial for trial in results[0].finished if trial.status == "done"]

        def train_each() -> None:
            for trial in trained:
                recipe = load_base(
                    base_path(loaded),
                    (*loaded.recipe.base_set, *trial.overrides),
                    options.folder / "single",
                    loaded.recipe.tracking,
                    loaded.recipe.evaluations,
                )
                train(recipe, f"trial-{trial.number}")

        single = seconds(train_each)
    finally:
        session.__exit__(None, None, None)
    count = len(trained)
    inside = sum(trial.metrics["seconds"] for trial in trained)
    print(f"{count} trials under the search: {searched:.1f} s ({searched / count:.1f} s per trial)")
    print(f"the same runs, one by one:      {single:.1f} s ({single / count:.1f} s per trial)")
    print(f"ratio {searched / single:.2f}; overhead per trial {(searched - single) / count:+.1f} s")
    print(f"inside the trials' jobs: {inside:.1f} s, concurrent if there is room")
    print(f"Ray's start, once: {started:.1f} s, {started / (started + searched):.0%} of the total")


if __name__ == "__main__":
    main()

"""What a search costs beside its trainings: its trials under Ray Tune, against the same trainings
by hand, one after another, on the same Ray.

    python benchmarks/search_overhead.py --config jobs/recipes/search_fewshot.yaml --folder NEW

In: a search whose data are prepared; short trials show the overhead best. Out, in `--folder`: the
runs; printed: seconds of Ray's start, of the search and of the runs by hand, their ratio, and the
overhead a trial (below 0 where trials run at the same time and by hand they do not).
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
    parser.add_argument("--folder", type=Path, required=True, help="a new one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"--folder {options.folder} is there; what it holds would not be run again")
    settings = [*options.settings, f"cluster.storage={options.folder}", "scheduler.kind=none"]
    loaded = load(options.config, settings, (SearchRecipe,))
    session = start_or_join(loaded.recipe.cluster, log_to_driver=False)
    started = seconds(session.__enter__)
    try:
        found = []
        searched = seconds(lambda: found.append(search(loaded, "search")))
        trained = [trial for trial in found[0].finished if trial.status == "done"]

        def by_hand() -> None:
            for trial in trained:
                recipe = load_base(
                    base_path(loaded),
                    (*loaded.recipe.base_set, *trial.overrides),
                    options.folder / "by_hand",
                    loaded.recipe.tracking,
                    loaded.recipe.evaluations,
                )
                train(recipe, f"trial-{trial.number}")

        hand = seconds(by_hand)
    finally:
        session.__exit__(None, None, None)
    count = len(trained)
    inside = sum(trial.metrics["seconds"] for trial in trained)
    print(f"{count} trials under the search: {searched:.1f} s ({searched / count:.1f} s a trial)")
    print(f"the same by hand, in sequence:  {hand:.1f} s ({hand / count:.1f} s a trial)")
    print(f"ratio {searched / hand:.2f}; overhead a trial {(searched - hand) / count:+.1f} s")
    print(f"inside the trials' jobs: {inside:.1f} s, at the same time where there is room")
    print(f"Ray's start, once: {started:.1f} s, {started / (started + searched):.0%} of all")


if __name__ == "__main__":
    main()

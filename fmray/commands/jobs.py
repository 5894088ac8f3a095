"""What each job script does: the table of kinds of recipe, and the one function behind `jobs/*.py`.

A script parses `--config`, `--set`, `--run-id` and `--verbose`, calls the function that the
recipe's kind has for its action, and exits with an exit code. The terminal shows fmray's lines; the
rest goes to `log.txt` in the run's folder. Functions are named here and imported when they are
called: their imports take seconds, and no job needs them all.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmray.config import AdaLlavaRecipe, BaseRecipe, LoadedRecipe, load
from fmray.config.arguments import job_arguments
from fmray.config.fewshot import FewshotRecipe
from fmray.config.search import PlansRecipe, SearchRecipe
from fmray.errors import exit_code
from fmray.runtime.console import open_log, say

LOG = "log.txt"  # in the run's folder
RAY_COPIES = "working_dir_files"  # Ray's folder for the working directories of submitted jobs

#: action -> `--help` of its script
ACTIONS = {
    "prepare": "Read or generate data into the recipe's Parquet store.",
    "pretrain": "Pretrain a small image encoder from scratch.",
    "select": "Choose the tasks to finetune on for a target.",
    "train": "Train the recipe's model on Ray Train.",
    "evaluate": "Evaluate a trained model at several budgets, or an encoder on test tasks.",
    "compare": "Compare methods and task selections over targets.",
    "search": "Search values of a recipe by trials on Ray Tune, or the plans of a trained model.",
}


@dataclass(frozen=True)
class Kind:
    """The functions that a kind of recipe has, as "module:function"; None: no such action.

    `prepare` takes the loaded recipe, the others also the run id.
    """

    recipe: type[BaseRecipe]
    prepare: str | None = None
    pretrain: str | None = None
    select: str | None = None
    train: str | None = None
    evaluate: str | None = None
    compare: str | None = None
    search: str | None = None

    def function(self, action: str) -> Callable[..., Any]:
        """Import the function of an action that the kind has."""
        module, _, name = getattr(self, action).partition(":")
        return getattr(importlib.import_module(module), name)


KINDS = {
    "adallava": Kind(
        AdaLlavaRecipe,
        prepare="fmray.commands.jobs:prepare_store",
        train="fmray.train.launch:train",
        evaluate="fmray.train.adallava.evaluate:evaluate_run",
    ),
    "fewshot": Kind(
        FewshotRecipe,
        prepare="fmray.commands.jobs:prepare_store",
        pretrain="fmray.train.fewshot.pretrain:pretrain_encoder",
        select="fmray.train.fewshot.select:select_run",
        train="fmray.train.launch:train",
        evaluate="fmray.train.fewshot.evaluate:evaluate_encoder",
        compare="fmray.train.fewshot.compare:compare",
    ),
    "search": Kind(
        SearchRecipe,
        prepare="fmray.commands.jobs:prepare_base",
        evaluate="fmray.commands.jobs:evaluate_recommended",
        search="fmray.search.run:search",
    ),
    "plans": Kind(
        PlansRecipe,
        prepare="fmray.commands.jobs:check_store",
        evaluate="fmray.search.plans:search_plans",  # resumes: only the evaluation is left to do
        search="fmray.search.plans:search_plans",
    ),
}


def run_job(action: str, old_name: str | None = None) -> int:
    """Run a job script: parse the command line, call the function, return the exit code.

    Args:
        action: a key of `ACTIONS`.
        old_name: the script's name of the previous release, if it was called by that.
    """
    return exit_code(_run, action, old_name)


def _run(action: str, old_name: str | None) -> None:
    if old_name is not None:
        print(f"jobs/{old_name} is now jobs/{script_of(action)}.py", file=sys.stderr)
    kinds = [kind.recipe for kind in KINDS.values() if getattr(kind, action) is not None]
    loaded, run_id, verbose = job_arguments(None, ACTIONS[action], kinds)
    storage = loaded.recipe.cluster.storage
    prepares = action == "prepare"  # the only action without a run
    log = storage / f"prepare-{loaded.recipe.name}.log" if prepares else storage / run_id / LOG
    with open_log(log, verbose):
        # the imports, too, are not silent
        function = KINDS[loaded.recipe.kind].function(action)
        _say_where(storage)
        if prepares:
            function(loaded)
        else:
            function(loaded, run_id)
        say(f"full log: {log}")


def _say_where(storage: Path) -> None:
    """Tell where the outputs are if they are in the copy of a working directory that Ray made."""
    if not storage.is_absolute() and RAY_COPIES in Path.cwd().parts:
        say(
            f"cluster.storage: {storage} is relative, so the outputs of this Ray job are in"
            f" {storage.absolute()} on this node, where another submission may not find them; use"
            " the absolute path of a folder that all nodes see"
        )


def script_of(action: str) -> str:
    """Name of the action's script in `jobs/`, without `.py`."""
    return {"prepare": "prepare_data", "select": "select_tasks"}.get(action, action)


def prepare_store(loaded: LoadedRecipe[AdaLlavaRecipe | FewshotRecipe]) -> None:
    """Prepare the data or image store of a recipe."""
    if isinstance(loaded.recipe, FewshotRecipe):
        from fmray.data.image_ingest import prepare_images

        prepare_images(loaded.recipe)
    else:
        from fmray.data.ingest import prepare

        prepare(loaded.recipe)


def prepare_base(loaded: LoadedRecipe[SearchRecipe]) -> None:
    """Prepare the data of a search: the store of its base recipe."""
    from fmray.search.run import base_path

    kinds = (AdaLlavaRecipe, FewshotRecipe)
    prepare_store(load(base_path(loaded), loaded.recipe.base_set, kinds=kinds))


def check_store(loaded: LoadedRecipe[PlansRecipe]) -> None:
    """Check that the store of a plan search is prepared: its model was trained on it.

    Raises:
        ValueError: it is not.
    """
    store = loaded.recipe.store
    if not (store / "manifest.json").is_file():
        raise ValueError(
            f"store: {store} is not prepared; run `python jobs/prepare_data.py` with the recipe"
            " that the model was trained with"
        )
    say(f"store {store} is prepared")


def evaluate_recommended(loaded: LoadedRecipe[SearchRecipe], run_id: str) -> None:
    """Evaluate the trial that a search recommends, as a run of its base recipe is evaluated."""
    from fmray.search.run import recommended_trial

    folder = recommended_trial(loaded, run_id)
    overrides = [f"cluster.storage={folder.parent.absolute()}"]
    trial = load(folder / "recipe.yaml", overrides, kinds=(AdaLlavaRecipe, FewshotRecipe))
    say(f"evaluating {folder}")
    KINDS[trial.recipe.kind].function("evaluate")(trial, folder.name)

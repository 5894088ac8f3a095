"""The search: from a recipe to trials on Ray Tune, and what they say.

In: a `LoadedRecipe` of kind search, and a run id; a running Ray, or one to start. Out: a
`SearchResult`, and in `<storage>/<run id>/`: recipe.yaml, search.json (what may not change when it
goes on), trials.jsonl (the truth when it goes on), trials/ (a folder a trial, as its job leaves
it), tune/ (TensorBoard files) and report.html; in MLflow a run with a child a trial.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from fmray.config import BaseRecipe, LoadedRecipe
from fmray.config.fewshot import FewshotRecipe
from fmray.config.search import SearchRecipe
from fmray.data.image_store import ImageStore
from fmray.runtime import placement as places
from fmray.runtime import tracking
from fmray.runtime.cluster import start_or_join
from fmray.runtime.console import changed_settings, say
from fmray.runtime.nodes import POLL_SECONDS
from fmray.runtime.placement import machines_of_cluster
from fmray.search.pareto import front_of, recommend, rule_of
from fmray.search.report import write_report
from fmray.search.space import Tasks, load_space
from fmray.search.state import Finished, read_finished
from fmray.search.suggest import Suggester, make_scheduler
from fmray.search.trial import load_base, metrics_of, run_trial
from fmray.search.verdict import LEAST, rank_correlations
from fmray.search.watch import Books, Suggestions, TrialTable, Watcher, describe, final_table
from fmray.train import checkpoint as checkpoints

if TYPE_CHECKING:
    from fmray.train.fewshot.select import EmbeddedTasks

# what may change when a search goes on; all else decides which trials there are
FREE_SETTINGS = {"name", "cluster", "tracking", "trials", "recommend"}


@dataclass(frozen=True)
class SearchResult:
    """finished: all trials, as they ended. recommended: by the rule, else the best where there is
    one objective."""

    finished: list[Finished]
    recommended: Finished | None
    mlflow_run_id: str | None
    run_dir: Path


def search(loaded: LoadedRecipe[SearchRecipe], run_id: str) -> SearchResult:
    """Run the trials that are missing, and put the report together.

    Raises ValueError for a recipe, space or earlier run that does not fit, and for trials that no
    machine has room for; KeyboardInterrupt where it was interrupted (finished trials are kept).
    """
    recipe = loaded.recipe
    storage = recipe.cluster.storage.absolute()
    run_dir = storage / run_id
    uri = tracking.tracking_uri(recipe.tracking, storage)
    track = recipe.tracking.model_copy(update={"uri": uri, "register_as": None})

    def load_trial(overrides: Sequence[str]) -> LoadedRecipe[Any]:
        written = (*recipe.base_set, *overrides)
        path, trials = base_path(loaded), run_dir / "trials"
        return load_base(path, written, trials, track, recipe.evaluations)

    base = load_trial(()).recipe
    _check_objectives(recipe, base)
    run_dir.mkdir(parents=True, exist_ok=True)
    _check_same(recipe, base.model_dump(mode="json"), run_dir / "search.json")
    finished = read_finished(run_dir / "trials.jsonl")
    (run_dir / "recipe.yaml").write_text(loaded.dump(), encoding="utf-8")
    say(changed_settings(loaded, run_dir / "recipe.yaml"))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own table beside ours
    with start_or_join(recipe.cluster, log_to_driver=False):
        together, why = places.concurrency(base.cluster, machines_of_cluster())
        say(why)

        @cache
        def measured() -> EmbeddedTasks:
            return _measure(base)

        def tasks() -> Tasks:
            return _tasks(base, run_dir / "tasks.json", measured)

        space = load_space(recipe.space, base, recipe.options, tasks)
        suggester = Suggester(
            space, recipe.algorithm, recipe.objectives, recipe.seed, list(finished)
        )
        parameters = recipe.model_dump(mode="json")
        names = [objective.metric for objective in recipe.objectives]
        with (
            tracking.open_run(track, storage, run_id, parameters, {"fmray.job": "search"}) as run,
            TrialTable(names, recipe.trials) as table,
        ):
            books = Books(
                space,
                suggester,
                finished,
                recipe.objectives,
                storage,
                run_id,
                load_trial,
                track,
                run.mlflow_run_id,
                table,
            )
            if finished:
                say(f"run {run_id} goes on: {books.trained()} trials have ended")
            _run_trials(recipe, books, together, base.train.eval_every, base.train.steps)
            notes = _task_notes(base, finished, measured) if "tasks" in space.names else []
            result = _result(recipe, base, books, notes)
            for trial in finished:
                run.log(trial.number, **{f"trial/{k}": v for k, v in trial.metrics.items()})
            for name in ("trials.jsonl", "report.html"):
                run.artifact(run_dir / name)
    return result


def _run_trials(recipe: SearchRecipe, books: Books, together: int, every: int, steps: int) -> None:
    """All trials that are missing, `together` at a time.

    every, steps: of a trial's evaluations, in the base recipe.
    """
    suggestions = Suggestions(books, recipe.trials)
    # it says of each trial that TensorBoard cannot show its assignment
    logging.getLogger("ray.tune.logger.tensorboardx").setLevel(logging.WARNING)
    try:
        tune.run(
            run_trial,
            name="tune",
            storage_path=str(books.run_dir),
            # a trial's driver waits, and takes as good as nothing (Ray refuses nothing at all); its
            # workers have places of their own
            resources_per_trial=tune.PlacementGroupFactory([{"memory": 1}]),
            num_samples=-1,
            max_concurrent_trials=together,
            search_alg=suggestions,
            scheduler=make_scheduler(recipe, every, steps, books.finished),
            callbacks=[Watcher(books, recipe.scheduler.kind)],
            trial_dirname_creator=lambda trial: f"trial-{trial.config['trial'].number:03d}",
            trial_name_creator=lambda trial: f"trial-{trial.config['trial'].number:03d}",
            raise_on_failed_trial=False,
            verbose=0,
        )
    finally:
        books.settle()
    if books.suggester.ended is not None:
        say(f"the search ends early: {books.suggester.ended}")
    if books.running or not suggestions.exhausted:
        say(
            f"{books.trained()} of {recipe.trials} trials have ended; the same command with"
            f" --run-id {books.run_id} goes on"
        )
        raise KeyboardInterrupt


def _check_objectives(recipe: SearchRecipe, base: BaseRecipe) -> None:
    known = metrics_of(base)
    for i, objective in enumerate(recipe.objectives):
        if objective.metric not in known:
            raise ValueError(
                f"objectives.{i}.metric: no trial reports {objective.metric!r}; they report"
                f" {', '.join(known)}"
            )
    if recipe.recommend is not None:
        rule_of(recipe.recommend, recipe.objectives)


def base_path(loaded: LoadedRecipe[SearchRecipe]) -> Path:
    """`base` is relative to the file that names it; on the command line, to the folder there."""
    file, colon, _ = loaded.origins["base"].rpartition(":")
    return (Path(file).parent if colon else Path()) / loaded.recipe.base


def _check_same(recipe: SearchRecipe, base: dict[str, Any], path: Path) -> None:
    """Raises ValueError for a search that would go on as another one."""
    base = {name: part for name, part in base.items() if name not in FREE_SETTINGS}
    own = recipe.model_dump(mode="json", exclude=FREE_SETTINGS | {"base"})
    settings = checkpoints.flatten_settings(own | {"base": base})
    if not path.is_file():
        _write_json(path, settings)
        return
    written = json.loads(path.read_text(encoding="utf-8"))
    for name in sorted(settings.keys() | written.keys()):
        before, now = (json.dumps(values.get(name)) for values in (written, settings))
        if before != now:
            raise ValueError(
                f"{path}: {name} was {before} when this search began and is {now}; set it back, or"
                " give another --run-id"
            )


def _measure(base: FewshotRecipe) -> EmbeddedTasks:
    """The candidate tasks, embedded."""
    # imports torch and an encoder's library, which a search that goes on has no use for
    from fmray.train.fewshot.encoder import load_encoder
    from fmray.train.fewshot.select import embed_tasks

    store = ImageStore.open(base.images.store, base.images.cache)
    return embed_tasks(base, store, load_encoder(base.encoder), base.target)


def _tasks(base: FewshotRecipe, path: Path, measured: Callable[[], EmbeddedTasks]) -> Tasks:
    """The candidate tasks as Algorithm 1 sees them; embedded once, then read from `path`."""
    if not isinstance(base, FewshotRecipe):
        raise ValueError(f"it varies tasks, which a base recipe of kind {base.kind} has none of")
    if not path.is_file():
        choice = measured().choice
        _write_json(path, asdict(Tasks(**asdict(choice))))
    return Tasks(**json.loads(path.read_text(encoding="utf-8")))


def _task_notes(
    base: FewshotRecipe, finished: Sequence[Finished], measured: Callable[[], EmbeddedTasks]
) -> list[str]:
    """How well Algorithm 1's cheap scores ranked the sets of tasks that were trained on, without
    shares of their own."""
    trials = [t for t in finished if t.status == "done" and len(t.overrides) == 1]
    if len(trials) < LEAST:
        return []
    found = rank_correlations(
        [trial.values["tasks"] for trial in trials],
        [trial.metrics["accuracy"] for trial in trials],
        measured().target,
        measured().moments,
        base.select,
        base.seed,
    )
    return [str(one) for one in found]


def _result(recipe: SearchRecipe, base: BaseRecipe, books: Books, notes: list[str]) -> SearchResult:
    """The end: a table, the recommended trial and the report."""
    finished, path = books.finished, books.run_dir / "report.html"
    recommended, rule = None, recipe.recommend
    if rule is not None:
        try:
            recommended = recommend(rule, finished, recipe.objectives)
        except ValueError as error:  # no trial fits: table and report are there all the same
            notes.append(str(error))
    elif len(recipe.objectives) == 1:
        rule = f"best {recipe.objectives[0].metric}"
        recommended = next(iter(front_of(finished, recipe.objectives)), None)
    names = [objective.metric for objective in recipe.objectives]
    say(final_table(finished, names))
    chosen = None
    if recommended is not None:
        chosen = (rule, recommended)
        model = books.model_dir(recommended.number)
        budget = recommended.metrics.get("budget")
        at = "" if budget is None else f" at budget {budget:g}"
        say(
            f"{rule}: trial {recommended.number}{at}: {describe(recommended.values)}\n"
            f"model: {model}"
        )
        if isinstance(base, FewshotRecipe):
            notes += _verdict(base, books, recommended)
    for note in notes:
        say(note)
    title = f"Search {books.run_id}"
    write_report(path, finished, recipe.objectives, title, chosen, notes)
    say(f"report: {path}\nTensorBoard: tensorboard --logdir {books.run_dir / 'tune'}")
    return SearchResult(finished, recommended, books.parent, books.run_dir)


def _verdict(base: FewshotRecipe, books: Books, best: Finished) -> list[str]:
    """The recommended trial beside Algorithm 1's tasks and all of them, on held-out tasks."""
    # imports torch and an encoder's library, which a search has no use for until here
    from fmray.search.verdict import held_out_gains

    models, notes = {f"trial {best.number}": books.model_dir(best.number)}, []
    for peer in books.finished:
        name = peer.origin.removeprefix("warm: ")
        if name in ("Algorithm 1", "all tasks"):
            # a duplicate has the model of the trial that it equals
            trained = [t for t in books.finished if t.key == peer.key and t.status == "done"]
            if not trained:
                notes.append(f"trial {best.number} against {name}: that was not trained whole")
            elif trained[0].number == best.number:
                notes.append(f"trial {best.number} is that of {name}")
            else:
                models[f"{name} (trial {trained[0].number})"] = books.model_dir(trained[0].number)
    return held_out_gains(base, models) + notes


def _write_json(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)

"""Runs a search: trials of a base recipe on Ray Tune, and the report on them.

The folder of a search, `<storage>/<run id>/`, gets::

    recipe.yaml     the resolved recipe
    search.json     the settings that must be the same when it resumes
    trials.jsonl    the finished trials, the source of truth when it resumes
    tasks.json      scores of the candidate tasks, if the space varies tasks
    trials/         one folder per trial, as a training job leaves it
    tune/           TensorBoard files
    report.html

In MLflow a search is a run, and each trial a child of it. The same run id resumes a search.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ray import tune

from fmray.config import BaseRecipe, LoadedRecipe, TrackingConfig
from fmray.config.fewshot import FewshotRecipe
from fmray.config.search import SearchRecipe
from fmray.data.image_store import ImageStore
from fmray.runtime import tracking
from fmray.runtime.cluster import start_or_join
from fmray.runtime.console import changed_settings, say
from fmray.runtime.files import write_atomic, write_json
from fmray.runtime.nodes import POLL_SECONDS
from fmray.runtime.placement import concurrency, machines_of_cluster
from fmray.search.pareto import front_of, recommend, rule_of
from fmray.search.report import write_report
from fmray.search.space import Tasks, load_space
from fmray.search.state import FinishedTrial, read_finished
from fmray.search.suggest import Suggester, make_scheduler
from fmray.search.trial import load_base, metrics_of, run_trial
from fmray.search.verdict import MIN_SETS, held_out_gains, rank_correlations
from fmray.search.watch import (
    TrialLedger,
    TrialTable,
    TuneCallback,
    TuneSearcher,
    describe,
    final_table,
    trial_run_id,
)
from fmray.train import resume
from fmray.train.checkpoint import flatten_settings
from fmray.train.fewshot.encoder import load_encoder
from fmray.train.fewshot.select import EmbeddedTasks, embed_tasks
from fmray.train.launch import check_model

#: settings that may change when a search resumes; all others decide which trials there are
FREE_SETTINGS = {"name", "cluster", "tracking", "trials", "recommend"}
_BASE = {"base", "base_set"}  # compared by the values of the base recipe


@dataclass(frozen=True)
class SearchResult:
    """What a finished search found."""

    finished: list[FinishedTrial]  #: all trials, in the order they finished
    #: the operating point that `recommend` selects; without a rule, the best for one objective
    recommended: FinishedTrial | None
    mlflow_run_id: str | None
    run_dir: Path


def search(loaded: LoadedRecipe[SearchRecipe], run_id: str) -> SearchResult:
    """Run the trials that are missing, and write the report.

    Raises:
        ValueError: recipe, space and earlier run do not fit together, or no machine has room for a
            trial.
        KeyboardInterrupt: the search was interrupted; its finished trials are kept.
    """
    recipe = loaded.recipe
    storage = recipe.cluster.storage.absolute()
    run_dir = storage / run_id
    uri = tracking.tracking_uri(recipe.tracking, storage)
    track = recipe.tracking.model_copy(update={"uri": uri, "register_as": None})

    load_trial = _trial_loader(loaded, run_dir / "trials", track)

    # before Ray starts: check the recipe, and that an earlier run was the same search
    base = load_trial(()).recipe
    check_model(base)
    _check_objectives(recipe, base)
    run_dir.mkdir(parents=True, exist_ok=True)
    _check_same_search(recipe, base, run_dir / "search.json")
    finished = read_finished(run_dir / "trials.jsonl")
    write_atomic(run_dir / "recipe.yaml", loaded.dump())
    say(changed_settings(loaded, run_dir / "recipe.yaml"))

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # otherwise Tune prints its own table too
    with start_or_join(recipe.cluster, log_to_driver=False):
        concurrent, explanation = concurrency(base.cluster, machines_of_cluster())
        say(explanation)
        embedded = cache(lambda: _embed_tasks(base))  # at most once, and only if needed
        space = load_space(
            recipe.space, base, recipe.options, lambda: _tasks(base, run_dir, embedded)
        )
        suggester = Suggester(
            space, recipe.algorithm, recipe.objectives, recipe.seed, list(finished)
        )
        settings, tags = recipe.model_dump(mode="json"), {"fmray.job": "search"}
        names = [objective.metric for objective in recipe.objectives]
        with (
            tracking.open_run(track, storage, run_id, settings, tags) as run,
            TrialTable(names, recipe.trials) as table,
        ):
            ledger = TrialLedger(
                space=space,
                suggester=suggester,
                finished=finished,
                objectives=recipe.objectives,
                storage=storage,
                run_id=run_id,
                load=load_trial,
                tracking=track,
                parent=run.mlflow_run_id,
                table=table,
            )
            if finished:
                say(f"resuming search {run_id}: {ledger.trained()} trials finished")
            _run_trials(recipe, ledger, concurrent, base.train.eval_every, base.train.steps)
            notes = _task_notes(base, finished, embedded) if "tasks" in space.names else []
            result = _report(recipe, base, ledger, notes)
            _track(run, result)
    return result


def base_path(loaded: LoadedRecipe[SearchRecipe]) -> Path:
    """Return the path of the base recipe: relative to the file that names it, or, given on the
    command line, to the working directory."""
    file, colon, _ = loaded.origins["base"].rpartition(":")
    return (Path(file).parent if colon else Path()) / loaded.recipe.base


def _trial_loader(
    loaded: LoadedRecipe[SearchRecipe], trials: Path, track: TrackingConfig
) -> Callable[[Sequence[str]], LoadedRecipe[Any]]:
    """Return the function: overrides of the base recipe -> recipe of a trial in folder `trials`."""
    path, recipe = base_path(loaded), loaded.recipe

    def load_trial(overrides: Sequence[str]) -> LoadedRecipe[Any]:
        settings = (*recipe.base_set, *overrides)
        return load_base(path, settings, trials, track, recipe.evaluations)

    return load_trial


# --- Checks ---


def _check_objectives(recipe: SearchRecipe, base: BaseRecipe) -> None:
    """Raise ValueError for an objective or a rule that trials of the base recipe cannot satisfy."""
    known = metrics_of(base)
    for i, objective in enumerate(recipe.objectives):
        if objective.metric not in known:
            raise ValueError(
                f"objectives.{i}.metric: trials report no {objective.metric!r}; they report"
                f" {', '.join(known)}"
            )
    if recipe.recommend is not None:
        rule_of(recipe.recommend, recipe.objectives)


def _check_same_search(recipe: SearchRecipe, base: BaseRecipe, path: Path) -> None:
    """Check that the run id belongs to this search; print what cannot be compared.

    Args:
        path: `search.json`; a new search writes it.

    Raises:
        ValueError: it belongs to a search with other settings, data or model.
    """
    settings, defaults = (_settings_of(values) for values in (base, type(base)(name="defaults")))
    settings |= resume.content(base)
    settings |= flatten_settings(recipe.model_dump(mode="json", exclude=FREE_SETTINGS | _BASE))
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        earlier.pop("base_set", None)  # its values are among those of the base recipe
        for note in resume.compare(earlier, settings, path, defaults):
            say(note)
    write_json(path, settings)


def _settings_of(base: BaseRecipe) -> dict[str, Any]:
    values = flatten_settings({"base": base.model_dump(mode="json", exclude=FREE_SETTINGS)})
    return resume.without_places(values)


# --- Trials ---


def _run_trials(
    recipe: SearchRecipe, ledger: TrialLedger, concurrent: int, every: int, steps: int
) -> None:
    """Run the missing trials on Ray Tune.

    Args:
        concurrent: trials at the same time.
        every: steps between evaluations, in the base recipe.
        steps: steps of a trial, in the base recipe.

    Raises:
        KeyboardInterrupt: trials are still missing.
    """
    searcher = TuneSearcher(ledger, recipe.trials)
    # it warns for each trial that TensorBoard cannot show its assignment
    logging.getLogger("ray.tune.logger.tensorboardx").setLevel(logging.WARNING)
    try:
        tune.run(
            run_trial,
            name="tune",
            storage_path=str(ledger.run_dir),
            # A trial's driver only waits; its workers have a placement group of their own. Ray
            # rejects an empty bundle, so the driver takes one byte of memory.
            resources_per_trial=tune.PlacementGroupFactory([{"memory": 1}]),
            num_samples=-1,
            max_concurrent_trials=concurrent,
            search_alg=searcher,
            scheduler=make_scheduler(recipe, every, steps, ledger.finished),
            callbacks=[TuneCallback(ledger, recipe.scheduler.kind)],
            trial_dirname_creator=lambda trial: f"trial-{trial.config['trial'].number:03d}",
            trial_name_creator=lambda trial: f"trial-{trial.config['trial'].number:03d}",
            raise_on_failed_trial=False,
            verbose=0,
        )
    finally:
        ledger.settle()
    if ledger.suggester.end_reason is not None:
        say(f"the search ends early: {ledger.suggester.end_reason}")
    if ledger.running or not searcher.exhausted:
        say(
            f"search {ledger.run_id} interrupted: {ledger.trained()} of {recipe.trials} trials"
            f" finished; the same command with --run-id {ledger.run_id} resumes it"
        )
        raise KeyboardInterrupt


# --- Candidate tasks of a few-shot base recipe ---


def _embed_tasks(base: FewshotRecipe) -> EmbeddedTasks:
    """Embed the candidate tasks and the target."""
    store = ImageStore.open(base.images.store, base.images.cache)
    return embed_tasks(base, store, load_encoder(base.encoder), base.target)


def _tasks(base: FewshotRecipe, run_dir: Path, embedded: Callable[[], EmbeddedTasks]) -> Tasks:
    """Return Algorithm 1's scores of the candidate tasks; a resumed search reads `tasks.json`."""
    if not isinstance(base, FewshotRecipe):
        raise ValueError(f"it varies tasks, and a base recipe of kind {base.kind} has no tasks")
    path = run_dir / "tasks.json"
    if not path.is_file():
        write_json(path, asdict(Tasks(**asdict(embedded().choice))))
    values = json.loads(path.read_text(encoding="utf-8"))
    values["coverage"] = [math.inf if value is None else value for value in values["coverage"]]
    return Tasks(**values)


def _task_notes(
    base: FewshotRecipe, finished: Sequence[FinishedTrial], embedded: Callable[[], EmbeddedTasks]
) -> list[str]:
    """Describe how well Algorithm 1's scores ranked the sets of tasks that were trained on.

    Sets with unequal shares of the tasks are left out, because the scores ignore shares.
    """
    trials = [t for t in finished if t.status == "done" and len(t.overrides) == 1]
    if len(trials) < MIN_SETS:
        return []
    correlations = rank_correlations(
        [trial.values["tasks"] for trial in trials],
        [trial.metrics["accuracy"] for trial in trials],
        embedded().target,
        embedded().moments,
        base.select,
        base.seed,
    )
    return [str(correlation) for correlation in correlations]


# --- The end of a search ---


def recommended_trial(loaded: LoadedRecipe[SearchRecipe], run_id: str) -> Path:
    """Return the folder of the trial that a search recommends, or would if it ended now.

    Raises:
        ValueError: there is no such search, or no trial that the rule selects.
    """
    recipe = loaded.recipe
    run_dir = recipe.cluster.storage / run_id
    finished = read_finished(run_dir / "trials.jsonl")
    if not finished:
        raise ValueError(
            f"{run_dir}: no finished trial; --run-id must name a run of jobs/search.py"
        )
    _, recommended = _recommended(recipe, finished)
    if recommended is None:
        raise ValueError(f"{run_dir}: no trial to recommend; several objectives need a rule")
    return run_dir / "trials" / trial_run_id(run_id, recommended.number)


def _recommended(
    recipe: SearchRecipe, finished: list[FinishedTrial]
) -> tuple[str | None, FinishedTrial | None]:
    """The rule and the trial that it selects: `recommend`, or the best for one objective.

    Raises ValueError when no trial satisfies the rule.
    """
    objectives = recipe.objectives
    if recipe.recommend is not None:
        return recipe.recommend, recommend(recipe.recommend, finished, objectives)
    if len(objectives) > 1:
        return None, None
    return f"best {objectives[0].metric}", next(iter(front_of(finished, objectives)), None)


def _report(
    recipe: SearchRecipe, base: BaseRecipe, ledger: TrialLedger, notes: list[str]
) -> SearchResult:
    """Show the table of trials and the recommended one, and write `report.html`."""
    finished, objectives = ledger.finished, recipe.objectives

    rule, recommended = None, None
    try:
        rule, recommended = _recommended(recipe, finished)
    except ValueError as error:  # no trial satisfies the rule; table and report are useful anyway
        notes.append(str(error))

    say(final_table(finished, [objective.metric for objective in objectives]))
    chosen = None
    if recommended is not None:
        chosen = (rule, recommended)
        budget = recommended.metrics.get("budget")
        at = "" if budget is None else f" at budget {budget:g}"
        say(
            f"{rule}: trial {recommended.number}{at}: {describe(recommended.values)}\n"
            f"model: {ledger.model_dir(recommended.number)}"
        )
        if isinstance(base, FewshotRecipe):
            notes += _held_out_notes(base, ledger, recommended)
    for note in notes:
        say(note)
    path = ledger.run_dir / "report.html"
    write_report(path, finished, objectives, f"Search {ledger.run_id}", chosen, notes)
    say(f"report: {path}\nTensorBoard: tensorboard --logdir {ledger.run_dir / 'tune'}")
    return SearchResult(finished, recommended, ledger.parent, ledger.run_dir)


def _held_out_notes(base: FewshotRecipe, ledger: TrialLedger, best: FinishedTrial) -> list[str]:
    """Compare the recommended trial with Algorithm 1's set and all tasks, on held-out tasks."""
    models, notes = {f"trial {best.number}": ledger.model_dir(best.number)}, []
    for reference in ledger.finished:
        name = reference.origin.removeprefix("warm: ")
        if name not in ("Algorithm 1", "all tasks"):
            continue
        # a duplicate has the model of the trial that it equals
        trained = [t for t in ledger.finished if t.key == reference.key and t.status == "done"]
        if not trained:
            notes.append(f"trial {best.number} against {name}: not trained to the end")
        elif trained[0].number == best.number:
            notes.append(f"trial {best.number} is that of {name}")
        else:
            models[f"{name} (trial {trained[0].number})"] = ledger.model_dir(trained[0].number)
    return held_out_gains(base, models) + notes


def _track(run: tracking.Run, result: SearchResult) -> None:
    """Log the metrics of all trials and the search's files to its MLflow run."""
    for trial in result.finished:
        run.log(trial.number, **{f"trial/{k}": v for k, v in trial.metrics.items()})
    for name in ("trials.jsonl", "report.html"):
        run.artifact(result.run_dir / name)

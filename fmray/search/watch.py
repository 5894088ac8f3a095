"""Between Ray Tune and the records of a search: what to try next, and what became of each trial.

Tune asks `TuneSearcher` for trials and reports their events to `TuneCallback`. Both keep the
`TrialLedger`, which records each trial in `trials.jsonl`, in MLflow and in the terminal
(`TrialTable`). Tune's own state is never read: a search resumes from `trials.jsonl` alone.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.search import Searcher
from rich.console import Console
from rich.live import Live
from rich.table import Table

from fmray.config import ConfigError, LoadedRecipe, TrackingConfig, load
from fmray.config.search import ObjectiveConfig
from fmray.errors import GaveUp
from fmray.runtime import tracking
from fmray.runtime.console import rich_console, say
from fmray.runtime.files import dumps
from fmray.search.space import Space
from fmray.search.state import FinishedTrial, TrialStatus, append_trial
from fmray.search.suggest import Suggester, Suggestion
from fmray.search.trial import Assignment, is_metric
from fmray.train.resume import same_training

SHOWN_ROWS = 30  # of the live table: the last trials
VALUES_WIDTH = 60  # characters of a trial's values


# --- Table of trials ---


@dataclass(frozen=True)
class TrialRow:
    """The current state of a trial: a row of the table."""

    number: int
    origin: str
    values: Mapping[str, Any]
    status: str  #: `running` or a `TrialStatus`
    step: int
    metrics: Mapping[str, float]
    reason: str | None = None


class TrialTable:
    """Shows trials while the context is open: a live table in a terminal, else one line per event.

    Args:
        metrics: names of the columns.
        trials: number of trials of the search.
    """

    def __init__(self, metrics: Sequence[str], trials: int) -> None:
        self._metrics, self._trials = list(metrics), trials
        self._rows: dict[int, TrialRow] = {}
        self._live: Live | None = None

    def __enter__(self) -> TrialTable:
        if (terminal := rich_console()) is not None:
            self._live = Live(
                self._table(), console=terminal, refresh_per_second=2, redirect_stdout=False
            )
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, row: TrialRow) -> None:
        """Show a trial that started, was evaluated or ended."""
        self._rows[row.number] = row
        if self._live is not None:
            self._live.update(self._table())
        else:
            say(self._line(row))

    def _line(self, row: TrialRow) -> str:
        parts = [f"trial {row.number}: {row.status}"]
        if row.metrics:
            parts.append(f"step {row.step}")
            parts += [
                f"{name} {row.metrics[name]:.4g}" for name in self._metrics if name in row.metrics
            ]
        elif row.status == "running":
            parts += [row.origin, describe(row.values)]
        return ", ".join(parts) + (f": {row.reason}" if row.reason else "")

    def _table(self) -> Table:
        ended = sum(row.status != "running" for row in self._rows.values())
        rows = list(self._rows.values())[-SHOWN_ROWS:]
        return _rich_table(f"{ended} of {self._trials} trials finished", rows, self._metrics)


def final_table(finished: Sequence[FinishedTrial], metrics: Sequence[str]) -> str:
    """Return the table of all trials as text, by number."""
    rows = [
        TrialRow(t.number, t.origin, t.values, t.status, t.steps, t.metrics, t.reason)
        for t in sorted(finished, key=lambda trial: trial.number)
    ]
    console = Console(width=140, color_system=None)
    with console.capture() as captured:
        console.print(_rich_table(None, rows, metrics))
    return captured.get().rstrip()


def describe(values: Mapping[str, Any]) -> str:
    """Return `name=value ...`, cut to `VALUES_WIDTH` characters."""
    parts = []
    for name, value in values.items():
        if isinstance(value, float):
            text = f"{value:.4g}"
        elif isinstance(value, (list, tuple)):
            text = "{" + " ".join(map(str, value)) + "}"
        else:
            text = str(value)
        parts.append(f"{name}={text}")
    text = " ".join(parts)
    return text if len(text) <= VALUES_WIDTH else text[: VALUES_WIDTH - 3] + "..."


def _rich_table(title: str | None, rows: Sequence[TrialRow], metrics: Sequence[str]) -> Table:
    table = Table(title=title)
    for name in ("trial", "origin", "values", "status", "step", *metrics):
        table.add_column(name, justify="right" if name in ("trial", "step", *metrics) else "left")
    for row in rows:
        status = row.status + (f": {row.reason}" if row.reason else "")
        cells = [f"{row.metrics[name]:.4g}" if name in row.metrics else "" for name in metrics]
        # escaped, because values and reasons may contain brackets, which are rich's markup
        texts = [str(row.number), row.origin, describe(row.values), status, str(row.step)]
        table.add_row(*(text.replace("[", r"\[") for text in texts), *cells)
    return table


# --- Records of trials ---


@dataclass
class _Running:
    """A trial that has started."""

    suggestion: Suggestion
    overrides: tuple[str, ...]
    steps: int  #: to train; 0 if its values make no valid recipe
    started: float  #: seconds since 1970
    curve: list[dict[str, float]] = field(default_factory=list)  #: metrics of each evaluation


def trial_run_id(run_id: str, number: int) -> str:
    """Run id of a trial's job, which names its folder and its MLflow run."""
    return f"{run_id}-{number:03d}"


@dataclass
class TrialLedger:
    """The trials of a search: running, waiting and finished."""

    space: Space
    suggester: Suggester
    finished: list[FinishedTrial]  #: in the order they finished; it grows
    objectives: Sequence[ObjectiveConfig]
    storage: Path
    run_id: str
    load: Callable[[Sequence[str]], LoadedRecipe[Any]]  #: overrides -> recipe of a trial
    tracking: TrackingConfig
    parent: str | None  #: MLflow run id of the search
    table: TrialTable
    running: dict[int, _Running] = field(default_factory=dict)  #: by number
    waiting: dict[int, list[_Running]] = field(default_factory=dict)  #: duplicates, by original

    @property
    def run_dir(self) -> Path:
        """Folder of the search."""
        return self.storage / self.run_id

    def trained(self) -> int:
        """Return the number of finished trials, without duplicates."""
        return sum(trial.status != "duplicate" for trial in self.finished)

    def next(self) -> Assignment | None:
        """Start the next trial; None if the space is exhausted. Duplicates are not started."""
        while (suggestion := self.suggester.next()) is not None:
            overrides = tuple(self.space.to_overrides(suggestion.values))
            running = _Running(suggestion, overrides, 0, time.time())
            if suggestion.duplicate_of in self.running:  # wait for its result
                self.waiting.setdefault(suggestion.duplicate_of, []).append(running)
                continue
            if suggestion.duplicate_of is not None:
                self._end_duplicate(running)
                continue
            self.running[suggestion.number] = running
            name = trial_run_id(self.run_id, suggestion.number)
            loaded, mistake = None, None
            try:
                loaded = self.load(overrides)
                running.steps = loaded.recipe.train.steps
                _remove_other_values(self.run_dir / "trials" / name, loaded)
            except ConfigError as error:  # the trial fails with it, and the search continues
                mistake = str(error)
            self._show(running, "running")
            latency = any(o.metric.startswith("latency") for o in self.objectives)
            return Assignment(suggestion.number, name, loaded, mistake, self.parent, latency)
        return None

    def evaluated(self, number: int, result: Mapping[str, Any]) -> None:
        """Record an evaluation.

        Args:
            result: as Tune reports it: `step`, the metrics, and Tune's own values.
        """
        metrics = {name: float(value) for name, value in result.items() if is_metric(name)}
        running = self.running[number]
        running.curve.append({"step": result["step"], **metrics})
        self._show(running, "running")

    def end(self, number: int, status: TrialStatus, reason: str | None) -> None:
        """Record the end of a trial, and of the duplicates that wait for it.

        In this order: in MLflow, in the sampler, in `trials.jsonl`.
        """
        running = self.running.pop(number)
        metrics = dict(running.curve[-1]) if running.curve else {}
        steps = int(metrics.pop("step", 0))
        if status != "failed":
            for objective in self.objectives:
                if not math.isfinite(metrics.get(objective.metric, math.nan)):
                    status, reason = "failed", f"{objective.metric} is not a finite number"
        seconds = time.time() - running.started
        trial = _finished(running, status, reason, metrics, steps, seconds)
        # MLflow before `trials.jsonl`: a search killed in between repeats the trial
        self._track(trial)
        self.suggester.tell(number, None if status == "failed" else metrics)
        self._write(running, trial)
        for duplicate in self.waiting.pop(number, ()):
            self._end_duplicate(duplicate)
        if status == "done":  # nothing resumes from its checkpoints; model/ stays
            folder = self.run_dir / "trials" / trial_run_id(self.run_id, number)
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)

    def _end_duplicate(self, running: _Running) -> None:
        original = running.suggestion.duplicate_of
        [metrics] = [trial.metrics for trial in self.finished if trial.number == original]
        trial = _finished(running, "duplicate", f"equals trial {original}", metrics, 0, 0.0)
        self._write(running, trial)

    def _write(self, running: _Running, trial: FinishedTrial) -> None:
        append_trial(self.run_dir / "trials.jsonl", trial)
        self.finished.append(trial)
        self._show(running, trial.status, trial.reason)

    def model_dir(self, number: int) -> Path:
        """Folder of a trial's model."""
        return self.run_dir / "trials" / trial_run_id(self.run_id, number) / "model"

    def settle(self) -> None:
        """Correct the status of MLflow runs after Tune has ended its actors.

        The job of a stopped trial may have set FAILED after the search set FINISHED. Trials that
        are still running are KILLED until the search resumes.
        """
        stopped = [trial.number for trial in self.finished if trial.status == "stopped"]
        for numbers, status in ((stopped, "FINISHED"), (list(self.running), "KILLED")):
            for number in numbers:
                run_id = trial_run_id(self.run_id, number)
                run = tracking.open_run(self.tracking, self.storage, run_id, {}, parent=self.parent)
                run.finish(status)

    def _track(self, trial: FinishedTrial) -> None:
        """End the trial's child run in MLflow; create it if the job did not get that far."""
        tags = {"fmray.trial": trial.number, "fmray.status": trial.status}
        tags |= {"fmray.origin": trial.origin}
        tags |= {"fmray.reason": trial.reason} if trial.reason else {}
        tags |= {"fmray.values": dumps(dict(trial.values))}
        run_id = trial_run_id(self.run_id, trial.number)
        with tracking.open_run(self.tracking, self.storage, run_id, {}, tags, self.parent) as run:
            for point in trial.curve:
                named = {f"trial/{name}": x for name, x in point.items() if name != "step"}
                run.log(int(point["step"]), **named)
            run.finish("FAILED" if trial.status == "failed" else "FINISHED")

    def _show(self, running: _Running, status: str, reason: str | None = None) -> None:
        suggestion = running.suggestion
        metrics = dict(running.curve[-1]) if running.curve else {}
        step = int(metrics.pop("step", 0))
        row = TrialRow(
            suggestion.number,
            suggestion.origin,
            suggestion.values,
            status,
            step,
            metrics,
            reason,
        )
        self.table.show(row)


# --- Interfaces of Ray Tune ---


class TuneSearcher(Searcher):
    """Gives Tune the trials to run.

    Args:
        trials: of the search, including those that have finished.
    """

    def __init__(self, ledger: TrialLedger, trials: int) -> None:
        super().__init__()
        self._ledger, self._left = ledger, trials - ledger.trained()
        self.exhausted = False

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return a trial's config, or `Searcher.FINISHED`."""
        assignment = self._ledger.next() if self._left > 0 else None
        if assignment is None:
            self.exhausted = True
            return Searcher.FINISHED
        self._left -= 1
        values = self._ledger.running[assignment.number].suggestion.values
        # the trial reads its assignment only; `values` are for TensorBoard (numbers and text)
        shown = {n: " ".join(v) if isinstance(v, tuple) else v for n, v in values.items()}
        return {"trial": assignment, "values": shown}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: `TuneCallback` records the end of trials."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: `trials.jsonl` has the state."""


class TuneCallback(Callback):
    """Records what Tune reports of trials.

    Args:
        rule: name of the rule that stops trials early.
    """

    def __init__(self, ledger: TrialLedger, rule: str) -> None:
        self._ledger, self._rule = ledger, rule

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Record an evaluation."""
        self._ledger.evaluated(trial.config["trial"].number, result)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Record a trial that trained to the end, or was stopped."""
        number = trial.config["trial"].number
        running = self._ledger.running[number]
        step = running.curve[-1]["step"] if running.curve else 0
        if step < running.steps:
            reason = f"{self._rule}, after step {step} of {running.steps}"
            self._ledger.end(number, "stopped", reason)
        else:
            self._ledger.end(number, "done", None)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Record a trial that raised."""
        self._ledger.end(trial.config["trial"].number, "failed", _reason(trial))


def _finished(
    running: _Running,
    status: TrialStatus,
    reason: str | None,
    metrics: Mapping[str, float],
    steps: int,
    seconds: float,
) -> FinishedTrial:
    suggestion = running.suggestion
    return FinishedTrial(
        suggestion.number,
        suggestion.key,
        suggestion.values,
        running.overrides,
        metrics,
        tuple(running.curve),
        status,
        reason,
        seconds,
        running.started,
        steps,
        suggestion.origin,
    )


def _reason(trial: Trial) -> str:
    """Return the innermost error of a failed trial in one line."""
    if trial.pickled_error_file is None:  # an error of Tune itself
        return Path(trial.error_file).read_text(encoding="utf-8").strip().splitlines()[-1]
    # not `get_pickled_error`, which reads a copy that is uploaded later
    error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    while True:
        if isinstance(error, RayTaskError):
            error = error.cause
        elif isinstance(error, WorkerGroupError):
            error = next(iter(error.worker_failures.values()))
        elif isinstance(error, ControllerError):
            error = error.controller_failure
        else:
            break
    lines = str(error).strip().splitlines() or [""]
    return (
        lines[0]
        if isinstance(error, ValueError | GaveUp)
        else f"{type(error).__name__}: {lines[0]}"
    )


def _remove_other_values(folder: Path, loaded: LoadedRecipe[Any]) -> None:
    """Remove the folder of an interrupted trial of the same number, if it had other values.

    A recipe that is no longer valid, of an earlier version, is one with other values.
    """
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        return
    try:
        same = same_training(load(recipe, kinds=(type(loaded.recipe),)).recipe, loaded.recipe)
    except ConfigError:
        same = False
    if not same:
        shutil.rmtree(folder)

"""Between Ray Tune and the search's own books: what is tried next, and what became of each trial.

In: a `Suggester`, and Tune's events. Out: to Tune, a config a trial; to `trials.jsonl`, to MLflow
and to the terminal, each trial as it ends. Tune's own notes are never read: a search goes on from
`trials.jsonl` alone.
"""

from __future__ import annotations

import json
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

from fmray.config import ConfigError, LoadedRecipe, TrackingConfig
from fmray.config.search import ObjectiveConfig
from fmray.runtime import tracking
from fmray.runtime.console import rich_console, say
from fmray.search.space import Space
from fmray.search.state import Finished, Status, append
from fmray.search.suggest import Suggester, Suggestion
from fmray.search.trial import Assignment, is_metric

# The trials of a search as they go: a live table in a terminal, plain lines elsewhere.
#
# In: what happens to a trial. Out: text on stdout.

SHOWN_ROWS = 30  # of a live table; the last ones
VALUES_WIDTH = 60


@dataclass(frozen=True)
class Row:
    """One line: where a trial stands. status: `running`, or as `Finished`."""

    number: int
    origin: str
    values: Mapping[str, Any]
    status: str
    step: int
    metrics: Mapping[str, float]
    reason: str | None = None


class TrialTable:
    """A context: while it lasts, `show` keeps the terminal up to date.

    metrics: names of the columns.
    """

    def __init__(self, metrics: Sequence[str], trials: int) -> None:
        self._metrics, self._trials = list(metrics), trials
        self._rows: dict[int, Row] = {}
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

    def show(self, row: Row) -> None:
        """A trial started, was evaluated or ended."""
        self._rows[row.number] = row
        if self._live is not None:
            self._live.update(self._table())
        else:
            say(self._line(row))

    def _line(self, row: Row) -> str:
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
        return _rich_table(f"{ended} of {self._trials} trials ended", rows, self._metrics)


def final_table(finished: Sequence[Finished], metrics: Sequence[str]) -> str:
    """All trials, in order of their numbers, as text."""
    rows = [
        Row(t.number, t.origin, t.values, t.status, t.steps, t.metrics, t.reason)
        for t in sorted(finished, key=lambda trial: trial.number)
    ]
    console = Console(width=140, color_system=None)
    with console.capture() as captured:
        console.print(_rich_table(None, rows, metrics))
    return captured.get().rstrip()


def describe(values: Mapping[str, Any]) -> str:
    """`name=value` of all, cut where it is long."""
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


def _rich_table(title: str | None, rows: Sequence[Row], metrics: Sequence[str]) -> Table:
    table = Table(title=title)
    for name in ("trial", "origin", "values", "status", "step", *metrics):
        table.add_column(name, justify="right" if name in ("trial", "step", *metrics) else "left")
    for row in rows:
        status = row.status + (f": {row.reason}" if row.reason else "")
        cells = [f"{row.metrics[name]:.4g}" if name in row.metrics else "" for name in metrics]
        # as text, not as rich's markup: values and reasons may hold brackets
        written = [str(row.number), row.origin, describe(row.values), status, str(row.step)]
        table.add_row(*(part.replace("[", r"\[") for part in written), *cells)
    return table


@dataclass
class _Running:
    """A trial that Tune has. steps: it is to train; 0 where its values make no recipe."""

    suggestion: Suggestion
    overrides: tuple[str, ...]
    steps: int
    started: float
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Books:
    """What a search knows, and where it is kept.

    finished: in the order they ended; it grows. load: overrides to a trial's recipe. running: by
    number. waiting: duplicates of a running trial, by its number.
    """

    space: Space
    suggester: Suggester
    finished: list[Finished]
    objectives: Sequence[ObjectiveConfig]
    storage: Path
    run_id: str
    load: Callable[[Sequence[str]], LoadedRecipe[Any]]
    tracking: TrackingConfig
    parent: str | None
    table: TrialTable
    running: dict[int, _Running] = field(default_factory=dict)
    waiting: dict[int, list[_Running]] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        """The folder of the search."""
        return self.storage / self.run_id

    def trained(self) -> int:
        """How many trials have ended, without duplicates."""
        return sum(trial.status != "duplicate" for trial in self.finished)

    def next(self) -> Assignment | None:
        """The next trial to train; None where the space is exhausted."""
        while (suggestion := self.suggester.next()) is not None:
            overrides = tuple(self.space.to_overrides(suggestion.values))
            running = _Running(suggestion, overrides, 0, time.time())
            if suggestion.duplicate_of in self.running:  # its result is not there yet
                self.waiting.setdefault(suggestion.duplicate_of, []).append(running)
                continue
            if suggestion.duplicate_of is not None:
                self._end_duplicate(running)
                continue
            self.running[suggestion.number] = running
            name = self.trial_run_id(suggestion.number)
            try:
                loaded, mistake = self.load(overrides), None
                running.steps = loaded.recipe.train.steps
                _forget_other(self.run_dir / "trials" / name, loaded)
            except ConfigError as error:
                loaded, mistake = None, str(error)
            self._show(running, "running")
            latency = any(o.metric.startswith("latency") for o in self.objectives)
            return Assignment(suggestion.number, name, loaded, mistake, self.parent, latency)
        return None

    def evaluated(self, number: int, result: Mapping[str, Any]) -> None:
        """A trial reported an evaluation."""
        metrics = {name: float(value) for name, value in result.items() if is_metric(name)}
        running = self.running[number]
        running.curve.append({"step": result["step"], **metrics})
        self._show(running, "running")

    def end(self, number: int, status: Status, reason: str | None) -> None:
        """A trial ended: tracked, told to the sampler, written down."""
        running = self.running.pop(number)
        metrics = dict(running.curve[-1]) if running.curve else {}
        steps = int(metrics.pop("step", 0))
        if status != "failed":
            for objective in self.objectives:
                if not math.isfinite(metrics.get(objective.metric, math.nan)):
                    status, reason = "failed", f"{objective.metric} is not a finite number"
        seconds = time.time() - running.started
        trial = _finished(running, status, reason, metrics, steps, seconds)
        # before it is written down: a search killed in between tries the trial again
        self._track(trial)
        self.suggester.tell(number, None if status == "failed" else metrics)
        self._write(running, trial)
        for waiting in self.waiting.pop(number, ()):
            self._end_duplicate(waiting)
        if status == "done":  # nothing resumes it; its model/ stays
            folder = self.run_dir / "trials" / self.trial_run_id(number)
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)

    def _end_duplicate(self, running: _Running) -> None:
        first = running.suggestion.duplicate_of
        [metrics] = [trial.metrics for trial in self.finished if trial.number == first]
        trial = _finished(running, "duplicate", f"equals trial {first}", metrics, 0, 0.0)
        self._write(running, trial)

    def _write(self, running: _Running, trial: Finished) -> None:
        append(self.run_dir / "trials.jsonl", trial)
        self.finished.append(trial)
        self._show(running, trial.status, trial.reason)

    def model_dir(self, number: int) -> Path:
        """What a trial trained."""
        return self.run_dir / "trials" / self.trial_run_id(number) / "model"

    def trial_run_id(self, number: int) -> str:
        """The run id of a trial's job, by which MLflow and its folder are found."""
        return f"{self.run_id}-{number:03d}"

    def settle(self) -> None:
        """The last word on MLflow runs, once Tune has ended its actors.

        A job that is stopped may call its run FAILED after the search called it finished; trials
        that Tune still had are KILLED until they are tried again.
        """
        ended = [trial.number for trial in self.finished if trial.status == "stopped"]
        for numbers, status in ((ended, "FINISHED"), (list(self.running), "KILLED")):
            for number in numbers:
                run_id = self.trial_run_id(number)
                run = tracking.open_run(self.tracking, self.storage, run_id, {}, parent=self.parent)
                run.finish(status)

    def _track(self, trial: Finished) -> None:
        """The end of the trial's child run in MLflow; it is there whatever became of the job."""
        tags = {"fmray.trial": trial.number, "fmray.status": trial.status}
        tags |= {"fmray.origin": trial.origin}
        tags |= {"fmray.reason": trial.reason} if trial.reason else {}
        tags |= {"fmray.values": json.dumps(dict(trial.values))}
        run_id = self.trial_run_id(trial.number)
        with tracking.open_run(self.tracking, self.storage, run_id, {}, tags, self.parent) as run:
            for point in trial.curve:
                named = {f"trial/{name}": x for name, x in point.items() if name != "step"}
                run.log(int(point["step"]), **named)
            run.finish("FAILED" if trial.status == "failed" else "FINISHED")

    def _show(self, running: _Running, status: str, reason: str | None = None) -> None:
        suggestion = running.suggestion
        metrics = dict(running.curve[-1]) if running.curve else {}
        step = int(metrics.pop("step", 0))
        row = Row(
            suggestion.number,
            suggestion.origin,
            suggestion.values,
            status,
            step,
            metrics,
            reason,
        )
        self.table.show(row)


class Suggestions(Searcher):
    """Tune asks it what to try; `trials`: in all, those that have ended included."""

    def __init__(self, books: Books, trials: int) -> None:
        super().__init__()
        self._books, self._left = books, trials - books.trained()
        self.exhausted = False

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """A trial's config, or that there are no more."""
        assignment = self._books.next() if self._left > 0 else None
        if assignment is None:
            self.exhausted = True
            return Searcher.FINISHED
        self._left -= 1
        values = self._books.running[assignment.number].suggestion.values
        # beside what the trial goes by, for TensorBoard: it knows numbers and text
        shown = {n: " ".join(v) if isinstance(v, tuple) else v for n, v in values.items()}
        return {"trial": assignment, "values": shown}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """The `Watcher` is told more."""

    def save(self, checkpoint_path: str) -> None:
        """`trials.jsonl` has it."""


class Watcher(Callback):
    """Tune tells it what happens to trials. rule: what stops them early."""

    def __init__(self, books: Books, rule: str) -> None:
        self._books, self._rule = books, rule

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """An evaluation."""
        self._books.evaluated(trial.config["trial"].number, result)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """The trial reported its last step, or was stopped."""
        number = trial.config["trial"].number
        running = self._books.running[number]
        step = running.curve[-1]["step"] if running.curve else 0
        if step < running.steps:
            reason = f"{self._rule}, after step {step} of {running.steps}"
            self._books.end(number, "stopped", reason)
        else:
            self._books.end(number, "done", None)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """The trial raised."""
        self._books.end(trial.config["trial"].number, "failed", _reason(trial))


def _finished(
    running: _Running,
    status: Status,
    reason: str | None,
    metrics: Mapping[str, float],
    steps: int,
    seconds: float,
) -> Finished:
    suggestion = running.suggestion
    return Finished(
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
    """One line: what the innermost error said, whoever wrapped it."""
    if trial.pickled_error_file is None:  # of Tune itself, not of the trial
        return Path(trial.error_file).read_text(encoding="utf-8").strip().splitlines()[-1]
    # the file here: `get_pickled_error` reads the one that is uploaded later
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
    return lines[0] if isinstance(error, ValueError) else f"{type(error).__name__}: {lines[0]}"


def _forget_other(folder: Path, loaded: LoadedRecipe[Any]) -> None:
    """Remove what an interrupted trial of the same number left, if it had other values."""
    recipe = folder / "recipe.yaml"
    if recipe.is_file() and recipe.read_text(encoding="utf-8") != loaded.dump():
        shutil.rmtree(folder)

"""The table of a comparison: accuracies, paired differences, and what they say of the thesis.

In: accuracies over the same test tasks, by line of the table, target and shots. Out: text for the
terminal, and plain values for `results.json`. Differences are paired, task by task.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fmray.config.fewshot import FewshotRecipe, Method, Selection, TargetConfig
from fmray.data.image_store import ImageStore
from fmray.fewshot import Encoder, Interval, confidence_interval, paired_interval
from fmray.train.engine import make_engine
from fmray.train.fewshot.encoder import ImageReader, load_encoder
from fmray.train.fewshot.evaluate import (
    measure_accuracy,
    percent,
    shots_name,
    task_samplers,
    ways_of,
)
from fmray.train.fewshot.learners import make_learner
from fmray.train.fewshot.method import run_steps
from fmray.train.fewshot.select import CandidateTask, candidate_tasks
from fmray.train.fewshot.tasks import TrainingSet
from fmray.train.method import Worker, training_settings

ALL, RANDOM, SELECTED = "multitask/all", "multitask/random", "multitask/selected"
CLAIMS = (
    # what the thesis says (chapter 3), and the lines of the table it is about
    ("selected tasks are at least as good as all tasks", SELECTED, ALL, ">="),
    ("selected tasks beat as many random ones", SELECTED, RANDOM, ">"),
    ("multitask finetuning beats standard finetuning", ALL, "standard", ">"),
    ("standard finetuning beats direct adaptation", "standard", "direct", ">"),
)

Column = tuple[str, int]  # target, shots


@dataclass(frozen=True)
class Claim:
    """A claim beside what was found: in how many columns the 95 % interval of `better - worse`
    lies above zero, holds it, or lies below; difference: mean over the columns, in [-1, 1]."""

    text: str
    better: str
    worse: str
    relation: str
    above: int
    within: int
    below: int
    difference: float

    def __str__(self) -> str:
        columns = self.above + self.within + self.below
        return (
            f"thesis: {self.text}. Found: {self.better} - {self.worse} is"
            f" {100 * self.difference:+.2f} points on average; above zero in {self.above} of"
            f" {columns} columns, undecided in {self.within}, below in {self.below}"
        )


@dataclass(frozen=True)
class Comparison:
    """Accuracies [tasks] by line and column. A line of several seeds is their mean, task by task.

    ways: by column.
    """

    accuracies: Mapping[str, Mapping[Column, np.ndarray]]
    ways: Mapping[Column, int]

    def difference(self, line: str, other: str, column: Column) -> Interval:
        """Paired interval of line - other."""
        return paired_interval(self.accuracies[line][column], self.accuracies[other][column])

    def claims(self) -> list[Claim]:
        """Those of the thesis whose lines are in the table."""
        found = []
        for text, better, worse, relation in CLAIMS:
            if better not in self.accuracies or worse not in self.accuracies:
                continue
            intervals = [self.difference(better, worse, column) for column in self.ways]
            above = sum(interval.low > 0 for interval in intervals)
            below = sum(interval.high < 0 for interval in intervals)
            within = len(intervals) - above - below
            mean = float(np.mean([interval.mean for interval in intervals]))
            found.append(Claim(text, better, worse, relation, above, within, below, mean))
        return found

    def table(self) -> str:
        """For the terminal: for each number of shots accuracies, then differences to all tasks and
        to random ones; below, the claims."""
        parts: list[str] = []
        for shots in dict.fromkeys(shots for _, shots in self.ways):
            columns = [column for column in self.ways if column[1] == shots]
            ways = [self.ways[column] or "variable" for column in columns]
            heads = [f"{target} {n}-way" for (target, _), n in zip(columns, ways, strict=True)]
            parts.append(f"{shots_name(shots)}: accuracy in %, with its 95 % interval over tasks")
            parts += _columns(heads, self._accuracy_lines(columns))
            for other in (ALL, RANDOM):
                if other in self.accuracies:
                    parts.append(f"{shots_name(shots)}: minus {other}, paired")
                    parts += _columns(heads, self._difference_lines(columns, other))
        return "\n".join([*parts, *map(str, self.claims())])

    def values(self) -> dict[str, Any]:
        """For `results.json`."""
        cells = [
            {
                "line": line,
                "target": target,
                "shots": shots,
                "ways": self.ways[target, shots],
                "accuracy": asdict(confidence_interval(values)),
            }
            | {
                f"minus {other}": asdict(self.difference(line, other, (target, shots)))
                for other in (ALL, RANDOM)
                if other in self.accuracies and other != line
            }
            for line, columns in self.accuracies.items()
            for (target, shots), values in columns.items()
        ]
        return {"cells": cells, "claims": [asdict(claim) for claim in self.claims()]}

    def _accuracy_lines(self, columns: list[Column]) -> Iterator[list[str]]:
        for line, values in self.accuracies.items():
            intervals = [confidence_interval(values[column]) for column in columns]
            mean = 100 * float(np.mean([interval.mean for interval in intervals]))
            yield [line, *map(percent, intervals), f"{mean:.2f}"]

    def _difference_lines(self, columns: list[Column], other: str) -> Iterator[list[str]]:
        for line in self.accuracies:
            if line == other:
                continue
            intervals = [self.difference(line, other, column) for column in columns]
            mean = 100 * float(np.mean([interval.mean for interval in intervals]))
            yield [line, *(percent(interval, "+") for interval in intervals), f"{mean:+.2f}"]


def _columns(heads: list[str], lines: Iterator[list[str]]) -> Iterator[str]:
    """Names set left, numbers right."""
    rows = [["", *heads, "mean"], *lines]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for first, *others in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([f"{first:<{widths[0]}}", *cells])


# The cells of a comparison: which trainings they need, how one training is run, what is kept.
#
# In: a recipe, the tasks that were selected, decoded pictures. Out: accuracies over the test tasks,
# one Parquet file a cell (`CELL_SCHEMA`), named by a hash of all that decides them: a cell whose
# file is there is not computed again. Cells that train on the same tasks in the same way share one
# training.

CELL_SCHEMA = pa.schema(
    [
        ("shots", pa.int32()),
        ("ways", pa.int32()),
        ("task", pa.int32()),  # the same number is the same images in every cell of a target
        ("accuracy", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Cell:
    """One entry of the table. selection, seed: of method multitask (seed: of random alone); tasks:
    names it trains on; training, key: hashes of what decides the training, and the accuracies."""

    target: TargetConfig
    method: Method
    selection: Selection | None
    seed: int | None
    tasks: tuple[str, ...]
    training: str
    key: str

    @property
    def row(self) -> str:
        """The line of the table it belongs to; all seeds are of one line."""
        return self.method if self.selection is None else f"{self.method}/{self.selection}"

    @property
    def column(self) -> str:
        """Its target's name in the table; the test split goes without saying."""
        split = self.target.split
        return self.target.collection + ("" if split == "test" else f" ({split})")

    @property
    def name(self) -> str:
        """Its own name, for folders and MLflow."""
        parts = [self.target.collection, self.target.split, self.method]
        parts += [] if self.selection is None else [self.selection]
        return "-".join(parts + ([] if self.seed is None else [str(self.seed)]))


@dataclass(frozen=True)
class CellResult:
    """What a cell's file holds: accuracies [tasks] and ways by shots; the training's seconds (0
    without one) and its loss over the last tenth of the steps."""

    accuracies: dict[int, np.ndarray]
    ways: dict[int, int]
    seconds: float
    loss: float | None


def method_recipe(recipe: FewshotRecipe, method: Method) -> FewshotRecipe:
    """The recipe as a cell of this method trains: its learning rate, one process."""
    lr = recipe.compare.lr.get(method, recipe.train.lr)
    changes = {"method": method, "lr": lr, "strategy": "ddp"}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def make_cell(
    recipe: FewshotRecipe,
    store: ImageStore,
    encoder: str,
    target: TargetConfig,
    method: Method,
    selection: Selection | None,
    seed: int | None,
    tasks: Mapping[str, CandidateTask],
) -> Cell:
    """A cell and its hashes. encoder: fingerprint of the weights it starts from; tasks: candidate
    tasks to train on, by name, none for direct adaptation."""
    settings: dict[str, Any] = {"encoder": encoder, "store": store.fingerprint}
    if method != "direct":
        own = method_recipe(recipe, method)
        training = TrainingSet(
            list(tasks.values()), store, own.episodes, own.seed, own.select.weights
        )
        settings |= {"tasks": training.fingerprint}
        values = training_settings(own, sorted(tasks))
        settings |= {name: value for name, value in values.items() if name != "encoder.checkpoint"}
    trained = digest(settings)
    measured = {
        "training": trained,
        "seed": recipe.seed,
        "target": target.model_dump(exclude={"unlabelled"}),
        "evaluate": recipe.evaluate.model_dump(exclude={"batch"}),
    }
    return Cell(target, method, selection, seed, tuple(sorted(tasks)), trained, digest(measured))


def run_cells(
    recipe: FewshotRecipe, cells: list[Cell], kept: np.ndarray | None
) -> dict[str, CellResult]:
    """Train once, and measure on each cell's target; by key.

    cells: all of one training. kept: decoded pictures of the store.
    """
    first = cells[0]
    own = method_recipe(recipe, first.method)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store = ImageStore.open(recipe.images.store, recipe.images.cache)
    encoder = load_encoder(recipe.encoder).to(device)
    pictures = ImageReader(store, encoder.preprocess, kept)
    seconds, loss = 0.0, None
    if first.method != "direct":
        with redirect_stdout(io.StringIO()):  # what it leaves out was said when cells were planned
            candidates = candidate_tasks(store, recipe, first.target)
        chosen = [task for task in candidates if task.name in set(first.tasks)]
        training = TrainingSet(chosen, store, own.episodes, own.seed, own.select.weights)
        learner = make_learner(encoder, training, pictures, own.train, own.seed, device)
        engine = make_engine(learner, own.train, world_size=1)
        alone = Worker(0, 1, device)
        steps = [m for _, m in run_steps(engine, training, pictures, own.train, 0, alone)]
        seconds = sum(own.train.episodes_per_step / metrics["episodes_per_s"] for metrics in steps)
        last = steps[-max(1, len(steps) // 10) :]
        loss = sum(metrics["loss"] for metrics in last) / len(last)
    results: dict[str, CellResult] = {}
    for cell in cells:
        if cell.key in results:
            continue
        rows = store.select(cell.target.collection, cell.target.split)
        with redirect_stdout(io.StringIO()):  # the table says how many ways there are
            samplers = task_samplers(store, rows, cell.target, recipe.evaluate, recipe.seed)
        found = measure_accuracy(encoder, pictures, rows, samplers, recipe.evaluate)
        results[cell.key] = CellResult(found, ways_of(samplers), seconds, loss)
    return results


def write_cell(path: Path, measured: CellResult) -> None:
    """One file, moved when complete: it is there, or the cell is not done."""
    records = [
        {"shots": shots, "ways": measured.ways[shots], "task": task, "accuracy": accuracy}
        for shots, values in measured.accuracies.items()
        for task, accuracy in enumerate(values.tolist())
    ]
    notes = json.dumps({"seconds": measured.seconds, "loss": measured.loss})
    table = pa.Table.from_pylist(records, CELL_SCHEMA.with_metadata({"training": notes}))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table, partial)
    os.replace(partial, path)


def read_cell(path: Path) -> CellResult:
    """What `write_cell` wrote."""
    table = pq.read_table(path)
    shots, task = table["shots"].to_numpy(), table["task"].to_numpy()
    values, ways = table["accuracy"].to_numpy(), table["ways"].to_numpy()
    accuracies, by_shots = {}, {}
    for number in np.unique(shots).tolist():
        chosen = np.flatnonzero(shots == number)
        accuracies[number] = values[chosen[np.argsort(task[chosen])]]
        by_shots[number] = int(ways[chosen[0]])
    return CellResult(accuracies, by_shots, **json.loads(table.schema.metadata[b"training"]))


def weights_digest(encoder: Encoder) -> str:
    """16 hex digits that change with any weight, and with what the encoder takes for an image."""
    found = hashlib.sha256(repr((encoder.name, encoder.preprocess)).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        found.update(name.encode() + tensor.cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def digest(settings: Mapping[str, Any]) -> str:
    """16 hex digits of SHA-256."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

"""The cells of a comparison (target x method x selection), and the table they are put into.

A cell is stored as one Parquet file (`CELL_SCHEMA`) named by a hash of everything that decides its
accuracies, so it is computed once. Cells that train on the same tasks in the same way share one
training. The table has accuracies, paired differences task by task, and what they say about the
claims of the thesis.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fmray.config.fewshot import FewshotRecipe, Method, Selection, TargetConfig
from fmray.data.image_store import ImageStore
from fmray.errors import NotFinite
from fmray.fewshot import Encoder, Interval, confidence_interval, paired_interval
from fmray.runtime.console import say
from fmray.runtime.files import atomic_path, digest_of, dumps
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
from fmray.train.finite import Diverged, FiniteCheck, name_samples, weights_finite
from fmray.train.method import Worker
from fmray.train.resume import training_settings

ALL, RANDOM, SELECTED = "multitask/all", "multitask/random", "multitask/selected"
CLAIMS = (
    # claims of the thesis (chapter 3): text, better line of the table, worse line, relation
    ("selected tasks are at least as good as all tasks", SELECTED, ALL, ">="),
    ("selected tasks beat as many random ones", SELECTED, RANDOM, ">"),
    ("multitask finetuning beats standard finetuning", ALL, "standard", ">"),
    ("standard finetuning beats direct adaptation", "standard", "direct", ">"),
)

Column = tuple[str, int]  # target, shots


@dataclass(frozen=True)
class Claim:
    """A claim of the thesis, and the 95 % intervals of `better - worse` in all columns."""

    text: str
    better: str  #: a line of the table
    worse: str  #: a line of the table
    relation: str  #: the claim is `better relation worse`
    above: int  #: columns whose interval lies above zero
    within: int  #: columns whose interval contains zero
    below: int  #: columns whose interval lies below zero
    difference: float  #: mean over the columns, in [-1, 1]

    def __str__(self) -> str:
        columns = self.above + self.within + self.below
        return (
            f"thesis: {self.text}. Measured: {self.better} - {self.worse} is"
            f" {100 * self.difference:+.2f} points on average; above zero in {self.above} of"
            f" {columns} columns, undecided in {self.within}, below in {self.below}"
        )


@dataclass(frozen=True)
class Comparison:
    """The table. A line with several seeds has their mean, task by task."""

    accuracies: Mapping[str, Mapping[Column, np.ndarray]]  #: [tasks], by line and column
    ways: Mapping[Column, int]

    def difference(self, line: str, other: str, column: Column) -> Interval:
        """Return the paired interval of line - other."""
        return paired_interval(self.accuracies[line][column], self.accuracies[other][column])

    def claims(self) -> list[Claim]:
        """Return the claims of the thesis whose lines are in the table."""
        claims = []
        for text, better, worse, relation in CLAIMS:
            if better not in self.accuracies or worse not in self.accuracies:
                continue
            intervals = [self.difference(better, worse, column) for column in self.ways]
            above = sum(interval.low > 0 for interval in intervals)
            below = sum(interval.high < 0 for interval in intervals)
            within = len(intervals) - above - below
            mean = float(np.mean([interval.mean for interval in intervals]))
            claims.append(Claim(text, better, worse, relation, above, within, below, mean))
        return claims

    def table(self) -> str:
        """Return the text for the terminal.

        For each number of shots: accuracies, then differences to all tasks and to random tasks.
        The claims follow.
        """
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
        """Return the content of `results.json`."""
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
    """Align names left and numbers right."""
    rows = [["", *heads, "mean"], *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for name, *numbers in rows:
        cells = (f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=True))
        yield "  ".join([f"{name:<{widths[0]}}", *cells])


# --- Cells ---

CELL_SCHEMA = pa.schema(
    [
        ("shots", pa.int32()),
        ("ways", pa.int32()),
        ("task", pa.int32()),  # the same images in every cell of a target
        ("accuracy", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Cell:
    """One entry of the table: what it trains on and is tested on."""

    target: TargetConfig
    method: Method
    selection: Selection | None  #: None unless the method is multitask
    seed: int | None  #: None unless the selection is random
    tasks: tuple[str, ...]  #: names of the tasks it trains on
    training: str  #: hash of what decides the training
    key: str  #: hash of what decides the accuracies

    @property
    def row(self) -> str:
        """Name of its line in the table; all seeds share one line."""
        return self.method if self.selection is None else f"{self.method}/{self.selection}"

    @property
    def column(self) -> str:
        """Name of its target in the table, with the split unless that is `test`."""
        split = self.target.split
        return self.target.collection + ("" if split == "test" else f" ({split})")

    @property
    def name(self) -> str:
        """Name in log lines, results.json and MLflow."""
        parts = [self.target.collection, self.target.split, self.method]
        parts += [] if self.selection is None else [self.selection]
        return "-".join(parts + ([] if self.seed is None else [str(self.seed)]))


@dataclass(frozen=True)
class CellResult:
    """The content of a cell's file."""

    accuracies: dict[int, np.ndarray]  #: [tasks], by shots
    ways: dict[int, int]  #: by shots
    seconds: float  #: of training; 0 without one
    loss: float | None  #: mean over the last tenth of the steps; None without a training


def method_recipe(recipe: FewshotRecipe, method: Method) -> FewshotRecipe:
    """Return the recipe of a cell's training: the method's learning rate, one process."""
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
    """Return a cell with its hashes.

    Args:
        encoder: `weights_digest` of the encoder it starts from.
        tasks: candidate tasks to train on, by name; none for direct adaptation.
    """
    settings: dict[str, Any] = {"encoder": encoder, "store": store.fingerprint}
    if method != "direct":
        trained = method_recipe(recipe, method)
        training = TrainingSet(
            list(tasks.values()), store, trained.episodes, trained.seed, trained.select.weights
        )
        settings |= {"tasks": training.fingerprint}
        values = training_settings(trained, sorted(tasks))
        settings |= {name: value for name, value in values.items() if name != "encoder.checkpoint"}
    training_key = digest(settings)
    evaluated = {
        "training": training_key,
        "seed": recipe.seed,
        "target": target.model_dump(exclude={"unlabelled"}),
        "evaluate": recipe.evaluate.model_dump(exclude={"batch"}),
    }
    return Cell(
        target, method, selection, seed, tuple(sorted(tasks)), training_key, digest(evaluated)
    )


def run_cells(
    recipe: FewshotRecipe, cells: list[Cell], decoded: np.ndarray | None
) -> dict[str, CellResult]:
    """Train once and evaluate on the target of each cell; return the results by key.

    Args:
        cells: of one training.
        decoded: all images of the store, from `decode_all`.

    Raises:
        Diverged: a loss, gradient, weight or feature is not finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store = ImageStore.open(recipe.images.store, recipe.images.cache)
    encoder = load_encoder(recipe.encoder).to(device)
    images = ImageReader(store, encoder.preprocess, decoded)
    seconds, loss = 0.0, None
    if cells[0].method != "direct":
        seconds, loss = _train(recipe, cells[0], store, encoder, images, device)
    results: dict[str, CellResult] = {}
    for cell in cells:
        if cell.key in results:
            continue
        rows = store.select(cell.target.collection, cell.target.split)
        samplers = task_samplers(  # the table reports the number of ways
            store, rows, cell.target, recipe.evaluate, recipe.seed, report=False
        )
        try:
            accuracies = measure_accuracy(encoder, images, rows, samplers, recipe.evaluate)
        except NotFinite as error:
            if cell.method == "direct":
                raise
            raise Diverged(f"run {cell.name}: {error}; {_advice(cell)}") from error
        results[cell.key] = CellResult(accuracies, ways_of(samplers), seconds, loss)
    return results


def _train(
    recipe: FewshotRecipe,
    cell: Cell,
    store: ImageStore,
    encoder: Encoder,
    images: ImageReader,
    device: torch.device,
) -> tuple[float, float]:
    """Finetune the encoder in place; return (seconds, mean loss over the last tenth of steps)."""
    trained = method_recipe(recipe, cell.method)
    candidates = candidate_tasks(store, recipe, cell.target)
    tasks = [task for task in candidates if task.name in set(cell.tasks)]
    training = TrainingSet(tasks, store, trained.episodes, trained.seed, trained.select.weights)
    learner = make_learner(encoder, training, images, trained.train, trained.seed, device)
    engine = make_engine(learner, trained.train, world_size=1)
    worker = Worker(0, 1, device)
    check = FiniteCheck(cell.name, say, lambda _: _advice(cell), trained.train.skip_nonfinite)
    steps = []
    for step, metrics in run_steps(engine, training, images, trained.train, 0, worker):
        if check.step(step, metrics, lambda: name_samples(worker)):
            steps.append(metrics)
    check.weights(trained.train.steps, weights_finite(learner, worker))
    seconds = sum(trained.train.episodes_per_step / metrics["episodes_per_s"] for metrics in steps)
    last = steps[-max(1, len(steps) // 10) :]
    if not last:
        raise NotFinite("every training step was skipped, because none was finite")
    return seconds, sum(metrics["loss"] for metrics in last) / len(last)


def _advice(cell: Cell) -> str:
    return f"finished cells are kept under the same --run-id; lower compare.lr.{cell.method}"


def write_cell(path: Path, result: CellResult) -> None:
    """Write the result of a cell; a file that exists is complete."""
    records = [
        {"shots": shots, "ways": result.ways[shots], "task": task, "accuracy": accuracy}
        for shots, values in result.accuracies.items()
        for task, accuracy in enumerate(values.tolist())
    ]
    notes = dumps({"seconds": result.seconds, "loss": result.loss})
    table = pa.Table.from_pylist(records, CELL_SCHEMA.with_metadata({"training": notes}))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def read_cell(path: Path) -> CellResult:
    """Read a file that `write_cell` wrote."""
    table = pq.read_table(path)
    shots, task = table["shots"].to_numpy(), table["task"].to_numpy()
    values, ways = table["accuracy"].to_numpy(), table["ways"].to_numpy()
    accuracies, ways_by_shots = {}, {}
    for number in np.unique(shots).tolist():
        rows = np.flatnonzero(shots == number)
        accuracies[number] = values[rows[np.argsort(task[rows])]]
        ways_by_shots[number] = int(ways[rows[0]])
    return CellResult(accuracies, ways_by_shots, **json.loads(table.schema.metadata[b"training"]))


def weights_digest(encoder: Encoder) -> str:
    """Return 16 hex digits that change with the name, any weight, and the preprocessing."""
    sha256 = hashlib.sha256(repr((encoder.name, encoder.preprocess)).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        sha256.update(name.encode() + tensor.cpu().numpy().tobytes())
    return sha256.hexdigest()[:16]


def digest(settings: Mapping[str, Any]) -> str:
    """Return 16 hex digits of the SHA-256 of settings."""
    return digest_of(settings)[:16]

"""Accuracy of encoders over many test tasks: a finetuned encoder against direct adaptation.

The job measures the encoder of a finished run and the one it started from; with
`train.method: direct`, only the recipe's encoder. It writes results.json and tasks.parquet
(`TASK_SCHEMA`) to `evaluation/` in the run's folder. Each image is encoded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fmray.config import LoadedRecipe
from fmray.config.fewshot import FewshotEvaluateConfig, FewshotRecipe, TargetConfig
from fmray.data.image_store import ImageStore, Rows
from fmray.fewshot import (
    Encoder,
    EpisodeSampler,
    Interval,
    MetaDatasetSampler,
    confidence_interval,
    evaluate_tasks,
    paired_interval,
)
from fmray.runtime import tracking
from fmray.runtime.console import say
from fmray.runtime.files import atomic_path, write_json
from fmray.train.fewshot.encoder import ImageReader, embed, load_encoder
from fmray.train.mirror import find_model

DIRECT = "direct"
VARIABLE = 0  # stands for the shots and ways of meta_dataset_v1, which vary by task
Sampler = EpisodeSampler | MetaDatasetSampler
TASK_SCHEMA = pa.schema(
    [
        ("method", pa.string()),
        ("shots", pa.int32()),
        ("task", pa.int32()),  # the same images for every method
        ("accuracy", pa.float64()),
    ]
)


@dataclass(frozen=True)
class EncoderReport:
    """Accuracies of one or two encoders on the same test tasks of a target."""

    target: str
    ways: dict[int, int]  #: by shots; 0: they vary
    accuracies: dict[tuple[str, int], np.ndarray]  #: [tasks] in [0, 1], by (method, shots)

    def table(self) -> str:
        """Return mean accuracy in % with its 95 % interval, and the gain over direct adaptation."""
        lines = [f"target {self.target}"]
        lines.append(f"{'method':>12}  {'tasks':>16}  {'accuracy %':>14}  gain, paired")
        for (method, shots), values in self.accuracies.items():
            gain = ""
            if method != DIRECT:
                gain = percent(paired_interval(values, self.accuracies[DIRECT, shots]), sign="+")
            accuracy = percent(confidence_interval(values))
            tasks = tasks_name(self.ways[shots], shots)
            lines.append(f"{method:>12}  {tasks:>16}  {accuracy:>14}  {gain}".rstrip())
        return "\n".join(lines)


def evaluate_encoder(loaded: LoadedRecipe[FewshotRecipe], run_id: str) -> EncoderReport:
    """Measure the encoder that the run `run_id` finetuned, and the one it started from.

    Raises:
        ValueError: a recipe without a target, or a run without a model.
    """
    recipe = loaded.recipe.with_absolute_paths()
    if recipe.target is None:
        raise ValueError("target: set target.collection and target.split, which are evaluated on")
    run_dir = recipe.cluster.storage / run_id
    method = recipe.train.method
    encoders = {DIRECT: recipe.encoder}
    if method != DIRECT:
        model = find_model(recipe.cluster, run_dir, "jobs/train.py")
        encoders[method] = recipe.encoder.model_copy(update={"checkpoint": model})
    store = ImageStore.open(recipe.images.store, recipe.images.cache)
    rows = store.select(recipe.target.collection, recipe.target.split)
    samplers = task_samplers(store, rows, recipe.target, recipe.evaluate, recipe.seed)
    out = run_dir / "evaluation"
    with tracking.open_job_run(recipe, run_id) as run:
        accuracies: dict[tuple[str, int], np.ndarray] = {}
        for name, config in encoders.items():
            encoder = load_encoder(config)
            images = ImageReader(store, encoder.preprocess)
            by_shots = measure_accuracy(encoder, images, rows, samplers, recipe.evaluate)
            accuracies |= {(name, shots): values for shots, values in by_shots.items()}
        result = EncoderReport(recipe.target.collection, ways_of(samplers), accuracies)
        _write(result, out)
        run.log(
            0,
            **{
                f"evaluate/{name}/{shots_name(shots)}": float(values.mean())
                for (name, shots), values in accuracies.items()
            },
        )
        run.artifact(out)
    say(result.table())
    return result


def task_samplers(
    store: ImageStore,
    rows: Rows,
    target: TargetConfig,
    config: FewshotEvaluateConfig,
    seed: int,
    report: bool = True,
) -> dict[int, Sampler]:
    """Return samplers of a target's test tasks by shots (`VARIABLE` if they vary by task).

    Episodes are positions in `rows`. A target with too few classes has tasks of fewer ways.

    Args:
        report: say so if the tasks have fewer ways.

    Raises:
        ValueError: fewer than two classes are large enough (five for meta_dataset_v1).
    """
    if config.sampler == "meta_dataset_v1":
        groups = store.groups(target.collection, target.split)
        # groups that overlap are WordNet's nodes, used completely; disjoint ones are alphabets
        labels = np.concatenate(groups or [np.empty(0, dtype=np.int64)])
        overlapping = len(np.unique(labels)) < len(labels)
        sampler = MetaDatasetSampler(
            rows.labels, seed, target.split, groups, whole_groups=overlapping
        )
        return {VARIABLE: sampler}
    counts = np.unique(rows.labels, return_counts=True)[1]
    samplers: dict[int, Sampler] = {}
    for shots in config.shots:
        large = int((counts >= shots + config.queries).sum())
        ways = min(config.ways, large)
        if ways < 2:
            raise ValueError(
                f"target {target.collection}, split {target.split}: {large} of {len(counts)}"
                f" classes have {shots} support + {config.queries} query images, and a task needs 2"
            )
        if ways < config.ways and report:
            say(
                f"target {target.collection}, split {target.split}, {shots}-shot: {ways}-way, not"
                f" {config.ways}-way: no more classes have {shots + config.queries} images"
            )
        samplers[shots] = EpisodeSampler(
            rows.labels, ways, shots, config.queries, seed, target.split
        )
    return samplers


def ways_of(samplers: Mapping[int, Sampler]) -> dict[int, int]:
    """Return ways by shots; `VARIABLE` if they vary by task."""
    return {shots: getattr(sampler, "ways", VARIABLE) for shots, sampler in samplers.items()}


def measure_accuracy(
    encoder: Encoder,
    images: ImageReader,
    rows: Rows,
    samplers: Mapping[int, Sampler],
    config: FewshotEvaluateConfig,
) -> dict[int, np.ndarray]:
    """Return accuracies [tasks] by shots. Leaves the encoder in eval mode."""
    embeddings = embed(encoder, images, rows.rows, config.batch)
    return {
        shots: np.asarray(evaluate_tasks(embeddings, sampler, config.tasks))
        for shots, sampler in samplers.items()
    }


def shots_name(shots: int) -> str:
    """Return `5-shot`, or `variable-shot`."""
    return f"{'variable' if shots == VARIABLE else shots}-shot"


def tasks_name(ways: int, shots: int) -> str:
    """Return `15-way 5-shot`, or `variable-shot`."""
    return (f"{ways}-way " if ways else "") + shots_name(shots)


def percent(interval: Interval, sign: str = "") -> str:
    """Return mean and half-width of an interval over shares in %, such as `54.21 ± 0.43`."""
    return f"{100 * interval.mean:{sign}.2f} ± {100 * interval.half_width:.2f}"


def _write(result: EncoderReport, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    records = [
        {"method": method, "shots": shots, "task": task, "accuracy": accuracy}
        for (method, shots), values in result.accuracies.items()
        for task, accuracy in enumerate(values.tolist())
    ]
    table = pa.Table.from_pylist(records, schema=TASK_SCHEMA)
    with atomic_path(out / "tasks.parquet") as temporary:
        pq.write_table(table, temporary)
    values = {
        "target": result.target,
        "ways": result.ways,
        "accuracy": [
            {"method": method, "shots": shots, **asdict(confidence_interval(values))}
            for (method, shots), values in result.accuracies.items()
        ],
    }
    write_json(out / "results.json", values)

"""Which candidate tasks to finetune on: from collections of images to a choice, and the job.

In: a recipe of kind fewshot, its image store, an encoder and a target. Out: `SelectedTasks`; from
the job also, in `<storage>/<run id>/selection/`: tasks.parquet (`TASK_SCHEMA`), similarity.png and
coverage.png, which go to MLflow too. The target is known by its unlabelled images alone, but for
the scorers LEEP and LogME, which need a few labelled ones.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import softmax

from fmray.config import LoadedRecipe
from fmray.config.fewshot import EpisodeConfig, FewshotRecipe, Selection, TargetConfig
from fmray.data.image_store import ImageStore, Rows
from fmray.fewshot import Encoder, EpisodeSampler
from fmray.plots import fewshot as fewshot_plots
from fmray.runtime import tracking
from fmray.runtime.cluster import start_or_join
from fmray.runtime.console import changed_settings, say
from fmray.runtime.files import write_json
from fmray.selection import Selection as Choice
from fmray.selection import TaskMoments, choose_baseline, select_tasks
from fmray.selection.baselines import class_responses, leep, logme
from fmray.train.fewshot.encoder import TaskFeatures, load_encoder, open_pool

TASK_SCHEMA = pa.schema(
    [
        ("rank", pa.int32()),  # 1: the most similar
        ("task", pa.string()),
        ("similarity", pa.float64()),
        ("coverage", pa.float64()),  # of the target by this task and all above it; inf: no distance
        ("selected", pa.bool_()),
        ("classes", pa.int32()),
        ("images", pa.int64()),
    ]
)
SUPPORT, TARGET, CLASSES = 101, 102, 103  # what is drawn with the recipe's seed: streams of it


_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CandidateTask:
    """A task to finetune on: images of some classes of one collection's train split.

    `rows` int64 [n]: global row ids; `labels` int64 [n]: class index within the collection.
    """

    name: str
    rows: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class EmbeddedTasks:
    """All that the choices for one target are made from: they share one pass over the images.

    Attributes:
        candidates: the tasks, by name.
        choice: Algorithm 1's, with the curves of all candidates.
        moments: of each candidate; target: of the target.
        centroids: of each candidate's classes [C, d].
        support: features [n, d] of a few labelled target images; labels: [n].
    """

    candidates: dict[str, CandidateTask]
    choice: Choice
    moments: dict[str, TaskMoments]
    target: TaskMoments
    centroids: dict[str, np.ndarray]
    support: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class SelectedTasks:
    """The choice. names: chosen; order: all candidates, most similar first; similarity: by name, in
    that order; coverage: by the first 1, 2, ... of `order`; tasks: those chosen."""

    names: list[str]
    order: list[str]
    similarity: dict[str, float]
    coverage: list[float]
    tasks: list[CandidateTask]


def candidate_tasks(
    store: ImageStore, recipe: FewshotRecipe, target: TargetConfig | None
) -> list[CandidateTask]:
    """The tasks that can be finetuned on, of the train splits; `select.tasks` says what a task is.

    By default of all collections but the target's. What cannot form an episode of the recipe is
    left out, and said.

    Raises:
        ValueError: no candidate is left, or one that the recipe names cannot be one.
    """
    config = recipe.select
    skipped = () if target is None else (target.collection,)
    names = config.candidates or tuple(n for n in store.collections if n not in skipped)
    tasks: list[CandidateTask] = []
    rounds: list[Iterator[CandidateTask]] = []
    for name in names:
        rows = store.select(name, "train")
        enough = _large_classes(rows, recipe.episodes)
        if len(enough) < recipe.episodes.ways:
            reason = (
                f"{len(enough)} of its {len(np.unique(rows.labels))} train classes have"
                f" {recipe.episodes.shots + recipe.episodes.queries} images, and an episode needs"
                f" {recipe.episodes.ways}"
            )
            if config.candidates:
                raise ValueError(f"select.candidates: {name} cannot be a candidate: {reason}")
            _logger.warning("%s is no candidate: %s", name, reason)
        elif config.tasks == "collection":
            tasks.append(CandidateTask(name, rows.rows, rows.labels))
        elif config.tasks == "classes":
            tasks += _class_groups(name, rows, enough, recipe)
        else:
            rounds.append(_episodes(name, rows, recipe))
    if rounds:  # one of each collection in turn
        tasks = [next(rounds[i % len(rounds)]) for i in range(config.episodes)]
    if not tasks:
        raise ValueError(
            f"no candidate tasks: {store.path} has no collection (but the target's) whose train"
            f" split forms a {recipe.episodes.ways}-way episode; lower episodes.ways"
        )
    return tasks


def embed_tasks(
    recipe: FewshotRecipe,
    store: ImageStore,
    encoder: Encoder,
    target: TargetConfig,
    known: dict[str, TaskFeatures] | None = None,
) -> EmbeddedTasks:
    """Embed candidates and target, once for all choices; on Ray where it runs.

    Args:
        known: features of candidates by name, of the same recipe, store and encoder (another
            target's, say): those in it are not embedded again, the others are put into it.

    Raises:
        ValueError: as `candidate_tasks`, a target without images, or moments that cannot be
            compared (a zero mean, features that are not finite or do not vary).
    """
    config = recipe.select
    candidates = {task.name: task for task in candidate_tasks(store, recipe, target)}
    whole = store.select(target.collection, target.split)
    unlabelled = _draw(recipe.seed, TARGET).permutation(len(whole.rows))[: target.unlabelled]
    support = _support(whole, max(recipe.evaluate.shots), recipe.seed)
    known = {} if known is None else known
    pieces = []
    for task in candidates.values():
        if task.name not in known:
            kept = _first_of_classes(task, config.images_per_class)
            pieces.append((task.name, task.rows[kept], task.labels[kept]))
    about = f"target {target.collection}/{target.split}"
    pieces.append((about, whole.rows[unlabelled], whole.labels[unlabelled]))
    with open_pool(store, encoder, recipe.cluster, recipe.images.cache) as pool:
        *features, found = pool.task_features(pieces)
        support_features = pool.embed(whole.rows[support])
    known |= {one.moments.name: one for one in features}
    moments = {name: known[name].moments for name in candidates}
    choice = select_tasks(
        found.moments,
        list(moments.values()),
        config.threshold,
        config.covariance,
        config.weighting,
    )
    centroids = {name: known[name].centroids for name in candidates}
    labels = whole.labels[support]
    return EmbeddedTasks(
        candidates, choice, moments, found.moments, centroids, support_features, labels
    )


def choose(
    recipe: FewshotRecipe,
    store: ImageStore,
    encoder: Encoder,
    target: TargetConfig,
    method: Selection,
    seed: int,
    measured: EmbeddedTasks | None = None,
) -> SelectedTasks:
    """The tasks to finetune on for a target.

    Args:
        method: `selected` is Algorithm 1, the others its peers (`fmray.selection.choose_baseline`).
        seed: of method `random`.
        measured: of the same target; default: measured now.

    Raises:
        ValueError: as `embed_tasks`, or `select.k` beyond the number of candidates.
    """
    measured = measured or embed_tasks(recipe, store, encoder, target)
    choice = measured.choice
    if method != "selected":
        scores = _scores(measured, method, recipe.train.temperature)
        choice = choose_baseline(choice, method, recipe.select.k, seed, scores)
    return SelectedTasks(
        choice.names,
        choice.order,
        dict(zip(choice.order, choice.similarity, strict=True)),
        choice.coverage,
        [measured.candidates[name] for name in choice.names],
    )


def choose_for_run(recipe: FewshotRecipe, path: Path) -> list[str]:
    """Choose the tasks that a run is finetuned on, and write them to `path` (JSON).

    Raises ValueError when `select.only` or `select.weights` names no candidate task.
    """
    store = ImageStore.open(recipe.images.store, recipe.images.cache)
    if recipe.select.only or recipe.select.method == "all":
        candidates = [task.name for task in candidate_tasks(store, recipe, recipe.target)]
        tasks = list(recipe.select.only) or candidates
        selection: dict[str, Any] = {"tasks": tasks}
    else:
        encoder = load_encoder(recipe.encoder)
        method, seed = recipe.select.method, recipe.seed
        selected = choose(recipe, store, encoder, recipe.target, method, seed)
        tasks, candidates = list(selected.names), selected.order
        selection = {"tasks": tasks, "similarity": dict(selected.similarity)}
    for key, names in (("only", recipe.select.only), ("weights", recipe.select.weights)):
        if unknown := [name for name in names if name not in candidates]:
            raise ValueError(
                f"select.{key}: there is no candidate task {unknown[0]!r}; there are"
                f" {', '.join(candidates)}"
            )
    write_json(path, selection)
    say(f"finetuning on {len(tasks)} tasks: {', '.join(tasks)}")
    return tasks


def select_run(loaded: LoadedRecipe[FewshotRecipe], run_id: str) -> SelectedTasks:
    """The job: choose, print the table, write it with two plots, and log all to MLflow.

    Raises:
        ValueError: a recipe without a target, or as `choose`.
    """
    recipe = loaded.recipe
    if recipe.target is None:
        raise ValueError("target: name one: target.collection is what tasks are selected for")
    store = ImageStore.open(recipe.images.store, recipe.images.cache)
    encoder = load_encoder(recipe.encoder)
    run_dir = recipe.cluster.storage / run_id
    out = run_dir / "selection"
    out.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(loaded.dump(), encoding="utf-8")
    say(changed_settings(loaded, run_dir / "recipe.yaml"))
    with (
        tracking.open_job_run(recipe, run_id, "select_tasks") as run,
        nullcontext() if recipe.cluster.workers == 0 else start_or_join(recipe.cluster),
    ):
        measured = embed_tasks(recipe, store, encoder, recipe.target)
        selected = choose(
            recipe, store, encoder, recipe.target, recipe.select.method, recipe.seed, measured
        )
        _write_table(measured, selected, out / "tasks.parquet")
        similarities = list(selected.similarity.values())
        fewshot_plots.similarity_bars(
            selected.order, similarities, selected.names, out / "similarity.png"
        )
        fewshot_plots.coverage_curve(
            selected.order, selected.coverage, selected.names, out / "coverage.png"
        )
        for rank, (similarity, covered) in enumerate(
            zip(similarities, selected.coverage, strict=True), start=1
        ):
            run.log(rank, **{"select/similarity": similarity, "select/coverage": covered})
        run.log(0, **{"select/tasks": len(selected.names)})
        run.artifact(out)
    say(table(selected))
    say(f"{len(selected.names)} of {len(selected.order)} tasks: {', '.join(selected.names)}")
    say(f"written to {out}")
    return selected


def table(selected: SelectedTasks) -> str:
    """For the terminal: a line per candidate, most similar first; `*` marks those chosen."""
    width = max(len(name) for name in [*selected.order, "task"])
    lines = [f"    {'task':{width}}  similarity  coverage"]
    for name, covered in zip(selected.order, selected.coverage, strict=True):
        mark = "*" if name in selected.names else " "
        lines.append(f"  {mark} {name:{width}}  {selected.similarity[name]:10.4f}  {covered:8.4g}")
    return "\n".join(lines)


def _class_groups(
    name: str, rows: Rows, classes: np.ndarray, recipe: FewshotRecipe
) -> Iterator[CandidateTask]:
    """Groups of `classes_per_task` classes, or a few more, drawn once with the recipe's seed."""
    wanted = recipe.select.classes_per_task
    if wanted < recipe.episodes.ways:
        raise ValueError(
            f"select.classes_per_task: {wanted} classes form no {recipe.episodes.ways}-way"
            " episode; raise it, or lower episodes.ways"
        )
    shuffled = _draw(recipe.seed, CLASSES).permutation(classes)
    for number, group in enumerate(np.array_split(shuffled, max(1, len(classes) // wanted))):
        chosen = np.isin(rows.labels, group)
        yield CandidateTask(f"{name}/{number:03d}", rows.rows[chosen], rows.labels[chosen])


def _episodes(name: str, rows: Rows, recipe: FewshotRecipe) -> Iterator[CandidateTask]:
    """Episodes 0, 1, ... of a collection: their images are all that such a task has."""
    config = recipe.episodes
    sampler = EpisodeSampler(
        rows.labels, config.ways, config.shots, config.queries, recipe.seed, "train", rows.rows
    )
    index = 0
    while True:
        episode = sampler[index]
        images = np.concatenate([episode.support, episode.query], axis=1)
        labels = np.repeat(episode.classes, images.shape[1])
        yield CandidateTask(f"{name}/{index:04d}", images.reshape(-1), labels)
        index += 1


def _large_classes(rows: Rows, config: EpisodeConfig) -> np.ndarray:
    labels, counts = np.unique(rows.labels, return_counts=True)
    return labels[counts >= config.shots + config.queries]


def _first_of_classes(task: CandidateTask, count: int) -> np.ndarray:
    """Positions of at most `count` images of each class: their order in the store is random."""
    order = np.argsort(task.labels, kind="stable")
    starts = np.flatnonzero(np.diff(task.labels[order], prepend=-1))
    within = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
    return np.sort(order[within < count])


def _support(rows: Rows, shots: int, seed: int) -> np.ndarray:
    """Positions of `shots` images of each class (of all, where it has fewer): the labelled ones."""
    shuffled = _draw(seed, SUPPORT).permutation(len(rows.rows))
    task = CandidateTask("target", rows.rows[shuffled], rows.labels[shuffled])
    return shuffled[_first_of_classes(task, shots)]


def _scores(
    measured: EmbeddedTasks, method: Selection, temperature: float
) -> dict[str, float] | None:
    """LEEP or LogME of each candidate, by its nearest-centroid classifier on the support."""
    if method not in ("leep", "logme"):
        return None
    scores = {}
    for name, centroids in measured.centroids.items():
        responses = class_responses(measured.support, centroids)
        if method == "leep":
            scores[name] = leep(softmax(temperature * responses, axis=1), measured.labels)
        else:
            scores[name] = logme(responses, measured.labels)
    return scores


def _write_table(measured: EmbeddedTasks, selected: SelectedTasks, path: Path) -> None:
    tasks = [measured.candidates[name] for name in selected.order]
    columns: dict[str, Sequence[object]] = {
        "rank": range(1, len(tasks) + 1),
        "task": selected.order,
        "similarity": list(selected.similarity.values()),
        "coverage": selected.coverage,
        "selected": [name in selected.names for name in selected.order],
        "classes": [len(np.unique(task.labels)) for task in tasks],
        "images": [len(task.rows) for task in tasks],
    }
    temporary = path.with_name(f".{path.name}.partial")
    pq.write_table(pa.table(columns, schema=TASK_SCHEMA), temporary)
    os.replace(temporary, path)


def _draw(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, stream]))

"""Selection of the candidate tasks to finetune on for a target, and the selection job.

`candidate_tasks` cuts the collections of an image store into tasks; `embed_tasks` computes their
moments once; `choose` selects some of them by Algorithm 1 or a baseline. The target is known by its
unlabelled images only, except for the scorers LEEP and LogME, which need a few labelled ones.

The job writes `selection/` in the run's folder and logs it to MLflow: tasks.parquet
(`TASK_SCHEMA`), similarity.png and coverage.png.
"""

from __future__ import annotations

import logging
from collections import Counter
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
from fmray.runtime.files import atomic_path, write_json
from fmray.selection import Selection as Choice
from fmray.selection import TaskMoments, choose_baseline, select_tasks
from fmray.selection.baselines import class_responses, leep, logme
from fmray.train.fewshot.encoder import TaskFeatures, load_encoder, open_pool

TASK_SCHEMA = pa.schema(
    [
        ("rank", pa.int32()),  # 1: the most similar
        ("task", pa.string()),
        ("similarity", pa.float64()),
        ("coverage", pa.float64()),  # of the target by this task and all more similar ones
        ("selected", pa.bool_()),
        ("classes", pa.int32()),
        ("images", pa.int64()),
    ]
)
SUPPORT, TARGET, CLASSES = 101, 102, 103  # random streams of the recipe's seed

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CandidateTask:
    """A task to finetune on: images of some classes of a collection's train split."""

    name: str
    rows: np.ndarray  #: int64 [n], global row ids
    labels: np.ndarray  #: int64 [n], class index within the collection


@dataclass(frozen=True)
class EmbeddedTasks:
    """What every choice for one target is made from, computed in one pass over the images."""

    candidates: dict[str, CandidateTask]  #: by name
    choice: Choice  #: of Algorithm 1, with the curves of all candidates
    moments: dict[str, TaskMoments]  #: of each candidate
    target: TaskMoments
    centroids: dict[str, np.ndarray]  #: [C, d], of the classes of each candidate
    support: np.ndarray  #: [n, d], features of a few labelled target images
    labels: np.ndarray  #: [n], their labels


@dataclass(frozen=True)
class SelectedTasks:
    """The tasks chosen for a target."""

    names: list[str]  #: chosen tasks
    order: list[str]  #: all candidates, most similar first
    similarity: dict[str, float]  #: by name, in that order
    coverage: list[float]  #: of the target by the first 1, 2, ... candidates of `order`
    tasks: list[CandidateTask]  #: chosen tasks, as `names`


# --- Candidate tasks ---


def candidate_tasks(
    store: ImageStore, recipe: FewshotRecipe, target: TargetConfig | None
) -> list[CandidateTask]:
    """Return the tasks that can be finetuned on, cut from train splits as `select.tasks` says.

    By default they come from all collections but the target's. A collection that is too small for
    an episode of the recipe is skipped with a warning.

    Raises:
        ValueError: no candidate remains, or one that the recipe names is too small.
    """
    config = recipe.select
    excluded = () if target is None else (target.collection,)
    names = config.candidates or tuple(n for n in store.collections if n not in excluded)
    tasks: list[CandidateTask] = []
    episodes: list[Iterator[CandidateTask]] = []  # of each collection
    for name in names:
        rows = store.select(name, "train")
        large = _large_classes(rows, recipe.episodes)
        if len(large) < recipe.episodes.ways:
            reason = _why_too_small(store, name, len(large), recipe)
            if config.candidates:
                raise ValueError(f"select.candidates: {name} cannot be a candidate: {reason}")
            _logger.warning("skipping candidate %s: %s", name, reason)
        elif config.tasks == "collection":
            tasks.append(CandidateTask(name, rows.rows, rows.labels))
        elif config.tasks == "classes":
            tasks += _class_groups(name, rows, large, recipe)
        else:
            episodes.append(_episodes(name, rows, recipe))
    if episodes:  # the collections take turns
        tasks = [next(episodes[i % len(episodes)]) for i in range(config.episodes)]
    if not tasks:
        raise ValueError(
            f"no candidate tasks: {store.path} has no collection (but the target's) whose train"
            f" split forms a {recipe.episodes.ways}-way episode; lower episodes.ways"
        )
    return tasks


def _why_too_small(store: ImageStore, name: str, large: int, recipe: FewshotRecipe) -> str:
    """Describe a collection whose train split forms no episode, by its source and its splits."""
    config, source = recipe.episodes, recipe.images.collections.get(name)
    classes = Counter(entry.split for entry in store.classes if entry.collection == name)
    return (
        f"{large} of its {classes['train']} train classes have"
        f" {config.shots + config.queries} images, and an episode needs {config.ways}"
        f" (val has {classes['val']} classes and test {classes['test']}; they come from"
        f" {source.path if source else store.path})"
    )


def _class_groups(
    name: str, rows: Rows, classes: np.ndarray, recipe: FewshotRecipe
) -> Iterator[CandidateTask]:
    """Yield groups of `classes_per_task` classes or a few more, drawn with the recipe's seed."""
    wanted = recipe.select.classes_per_task
    if wanted < recipe.episodes.ways:
        raise ValueError(
            f"select.classes_per_task: {wanted} classes form no {recipe.episodes.ways}-way"
            " episode; raise it, or lower episodes.ways"
        )
    shuffled = _generator(recipe.seed, CLASSES).permutation(classes)
    for number, group in enumerate(np.array_split(shuffled, max(1, len(classes) // wanted))):
        chosen = np.isin(rows.labels, group)
        yield CandidateTask(f"{name}/{number:03d}", rows.rows[chosen], rows.labels[chosen])


def _episodes(name: str, rows: Rows, recipe: FewshotRecipe) -> Iterator[CandidateTask]:
    """Yield episodes 0, 1, ... of a collection as tasks of their own, without an end."""
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
    """Return the labels of the classes that have enough images for an episode."""
    labels, counts = np.unique(rows.labels, return_counts=True)
    return labels[counts >= config.shots + config.queries]


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, stream]))


# --- Embedding and choice ---


def embed_tasks(
    recipe: FewshotRecipe,
    store: ImageStore,
    encoder: Encoder,
    target: TargetConfig,
    known: dict[str, TaskFeatures] | None = None,
) -> EmbeddedTasks:
    """Embed the candidates and the target of a recipe, on Ray if it is initialized.

    Args:
        known: features of candidates by name, for the same recipe, store and encoder. Candidates in
            it are not embedded again (those of another target, for example); others are added.

    Raises:
        ValueError: as in `candidate_tasks`, a target without images, or moments that cannot be
            compared (a zero mean, features that are not finite or do not vary).
    """
    config = recipe.select
    candidates = {task.name: task for task in candidate_tasks(store, recipe, target)}
    images = store.select(target.collection, target.split)
    unlabelled = _generator(recipe.seed, TARGET).permutation(len(images.rows))[: target.unlabelled]
    support = _support(images, max(recipe.evaluate.shots), recipe.seed)

    known = {} if known is None else known
    to_embed = []
    for task in candidates.values():
        if task.name not in known:
            used = _first_of_classes(task, config.images_per_class)
            to_embed.append((task.name, task.rows[used], task.labels[used]))
    target_name = f"target {target.collection}/{target.split}"
    to_embed.append((target_name, images.rows[unlabelled], images.labels[unlabelled]))
    with open_pool(store, encoder, recipe.cluster, recipe.images.cache) as pool:
        *features, target_features = pool.task_features(to_embed)
        support_features = pool.embed(images.rows[support])
    known |= {task.moments.name: task for task in features}

    moments = {name: known[name].moments for name in candidates}
    choice = select_tasks(
        target_features.moments,
        list(moments.values()),
        config.threshold,
        config.covariance,
        config.weighting,
    )
    return EmbeddedTasks(
        candidates,
        choice,
        moments,
        target_features.moments,
        {name: known[name].centroids for name in candidates},
        support_features,
        images.labels[support],
    )


def choose(
    recipe: FewshotRecipe,
    store: ImageStore,
    encoder: Encoder,
    target: TargetConfig,
    method: Selection,
    seed: int,
    embedded: EmbeddedTasks | None = None,
) -> SelectedTasks:
    """Choose the tasks to finetune on for a target.

    Args:
        method: `selected` is Algorithm 1; the others are baselines (see
            `fmray.selection.choose_baseline`).
        seed: of method `random`.
        embedded: of the same target; by default the tasks are embedded now.

    Raises:
        ValueError: as in `embed_tasks`, or `select.k` exceeds the number of candidates.
    """
    embedded = embedded or embed_tasks(recipe, store, encoder, target)
    choice = embedded.choice
    if method != "selected":
        scores = _scores(embedded, method, recipe.train.temperature)
        choice = choose_baseline(choice, method, recipe.select.k, seed, scores)
    return SelectedTasks(
        choice.names,
        choice.order,
        dict(zip(choice.order, choice.similarity, strict=True)),
        choice.coverage,
        [embedded.candidates[name] for name in choice.names],
    )


def _first_of_classes(task: CandidateTask, count: int) -> np.ndarray:
    """Return positions of the first `count` images of each class; the store has a random order."""
    order = np.argsort(task.labels, kind="stable")
    starts = np.flatnonzero(np.diff(task.labels[order], prepend=-1))
    within = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
    return np.sort(order[within < count])


def _support(rows: Rows, shots: int, seed: int) -> np.ndarray:
    """Return positions of the labelled images: `shots` of each class, or all if it has fewer."""
    shuffled = _generator(seed, SUPPORT).permutation(len(rows.rows))
    task = CandidateTask("target", rows.rows[shuffled], rows.labels[shuffled])
    return shuffled[_first_of_classes(task, shots)]


def _scores(
    embedded: EmbeddedTasks, method: Selection, temperature: float
) -> dict[str, float] | None:
    """Return LEEP or LogME of each candidate, whose centroids classify the support; else None."""
    if method not in ("leep", "logme"):
        return None
    scores = {}
    for name, centroids in embedded.centroids.items():
        responses = class_responses(embedded.support, centroids)
        if method == "leep":
            scores[name] = leep(softmax(temperature * responses, axis=1), embedded.labels)
        else:
            scores[name] = logme(responses, embedded.labels)
    return scores


# --- Jobs ---


def choose_for_run(recipe: FewshotRecipe, path: Path) -> list[str]:
    """Choose the tasks of a training run, write them to `path` (JSON), and return their names.

    Raises:
        ValueError: `select.only` or `select.weights` names a task that is no candidate.
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
    """Choose the tasks of a recipe; report and write the table and two plots, and log to MLflow.

    Raises:
        ValueError: a recipe without a target, or as in `choose`.
    """
    recipe = loaded.recipe
    if recipe.target is None:
        raise ValueError("target: set target.collection, which tasks are selected for")
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
        embedded = embed_tasks(recipe, store, encoder, recipe.target)
        selected = choose(
            recipe, store, encoder, recipe.target, recipe.select.method, recipe.seed, embedded
        )
        _write_table(embedded, selected, out / "tasks.parquet")
        similarities = list(selected.similarity.values())
        fewshot_plots.similarity_bars(
            selected.order, similarities, selected.names, out / "similarity.png"
        )
        fewshot_plots.coverage_curve(
            selected.order, selected.coverage, selected.names, out / "coverage.png"
        )
        # the curves: step r is the r-th most similar task
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
    """Return the table for the terminal: most similar candidate first; `*` marks chosen ones."""
    width = max(len(name) for name in [*selected.order, "task"])
    lines = [f"    {'task':{width}}  similarity  coverage"]
    for name, covered in zip(selected.order, selected.coverage, strict=True):
        mark = "*" if name in selected.names else " "
        lines.append(f"  {mark} {name:{width}}  {selected.similarity[name]:10.4f}  {covered:8.4g}")
    return "\n".join(lines)


def _write_table(embedded: EmbeddedTasks, selected: SelectedTasks, path: Path) -> None:
    tasks = [embedded.candidates[name] for name in selected.order]
    columns: dict[str, Sequence[object]] = {
        "rank": range(1, len(tasks) + 1),
        "task": selected.order,
        "similarity": list(selected.similarity.values()),
        "coverage": selected.coverage,
        "selected": [name in selected.names for name in selected.order],
        "classes": [len(np.unique(task.labels)) for task in tasks],
        "images": [len(task.rows) for task in tasks],
    }
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns, schema=TASK_SCHEMA), temporary)

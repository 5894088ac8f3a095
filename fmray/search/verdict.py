"""The verdict on a search for tasks: did cheap scores rank the sets, and does the best one hold up?

`rank_correlations` compares the scores that Algorithm 1 selects by with the accuracies that the
search found by training. `held_out_gains` compares trained encoders on test tasks that no trial was
judged by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from fmray.config.fewshot import FewshotRecipe, SelectConfig
from fmray.data.image_store import ImageStore
from fmray.fewshot import paired_interval
from fmray.selection import TaskMoments, coverage, similarity
from fmray.train.fewshot.encoder import ImageReader, load_encoder
from fmray.train.fewshot.evaluate import measure_accuracy, percent, shots_name, task_samplers

MIN_SETS = 5  # with fewer sets, no interval is informative
RESAMPLES = 2000


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of a score with accuracy, over sets of tasks."""

    score: str  #: name of the score
    rho: float  #: NaN if the score does not vary
    low: float  #: 95 % interval of rho
    high: float
    sets: int

    def __str__(self) -> str:
        return (
            f"{self.score} ranks {self.sets} sets of tasks with a correlation of {self.rho:+.2f}"
            f" [{self.low:+.2f}, {self.high:+.2f}] with their accuracy"
        )


def rank_correlations(
    sets: Sequence[Sequence[str]],
    accuracies: Sequence[float],
    target: TaskMoments,
    tasks: Mapping[str, TaskMoments],
    config: SelectConfig,
    seed: int,
) -> list[RankCorrelation]:
    """Return the correlations of coverage, mean similarity and size of a set with its accuracy.

    Returns [] for fewer than `MIN_SETS` sets.

    Args:
        sets: names of tasks; no set occurs twice.
        accuracies: found by training on each set.
        config: `covariance` and `weighting` of coverage.
        seed: of the percentile bootstrap over sets.
    """
    if len(sets) < MIN_SETS:
        return []
    similarities = {name: similarity(target, task) for name, task in tasks.items()}
    scores = {
        "coverage": [
            coverage([tasks[n] for n in names], target, config.covariance, config.weighting)
            for names in sets
        ],
        "mean similarity": [np.mean([similarities[n] for n in names]) for names in sets],
        "the number of tasks": [len(names) for names in sets],
    }
    draws = np.random.default_rng(seed).integers(len(sets), size=(RESAMPLES, len(sets)))
    truth = np.asarray(accuracies, dtype=np.float64)
    correlations = []
    for name, values in scores.items():
        score = np.asarray(values, dtype=np.float64)
        resampled = [spearman(score[draw], truth[draw]) for draw in draws]
        low, high = np.nanquantile(resampled, [0.025, 0.975])
        correlations.append(RankCorrelation(name, spearman(score, truth), low, high, len(sets)))
    return correlations


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's rank correlation; ties get their mean rank.

    NaN if either is constant, as a resample of few sets may be.
    """
    ranks = rankdata(first), rankdata(second)
    if any(np.ptp(rank) == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def held_out_gains(base: FewshotRecipe, models: Mapping[str, Path]) -> list[str]:
    """Compare the first encoder with each other one on the test tasks of `target.split`.

    Returns one line per other encoder and number of shots, with the paired difference.

    Args:
        base: its `evaluate` section defines the tasks.
        models: name of an encoder -> its folder; a folder is evaluated once.
    """
    store = ImageStore.open(base.images.store, base.images.cache)
    rows = store.select(base.target.collection, base.target.split)
    samplers = task_samplers(store, rows, base.target, base.evaluate, base.seed)
    accuracies = {}
    for folder in set(models.values()):
        encoder = load_encoder(base.encoder.model_copy(update={"checkpoint": folder}))
        images = ImageReader(store, encoder.preprocess)
        accuracies[folder] = measure_accuracy(encoder, images, rows, samplers, base.evaluate)

    where = f"{base.target.collection}, split {base.target.split}"
    if (base.train.eval_split or base.target.split) == base.target.split:
        where += " (other tasks of the classes that trials were judged by)"
    (best_name, best_folder), *others = models.items()
    lines = []
    for name, folder in others:
        for shots, best in accuracies[best_folder].items():
            other = accuracies[folder][shots]
            gain = percent(paired_interval(best, other), sign="+")
            lines.append(
                f"{best_name} against {name} on {len(best)} {shots_name(shots)} tasks of {where}:"
                f" {100 * best.mean():.2f} % against {100 * other.mean():.2f} %, {gain} paired"
            )
    return lines

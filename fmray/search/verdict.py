"""How well cheap scores of a set of tasks rank it, against the accuracy found by training on it.

In: the sets that a search trained on, their accuracies, and the moments that Algorithm 1 selects
by. Out: Spearman's rank correlation of each score with accuracy, with a bootstrap interval.
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

LEAST = 5  # sets, below which no interval says anything
RESAMPLES = 2000


@dataclass(frozen=True)
class RankCorrelation:
    """score: its name. rho: Spearman's, NaN where the score does not vary; low, high: 95 %."""

    score: str
    rho: float
    low: float
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
    """Of what Algorithm 1 goes by, coverage and the mean similarity of a set, and of its size; []
    for fewer than five sets.

    Args:
        sets: names of tasks, different sets. accuracies: found by training, in their order.
        config: whose `covariance` and `weighting` coverage takes.
        seed: of the percentile bootstrap over sets.
    """
    if len(sets) < LEAST:
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
    found = []
    for name, values in scores.items():
        score = np.asarray(values, dtype=np.float64)
        resampled = [spearman(score[draw], truth[draw]) for draw in draws]
        low, high = np.nanquantile(resampled, [0.025, 0.975])
        found.append(RankCorrelation(name, spearman(score, truth), low, high, len(sets)))
    return found


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation, equal values at their mean rank; NaN where either is constant,
    as a resample of few sets may be."""
    ranks = rankdata(first), rankdata(second)
    if any(np.ptp(rank) == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


# The verdict on a search for tasks: encoders on tasks of the target that no trial was judged by.
#
# In: the base recipe and folders of encoders that trials made. Out: accuracies over the test tasks
# of `target.split` (`evaluate` of the recipe), and what the first encoder gains over each other,
# paired.


def held_out_gains(base: FewshotRecipe, models: Mapping[str, Path]) -> list[str]:
    """A line for each encoder but the first, and number of shots.

    Args:
        models: what an encoder is called -> its folder; the same folder is measured once.
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
    (first, folder), *others = models.items()
    lines = []
    for name, other in others:
        for shots, best in accuracies[folder].items():
            peer = accuracies[other][shots]
            gain = percent(paired_interval(best, peer), sign="+")
            lines.append(
                f"{first} against {name} on {len(best)} {shots_name(shots)} tasks of {where}:"
                f" {100 * best.mean():.2f} % against {100 * peer.mean():.2f} %, {gain} paired"
            )
    return lines

"""How well cheap scores of a set of tasks rank it, against the accuracy found by training on it.

In: the sets that a search trained on, their accuracies, and the moments that Algorithm 1 selects
by. Out: Spearman's rank correlation of each score with accuracy, with a bootstrap interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from fmray.fewshot_config import SelectConfig
from fmray.selection import TaskMoments, coverage, similarity

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

"""Accuracy of an encoder over many few-shot tasks, from embeddings that were computed once.

In: the features of every image of the target, and a sampler. Out: one accuracy per task, for
`fmray.fewshot.evaluation`. An image appears in dozens of the usual 1500 tasks, and is encoded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import stdtrit
from torch import Tensor
from torch.nn import functional

from fmray.fewshot.episodes import EpisodeSampler, MetaDatasetSampler
from fmray.fewshot.methods import centroid_logits

# How sure a mean accuracy over tasks is: intervals over tasks, and of paired differences.
#
# In: one accuracy per task (episode), or two methods' accuracies on the same tasks. Out: an
# `Interval`. Two methods are compared by the paired interval: tasks differ in difficulty far more
# than methods do, and pairing takes that out.


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its confidence interval, in the unit of the values.

    half_width is NaN for a single value: one task says nothing about the spread over tasks.
    """

    mean: float
    half_width: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def confidence_interval(
    values: ArrayLike, level: float = 0.95, kind: Literal["t", "meta_dataset"] = "t"
) -> Interval:
    """The mean of `values` [n] (one per task) and its two-sided interval.

    kind "t": half-width t_{(1+level)/2, n-1} s / sqrt(n), s with ddof 1 (Student). "meta_dataset":
    1.96 s / sqrt(n), s with ddof 0, as Meta-Dataset reports it; 95 % only. Raises ValueError for no
    values, values that are not finite, or a level outside (0, 1).
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"values must be [n] with n >= 1, not {list(array.shape)}")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"values must be finite; value {bad[0]} is {array[bad[0]]}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    count = len(array)
    if kind == "t":
        spread = array.std(ddof=1) if count > 1 else math.nan
        factor = float(stdtrit(count - 1, (1 + level) / 2)) if count > 1 else math.nan
    elif kind == "meta_dataset":
        if level != 0.95:
            raise ValueError(f"kind 'meta_dataset' is a 95 % interval, not {level:.0%}; use 't'")
        spread, factor = (array.std() if count > 1 else math.nan), 1.96
    else:
        raise ValueError(f"kind must be 't' or 'meta_dataset', not {kind!r}")
    return Interval(float(array.mean()), float(factor * spread / math.sqrt(count)), count)


def paired_interval(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Interval:
    """The interval of the mean of a - b, for two methods' accuracies [n] on the same n tasks.

    Zero outside the interval: the methods differ at this level. Raises ValueError for arrays of
    different lengths, and as `confidence_interval`.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"paired values must be of the same tasks: {list(first.shape)} against "
            f"{list(second.shape)}"
        )
    return confidence_interval(first - second, level)


# features gathered at a time: 16 MB of float32, which caches hold better than more
GATHERED = 1 << 22


def evaluate_tasks(
    embeddings: ArrayLike | Tensor, sampler: EpisodeSampler | MetaDatasetSampler, tasks: int
) -> np.ndarray:
    """The share of queries that the nearest-centroid classifier gets right, in tasks 0..tasks-1.

    embeddings: [n, d], row k of the k-th image of the sampler's `labels` (whatever `rows` it names
    them by); a CUDA tensor is worked on where it lies. Returns float64 [tasks]. Raises ValueError
    for another number of rows than the sampler's, and for the first row that is not finite.
    """
    features = torch.as_tensor(embeddings)
    features = features if features.dtype == torch.float64 else features.float()
    images = len(sampler.images.rows)
    if features.dim() != 2 or len(features) != images:
        raise ValueError(
            f"embeddings must be [n, d] with n = {images} as the sampler's labels, "
            f"not {list(features.shape)}"
        )
    finite = torch.isfinite(features).all(1)
    if not finite.all():
        raise ValueError(f"embeddings must be finite; row {int((~finite).nonzero()[0])} is not")
    if tasks < 1:
        raise ValueError(f"tasks must be at least 1, not {tasks}")
    if isinstance(sampler, MetaDatasetSampler):
        return np.array([_ragged(features, sampler, index) for index in range(tasks)])
    gathered = sampler.ways * (sampler.shots + sampler.queries) * features.shape[1]
    together = max(1, GATHERED // gathered)
    labels = torch.arange(sampler.ways, device=features.device).repeat_interleave(sampler.queries)
    accuracies = []
    for start in range(0, tasks, together):
        drawn = [sampler.positions(i) for i in range(start, min(start + together, tasks))]
        support, query = (
            features[torch.from_numpy(np.stack(rows)).to(features.device)]
            for rows in ([task.support for task in drawn], [task.query for task in drawn])
        )  # [T, N, K, d], [T, N, Q, d]
        # `centroid_logits` less what does not move the largest: queries' norms, the temperature
        centroids = functional.normalize(support.mean(-2), dim=-1)
        right = (query.flatten(1, 2) @ centroids.mT).argmax(-1) == labels
        accuracies.append(right.double().mean(1))
    return torch.cat(accuracies).cpu().numpy()


def _ragged(features: Tensor, sampler: MetaDatasetSampler, index: int) -> float:
    """The accuracy of one task of variable shots."""
    task = sampler.positions(index)
    centroids = torch.stack([features[torch.from_numpy(rows)].mean(0) for rows in task.support])
    query = features[torch.from_numpy(np.concatenate(task.query))]
    labels = torch.arange(len(task.query)).repeat_interleave(
        torch.tensor([len(rows) for rows in task.query])
    )
    predicted = centroid_logits(centroids[:, None], query).argmax(-1).cpu()
    return (predicted == labels).double().mean().item()

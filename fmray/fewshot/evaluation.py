"""Accuracy of an encoder over many few-shot tasks, and confidence intervals over tasks.

`evaluate_tasks` classifies by nearest centroid, from features that are computed once: an image
appears in dozens of the usual 1500 tasks. Two methods are compared on the same tasks by
`paired_interval`: tasks differ in difficulty far more than methods do, and pairing removes that.
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

from fmray.errors import NotFinite
from fmray.fewshot.episodes import EpisodeSampler, MetaDatasetSampler
from fmray.fewshot.methods import centroid_logits

GATHERED = 1 << 22  # features gathered at a time: 16 MB of float32, which fit into caches


def evaluate_tasks(
    embeddings: ArrayLike | Tensor, sampler: EpisodeSampler | MetaDatasetSampler, tasks: int
) -> np.ndarray:
    """Return the share of queries that the nearest-centroid classifier gets right, by task.

    Args:
        embeddings: [n, d]; row k belongs to the k-th of the sampler's `labels`, whatever its row
            id. A CUDA tensor stays on its device.
        tasks: evaluates the sampler's episodes 0 to tasks - 1.

    Returns:
        float64 [tasks].

    Raises:
        ValueError: another number of rows than the sampler has images, or a row that is not finite.
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
        raise NotFinite(f"embeddings must be finite; row {int((~finite).nonzero()[0])} is not")
    if tasks < 1:
        raise ValueError(f"tasks must be at least 1, not {tasks}")

    if isinstance(sampler, MetaDatasetSampler):
        return np.array([_variable_task(features, sampler, index) for index in range(tasks)])
    per_task = sampler.ways * (sampler.shots + sampler.queries) * features.shape[1]
    at_a_time = max(1, GATHERED // per_task)
    labels = torch.arange(sampler.ways, device=features.device).repeat_interleave(sampler.queries)
    accuracies = []
    for start in range(0, tasks, at_a_time):
        episodes = [sampler.positions(i) for i in range(start, min(start + at_a_time, tasks))]
        support, query = (
            features[torch.from_numpy(np.stack(rows)).to(features.device)]
            for rows in ([task.support for task in episodes], [task.query for task in episodes])
        )  # [T, N, K, d], [T, N, Q, d]
        # `centroid_logits` without what does not change the argmax: query norms and temperature
        centroids = functional.normalize(support.mean(-2), dim=-1)
        right = (query.flatten(1, 2) @ centroids.mT).argmax(-1) == labels
        accuracies.append(right.double().mean(1))
    return torch.cat(accuracies).cpu().numpy()


def _variable_task(features: Tensor, sampler: MetaDatasetSampler, index: int) -> float:
    """Return the accuracy on one task of variable shots."""
    task = sampler.positions(index)
    centroids = torch.stack([features[torch.from_numpy(rows)].mean(0) for rows in task.support])
    query = features[torch.from_numpy(np.concatenate(task.query))]
    labels = torch.arange(len(task.query)).repeat_interleave(
        torch.tensor([len(rows) for rows in task.query])
    )
    predicted = centroid_logits(centroids[:, None], query).argmax(-1).cpu()
    return (predicted == labels).double().mean().item()


# --- Confidence intervals over tasks ---


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval, in the unit of the values."""

    mean: float
    half_width: float  #: NaN for a single value, which says nothing about the spread over tasks
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
    """Return the mean of `values` [n] (one per task) and its two-sided confidence interval.

    Args:
        kind: "t": half-width t_{(1+level)/2, n-1} s / sqrt(n), s with ddof 1 (Student).
            "meta_dataset": 1.96 s / sqrt(n), s with ddof 0, as Meta-Dataset reports it; 95 % only.

    Raises:
        ValueError: no values, values that are not finite, or a level outside (0, 1).
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
    """Return the interval of the mean of a - b, for two methods' accuracies [n] on the same tasks.

    The methods differ at this level if zero lies outside the interval.

    Raises:
        ValueError: arrays of different lengths, or as in `confidence_interval`.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"paired values must be of the same tasks: {list(first.shape)} against "
            f"{list(second.shape)}"
        )
    return confidence_interval(first - second, level)

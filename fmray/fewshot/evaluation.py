"""Accuracy of an encoder over many few-shot tasks, from embeddings that were computed once.

In: the features of every image of the target, and a sampler. Out: one accuracy per task, for
`fmray.fewshot.intervals`. An image appears in dozens of the usual 1500 tasks, and is encoded once.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from fmray.fewshot.centroid import centroid_logits
from fmray.fewshot.episodes import EpisodeSampler
from fmray.fewshot.meta_dataset import MetaDatasetSampler

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

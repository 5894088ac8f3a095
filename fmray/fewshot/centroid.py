"""The nearest-centroid classifier: what every method here is tested with, and multitask finetuning
is trained with.

In: raw features of support and query images. Out: logits. The centroid of a class is the mean of
its *raw* support features; it and the queries are then L2-normalised, and the logits are their
cosines times a temperature (thesis, A.5; Chen et al. 2021, Meta-Baseline). Queries never touch
centroids.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def centroid_logits(support: Tensor, query: Tensor, temperature: float | Tensor = 10.0) -> Tensor:
    """Temperature times the cosine of each query with each class centroid.

    support: [N, shots, d]; query: [M, d]; returns [M, N], in float32 at least. Both may have equal
    leading dimensions: [..., N, shots, d] and [..., M, d] give [..., M, N]. Raises ValueError for
    shapes that do not fit, no shots, and features that are not finite.
    """
    if support.dim() < 3 or support.shape[-2] == 0:
        raise ValueError(f"support must be [N, shots, d] with shots >= 1: {list(support.shape)}")
    return cosine_logits(_wide(support).mean(-2), query, temperature)


def cosine_logits(centroids: Tensor, query: Tensor, temperature: float | Tensor = 10.0) -> Tensor:
    """As `centroid_logits`, from centroids [N, d] that were made elsewhere."""
    if query.dim() < 2 or query.shape[:-2] + query.shape[-1:] != (
        centroids.shape[:-2] + centroids.shape[-1:]
    ):
        raise ValueError(
            f"query must be [M, d] with d = {centroids.shape[-1]} as in the support, "
            f"not {list(query.shape)}"
        )
    for name, features in (("support", centroids), ("query", query)):
        if not torch.isfinite(features).all():
            raise ValueError(f"{name} features must be finite, and some are NaN or infinite")
    centroids = functional.normalize(_wide(centroids), dim=-1)
    return temperature * functional.normalize(_wide(query), dim=-1) @ centroids.mT


def _wide(features: Tensor) -> Tensor:
    """At least float32: cosines of near neighbours differ by less than half precision resolves."""
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features

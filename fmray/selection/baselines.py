"""The other ways to choose tasks that Algorithm 1 is compared with: ablations and scorers.

In: the `Selection` of Algorithm 1, and for the scorers features, class centroids and labels. Out: a
`Selection` with other names chosen and the same curves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from fmray.selection.coverage import Selection

Peer = Literal["all", "random", "no_diversity", "no_consistency", "top_k", "leep", "logme"]


def choose_peer(
    selection: Selection,
    peer: Peer,
    k: int | None = None,
    seed: int = 0,
    scores: Mapping[str, float] | None = None,
) -> Selection:
    """Choose among the candidates of `selection` by another rule.

    Args:
        peer: `all`; `random`: k of them, by `seed`; `no_diversity`: the most similar one;
            `no_consistency`: all of them (Algorithm 1 that goes on beyond its stop, A.5.4);
            `top_k`: the k most similar; `leep` and `logme`: the k with the highest `scores`.
        k: default: as many as `selection` chose.
        scores: a score for each candidate, larger is better; for `leep` and `logme`.

    Raises:
        ValueError: an unknown peer, k out of range, or a candidate without a score.
    """
    if peer not in get_args(Peer):
        raise ValueError(f"peer: one of {', '.join(get_args(Peer))}, not {peer!r}")
    order = selection.order
    k = len(selection.names) if k is None else k
    if not 1 <= k <= len(order):
        raise ValueError(f"k: 1 to {len(order)}, the number of candidates, not {k}")
    if peer in ("all", "no_consistency"):
        names = order
    elif peer == "no_diversity":
        names = order[:1]
    elif peer == "top_k":
        names = order[:k]
    elif peer == "random":
        # Drawn from the sorted names: the target's similarities have no part in it.
        drawn = np.random.default_rng(seed).choice(sorted(order), size=k, replace=False)
        names = [name for name in order if name in set(drawn.tolist())]
    else:
        missing = [name for name in order if name not in (scores or {})]
        if missing:
            raise ValueError(f"peer {peer!r}: candidate {missing[0]!r} has no score")
        assert scores is not None
        names = sorted(order, key=lambda name: -scores[name])[:k]  # ties: the more similar
    return replace(selection, names=list(names))


def class_responses(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Cosines [n, Z] of target features [n, d] with a candidate's class centroids [Z, d].

    The candidate's own nearest-centroid classifier, through which both scorers look at the target:
    the encoder is the same for all candidates, so its features alone would score them all alike.
    """
    return _unit_rows(features) @ _unit_rows(centroids).T


def leep(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Log expected empirical prediction (Nguyen et al. 2020, eq. 2), at most 0, larger is better.

    Args:
        probabilities: [n, Z] of the candidate's classes, for each target example.
        labels: [n] target labels, of its support.
    """
    classes, target = np.unique(labels, return_inverse=True)
    joint = np.zeros((len(classes), probabilities.shape[1]))
    np.add.at(joint, target, probabilities / len(target))  # P(y, z)
    marginal = joint.sum(axis=0)
    conditional = np.divide(joint, marginal, out=np.zeros_like(joint), where=marginal > 0)
    expected = (probabilities * conditional[target]).sum(axis=1)
    return float(np.log(expected).mean())


def logme(features: np.ndarray, labels: np.ndarray) -> float:
    """Log maximum evidence of labels given features (You et al. 2021), per example.

    The mean over classes. The 0/1 labels of a class are linear in the features with Gaussian
    weights (precision alpha) and noise (precision beta), both set where the evidence is highest, by
    MacKay's fixed point.

    Args:
        features: [n, D] of target examples, seen through a candidate.
        labels: [n] target labels, of its support.
    """
    features = np.asarray(features, dtype=np.float64)
    left, values, _ = np.linalg.svd(features, full_matrices=False)
    squares = values**2
    classes = np.unique(labels)
    return float(
        np.mean(
            [
                _log_evidence(left, squares, (labels == one).astype(float), features.shape[1])
                for one in classes
            ]
        )
    )


def _log_evidence(left: np.ndarray, squares: np.ndarray, y: np.ndarray, dimension: int) -> float:
    """Highest log evidence per example; features = left sqrt(squares) right^T, y [n]."""
    n = len(y)
    projected = (left.T @ y) ** 2
    outside = max(0.0, float(y @ y - projected.sum()))  # of the features' span
    tiny = np.finfo(np.float64).tiny
    alpha = beta = 1.0
    for _ in range(200):
        ratio = alpha / beta
        shrunk = squares + ratio
        effective = float((squares / shrunk).sum())
        weight = max(float((squares * projected / shrunk**2).sum()), tiny)
        error = max(outside + float((ratio**2 * projected / shrunk**2).sum()), tiny)
        alpha, beta = effective / weight, max(n - effective, tiny) / error
        if abs(alpha / beta - ratio) <= 1e-6 * ratio or not 1e-12 < alpha / beta < 1e12:
            break
    ratio = alpha / beta
    shrunk = squares + ratio
    weight = float((squares * projected / shrunk**2).sum())
    error = outside + float((ratio**2 * projected / shrunk**2).sum())
    determinant = np.log(shrunk * beta).sum() + (dimension - len(squares)) * np.log(alpha)
    evidence = (
        n * np.log(beta / (2 * np.pi))
        + dimension * np.log(alpha)
        - determinant
        - beta * error
        - alpha * weight
    ) / 2
    return float(evidence / n)


def _unit_rows(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)

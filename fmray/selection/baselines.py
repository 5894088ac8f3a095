"""Other rules to choose tasks, which Algorithm 1 is compared with: ablations, LEEP and LogME.

`choose_baseline` chooses other names among the candidates of a `Selection` and keeps its curves.
LEEP and LogME need a score per candidate, from a few labelled images of the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from fmray.selection.coverage import Selection

Baseline = Literal["all", "random", "no_diversity", "no_consistency", "top_k", "leep", "logme"]


def choose_baseline(
    selection: Selection,
    baseline: Baseline,
    k: int | None = None,
    seed: int = 0,
    scores: Mapping[str, float] | None = None,
) -> Selection:
    """Choose among the candidates of `selection` by another rule.

    Args:
        baseline: the rule:

            all             all candidates
            no_consistency  all candidates (Algorithm 1 without its stop, A.5.4)
            no_diversity    the most similar candidate
            top_k           the k most similar candidates
            random          k candidates, drawn by `seed`
            leep, logme     the k candidates with the highest scores

        k: default: as many as `selection` chose.
        scores: by candidate, larger is better; for `leep` and `logme`.

    Raises:
        ValueError: an unknown baseline, k out of range, or a candidate without a score.
    """
    if baseline not in get_args(Baseline):
        raise ValueError(f"baseline: one of {', '.join(get_args(Baseline))}, not {baseline!r}")
    order = selection.order
    k = len(selection.names) if k is None else k
    if not 1 <= k <= len(order):
        raise ValueError(f"k: 1 to {len(order)}, the number of candidates, not {k}")
    if baseline in ("all", "no_consistency"):
        names = order
    elif baseline == "no_diversity":
        names = order[:1]
    elif baseline == "top_k":
        names = order[:k]
    elif baseline == "random":
        # drawn from the sorted names, so that similarity to the target plays no part
        drawn = np.random.default_rng(seed).choice(sorted(order), size=k, replace=False)
        names = [name for name in order if name in set(drawn.tolist())]
    else:
        missing = [name for name in order if name not in (scores or {})]
        if missing:
            raise ValueError(f"baseline {baseline!r}: candidate {missing[0]!r} has no score")
        assert scores is not None
        names = sorted(order, key=lambda name: -scores[name])[:k]  # stable: ties keep order
    return replace(selection, names=list(names))


def class_responses(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return cosines [n, Z] of target features [n, d] with a candidate's class centroids [Z, d].

    These are the outputs of the candidate's nearest-centroid classifier. Both scorers use them
    instead of features: the encoder is the same for all candidates, so features alone would give
    every candidate the same score.
    """
    return _unit_rows(features) @ _unit_rows(centroids).T


def leep(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the log expected empirical prediction, at most 0; larger is better.

    Nguyen et al. 2020, eq. 2.

    Args:
        probabilities: [n, Z] of the candidate's classes for each target example.
        labels: [n] labels of the target examples.
    """
    classes, target = np.unique(labels, return_inverse=True)
    joint = np.zeros((len(classes), probabilities.shape[1]))
    np.add.at(joint, target, probabilities / len(target))  # P(y, z)
    marginal = joint.sum(axis=0)
    conditional = np.divide(joint, marginal, out=np.zeros_like(joint), where=marginal > 0)
    expected = (probabilities * conditional[target]).sum(axis=1)
    return float(np.log(expected).mean())


def logme(features: np.ndarray, labels: np.ndarray) -> float:
    """Return the log maximum evidence of labels given features, per example, mean over classes.

    You et al. 2021. The model of a class: its 0/1 labels are linear in the features with Gaussian
    weights (precision alpha) and noise (precision beta). MacKay's fixed point finds the alpha and
    beta of highest evidence.

    Args:
        features: [n, D] of target examples, such as `class_responses` of a candidate.
        labels: [n] labels of the target examples.
    """
    features = np.asarray(features, dtype=np.float64)
    left, values, _ = np.linalg.svd(features, full_matrices=False)
    squares = values**2
    classes = np.unique(labels)
    return float(
        np.mean(
            [
                _log_evidence(left, squares, (labels == label).astype(float), features.shape[1])
                for label in classes
            ]
        )
    )


def _log_evidence(left: np.ndarray, squares: np.ndarray, y: np.ndarray, dimension: int) -> float:
    """Return the highest log evidence per example of y [n].

    Args:
        left, squares: the features are left sqrt(squares) right^T.
    """
    n = len(y)
    projected = (left.T @ y) ** 2
    outside = max(0.0, float(y @ y - projected.sum()))  # outside the span of the features
    tiny = np.finfo(np.float64).tiny
    # fixed point in alpha / beta; the bounds stop it where the features explain all or nothing
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
    # evidence at the fixed point
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

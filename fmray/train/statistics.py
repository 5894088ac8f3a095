"""The statistics of an evaluation: intervals of shares, paired tests, plans against question types.

In: counts, and arrays over the same questions in the same order. Out: numbers. No models here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054  # two-sided normal quantile


@dataclass(frozen=True)
class Dependence:
    """Mutual information in bits, its mean over shuffled labels, and the permutation p value."""

    bits: float
    shuffled_bits: float
    p_value: float


@dataclass(frozen=True)
class PairedTest:
    """a minus b in accuracy over the same questions, and McNemar's exact two-sided p value.

    low, high: 95 % interval of the difference (Bonett and Price 2012).
    """

    difference: float
    only_a: int
    only_b: int
    p_value: float
    low: float
    high: float


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score interval), which stays within [0, 1]."""
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"{right} right of {total} is not a share")
    share, square = right / total, Z_95**2 / total
    center = (share + square / 2) / (1 + square)
    half = Z_95 * math.sqrt(share * (1 - share) / total + square / (4 * total)) / (1 + square)
    # exactly 0 and 1 at the ends, where rounding would miss them
    return (center - half if right else 0.0), (center + half if right < total else 1.0)


def paired_test(a: np.ndarray, b: np.ndarray) -> PairedTest:
    """Are two kinds of plans right on different questions more often one way? a, b: bool [n].

    McNemar's exact test: of the questions that one answers and the other does not, each side is
    equally likely if there is no difference. The interval is Wald's with one question more on each
    side, so that it has a width where no question tells the two apart.
    """
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"paired answers must be two arrays [n], not {a.shape} and {b.shape}")
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    discordant = only_a + only_b
    tail = sum(math.comb(discordant, i) for i in range(min(only_a, only_b) + 1))
    p_value = min(1.0, float(2 * tail / 2**discordant)) if discordant else 1.0
    share_a, share_b = (only_a + 1) / (len(a) + 2), (only_b + 1) / (len(a) + 2)
    center = share_a - share_b
    half = Z_95 * math.sqrt((share_a + share_b - center**2) / (len(a) + 2))
    low, high = max(-1.0, center - half), min(1.0, center + half)
    return PairedTest((only_a - only_b) / len(a), only_a, only_b, p_value, low, high)


def dependence(
    labels: np.ndarray, plans: np.ndarray, shuffles: int = 1000, seed: int = 0
) -> Dependence:
    """Do plans depend on the question? labels [n] of any kind, plans [n] of any kind.

    Mutual information of a finite sample is positive by chance alone (more so with many plans), so
    it is compared with shuffled labels: p = (1 + number at least as large) / (1 + shuffles).
    """
    _, label_codes = np.unique(labels, return_inverse=True)
    _, plan_codes = np.unique(plans, return_inverse=True)
    generator = np.random.default_rng(seed)
    found = _bits(label_codes, plan_codes)
    chance = np.array(
        [_bits(generator.permutation(label_codes), plan_codes) for _ in range(shuffles)]
    )
    # ties up to rounding count as "at least as large"
    larger = int((chance >= found - 1e-12).sum())
    return Dependence(found, float(chance.mean()), (1 + larger) / (1 + shuffles))


def _bits(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information of two arrays of codes from 0, in bits (plug-in estimate)."""
    columns = int(b.max()) + 1
    joint = np.bincount(a * columns + b, minlength=(int(a.max()) + 1) * columns) / len(a)
    joint = joint.reshape(-1, columns)
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())

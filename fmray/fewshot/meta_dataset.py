"""Meta-Dataset's episodes (version 1): ways and shots that vary, and classes that belong together.

In: the class of every image and, for Omniglot and ILSVRC, groups of classes. Out: a
`VariableEpisode` of row ids, a pure function of (seed, split, index). Source: Triantafillou et al.
2020, section 3.2 and appendix (sampling of classes and of examples).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fmray.fewshot.episodes import ClassRows

FEWEST_WAYS, MOST_WAYS = 5, 50
MOST_QUERIES = 10  # per class
MOST_SUPPORT, MOST_SUPPORT_OF_CLASS = 500, 100  # images

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VariableEpisode:
    """One task of N classes: `classes` [N] (labels), and per class its `support` and `query` row
    ids, int64. Queries are as many in each class; support images are not.
    """

    classes: np.ndarray
    support: list[np.ndarray]
    query: list[np.ndarray]


class MetaDatasetSampler:
    """Episodes of variable way and shot; `sampler[i]` is the i-th, and there is no last one.

    labels, seed, split and rows as `EpisodeSampler`'s. groups: arrays of labels; an episode draws
    one group uniformly, and its classes from it. whole_groups: False (Omniglot's alphabets) draws
    the number of ways as without groups; True (ILSVRC's WordNet nodes) takes all classes of the
    group, at most 50. Classes with fewer than 2 images and groups of fewer than 5 classes are left
    out and counted in the log.

    The laws of section 3.2: ways ~ U{5..min(50, classes)}; queries per class
    q = min(10, min_c floor(n_c / 2)); |S| = min(500, sum_c floor(b min(100, n_c - q) + 1)),
    b ~ U(0, 1); R_c proportional to n_c exp(a_c), a_c ~ U(log 1/2, log 2);
    shots k_c = min(floor(R_c (|S| - N)) + 1, n_c - q). Raises ValueError where no 5 classes remain.
    """

    def __init__(
        self,
        labels: ArrayLike,
        seed: int,
        split: str,
        groups: Sequence[ArrayLike] | None = None,
        rows: ArrayLike | None = None,
        whole_groups: bool = False,
    ) -> None:
        self.images = ClassRows(labels, seed, split, least=2, rows=rows)
        self.left_out = self.images.left_out
        self.whole_groups = whole_groups
        classes = self.images.classes
        # places in `classes`, which are sorted
        self.groups = [np.arange(len(classes))]
        if groups is not None:
            found = [np.flatnonzero(np.isin(classes, np.asarray(group))) for group in groups]
            self.groups = [group for group in found if len(group) >= FEWEST_WAYS]
            if len(self.groups) < len(found):
                _logger.warning(
                    "%d of %d groups of the %s split have fewer than %d classes and are left out",
                    len(found) - len(self.groups),
                    len(found),
                    split,
                    FEWEST_WAYS,
                )
        if not self.groups or len(self.groups[0]) < FEWEST_WAYS:
            what = "classes" if groups is None else "classes in any group"
            raise ValueError(
                f"a Meta-Dataset episode has {FEWEST_WAYS} ways or more, and the {split} split has "
                f"no {FEWEST_WAYS} {what} of at least 2 images"
            )

    def __getitem__(self, index: int) -> VariableEpisode:
        """Episode `index` >= 0, as row ids."""
        drawn, rows = self.positions(index), self.images.rows
        return VariableEpisode(
            drawn.classes, [rows[c] for c in drawn.support], [rows[c] for c in drawn.query]
        )

    def positions(self, index: int) -> VariableEpisode:
        """As `self[index]`, as positions in `labels`. Raises IndexError for a negative index."""
        images = self.images
        generator = images.generator(index)
        group = self.groups[generator.integers(len(self.groups))]
        most = min(MOST_WAYS, len(group))
        ways = most if self.whole_groups else generator.integers(FEWEST_WAYS, most + 1)
        chosen = generator.choice(group, ways, replace=False)
        counts = images.counts[chosen]
        queries = min(MOST_QUERIES, int(counts.min()) // 2)
        shots = _shots(generator, counts, queries)
        drawn = [
            images.draw(generator, place, queries + count)
            for place, count in zip(chosen, shots, strict=True)
        ]
        return VariableEpisode(
            images.classes[chosen], [c[queries:] for c in drawn], [c[:queries] for c in drawn]
        )


def _shots(generator: np.random.Generator, counts: np.ndarray, queries: int) -> np.ndarray:
    """Support images of each class [N], from its images `counts` [N]."""
    usable = counts - queries
    share = generator.random()
    wanted = np.floor(share * np.minimum(MOST_SUPPORT_OF_CLASS, usable) + 1).sum()
    support = min(MOST_SUPPORT, int(wanted))
    weights = counts * np.exp(generator.uniform(math.log(0.5), math.log(2), len(counts)))
    spread = np.floor(weights / weights.sum() * (support - len(counts))).astype(np.int64) + 1
    return np.minimum(spread, usable)

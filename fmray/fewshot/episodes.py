"""N-way K-shot episodes: which images make up few-shot task number i.

In: the class of every image. Out: an `Episode` of row ids; pixels or embeddings are gathered later.
An episode is a pure function of (seed, split, index): the same on one worker and on eight, in any
order, and after a resume (`numpy.random.SeedSequence([seed, split, index])`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

# what a split's name stands for in the seed
SPLITS = {"train": 0, "val": 1, "test": 2, "all": 3}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Episode:
    """One task: `classes` [N] (labels), `support` [N, shots] and `query` [N, queries] (row ids).

    int64. Class n of the task is row n of each: labels 0..N-1 are by position.
    """

    classes: np.ndarray
    support: np.ndarray
    query: np.ndarray


class EpisodeSampler:
    """Balanced N-way K-shot Q-query episodes, drawn without replacement; `sampler[i]` is the i-th.

    labels: [n] integers, the class of each image. seed: >= 0. split: "train", "val", "test" or
    "all", which only seeds (the images are those of `labels`). rows: [n] ids that episodes name the
    images by; default: positions in `labels`. Classes with fewer than shots + queries images are
    left out, counted in the log and in `left_out`. There is no last episode.

    Raises ValueError where fewer than `ways` classes remain: images are never drawn twice.
    """

    def __init__(
        self,
        labels: ArrayLike,
        ways: int,
        shots: int,
        queries: int,
        seed: int,
        split: str,
        rows: ArrayLike | None = None,
    ) -> None:
        for name, value, least in (("ways", ways, 2), ("shots", shots, 1), ("queries", queries, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        self.ways, self.shots, self.queries = ways, shots, queries
        self.images = ClassRows(labels, seed, split, least=shots + queries, rows=rows)
        self.left_out = self.images.left_out
        found = len(self.images.classes)
        if ways > found:
            short = f"; {self.left_out} have fewer" if self.left_out else ""
            raise ValueError(
                f"{ways} ways, but the {split} split has {found} classes of at least "
                f"{shots + queries} images ({shots} support + {queries} query){short}"
            )

    def __getitem__(self, index: int) -> Episode:
        """Episode `index` >= 0, as row ids."""
        drawn = self.positions(index)
        rows = self.images.rows
        return Episode(drawn.classes, rows[drawn.support], rows[drawn.query])

    def positions(self, index: int) -> Episode:
        """As `self[index]`, as positions in `labels`: for features that are stored in that order.

        Raises IndexError for a negative index.
        """
        images = self.images
        generator = images.generator(index)
        chosen = generator.choice(len(images.classes), self.ways, replace=False)
        drawn = np.stack([images.draw(generator, c, self.shots + self.queries) for c in chosen])
        return Episode(images.classes[chosen], drawn[:, : self.shots], drawn[:, self.shots :])


class ClassRows:
    """Images by class, and the random generator of each episode: what samplers draw from.

    least: images that a class must have; smaller ones are left out, and counted in `left_out`.
    `classes` [C] are the labels that remain, ascending, `counts` [C] their images, `rows` [n] the
    ids of all positions. Raises ValueError for labels that are not [n] integers, ids that are not
    [n] distinct integers, a negative seed or an unknown split.
    """

    def __init__(
        self, labels: ArrayLike, seed: int, split: str, least: int, rows: ArrayLike | None
    ) -> None:
        labels = np.asarray(labels)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels must be [n] integers, not {labels.dtype} {labels.shape}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, not {seed}")
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        self.rows = np.arange(len(labels)) if rows is None else np.asarray(rows)
        if self.rows.shape != labels.shape or not np.issubdtype(self.rows.dtype, np.integer):
            raise ValueError(
                f"rows must be {len(labels)} integers like the labels, not {self.rows.dtype} "
                f"{self.rows.shape}"
            )
        ordered = np.sort(self.rows)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(twice):
            raise ValueError(f"rows must be distinct, and {twice[0]} is there more than once")
        self._seed = (seed, SPLITS[split])
        self._order = np.argsort(labels, kind="stable")
        classes, first, counts = np.unique(
            labels[self._order], return_index=True, return_counts=True
        )
        large = counts >= least
        self.left_out = int((~large).sum())
        self.classes, self.counts = classes[large].astype(np.int64), counts[large]
        self._first = first[large]
        if self.left_out:
            _logger.warning(
                "%d of %d classes of the %s split have fewer than %d images and are left out",
                self.left_out,
                len(classes),
                split,
                least,
            )

    def generator(self, index: int) -> np.random.Generator:
        """The generator of episode `index`."""
        if index < 0:
            raise IndexError(f"episodes are numbered from 0, and there is none {index}")
        return np.random.default_rng(np.random.SeedSequence([*self._seed, int(index)]))

    def draw(self, generator: np.random.Generator, place: int, images: int) -> np.ndarray:
        """Positions [images] of distinct images of class `self.classes[place]`, in random order."""
        drawn = generator.choice(int(self.counts[place]), images, replace=False)
        return self._order[self._first[place] + drawn]


# Meta-Dataset's episodes (version 1): ways and shots that vary, and classes that belong together.
#
# In: the class of every image and, for Omniglot and ILSVRC, groups of classes. Out: a
# `VariableEpisode` of row ids, a pure function of (seed, split, index). Source: Triantafillou et
# al. 2020, section 3.2 and appendix (sampling of classes and of examples).

FEWEST_WAYS, MOST_WAYS = 5, 50
MOST_QUERIES = 10  # per class
MOST_SUPPORT, MOST_SUPPORT_OF_CLASS = 500, 100  # images


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

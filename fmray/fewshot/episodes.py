"""Few-shot episodes: which images are the support and the queries of task number i.

Two samplers: `EpisodeSampler` draws balanced N-way K-shot episodes, `MetaDatasetSampler` those of
Meta-Dataset, whose ways and shots vary. Both know only the class of each image and return row ids;
pixels or embeddings are gathered later. An episode depends on (seed, split, index) alone: it is the
same for any number of workers, in any order, and after a resume
(`numpy.random.SeedSequence([seed, split, index])`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

#: the number that stands for a split in the seed
SPLITS = {"train": 0, "val": 1, "test": 2, "all": 3}

_logger = logging.getLogger(__name__)


class ClassRows:
    """Images by class, and the random generator of each episode: what both samplers draw from.

    Attributes:
        classes: [C] labels of the classes that are large enough, ascending.
        counts: [C] their numbers of images.
        rows: [n] row ids of all images.
        left_out: how many classes are too small.
    """

    def __init__(
        self, labels: ArrayLike, seed: int, split: str, least: int, rows: ArrayLike | None
    ) -> None:
        """Group the images.

        Args:
            labels: [n] integers, the class of each image.
            least: images that a class must have; smaller classes are skipped with a warning.
            rows: [n] row ids of the images; default: positions in `labels`.

        Raises:
            ValueError: labels that are not [n] integers, row ids that are not [n] distinct
                integers, a negative seed or an unknown split.
        """
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
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(repeated):
            raise ValueError(f"rows must be distinct, but {repeated[0]} occurs more than once")

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
                "skipping %d of %d classes of the %s split: they have fewer than %d images",
                self.left_out,
                len(classes),
                split,
                least,
            )

    def generator(self, index: int) -> np.random.Generator:
        """Return the generator of episode `index`."""
        if index < 0:
            raise IndexError(f"episodes are numbered from 0; there is no episode {index}")
        return np.random.default_rng(np.random.SeedSequence([*self._seed, int(index)]))

    def draw(self, generator: np.random.Generator, position: int, images: int) -> np.ndarray:
        """Draw distinct images of class `self.classes[position]`.

        Returns:
            [images] positions in `labels`, in random order.
        """
        drawn = generator.choice(int(self.counts[position]), images, replace=False)
        return self._order[self._first[position] + drawn]


# --- Balanced episodes ---


@dataclass(frozen=True)
class Episode:
    """One N-way task, int64. Row n of each array is class n of the task: its label is n."""

    classes: np.ndarray  #: [N] labels
    support: np.ndarray  #: [N, shots] row ids
    query: np.ndarray  #: [N, queries] row ids


class EpisodeSampler:
    """Balanced N-way K-shot episodes, drawn without replacement; `sampler[i]` is episode i.

    There is no last episode. Classes with fewer than shots + queries images are skipped with a
    warning and counted in `left_out`.

    Args:
        labels: [n] integers, the class of each image.
        queries: query images per class.
        seed: at least 0.
        split: "train", "val", "test" or "all". It only seeds: the images are those of `labels`.
        rows: [n] row ids of the images; default: positions in `labels`.

    Raises:
        ValueError: fewer than `ways` classes are large enough; no image is drawn twice.
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
        classes = len(self.images.classes)
        if ways > classes:
            fewer = f"; {self.left_out} have fewer" if self.left_out else ""
            raise ValueError(
                f"{ways} ways, but the {split} split has {classes} classes of at least "
                f"{shots + queries} images ({shots} support + {queries} query){fewer}"
            )

    def __getitem__(self, index: int) -> Episode:
        """Return episode `index` >= 0 as row ids."""
        drawn = self.positions(index)
        rows = self.images.rows
        return Episode(drawn.classes, rows[drawn.support], rows[drawn.query])

    def positions(self, index: int) -> Episode:
        """Return `self[index]` as positions in `labels`, for features stored in that order.

        Raises:
            IndexError: a negative index.
        """
        images = self.images
        generator = images.generator(index)
        chosen = generator.choice(len(images.classes), self.ways, replace=False)
        drawn = np.stack([images.draw(generator, c, self.shots + self.queries) for c in chosen])
        return Episode(images.classes[chosen], drawn[:, : self.shots], drawn[:, self.shots :])


# --- Episodes of Meta-Dataset, version 1 (Triantafillou et al. 2020, section 3.2, appendix) ---

FEWEST_WAYS, MOST_WAYS = 5, 50
MOST_QUERIES = 10  # per class
MOST_SUPPORT, MOST_SUPPORT_OF_CLASS = 500, 100  # images


@dataclass(frozen=True)
class VariableEpisode:
    """One task of N classes, int64. All classes have as many queries, but not as many shots."""

    classes: np.ndarray  #: [N] labels
    support: list[np.ndarray]  #: row ids of each class
    query: list[np.ndarray]  #: row ids of each class


class MetaDatasetSampler:
    """Episodes of variable ways and shots; `sampler[i]` is episode i, and there is no last one.

    An episode draws, with n_c the images of class c (section 3.2):

        ways                 U{5..min(50, classes)}
        queries per class    q = min(10, min_c floor(n_c / 2))
        support images       |S| = min(500, sum_c floor(b min(100, n_c - q) + 1)), b ~ U(0, 1)
        share of a class     R_c proportional to n_c exp(a_c), a_c ~ U(log 1/2, log 2)
        shots of a class     k_c = min(floor(R_c (|S| - N)) + 1, n_c - q)

    Classes with fewer than 2 images and groups of fewer than 5 classes are skipped with a warning.

    Args:
        labels, seed, split, rows: as in `EpisodeSampler`.
        groups: arrays of labels; an episode draws one group uniformly, and its classes from it.
        whole_groups: False (Omniglot's alphabets): the number of ways is drawn as without groups.
            True (ILSVRC's WordNet nodes): all classes of the group, at most 50.

    Raises:
        ValueError: no 5 classes remain.
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
        # positions in `classes`, which are sorted
        self.groups = [np.arange(len(classes))]
        if groups is not None:
            members = [np.flatnonzero(np.isin(classes, np.asarray(group))) for group in groups]
            self.groups = [group for group in members if len(group) >= FEWEST_WAYS]
            if len(self.groups) < len(members):
                _logger.warning(
                    "skipping %d of %d groups of the %s split: they have fewer than %d classes",
                    len(members) - len(self.groups),
                    len(members),
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
        """Return episode `index` >= 0 as row ids."""
        drawn, rows = self.positions(index), self.images.rows
        return VariableEpisode(
            drawn.classes, [rows[c] for c in drawn.support], [rows[c] for c in drawn.query]
        )

    def positions(self, index: int) -> VariableEpisode:
        """Return `self[index]` as positions in `labels`.

        Raises:
            IndexError: a negative index.
        """
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
            images.draw(generator, position, queries + count)
            for position, count in zip(chosen, shots, strict=True)
        ]
        return VariableEpisode(
            images.classes[chosen], [c[queries:] for c in drawn], [c[:queries] for c in drawn]
        )


def _shots(generator: np.random.Generator, counts: np.ndarray, queries: int) -> np.ndarray:
    """Draw the number of support images of each class [N]; `counts` [N] are all its images."""
    usable = counts - queries
    share = generator.random()
    wanted = np.floor(share * np.minimum(MOST_SUPPORT_OF_CLASS, usable) + 1).sum()
    support = min(MOST_SUPPORT, int(wanted))
    weights = counts * np.exp(generator.uniform(math.log(0.5), math.log(2), len(counts)))
    spread = np.floor(weights / weights.sum() * (support - len(counts))).astype(np.int64) + 1
    return np.minimum(spread, usable)

"""N-way K-shot episodes: which images make up few-shot task number i.

In: the class of every image. Out: an `Episode` of row ids; pixels or embeddings are gathered later.
An episode is a pure function of (seed, split, index): the same on one worker and on eight, in any
order, and after a resume (`numpy.random.SeedSequence([seed, split, index])`).
"""

from __future__ import annotations

import logging
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

"""The training set of a run: M episodes of the selected tasks, and the order the steps use them in.

Both depend on the recipe's seed alone, so they are the same for any number of ranks and after a
resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fmray.config.fewshot import EpisodeConfig
from fmray.data.image_store import ImageStore
from fmray.fewshot import EpisodeSampler
from fmray.train.fewshot.encoder import ImageReader
from fmray.train.fewshot.select import CandidateTask


@dataclass(frozen=True)
class TaskBatch:
    """The images of one episode."""

    support: Tensor  #: uint8 [N, K, 3, size, size]
    query: Tensor  #: uint8 [N, Q, 3, size, size]
    labels: Tensor  #: int64 [N], its classes among all classes of the training set


class TrainingSet:
    """M episodes, each of one task. Tasks take turns in an order drawn once.

    Attributes:
        tasks: sorted by name, so that the set does not depend on the order of selection.
        num_classes: number of classes over all tasks.
        fingerprint: 12 hex digits that change with any row or name.
    """

    def __init__(
        self,
        tasks: Sequence[CandidateTask],
        store: ImageStore,
        config: EpisodeConfig,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Prepare a sampler for each task.

        Args:
            weights: relative number of episodes by task name, 1 by default.

        Raises:
            ValueError: a task with too few classes or images for an episode.
        """
        self.tasks = sorted(tasks, key=lambda task: task.name)
        self._config, self._seed = config, seed
        self._first = np.array([entry.first for entry in store.classes])  # ascending
        self._classes = np.unique(np.concatenate([self._class_of(t.rows) for t in self.tasks]))
        self.num_classes = len(self._classes)
        self._samplers = [self._sampler(task) for task in self.tasks]
        # shuffled: with fewer episodes than tasks, the unused ones must not depend on the names
        self._turns = _generator(seed, 0).permutation(len(self.tasks))
        shares = np.array([(weights or {}).get(task.name, 1.0) for task in self.tasks])
        if len(set(shares)) > 1:
            self._turns = _weighted_turns(self._turns, shares[self._turns], config.tasks)
        digest = hashlib.sha256(store.fingerprint.encode())
        for task in self.tasks:
            digest.update(task.name.encode())
            digest.update(np.sort(task.rows).tobytes())
        self.fingerprint = digest.hexdigest()[:12]

    def rows(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return episode `index` as global row ids: support [N, K], query [N, Q], labels [N]."""
        assert 0 <= index < self._config.tasks, index
        sampler = self._samplers[self._turns[index % len(self._turns)]]
        episode = sampler[index]
        labels = np.searchsorted(self._classes, self._class_of(episode.support[:, 0]))
        return episode.support, episode.query, labels

    def name(self, index: int) -> list[str]:
        """Return the name of episode `index` in messages, as a list of one."""
        task = self.tasks[self._turns[index % len(self._turns)]]
        return [f"episode {index} of {task.name}"]

    def used_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each image of the M episodes once: rows [n] (ascending) and labels [n]."""
        parts = [self.rows(index)[:2] for index in range(self._config.tasks)]
        rows = np.unique(np.concatenate([part.reshape(-1) for pair in parts for part in pair]))
        return rows, np.searchsorted(self._classes, self._class_of(rows))

    def order(self, step: int, per_step: int) -> list[int]:
        """Return the episodes of a step.

        An epoch uses all M episodes once; each epoch has another order.
        """
        positions = range(step * per_step, (step + 1) * per_step)
        total = self._config.tasks
        orders = {
            epoch: _generator(self._seed, 1 + epoch).permutation(total)
            for epoch in {position // total for position in positions}
        }
        return [int(orders[position // total][position % total]) for position in positions]

    def _class_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first, rows, side="right") - 1

    def _sampler(self, task: CandidateTask) -> EpisodeSampler:
        config = self._config
        try:
            return EpisodeSampler(
                task.labels,
                config.ways,
                config.shots,
                config.queries,
                self._seed,
                "train",
                rows=task.rows,
            )
        except ValueError as error:
            raise ValueError(f"task {task.name}: {error}") from error


def read_ahead(
    training: TrainingSet, images: ImageReader, indices: Sequence[int]
) -> Iterator[TaskBatch]:
    """Yield episodes by index; decode the next one in a thread while the caller uses this one."""

    def read(index: int) -> TaskBatch:
        support, query, labels = training.rows(index)
        return TaskBatch(images[support], images[query], torch.from_numpy(labels))

    with ThreadPoolExecutor(max_workers=1) as ahead:
        waiting = ahead.submit(read, indices[0]) if indices else None
        for following in indices[1:]:
            batch = waiting.result()
            waiting = ahead.submit(read, following)
            yield batch
        if waiting is not None:
            yield waiting.result()


def _weighted_turns(tasks: np.ndarray, shares: np.ndarray, count: int) -> np.ndarray:
    """Return the task of each of `count` turns: always the one that is furthest behind its share.

    So any stretch of turns is mixed in the same proportions.
    """
    taken = np.zeros(len(tasks))
    turns = []
    for turn in range(1, count + 1):
        behind = int(np.argmax(turn * shares / shares.sum() - taken))
        taken[behind] += 1
        turns.append(tasks[behind])
    return np.array(turns)


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, stream]))

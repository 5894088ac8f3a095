"""Which samples make up which batch: the order of an epoch, the same for any number of workers.

In: the lengths of all samples, in store order, with the row group of each. Out: sample indices for
one rank.

The epoch is cut into lanes that do not depend on the number of workers; every lane gives each
global batch the same number of samples, and a rank takes an even share of the batch, lane by lane.
So a global batch holds the same samples however many workers share it, and a rank reads only its
own lanes' part of the store.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MAX_LANES = 64  # each is a long stretch of the store, read by one rank or by neighbours
LENGTH_STEP = 16  # lengths this close count as equal: short samples sorted to the last token would
# make batches of one kind of question each
WINDOW_SAMPLES = 4096  # samples of a lane that are shuffled and sorted by length together
WINDOW_BYTES = 2**30  # of the store, over all lanes: what windows may keep in memory at once


def passes_of(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro batches of each rank in a step; where the numbers do not divide, some are not full."""
    return math.ceil(global_batch / (micro_batch * world_size))


def lanes_of(global_batch: int) -> int:
    """Largest divisor of the global batch that is at most 64."""
    return max(lane for lane in range(1, MAX_LANES + 1) if global_batch % lane == 0)


@dataclass(frozen=True)
class Schedule:
    """The order of samples. `lengths` [n] tokens, `groups` [n] their row groups, ascending."""

    lengths: np.ndarray
    groups: np.ndarray
    global_batch: int
    seed: int
    sample_bytes: float = 0.0  # average, in the store

    @property
    def lanes(self) -> int:
        """Number of lanes."""
        return lanes_of(self.global_batch)

    @property
    def steps(self) -> int:
        """Full global batches in an epoch; the samples left over differ from epoch to epoch."""
        return len(self.lengths) // self.global_batch

    def epoch(self, epoch: int, rank: int, world_size: int) -> np.ndarray:
        """Samples of one rank, [steps, n] indices, n = global_batch / world_size rounded up or
        down; a function of (seed, epoch)."""
        per_lane = self.global_batch // self.lanes  # samples of a lane in one batch
        lane_length = self.steps * per_lane
        order = self._group_order(epoch)[: lane_length * self.lanes].reshape(
            self.lanes, lane_length
        )
        start, stop = (r * self.global_batch // world_size for r in (rank, rank + 1))
        lanes = range(start // per_lane, -(-stop // per_lane))
        whole = np.concatenate(
            [self._lane(order[lane], lane, epoch, per_lane) for lane in lanes], axis=1
        )
        first = lanes.start * per_lane
        return whole[:, start - first : stop - first]

    def _group_order(self, epoch: int) -> np.ndarray:
        """All samples, row groups shuffled, the samples of a group together."""
        groups = int(self.groups[-1]) + 1
        position = np.random.default_rng((self.seed, epoch, 0)).permutation(groups)
        return np.argsort(position[self.groups], kind="stable")

    def _lane(self, samples: np.ndarray, lane: int, epoch: int, per_lane: int) -> np.ndarray:
        """[steps, per_lane]: like lengths together, and in one step like lengths in all lanes."""
        steps = self._window_steps(per_lane)
        pieces = []
        for window, start in enumerate(range(0, len(samples), steps * per_lane)):
            piece = samples[start : start + steps * per_lane]
            piece = np.random.default_rng((self.seed, epoch, 1, window, lane)).permutation(piece)
            length = self.lengths[piece] // LENGTH_STEP
            piece = piece[np.argsort(length, kind="stable")].reshape(-1, per_lane)
            # the same for every lane: step i takes the same quantile of lengths from each
            pieces.append(
                piece[np.random.default_rng((self.seed, epoch, 2, window)).permutation(len(piece))]
            )
        return np.concatenate(pieces)

    def _window_steps(self, per_lane: int) -> int:
        """Steps in a window: some thousand samples, fewer where samples are large."""
        samples = WINDOW_SAMPLES
        if self.sample_bytes:
            samples = min(samples, int(WINDOW_BYTES / (self.lanes * self.sample_bytes)))
        return max(1, samples // per_lane)

"""Batches for training and evaluation from a data store.

In: a finished store, a processor, this worker's rank. Out: padded `Batch`es, decoded ahead of time
in threads.

The order is a function of (seed, epoch) and the same for any number of workers
(`fmray/data/loader.py`), so an epoch can be taken up at any step, by any number of workers.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from fmray.data.records import Encoded, decode_image, encode
from fmray.data.store import CACHE_BYTES, StoreSplit

if TYPE_CHECKING:
    from transformers import ProcessorMixin


# Which samples make up which batch: the order of an epoch, the same for any number of workers.
#
# In: the lengths of all samples, in store order, with the row group of each. Out: sample indices
# for one rank.
#
# The epoch is cut into lanes that do not depend on the number of workers; every lane gives each
# global batch the same number of samples, and a rank takes an even share of the batch, lane by
# lane. So a global batch holds the same samples however many workers share it, and a rank reads
# only its own lanes' part of the store.

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


IGNORED = -100  # label of a position that is not learned
KEPT_ENCODINGS = (
    100_000  # rows whose tokens are remembered; some hundred bytes each for short questions
)


@dataclass
class Batch:
    """Right-padded samples. B samples, n tokens; text-only samples have no entry in `pixel_values`.

    `filler` marks a batch that only keeps ranks in step, and counts for nothing: one more of a rank
    that has fewer samples than others, or (all its labels are -100) at the end of an evaluation.
    """

    input_ids: torch.Tensor  # [B, n] int64
    attention_mask: torch.Tensor  # [B, n] int64
    labels: torch.Tensor  # [B, n] int64, -100 but for answers and their end-of-answer tokens
    pixel_values: torch.Tensor | None
    extras: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # image_sizes, image_grid_thw, ...
    tags: list[str | None] = field(default_factory=list)  # [B] kind of the (last) question
    rows: list[int] = field(default_factory=list)  # [B] rows of the source file
    filler: bool = False

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.attention_mask.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            None if self.pixel_values is None else self.pixel_values.to(device, non_blocking=True),
            {name: value.to(device, non_blocking=True) for name, value in self.extras.items()},
            self.tags,
            self.rows,
            self.filler,
        )


class Collator:
    """Makes batches of (row, last turn) pairs, in any thread. A row's tokens are remembered."""

    def __init__(self, split: StoreSplit, processor: ProcessorMixin, kind: str) -> None:
        self.split, self.kind = split, kind
        self._processor, self._local = processor, threading.local()
        self._encodings: OrderedDict[int, Encoded] = OrderedDict()

    @property
    def processor(self) -> ProcessorMixin:
        """This thread's own copy: a fast tokenizer keeps its padding mode as state."""
        if not hasattr(self._local, "processor"):
            self._local.processor = copy.deepcopy(self._processor)
        return self._local.processor

    def __call__(self, rows: np.ndarray, turns: np.ndarray) -> Batch:
        """`rows` [B] of the split, `turns` [B] the last answer of each sample."""
        encoded_images = [self.split.image(int(row)) for row in rows]
        features = self._image_features(
            [decode_image(image) for image in encoded_images if image is not None]
        )
        expansions = iter(features.pop("expansions", []))
        samples = [
            self._sample(int(row), int(turn), None if image is None else next(expansions))
            for row, turn, image in zip(rows, turns, encoded_images, strict=True)
        ]
        tokenizer = self.processor.tokenizer
        # padding is masked, so any token will do where there is none for it
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        shape = (len(samples), max(len(ids) for ids, _ in samples))
        batch_ids = np.full(shape, pad, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for index, (ids, targets) in enumerate(samples):
            batch_ids[index, : len(ids)] = ids
            labels[index, : len(ids)] = targets
            mask[index, : len(ids)] = 1
        if "mm_token_type_ids" in features:  # those of the images alone: make the whole batch's
            types = self.processor.create_mm_token_type_ids(batch_ids.tolist())
            features["mm_token_type_ids"] = torch.tensor(types) * torch.from_numpy(mask)
        return Batch(
            torch.from_numpy(batch_ids),
            torch.from_numpy(mask),
            torch.from_numpy(labels),
            features.pop("pixel_values", None),
            features,
            [self.split.tag(int(row), int(turn)) for row, turn in zip(rows, turns, strict=True)],
            self.split.source_row[rows].tolist(),
        )

    def _image_features(self, images: list[Any]) -> dict[str, Any]:
        """The processor's outputs for some images; `expansions`: the token ids [k] that stand for
        each of them."""
        if not images:
            return {}
        outputs = self.processor(
            images=images,
            text=[self.processor.image_token] * len(images),
            add_special_tokens=False,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        features = dict(outputs)
        ids, mask = features.pop("input_ids").numpy(), features.pop("attention_mask").numpy()
        features["expansions"] = [
            row[: int(length)] for row, length in zip(ids, mask.sum(1), strict=True)
        ]
        return features

    def _sample(
        self, row: int, turn: int, expansion: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and labels up to and with one answer, the image token replaced by its
        expansion."""
        encoded = self._encoding(row)
        end = encoded.ends[turn]
        ids = encoded.ids[:end]
        labels = np.full(end, IGNORED, dtype=np.int64)
        for learned in [turn] if self.kind == "turn" else range(turn + 1):
            span = slice(encoded.starts[learned], encoded.ends[learned])
            labels[span] = ids[span]
        if expansion is None:
            return ids, labels
        at = encoded.image_at
        assert at is not None, f"row {row} has an image but no image token"
        unlearned = np.full(len(expansion), IGNORED, dtype=np.int64)
        return (
            np.concatenate([ids[:at], expansion, ids[at + 1 :]]),
            np.concatenate([labels[:at], unlearned, labels[at + 1 :]]),
        )

    def _encoding(self, row: int) -> Encoded:
        encoded = self._encodings.get(row)
        if encoded is None:
            encoded = encode(self.processor, self.split.conversation(row))
            self._encodings[row] = encoded
            if len(self._encodings) > KEPT_ENCODINGS:
                self._encodings.popitem(last=False)
        return encoded


class InstructionLoader:
    """Training batches of one rank.

    `.samples` and `.steps_per_epoch` count the whole split; `.passes`: micro batches in a step;
    `.wait_seconds`: the time the consumer has spent waiting for a batch so far.
    """

    def __init__(
        self,
        store: Path,
        split: str,
        processor: ProcessorMixin,
        *,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        samples: Literal["turn", "conversation"],
        max_length: int,
        micro_batch: int,
        threads: int = 1,
        prefetch: int = 4,
    ) -> None:
        """Raises ValueError when there are more workers than samples in a batch, or the split has
        less than one batch."""
        if global_batch < world_size:
            raise ValueError(
                f"train.global_batch {global_batch} is less than a sample for each of {world_size} "
                "workers; use fewer workers, or a larger batch"
            )
        self.rank, self.world_size = rank, world_size
        self.micro_batch, self.threads, self.prefetch = micro_batch, threads, prefetch
        self._split = StoreSplit(store, split, CACHE_BYTES // world_size)
        self._samples = self._split.samples(samples, max_length)
        if len(self._samples.row) < global_batch:
            raise ValueError(
                f"{store}: {len(self._samples.row)} {split} samples of at most {max_length} tokens "
                f"are less than one train.global_batch of {global_batch}"
            )
        self._schedule = Schedule(
            self._samples.length,
            self._samples.group,
            global_batch,
            seed,
            sample_bytes=self._split.bytes / len(self._samples.row),
        )
        self.passes = passes_of(global_batch, micro_batch, world_size)
        self._collate = Collator(self._split, processor, samples)
        self.wait_seconds = 0.0

    @property
    def samples(self) -> int:
        """Samples of the split that are short enough."""
        return len(self._samples.row)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, the same for every epoch and rank."""
        return self._schedule.steps

    @property
    def tags(self) -> list[str]:
        """All kinds of questions of the split."""
        return self._split.tags

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """This rank's micro batches, one list for each optimizer step from `start_step` on.

        A step that is skipped costs nothing. What goes wrong in a thread is raised here, at its
        step. Closing the iterator ends the threads.
        """
        plan = self._schedule.epoch(epoch, self.rank, self.world_size)
        steps = iter(range(start_step, len(plan)))
        with ThreadPoolExecutor(self.threads, thread_name_prefix="fmray-loader") as pool:
            pending: deque[Future[list[Batch]]] = deque()
            try:
                for step in steps:
                    pending.append(pool.submit(self._step, plan[step]))
                    if len(pending) >= self.prefetch:
                        yield self._wait(pending.popleft())
                while pending:
                    yield self._wait(pending.popleft())
            finally:
                for future in pending:
                    future.cancel()

    def _step(self, samples: np.ndarray) -> list[Batch]:
        pieces = np.split(samples, range(self.micro_batch, len(samples), self.micro_batch))
        batches = [self._collate(self._samples.row[p], self._samples.turn[p]) for p in pieces]
        return batches + [replace(batches[0], filler=True)] * (self.passes - len(batches))

    def _wait(self, future: Future[list[Batch]]) -> list[Batch]:
        begun = time.perf_counter()
        try:
            return future.result()
        finally:
            self.wait_seconds += time.perf_counter() - begun


def evaluation_batches(
    store: Path,
    split: str,
    processor: ProcessorMixin,
    batch: int,
    rows: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """One sample for each answer of the first `rows` rows, in store order; batch i goes to rank i
    modulo world size.

    Every rank gets the same number of batches: the last ones may be `filler`, which keeps
    collectives in step.
    """
    source = StoreSplit(store, split)
    samples = source.samples("turn", max_length=2**31)
    count = len(samples.row) if rows is None else int(np.searchsorted(samples.row, rows))
    collate = Collator(source, processor, "turn")
    starts = range(0, count, batch)
    for first in range(0, len(starts), world_size):
        filler = first + rank >= len(starts)
        start = starts[first if filler else first + rank]
        piece = slice(start, min(start + batch, count))
        result = collate(samples.row[piece], samples.turn[piece])
        if filler:
            result.filler = True
            result.labels.fill_(IGNORED)
        yield result

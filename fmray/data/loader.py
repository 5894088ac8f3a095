"""Batches for training and evaluation from a data store, decoded ahead of time in threads.

`Schedule` defines the order of the samples. It depends on (seed, epoch) but not on the number of
ranks, so an epoch can be resumed at any step by any number of ranks. `Collator` turns samples into
padded tensors, `InstructionLoader` combines both for one rank.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from fmray.data.images import decode_image
from fmray.data.records import Encoded, encode
from fmray.data.store import CACHE_BYTES, Samples, StoreSplit

if TYPE_CHECKING:
    from transformers import ProcessorMixin

IGNORED = -100  # label of a position that has no loss
CACHED_ENCODINGS = 100_000  # rows whose tokens are cached; a few hundred bytes each

# --- Order of the samples ---

MAX_LANES = 64  # each is a long stretch of the store, read by one rank or by neighbours
# Lengths in the same step of 16 count as equal: sorting to the last token would make batches with
# a single kind of question.
LENGTH_STEP = 16
WINDOW_SAMPLES = 4096  # samples of a lane that are shuffled and sorted by length together
WINDOW_BYTES = 2**30  # limit for the part of the store that the windows of all lanes cover


def passes_of(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Return the micro batches per rank and step; not all are full if the sizes do not divide."""
    return math.ceil(global_batch / (micro_batch * world_size))


def lanes_of(global_batch: int) -> int:
    """Return the largest divisor of the global batch that is at most `MAX_LANES`."""
    return max(lane for lane in range(1, MAX_LANES + 1) if global_batch % lane == 0)


@dataclass(frozen=True)
class Schedule:
    """The order of the samples of a split.

    An epoch is cut into lanes, whose number does not depend on the number of ranks. Every lane
    gives each global batch the same number of samples, and a rank takes an even share of the batch,
    lane by lane. So a global batch contains the same samples however many ranks share it, and a
    rank reads only the part of the store that belongs to its lanes.
    """

    lengths: np.ndarray  # [n] tokens of each sample, in store order
    groups: np.ndarray  # [n] row group of each sample, ascending
    global_batch: int
    seed: int
    sample_bytes: float = 0.0  # average size in the store

    @property
    def lanes(self) -> int:
        """Number of lanes."""
        return lanes_of(self.global_batch)

    @property
    def steps(self) -> int:
        """Full global batches in an epoch; which samples are left over depends on the epoch."""
        return len(self.lengths) // self.global_batch

    def epoch(self, epoch: int, rank: int, world_size: int) -> np.ndarray:
        """Return the samples of one rank: indices [steps, n].

        n is global_batch / world_size, rounded up or down.
        """
        per_lane = self.global_batch // self.lanes  # samples of a lane in one batch
        lane_length = self.steps * per_lane
        order = self._group_order(epoch)[: lane_length * self.lanes].reshape(
            self.lanes, lane_length
        )
        # the rank takes columns start to stop of the global batch, which some lanes cover
        start, stop = (r * self.global_batch // world_size for r in (rank, rank + 1))
        lanes = range(start // per_lane, -(-stop // per_lane))
        columns = np.concatenate(
            [self._lane(order[lane], lane, epoch, per_lane) for lane in lanes], axis=1
        )
        offset = lanes.start * per_lane
        return columns[:, start - offset : stop - offset]

    def _group_order(self, epoch: int) -> np.ndarray:
        """Return all samples in a random order of row groups; a group's samples stay together."""
        groups = int(self.groups[-1]) + 1
        position = np.random.default_rng((self.seed, epoch, 0)).permutation(groups)
        return np.argsort(position[self.groups], kind="stable")

    def _lane(self, samples: np.ndarray, lane: int, epoch: int, per_lane: int) -> np.ndarray:
        """Return the samples of a lane, [steps, per_lane].

        Samples of similar length share a step, and the lanes have similar lengths in each step.
        """
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
        """Return the steps in a window: some thousand samples, fewer if samples are large."""
        samples = WINDOW_SAMPLES
        if self.sample_bytes:
            samples = min(samples, int(WINDOW_BYTES / (self.lanes * self.sample_bytes)))
        return max(1, samples // per_lane)


# --- Batches ---


@dataclass
class Batch:
    """B right-padded samples of n tokens."""

    input_ids: torch.Tensor  # [B, n] int64
    attention_mask: torch.Tensor  # [B, n] int64
    labels: torch.Tensor  # [B, n] int64, -100 outside answers and their end-of-answer tokens
    #: processor's output for the images; None without images. Text-only samples have no entry.
    pixel_values: torch.Tensor | None
    #: other image inputs of the model: image_sizes, image_grid_thw, ...
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    tags: list[str | None] = field(default_factory=list)  # [B] kind of the (last) question
    rows: list[int] = field(default_factory=list)  # [B] rows of the source file
    #: the batch keeps ranks in step and must not count: an extra micro batch of a rank with fewer
    #: samples than others, or (with all labels -100) at the end of an evaluation
    filler: bool = False

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`."""
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
    """Make batches from (row, last turn) pairs; thread-safe. Caches the tokens of rows."""

    def __init__(self, split: StoreSplit, processor: ProcessorMixin, kind: str) -> None:
        self.split, self.kind = split, kind
        self._processor, self._local = processor, threading.local()
        self._encodings: OrderedDict[int, Encoded] = OrderedDict()

    @property
    def processor(self) -> ProcessorMixin:
        """The thread's own copy: a fast tokenizer keeps its padding mode as state."""
        if not hasattr(self._local, "processor"):
            self._local.processor = copy.deepcopy(self._processor)
        return self._local.processor

    def __call__(self, rows: np.ndarray, turns: np.ndarray) -> Batch:
        """Make a batch.

        Args:
            rows: [B] rows of the split.
            turns: [B] the last answer of each sample.
        """
        # images, each with the tokens that stand for it; then texts
        encoded_images = [self.split.image(int(row)) for row in rows]
        features = self._image_features(
            [decode_image(image).image for image in encoded_images if image is not None]
        )
        expansions = iter(features.pop("expansions", []))
        samples = [
            self._sample(int(row), int(turn), None if image is None else next(expansions))
            for row, turn, image in zip(rows, turns, encoded_images, strict=True)
        ]
        tokenizer = self.processor.tokenizer

        # pad to the longest
        shape = (len(samples), max(len(ids) for ids, _ in samples))
        batch_ids = np.full(shape, tokenizer.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for index, (ids, targets) in enumerate(samples):
            batch_ids[index, : len(ids)] = ids
            labels[index, : len(ids)] = targets
            mask[index, : len(ids)] = 1
        if "mm_token_type_ids" in features:  # the processor saw the images alone: redo for all ids
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
        """Return the processor's outputs; `expansions` are the ids that stand for each image."""
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
        """Return token ids and labels up to the end of an answer.

        The image token is replaced by its expansion.
        """
        encoded = self._encoding(row)
        end = encoded.ends[turn]
        ids = encoded.ids[:end]
        labels = np.full(end, IGNORED, dtype=np.int64)
        for answer in [turn] if self.kind == "turn" else range(turn + 1):
            span = slice(encoded.starts[answer], encoded.ends[answer])
            labels[span] = ids[span]
        if expansion is None:
            return ids, labels
        at = encoded.image_at
        assert at is not None, f"row {row} has an image but no image token"
        ignored = np.full(len(expansion), IGNORED, dtype=np.int64)
        return (
            np.concatenate([ids[:at], expansion, ids[at + 1 :]]),
            np.concatenate([labels[:at], ignored, labels[at + 1 :]]),
        )

    def _encoding(self, row: int) -> Encoded:
        encoded = self._encodings.get(row)
        if encoded is None:
            encoded = encode(self.processor, self.split.conversation(row))
            self._encodings[row] = encoded
            if len(self._encodings) > CACHED_ENCODINGS:
                self._encodings.popitem(last=False)
        return encoded


class InstructionLoader:
    """Training batches of one rank."""

    #: what it trains on
    samples: Samples
    #: micro batches in a step
    passes: int
    #: how long the consumer has waited for batches so far
    wait_seconds: float

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
        """Open the split.

        Args:
            global_batch: samples of all ranks in a step.
            samples: one sample per answer ("turn") or per row ("conversation").
            max_length: tokens; longer samples are skipped or cut, see `StoreSplit.samples`.
            micro_batch: samples in a batch.
            threads: threads that decode.
            prefetch: steps that are decoded ahead.

        Raises:
            ValueError: there are more ranks than samples in a global batch, or the split has less
                than one global batch.
        """
        if global_batch < world_size:
            raise ValueError(
                f"train.global_batch {global_batch} is less than a sample for each of {world_size} "
                "workers; use fewer workers, or a larger batch"
            )
        self.rank, self.world_size = rank, world_size
        self.micro_batch, self.threads, self.prefetch = micro_batch, threads, prefetch
        self._split = StoreSplit(store, split, CACHE_BYTES // world_size)
        self.samples = self._split.samples(samples, max_length)
        if len(self.samples.row) < global_batch:
            raise ValueError(
                f"{store}: {len(self.samples.row)} {split} samples of at most {max_length} tokens "
                f"are less than one train.global_batch of {global_batch}"
            )
        self._schedule = Schedule(
            self.samples.length,
            self.samples.group,
            global_batch,
            seed,
            sample_bytes=self._split.bytes / len(self.samples.row),
        )
        self.passes = passes_of(global_batch, micro_batch, world_size)
        self._collate = Collator(self._split, processor, samples)
        self.wait_seconds = 0.0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, the same for every epoch and rank."""
        return self._schedule.steps

    def ids(self, rows: Iterable[int]) -> list[str]:
        """Return the ids of a batch's rows; reads those of the split."""
        return self._split.ids(rows)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yield the rank's micro batches, one list per optimizer step from `start_step` on.

        Skipped steps cost nothing. An error in a thread is raised here, at its step. Closing the
        iterator ends the threads.
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
        batches = [self._collate(self.samples.row[p], self.samples.turn[p]) for p in pieces]
        return batches + [replace(batches[0], filler=True)] * (self.passes - len(batches))

    def _wait(self, future: Future[list[Batch]]) -> list[Batch]:
        start = time.perf_counter()
        try:
            return future.result()
        finally:
            self.wait_seconds += time.perf_counter() - start


def evaluation_samples(
    split: StoreSplit, rows: int | None = None, max_length: int | None = None
) -> Samples:
    """Return what an evaluation scores: each answer that training could learn from.

    Args:
        rows: of the first so many rows; default: of all.
        max_length: `data.max_length`; default: that of the store.

    Raises:
        ValueError: no answer is short enough.
    """
    samples = split.samples("turn", max_length, rows)
    if not len(samples.row):
        raise ValueError(
            f"{split.files[0].parent}: all {samples.left_out} answers to evaluate are longer than "
            f"data.max_length ({samples.max_length} tokens); raise it, or evaluate more rows"
        )
    return samples


def evaluation_batches(
    store: Path,
    split: str,
    processor: ProcessorMixin,
    batch: int,
    rows: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    max_length: int | None = None,
) -> Iterator[Batch]:
    """Yield a rank's batches of `evaluation_samples`, in store order.

    Batch i goes to rank i modulo world size. Every rank gets the same number of batches, so that
    collectives stay in step: the last ones may be `filler`.
    """
    source = StoreSplit(store, split)
    samples = evaluation_samples(source, rows, max_length)
    count = len(samples.row)
    collate = Collator(source, processor, "turn")
    starts = range(0, count, batch)
    for round_start in range(0, len(starts), world_size):
        filler = round_start + rank >= len(starts)
        start = starts[round_start if filler else round_start + rank]
        piece = slice(start, min(start + batch, count))
        result = collate(samples.row[piece], samples.turn[piece])
        if filler:
            result.filler = True
            result.labels.fill_(IGNORED)
        yield result

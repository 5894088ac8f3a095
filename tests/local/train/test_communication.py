"""The bytes of a step, compared with a simulated ring and with the calls of DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from communication import Volume, least, volume
from support.deepspeed_calls import FROZEN, TRAINABLE, called_in_a_step
from support.forked import forked

STAGES = (0, 1, 2, 3)
CASES = [(0, 2, False), (1, 2, True), (2, 3, False), (3, 2, True)]


class Ring:
    """Ranks that pass pieces of their tensors [world_size, n] to the next rank."""

    def __init__(self, tensors: np.ndarray) -> None:
        self.world_size = len(tensors)
        self.pieces = [np.split(tensor.copy(), self.world_size) for tensor in tensors]
        self.sent = np.zeros(self.world_size, dtype=int)

    def reduce_scatter(self) -> None:
        """Reduce: afterwards rank r has the sum of piece (r + 1) modulo N."""
        for rank, number, piece in self._passed(first=0):
            self.pieces[rank][number] = self.pieces[rank][number] + piece

    def all_gather(self) -> None:
        """Gather, after `reduce_scatter`: afterwards every rank has all pieces."""
        for rank, number, piece in self._passed(first=1):
            self.pieces[rank][number] = piece

    def _passed(self, first: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield (receiver, number of the piece, piece) over N - 1 rounds."""
        for turn in range(self.world_size - 1):
            numbers = [(rank + first - turn) % self.world_size for rank in range(self.world_size)]
            sent = [self.pieces[rank][number] for rank, number in enumerate(numbers)]
            for rank, (number, piece) in enumerate(zip(numbers, sent, strict=True)):
                self.sent[rank] += piece.nbytes
                yield (rank + 1) % self.world_size, number, piece


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_rank_sends_as_much_as_in_a_ring(world_size: int) -> None:
    tensors = np.random.default_rng(0).normal(size=(world_size, 24 * world_size))
    ring = Ring(tensors)
    size = tensors[0].nbytes
    ring.reduce_scatter()
    assert ring.sent == pytest.approx(Volume(reduce_scatter=size).sent(world_size))
    before = ring.sent.copy()
    ring.all_gather()
    assert ring.sent - before == pytest.approx(Volume(all_gather=size).sent(world_size))
    assert ring.sent == pytest.approx(Volume(all_reduce=size).sent(world_size))
    for pieces in ring.pieces:
        assert np.concatenate(pieces) == pytest.approx(tensors.sum(0))


def test_the_paper_sends_the_parameters_twice_and_three_times_in_stage_3() -> None:
    sent = [least(stage, 10**6, 0, 2, passes=1).sent(10**9) / 2e6 for stage in STAGES]
    assert sent == pytest.approx([2, 2, 2, 3])


@pytest.fixture(scope="module")
def called() -> dict[tuple[int, int, bool], dict[str, int]]:
    """The collectives that DeepSpeed calls in each case, in a separate process."""
    with forked().Pool(1, maxtasksperchild=1) as pool:
        return dict(zip(CASES, pool.starmap(called_in_a_step, CASES, chunksize=1), strict=True))


@pytest.mark.parametrize("stage, passes, bf16", CASES)
def test_deepspeed_calls_what_the_model_predicts(
    called: dict[tuple[int, int, bool], dict[str, int]], stage: int, passes: int, bf16: bool
) -> None:
    measured = called[stage, passes, bf16]
    predicted = volume(stage, TRAINABLE, FROZEN, 2 if bf16 else 4, passes)
    for kind in ("all_reduce", "reduce_scatter", "all_gather"):
        # plus a few scalars: norms, flags
        assert measured.get(kind, 0) == pytest.approx(
            getattr(predicted, kind), rel=1e-3, abs=100
        ), kind

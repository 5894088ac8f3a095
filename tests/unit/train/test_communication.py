"""The bytes of a step: against a ring that is played through, and against what DeepSpeed calls."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fmray.train.communication import Volume, least, volume

STAGES = (0, 1, 2, 3)


class Ring:
    """Ranks that hand pieces of their tensors [world_size, n] to the next one."""

    def __init__(self, tensors: np.ndarray) -> None:
        self.world_size = len(tensors)
        self.pieces = [np.split(tensor.copy(), self.world_size) for tensor in tensors]
        self.sent = np.zeros(self.world_size, dtype=int)

    def reduce_scatter(self) -> None:
        """Afterwards rank r has the sum of piece (r + 1) modulo N."""
        for rank, number, piece in self._passed(first=0):
            self.pieces[rank][number] = self.pieces[rank][number] + piece

    def all_gather(self) -> None:
        """From there: everyone has everything."""
        for rank, number, piece in self._passed(first=1):
            self.pieces[rank][number] = piece

    def _passed(self, first: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """N - 1 rounds: receiver, number of the piece, the piece."""
        for turn in range(self.world_size - 1):
            numbers = [(rank + first - turn) % self.world_size for rank in range(self.world_size)]
            given = [self.pieces[rank][number] for rank, number in enumerate(numbers)]
            for rank, (number, piece) in enumerate(zip(numbers, given, strict=True)):
                self.sent[rank] += piece.nbytes
                yield (rank + 1) % self.world_size, number, piece


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_what_a_rank_sends_is_what_a_ring_sends(world_size: int) -> None:
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


def test_the_paper_needs_twice_the_parameters_and_three_times_for_stage_3() -> None:
    sent = [least(stage, 10**6, 0, 2, passes=1).sent(10**9) / 2e6 for stage in STAGES]
    assert sent == pytest.approx([2, 2, 2, 3])


PROGRAM = """
import json, os, sys, torch, torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from support.collectives import Collectives
from fmray.train.zero import import_deepspeed

stage, world_size, passes, bf16 = json.loads(sys.argv[1])
os.environ["LOCAL_RANK"] = "0"
collectives = Collectives()
deepspeed = import_deepspeed()
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
tower, inner = nn.Linear(24, 48), nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 24))
model = nn.Sequential(tower.requires_grad_(False), inner)
learned = [p for p in model.parameters() if p.requires_grad]
zero = {"stage": stage}
if stage == 3:
    zero["stage3_param_persistence_threshold"] = 0
    zero["stage3_max_reuse_distance"] = zero["stage3_prefetch_bucket_size"] = 0
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(learned),
    config={
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": passes,
        "bf16": {"enabled": bf16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
    },
    dist_init_required=False,
)
dtype = torch.bfloat16 if bf16 else torch.float32
for _ in range(4):
    collectives.bytes.clear()
    for _ in range(passes):
        engine.backward(engine(torch.ones(2, 24, dtype=dtype)).sum())
        engine.step()
print(json.dumps(collectives.bytes))
"""
TRAINABLE, FROZEN = 48 * 48 + 48 + 48 * 24 + 24, 24 * 48 + 48


@pytest.mark.parametrize(
    "stage, passes, bf16", [(0, 2, False), (1, 2, True), (2, 3, False), (3, 1, False), (3, 2, True)]
)
def test_deepspeed_calls_what_the_model_says(stage: int, passes: int, bf16: bool) -> None:
    """Of four ranks one runs; the process group is torch's fake, which moves nothing."""
    program = [sys.executable, "-c", PROGRAM, json.dumps([stage, 4, passes, bf16])]
    tests = str(Path(__file__).parents[2])
    done = subprocess.run(program, cwd=tests, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    called = json.loads(done.stdout.splitlines()[-1])
    wanted = volume(stage, TRAINABLE, FROZEN, 2 if bf16 else 4, passes)
    for kind in ("all_reduce", "reduce_scatter", "all_gather"):
        # beside them a few scalars: norms, flags
        assert called.get(kind, 0) == pytest.approx(getattr(wanted, kind), rel=1e-3, abs=100), kind

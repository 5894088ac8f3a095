"""The collectives that DeepSpeed calls in a step of a tiny model, on one of four ranks.

The process group is torch's fake one, which transfers nothing, so the trained values are
meaningless.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from support.collectives import Collectives
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from fmray.train.engine import import_deepspeed

deepspeed = import_deepspeed()
TRAINABLE, FROZEN = 48 * 48 + 48 + 48 * 24 + 24, 24 * 48 + 48


def called_in_a_step(stage: int, passes: int, bf16: bool) -> dict[str, int]:
    """Return the bytes by collective; the process cannot be reused afterwards."""
    os.environ["LOCAL_RANK"] = "0"
    collectives = Collectives()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    tower = nn.Linear(24, 48).requires_grad_(False)
    learned = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 24))
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:  # partition every parameter, and release each after use
        zero["stage3_param_persistence_threshold"] = 0
        zero["stage3_max_reuse_distance"] = zero["stage3_prefetch_bucket_size"] = 0
    engine, *_ = deepspeed.initialize(
        model=nn.Sequential(tower, learned),
        optimizer=torch.optim.AdamW(learned.parameters()),
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
    rows = torch.ones(2, 24, dtype=torch.bfloat16 if bf16 else torch.float32)
    for _ in range(4):  # ZeRO-3 records the order of the modules in the first two
        collectives.bytes.clear()
        for _ in range(passes):
            engine.backward(engine(rows).sum())
            engine.step()
    return dict(collectives.bytes)

"""DeepSpeed's settings, the optimizer and the learning rate's course, from a recipe.

In: a `Recipe` and the number of workers. Out: the configuration dict of `deepspeed.initialize`, an
optimizer with one parameter group for the base and one for the adaptive parts, and a learning-rate
factor by step.
"""

from __future__ import annotations

import math
import os
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fmray.config import Recipe
from fmray.data.schedule import passes_of


def import_deepspeed() -> ModuleType:
    """DeepSpeed, told before its import which accelerator there is."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # an all-reduce for inference on CPUs, not used in training: compiling it takes a minute and
    # needs a compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def engine_config(recipe: Recipe, world_size: int, universal: bool = False) -> dict[str, Any]:
    """The configuration of `deepspeed.initialize`.

    `universal` when a checkpoint of another world size is loaded.
    """
    zero = recipe.zero
    stage: dict[str, Any] = {"stage": zero.stage}
    if zero.offload_optimizer != "none":
        stage["offload_optimizer"] = {"device": zero.offload_optimizer}
    if zero.stage == 3:
        stage["stage3_param_persistence_threshold"] = zero.parameter_persistence
        if zero.offload_parameters != "none":
            stage["offload_param"] = {"device": zero.offload_parameters}
    micro_batch = recipe.train.micro_batch
    passes = passes_of(recipe.train.global_batch, micro_batch, world_size)
    config: dict[str, Any] = {
        "train_batch_size": micro_batch * passes * world_size,  # fillers included
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": recipe.train.gradient_clip,
        "bf16": {"enabled": recipe.model.dtype == "bfloat16"},
        "zero_optimization": stage,
        # the optimizer is ours: torch's AdamW works on every stage, on the CPU too
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
    }
    if universal:
        config["checkpoint"] = {"load_universal": True}
    return config


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over what learns.

    The base at `train.lr`, latency encoder and scheduler at `train.scheduler_lr`.
    """
    adaptive = list(model.adaptive_parameters()) if recipe.adaptive is not None else []
    chosen = {id(parameter) for parameter in adaptive}
    base = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    adaptive = [p for p in adaptive if p.requires_grad]
    groups = [
        {"params": base, "lr": recipe.train.lr},
        {"params": adaptive, "lr": recipe.train.scheduler_lr or recipe.train.lr},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {
        "lr": recipe.train.lr,
        "betas": recipe.train.betas,
        "weight_decay": recipe.train.weight_decay,
    }
    if recipe.zero.offload_optimizer == "cpu" and torch.cuda.is_available():
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # its kernel is compiled at the first use

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)  # one pass over the parameters


def lr_factor(step: int, total: int, warmup_ratio: float) -> float:
    """Linear warm-up over `warmup_ratio` of the steps, then a cosine to zero at step `total`."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, total: int) -> LambdaLR:
    """The learning rate of each step, for DeepSpeed to advance after each optimizer step."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, total, recipe.train.warmup_ratio))

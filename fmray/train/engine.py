"""One optimizer step over several episodes and workers: torch's own, or DeepSpeed ZeRO's.

In: a learner (a module whose forward gives the loss of one episode) and the `train` section. Out:
an engine: call it, `backward`, `step`, once for each of this worker's episodes; the last one of a
step moves the weights by the gradient of the mean over the passes of *all* workers.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from fmray.config import AdaLlavaRecipe
from fmray.config.fewshot import FewshotTrainConfig
from fmray.data.loader import passes_of

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


# DeepSpeed's settings, the optimizer and the learning rate's course, from a recipe.
#
# The `deepspeed.initialize` configuration, an optimizer with one parameter group for the base and
# one for the adaptive parts, and the learning-rate factor by step.


def import_deepspeed() -> ModuleType:
    """DeepSpeed, told before its import which accelerator there is."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # an all-reduce for inference on CPUs, not used in training: compiling it takes a minute and
    # needs a compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def single_process_group() -> Iterator[None]:
    """A process group of one rank, for Ray Train's local mode; destroyed when the block ends."""
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        deepspeed = sys.modules.get("deepspeed")
        if deepspeed is None or deepspeed.comm.comm.cdb is None:  # DeepSpeed never took it over
            dist.destroy_process_group()
        else:
            deepspeed.comm.destroy_process_group()


def engine_config(
    recipe: AdaLlavaRecipe, world_size: int, universal: bool = False
) -> dict[str, Any]:
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


def make_optimizer(model: nn.Module, recipe: AdaLlavaRecipe) -> torch.optim.Optimizer:
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


def make_schedule(optimizer: torch.optim.Optimizer, recipe: AdaLlavaRecipe, total: int) -> LambdaLR:
    """The learning rate of each step, for DeepSpeed to advance after each optimizer step."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, total, recipe.train.warmup_ratio))


ZERO_STAGE = 2  # gradients and optimizer states are divided among workers, weights are whole
STATE_FILE = "torch.pt"


class TorchEngine:
    """Plain torch in one process, `DistributedDataParallel` over several.

    The part of DeepSpeed's engine that the loop and `fmray.train.checkpoint` use.
    """

    def __init__(
        self, learner: nn.Module, optimizer: torch.optim.Optimizer, passes: int, clip: float
    ) -> None:
        """passes: episodes of this worker in a step; clip: of the gradient's norm, 0 for none."""
        self.module, self._optimizer = learner, optimizer
        self._passes, self._clip, self._done = passes, clip, 0
        self._norm: Tensor | None = None
        self._parallel: DistributedDataParallel | None = None
        self.global_rank = 0
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.global_rank = dist.get_rank()
            self._parallel = DistributedDataParallel(learner)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, accuracy) of one episode."""
        if self._parallel is None:
            return self.module(*inputs)
        last = (self._done + 1) % self._passes == 0
        with nullcontext() if last else self._parallel.no_sync():
            return self._parallel(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add this episode's part of the gradient."""
        (loss / self._passes).backward()

    def step(self) -> None:
        """After the last episode of a step: clip, move the weights, forget the gradient."""
        self._done += 1
        if self._done % self._passes:
            return
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._norm = nn.utils.clip_grad_norm_(parameters, self._clip or float("inf"))
        self._optimizer.step()
        self._optimizer.zero_grad()

    def get_global_grad_norm(self) -> float | None:
        """Of the last step, before clipping."""
        return None if self._norm is None else float(self._norm)

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        """Weights and optimizer, by the first rank: all ranks have the same."""
        assert not save_latest, "the folder's name says which checkpoint is the latest"
        if self.global_rank == 0:
            target = Path(folder) / tag
            target.mkdir()
            state = {"learner": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}
            torch.save(state, target / STATE_FILE)

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict[str, Any]]:
        """(file, {}) of what was restored, or (None, {}) where there is nothing to restore."""
        path = Path(folder) / tag / STATE_FILE
        if not path.is_file():
            return None, {}
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["learner"])
        self._optimizer.load_state_dict(state["optimizer"])
        return str(path), {}


def make_engine(
    learner: nn.Module, config: FewshotTrainConfig, world_size: int, universal: bool = False
) -> TorchEngine | DeepSpeedEngine:
    """The engine of `train.strategy`; a process group must be there for `zero`.

    universal: a ZeRO checkpoint of another number of workers will be loaded.
    """
    passes = passes_of(config.episodes_per_step, 1, world_size)
    optimizer = make_learner_optimizer(learner, config)
    if config.strategy == "ddp":
        return TorchEngine(learner, optimizer, passes, config.gradient_clip)
    settings: dict[str, Any] = {
        "train_batch_size": passes * world_size,  # its sample is an episode
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": config.gradient_clip,
        "zero_optimization": {"stage": ZERO_STAGE},
        # the optimizer is ours: torch's works on every stage, on the CPU too
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
    }
    if universal:
        settings["checkpoint"] = {"load_universal": True}
    engine, _, _, _ = import_deepspeed().initialize(
        model=learner,
        optimizer=optimizer,
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 1.0),
        config=settings,
        dist_init_required=False,
    )
    return engine


def make_learner_optimizer(learner: nn.Module, config: FewshotTrainConfig) -> torch.optim.Optimizer:
    """Over all that learns; SGD with momentum (the paper's) or AdamW, at a constant rate."""
    parameters = [p for p in learner.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)

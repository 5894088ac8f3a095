"""Training engines: DeepSpeed and plain torch behind one interface.

An engine wraps a module and its optimizer: call it for the loss, then `backward(loss)` and
`step()`, once per pass (micro batch or episode). The last pass of an optimizer step updates the
weights with the gradient of the mean over the passes of all workers. A gradient that is not finite
changes neither weights nor optimizer, on no rank: see `scaled`.

AdaLLaVA trains with DeepSpeed ZeRO (`engine_config`, `make_optimizer`, `make_schedule`); few-shot
finetuning with DeepSpeed or, with `train.strategy: ddp`, with `TorchEngine` (`make_engine`).
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
from fmray.runtime import ray_private

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

ZERO_STAGE = 2  # of few-shot learners: gradients and optimizer states are partitioned, weights not
STATE_FILE = "torch.pt"  # of a `TorchEngine` checkpoint


# --- DeepSpeed and process groups ---


def import_deepspeed() -> ModuleType:
    """Import DeepSpeed, with the accelerator set beforehand: it is chosen at the import."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # an all-reduce for inference on CPUs, unused in training: it needs a compiler and a minute
    ray_private.deepspeed_compatible_ops["deepspeed_shm_comm"] = False
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
        if deepspeed is None or ray_private.deepspeed_backend is None:
            dist.destroy_process_group()
        else:  # DeepSpeed has taken the group over
            deepspeed.comm.destroy_process_group()


def _common_settings(
    micro_batch: int, passes: int, world_size: int, clip: float, universal: bool
) -> dict[str, Any]:
    """Return the `deepspeed.initialize` settings that all kinds of training share."""
    settings: dict[str, Any] = {
        "train_batch_size": micro_batch * passes * world_size,  # fillers included
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": clip,
        # torch's optimizers work with every stage, on the CPU too
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
    }
    if universal:
        settings["checkpoint"] = {"load_universal": True}
    return settings


def scaled(loss: Tensor, factor: float) -> Tensor:
    """Return the loss times a factor, to call backward on.

    The gradient of a loss that is not finite is NaN. Gradients are summed over the passes and the
    ranks, and an optimizer skips a step whose gradient is not finite: so all ranks skip it, without
    a look at the loss, for which they would have to wait.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), factor, math.nan)


# --- AdaLLaVA: DeepSpeed ZeRO ---


def engine_config(
    recipe: AdaLlavaRecipe, world_size: int, universal: bool = False
) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`.

    Args:
        universal: a checkpoint of another world size will be loaded.
    """
    zero = recipe.zero
    stage: dict[str, Any] = {"stage": zero.stage}
    if zero.offload_optimizer != "none":
        stage["offload_optimizer"] = {"device": zero.offload_optimizer}
    if zero.stage == 3:
        stage["stage3_param_persistence_threshold"] = zero.parameter_persistence
        if zero.offload_parameters != "none":
            stage["offload_param"] = {"device": zero.offload_parameters}
    train = recipe.train
    passes = passes_of(train.global_batch, train.micro_batch, world_size)
    clip = 0.0 if _is_plain(recipe) else train.gradient_clip
    return {
        **_common_settings(train.micro_batch, passes, world_size, clip, universal),
        "bf16": {"enabled": recipe.model.dtype == "bfloat16"},
        "zero_optimization": stage,
    }


def make_optimizer(model: nn.Module, recipe: AdaLlavaRecipe) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters, in up to two groups.

    The base model learns at `train.lr`, latency encoder and scheduler at `train.scheduler_lr`.
    """
    adaptive = list(model.adaptive_parameters()) if recipe.adaptive is not None else []
    adaptive_ids = {id(parameter) for parameter in adaptive}
    base = [p for p in model.parameters() if p.requires_grad and id(p) not in adaptive_ids]
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
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles its kernel at the first use

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    if _is_plain(recipe):
        return PlainAdamW(groups, recipe.train.gradient_clip, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)  # one pass over the parameters


def _is_plain(recipe: AdaLlavaRecipe) -> bool:
    """Whether DeepSpeed has no optimizer of its own around the recipe's."""
    return recipe.zero.stage == 0 and recipe.model.dtype == "float32"


class PlainAdamW(torch.optim.AdamW):
    """AdamW that clips, and skips a gradient that is not finite, as DeepSpeed's optimizers do.

    The decision stays on the device.
    """

    def __init__(self, groups: list[dict[str, Any]], clip: float, **settings: Any) -> None:
        """See `torch.optim.AdamW`.

        Args:
            clip: maximum norm of the gradient; 0 for no clipping.
        """
        super().__init__(groups, fused=True, **settings)
        self._clip = clip or float("inf")

    def step(self, closure: None = None) -> None:
        """Take a step; DeepSpeed reads the gradient norm, before clipping, from the attribute."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._global_grad_norm = nn.utils.clip_grad_norm_(parameters, self._clip)
        self.found_inf = (~torch.isfinite(self._global_grad_norm)).float()  # the kernel reads it
        super().step(closure)


def lr_factor(step: int, total: int, warmup_ratio: float) -> float:
    """Linear warm-up over `warmup_ratio` of the steps, then a cosine to zero at step `total`."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def make_schedule(optimizer: torch.optim.Optimizer, recipe: AdaLlavaRecipe, total: int) -> LambdaLR:
    """Return the learning-rate schedule, which DeepSpeed advances after each optimizer step."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, total, recipe.train.warmup_ratio))


# --- Few-shot learners: DeepSpeed or plain torch ---


class TorchEngine:
    """Plain torch in one process, `DistributedDataParallel` over several.

    Has those methods of DeepSpeed's engine that the loop and `fmray.train.checkpoint` use.
    """

    def __init__(
        self, learner: nn.Module, optimizer: torch.optim.Optimizer, passes: int, clip: float
    ) -> None:
        """Wrap `learner`.

        Args:
            learner: module whose forward returns (loss, accuracy) of an episode.
            passes: episodes of this worker per step.
            clip: maximum norm of the gradient; 0 for no clipping.
        """
        self.module, self._optimizer = learner, optimizer
        self._passes, self._clip, self._passes_done = passes, clip, 0
        self._norm: float | None = None
        self._parallel: DistributedDataParallel | None = None
        self.global_rank = 0
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.global_rank = dist.get_rank()
            self._parallel = DistributedDataParallel(learner)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss, accuracy) of one episode."""
        if self._parallel is None:
            return self.module(*inputs)
        last = (self._passes_done + 1) % self._passes == 0
        with nullcontext() if last else self._parallel.no_sync():
            return self._parallel(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this episode."""
        (loss / self._passes).backward()

    def step(self) -> None:
        """After the last episode of a step: clip, update the weights, reset the gradient.

        A gradient that is not finite updates nothing.
        """
        self._passes_done += 1
        if self._passes_done % self._passes:
            return
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._norm = float(nn.utils.clip_grad_norm_(parameters, self._clip or float("inf")))
        if math.isfinite(self._norm):
            self._optimizer.step()
        self._optimizer.zero_grad()

    def get_global_grad_norm(self) -> float | None:
        """Return the gradient norm of the last step, before clipping."""
        return self._norm

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        """Save weights and optimizer on rank 0; all ranks hold the same."""
        assert not save_latest, "the name of the folder tells which checkpoint is the latest"
        if self.global_rank == 0:
            target = Path(folder) / tag
            target.mkdir()
            state = {"learner": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}
            torch.save(state, target / STATE_FILE)

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict[str, Any]]:
        """Load weights and optimizer; return (file, {}), or (None, {}) if there is no file.

        The learning rate stays as it is.
        """
        path = Path(folder) / tag / STATE_FILE
        if not path.is_file():
            return None, {}
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["learner"])
        rates = [group["lr"] for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(state["optimizer"])
        for group, lr in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        return str(path), {}


def make_engine(
    learner: nn.Module, config: FewshotTrainConfig, world_size: int, universal: bool = False
) -> TorchEngine | DeepSpeedEngine:
    """Return the engine of `train.strategy`; `zero` requires a process group.

    Args:
        universal: a ZeRO checkpoint of another world size will be loaded.
    """
    passes = passes_of(config.episodes_per_step, 1, world_size)
    optimizer = make_learner_optimizer(learner, config)
    if config.strategy == "ddp":
        return TorchEngine(learner, optimizer, passes, config.gradient_clip)
    # to DeepSpeed, an episode is a sample
    settings = _common_settings(1, passes, world_size, config.gradient_clip, universal)
    engine, _, _, _ = import_deepspeed().initialize(
        model=learner,
        optimizer=optimizer,
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 1.0),
        config={**settings, "zero_optimization": {"stage": ZERO_STAGE}},
        dist_init_required=False,
    )
    return engine


def make_learner_optimizer(learner: nn.Module, config: FewshotTrainConfig) -> torch.optim.Optimizer:
    """Return SGD with momentum (the paper's) or AdamW over the trainable parameters.

    The learning rate is constant.
    """
    parameters = [p for p in learner.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)

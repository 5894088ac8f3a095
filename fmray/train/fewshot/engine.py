"""One optimizer step over several episodes and workers: torch's own, or DeepSpeed ZeRO's.

In: a learner (a module whose forward gives the loss of one episode) and the `train` section. Out:
an engine: call it, `backward`, `step`, once for each of this worker's episodes; the last one of a
step moves the weights by the gradient of the mean over the passes of *all* workers.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from fmray.data.schedule import passes_of
from fmray.fewshot_config import FewshotTrainConfig
from fmray.train.zero import import_deepspeed

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

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
    optimizer = make_optimizer(learner, config)
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


def make_optimizer(learner: nn.Module, config: FewshotTrainConfig) -> torch.optim.Optimizer:
    """Over all that learns; SGD with momentum (the paper's) or AdamW, at a constant rate."""
    parameters = [p for p in learner.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)

"""Estimate the memory of a training job on each GPU (or in each process) before it starts.

`estimate` takes the sizes of a model (`fmray.train.adallava.model.sizes_of` counts them) and a
recipe, and returns a `Memory`: bytes by part. Model states follow Rajbhandari et al. 2020 (ZeRO),
counted as DeepSpeed's own estimators do: 16 bytes per Adam parameter (float32 weight, two moments
and the float32 gradient of the step). Activations follow Korthikanti et al. 2022, section 4.1 (what
each operation saves for its backward pass), recounted for the gated MLP and the float32 norms of
the Llama family; a test compares them with what PyTorch saves.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from fmray.config import AdaLlavaRecipe

GIB = 1 << 30
# CUDA context, NCCL and DeepSpeed's communication buckets (5e8 elements by default); on a CPU the
# process with its libraries.
GPU_RESERVE, CPU_RESERVE = 2 * GIB, GIB
OPTIMIZER_BYTES = 16


@dataclass(frozen=True)
class Sizes:
    """Parameter counts of a model, and the widths that its activations depend on."""

    parameters: int
    trainable: int
    largest_layer: int  # parameters of the largest single module: what ZeRO-3 gathers at once
    hidden: int
    layers: int
    heads: int
    kv_width: int  # channels of the keys, all heads
    intermediate: int
    vocabulary: int


@dataclass(frozen=True)
class Memory:
    """Bytes per worker at the peak of a step."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    reserve: float
    host: float = 0.0  # offloaded states, all workers together

    @property
    def states(self) -> float:
        """Parameters, gradients and optimizer: what DeepSpeed calls model states."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """All bytes on the GPU."""
        return self.states + self.activations + self.logits + self.reserve

    def __str__(self) -> str:
        parts = [
            f"{field.name} {getattr(self, field.name) / GIB:.3g}"
            for field in fields(self)
            if field.name != "host"
        ]
        return f"{self.total / GIB:.3g} GiB ({', '.join(parts)})"


def estimate(sizes: Sizes, recipe: AdaLlavaRecipe) -> Memory:
    """Return one worker's memory at the peak of a step, with samples of `data.max_length` tokens.

    The number of workers is the smallest that the recipe runs with: its states are the largest.
    """
    world, zero = recipe.cluster.world_sizes[0], recipe.zero
    width = 2 if recipe.model.dtype == "bfloat16" else 4
    # Model states, sharded by ZeRO's stage over the workers.
    parameters = float(width * sizes.parameters)
    gradients = float(width * sizes.trainable)
    optimizer = float(OPTIMIZER_BYTES * sizes.trainable)
    if zero.stage == 0 and width == 4:
        optimizer /= 2  # plain AdamW: two moments, no float32 copies
    host = 0.0
    if zero.stage >= 1:
        optimizer /= world
    if zero.stage >= 2:
        gradients /= world
    if zero.offload_optimizer == "cpu":
        host += optimizer * world
        optimizer = 0.0
        if zero.stage >= 2:
            host += gradients * world
            gradients = 0.0
    if zero.stage == 3:
        parameters /= world
        if zero.offload_parameters == "cpu":
            host += parameters * world
            parameters = 0.0
        # One layer is gathered at a time, with its gradients.
        parameters += 2 * width * sizes.largest_layer
    # Activations: all layers, or with checkpointing one vector per layer and one layer recomputed.
    tokens = recipe.train.micro_batch * recipe.data.max_length
    layer = layer_activations(
        sizes, width, recipe.data.max_length, recipe.model.attention == "eager"
    )
    if recipe.train.gradient_checkpointing:
        saved = sizes.layers * width * sizes.hidden + layer
    else:
        saved = sizes.layers * layer
    # Logits, their float32 copy, the log-softmax and its gradient.
    logits = tokens * sizes.vocabulary * (width + 12)
    reserve = GPU_RESERVE if recipe.cluster.gpus_per_worker else CPU_RESERVE
    return Memory(parameters, gradients, optimizer, tokens * saved, logits, reserve, host)


def estimate_evaluation(sizes: Sizes, recipe: AdaLlavaRecipe, models: int, batch: int) -> Memory:
    """Return the memory of `jobs/evaluate.py`: one process, no gradients.

    The batch has samples of `data.max_length` tokens. An evaluation during training has no more
    tokens than a step, so it needs less than that.

    Args:
        models: in memory; 2 with the base model that it compares with.
        batch: samples, `evaluate.batch`.
    """
    width, length = 2 if recipe.model.dtype == "bfloat16" else 4, recipe.data.max_length
    # One layer at a time; logits, their float32 copy and the log-softmax.
    layer = layer_activations(sizes, width, length, recipe.model.attention == "eager")
    activations = batch * length * (layer + width * sizes.hidden)
    logits = batch * length * sizes.vocabulary * (width + 8)
    reserve = GPU_RESERVE if recipe.cluster.gpus_per_worker else CPU_RESERVE
    parameters = float(models * width * sizes.parameters)
    return Memory(parameters, 0.0, 0.0, activations, logits, reserve)


def layer_activations(sizes: Sizes, width: int, length: int, eager: bool) -> int:
    """Return the bytes that a decoder layer saves per token for its backward pass.

    Two norms (float32 input and the product's input), the query twice (also rotated), output
    projection and residuals: 6 x width + 8 per hidden channel; keys and values: 2 x width; gate,
    up, activation and product of the MLP: 4 x width per channel. Attention that is not fused also
    saves the probabilities of every head.

    Args:
        width: bytes of an activation.
        length: tokens of a sample.
        eager: attention is not fused.
    """
    saved = (6 * width + 8) * sizes.hidden + 2 * width * sizes.kv_width
    saved += 4 * width * sizes.intermediate
    return saved + ((4 + width) * sizes.heads * length if eager else 0)


def saved_bytes(module: nn.Module, inputs: Tensor) -> int:
    """Return the bytes that a forward pass saves for its backward pass, parameters excluded.

    Args:
        module: on any device; on `meta` nothing is computed.
        inputs: on the same device.
    """
    parameters = {p.untyped_storage()._cdata for p in module.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # holding a storage keeps its identity unique

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(inputs)
    return sum(storage.nbytes() for storage in saved.values())

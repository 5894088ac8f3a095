"""How much memory a training job will take on each GPU (or in each process), before it starts.

In: a recipe. Out: a `Memory`: bytes by part. Models are built on the `meta` device:
shapes without weights. Sources: for the model states Rajbhandari et al. 2020 (ZeRO), counted as
DeepSpeed's own estimators do (16 bytes an Adam parameter: float32 weight, two moments and the
float32 gradient of the step); for activations the method of Korthikanti et al. 2022 (section 4.1:
what each operation keeps for its backward pass), counted anew for the gated MLP and the float32
norms of the Llama family; a test compares it with what PyTorch keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, PreTrainedConfig

from fmray.adallava.presets import preset
from fmray.config import AdaLlavaRecipe, AdaptiveConfig, ModelConfig, ScratchConfig

GIB = 1 << 30
# CUDA context, NCCL and DeepSpeed's communication buckets (5e8 elements by default); on a CPU the
# process with its libraries.
GPU_RESERVE, CPU_RESERVE = 2 * GIB, GIB
OPTIMIZER_BYTES = 16
PRESETS = {
    "llava-hf/llava-1.5-7b-hf": "llava-1.5-7b",
    "llava-hf/llava-1.5-13b-hf": "llava-1.5-13b",
}
LLAVA_VOCABULARY = 32_064  # 32000 of Llama, the image and padding tokens, rounded up
VISION_NAMES = ("vision_tower.", "visual.", "vision_model.")
PROJECTOR_NAMES = ("multi_modal_projector.", "connector.", "visual.merger.")
ENCODER_FEATURES = 256  # of the latency encoder


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model: all parameters, those that learn, and what activations depend on."""

    parameters: int
    trainable: int
    largest_layer: int
    hidden: int
    layers: int
    heads: int
    kv_width: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True)
class Memory:
    """Bytes per worker at the peak of a step; `host`: of offloaded states, all workers together."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    reserve: float
    host: float = 0.0

    @property
    def states(self) -> float:
        """Parameters, gradients and optimizer: what DeepSpeed calls model states."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """Everything on the GPU."""
        return self.states + self.activations + self.logits + self.reserve

    def __str__(self) -> str:
        parts = [
            f"{field.name} {getattr(self, field.name) / GIB:.3g}"
            for field in fields(self)
            if field.name != "host"
        ]
        return f"{self.total / GIB:.3g} GiB ({', '.join(parts)})"


def estimate(sizes: Sizes, recipe: AdaLlavaRecipe) -> Memory:
    """Memory of one worker at the peak of a step, with samples as long as `data.max_length`."""
    world, zero = recipe.cluster.world_sizes[0], recipe.zero
    width = 2 if recipe.model.dtype == "bfloat16" else 4
    parameters = float(width * sizes.parameters)
    gradients = float(width * sizes.trainable)
    optimizer = float(OPTIMIZER_BYTES * sizes.trainable)
    if zero.stage == 0 and width == 4:
        optimizer /= 2  # plain AdamW: two moments, no copies
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
    tokens = recipe.train.micro_batch * recipe.data.max_length
    layer = layer_activations(
        sizes, width, recipe.data.max_length, recipe.model.attention == "eager"
    )
    if recipe.train.gradient_checkpointing:
        kept = sizes.layers * width * sizes.hidden + layer
    else:
        kept = sizes.layers * layer
    # Logits, their float32 copy, the log-softmax and its gradient.
    logits = tokens * sizes.vocabulary * (width + 12)
    reserve = GPU_RESERVE if recipe.cluster.gpus_per_worker else CPU_RESERVE
    return Memory(parameters, gradients, optimizer, tokens * kept, logits, reserve, host)


def layer_activations(sizes: Sizes, width: int, length: int, eager: bool) -> int:
    """Bytes that a decoder layer keeps per token; `width`: bytes of an activation.

    Two norms (float32 input and the product's input), query twice (rotated too), output projection
    and residuals: 6 x width + 8 per hidden channel; keys and values: 2 x width; gate, up,
    activation and product of the MLP: 4 x width per channel. Attention that is not fused also keeps
    the probabilities of every head.
    """
    kept = (6 * width + 8) * sizes.hidden + 2 * width * sizes.kv_width
    kept += 4 * width * sizes.intermediate
    return kept + ((4 + width) * sizes.heads * length if eager else 0)


def measure(recipe: AdaLlavaRecipe) -> Sizes:
    """The sizes of the recipe's model, with what is frozen, LoRA and the adaptive parts counted in.

    Raises:
        ValueError: the model's config cannot be had here.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(model_config(recipe.model))
    text = model.config.get_text_config()
    trainable = added = 0
    for name, parameter in model.named_parameters():
        if _part(name) not in recipe.model.freeze and not (
            recipe.model.lora and _part(name) == "language"
        ):
            trainable += parameter.numel()
    if recipe.model.lora:
        added += _lora_parameters(model, recipe.model.lora.rank)
    if recipe.adaptive:
        added += _adaptive_parameters(text, recipe.adaptive)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()) + added,
        trainable=trainable + added,
        largest_layer=max(
            sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()
        ),
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_width=kv_heads * head_width,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
    )


def model_config(model: ModelConfig) -> PreTrainedConfig:
    """The Hugging Face config of a recipe's model: from its sizes, known by name, or read.

    Raises:
        ValueError: neither a known name nor a directory or hub name whose config can be read here.
    """
    if model.source == "scratch":
        return _scratch_config(model.scratch)
    if model.source in PRESETS:
        known = preset(PRESETS[model.source])
        known.text_config.vocab_size = LLAVA_VOCABULARY
        return LlavaConfig(vision_config=known.vision_config, text_config=known.text_config)
    try:
        return AutoConfig.from_pretrained(model.source, revision=model.revision)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model.source: no config of {model.source} can be read here: no such folder, and the"
            " hub does not know it or cannot be reached"
        ) from error


def _scratch_config(scratch: ScratchConfig) -> LlavaConfig:
    """The largest model of these sizes: the true vocabulary is known after data preparation."""
    text: dict[str, Any] = {
        "model_type": scratch.text_family,
        "vocab_size": scratch.max_vocabulary,
        "hidden_size": scratch.hidden,
        "intermediate_size": scratch.intermediate,
        "num_hidden_layers": scratch.layers,
        "num_attention_heads": scratch.heads,
        "num_key_value_heads": scratch.kv_heads or scratch.heads,
        "tie_word_embeddings": False,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": scratch.vision_hidden,
        "intermediate_size": 4 * scratch.vision_hidden,
        "num_hidden_layers": scratch.vision_layers,
        "num_attention_heads": scratch.vision_heads,
        "image_size": scratch.image_size,
        "patch_size": scratch.patch_size,
    }
    return LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)


def _part(name: str) -> str:
    """Which name of `model.freeze` a parameter belongs to."""
    if any(part in name for part in PROJECTOR_NAMES):
        return "projector"
    return "vision" if any(part in name for part in VISION_NAMES) else "language"


def _lora_parameters(model: nn.Module, rank: int) -> int:
    """Two factors on each linear layer of the decoder."""
    return sum(
        rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and _part(name + ".") == "language"
    )


def _adaptive_parameters(text: PreTrainedConfig, adaptive: AdaptiveConfig) -> int:
    """Latency encoder (norm and two linear layers) and scheduler (one, to a logit a switch)."""
    hidden, first = text.hidden_size, adaptive.first or text.num_hidden_layers // 2
    units = text.num_hidden_layers - first
    if adaptive.design == "heads":
        units *= -(-text.num_attention_heads // adaptive.unit)
    encoder = 2 * ENCODER_FEATURES + (ENCODER_FEATURES + 1) * hidden + (hidden + 1) * hidden
    return encoder + (hidden + 1) * units

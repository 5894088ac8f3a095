"""Models and devices whose cost can be computed: the paper's presets, and any model by its config.

A `CostedModel` holds what the cost model needs: text config, vision config and the mean prompt of
the paper's benchmark. No weights are loaded. `prefill_seconds` is the roofline time of a prefill on
a `Device`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from fmray.adallava.cost import CostModel, Tokens
from fmray.adallava.layout import text_config_of


@dataclass(frozen=True)
class CostedModel:
    """A model whose cost `fmray cost` computes."""

    name: str
    text_config: PreTrainedConfig
    vision_config: PreTrainedConfig | None = None
    feature_layer: int = -2
    visual_tokens: int = 0  # tokens of the mean prompt that come from one image
    tokens: Fraction | None = None  # mean prompt length


# Mean prompt on MME with LLaVA-1.5: 66.28 text tokens, the image, the latency token, one more.
_TEXT_TOKENS = Fraction("68.28")


def preset(name: str) -> CostedModel:
    """Return the preset called `name`.

    The prompt of mipha-3b is the paper's text length, measured with Vicuna's tokenizer, plus 729
    visual tokens; Phi's tokenizer may differ by a few tokens.

    Raises:
        ValueError: not one of `PRESETS`.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; there are {', '.join(PRESETS)}")
    if name == "mipha-3b":
        text = PhiConfig(
            vocab_size=51200,
            hidden_size=2560,
            num_hidden_layers=32,
            num_attention_heads=32,
            intermediate_size=10240,
        )
        vision = SiglipVisionConfig(
            hidden_size=1152,
            num_hidden_layers=27,
            num_attention_heads=16,
            intermediate_size=4304,
            image_size=384,
            patch_size=14,
        )
    else:
        size = (
            {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008}
            if name == "llava-1.5-7b"
            else {"hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 13824}
        )
        text = LlamaConfig(vocab_size=32000, num_attention_heads=size["num_hidden_layers"], **size)
        vision = CLIPVisionConfig(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            image_size=336,
            patch_size=14,
        )
    visual = (vision.image_size // vision.patch_size) ** 2
    return CostedModel(name, text, vision, visual_tokens=visual, tokens=_TEXT_TOKENS + visual)


PRESETS = ("llava-1.5-7b", "llava-1.5-13b", "mipha-3b")


def load(source: str) -> CostedModel:
    """Return a model by directory, `config.json` or hub name.

    Raises:
        ValueError: no readable config.
    """
    path = Path(source)
    try:
        if path.is_file():
            json.loads(path.read_text(encoding="utf-8"))  # for an error that names the line
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{source}: no config can be read there (directory, config.json or hub name): {reason}"
        ) from error
    vision: Any = getattr(config, "vision_config", None)
    visual = 0
    if getattr(vision, "model_type", None) in ("clip_vision_model", "siglip_vision_model"):
        visual = (vision.image_size // vision.patch_size) ** 2
    feature_layer = getattr(config, "vision_feature_layer", -2)
    return CostedModel(
        name=source,
        text_config=text_config_of(config),
        vision_config=vision if visual and isinstance(feature_layer, int) else None,
        feature_layer=feature_layer if isinstance(feature_layer, int) else -2,
        visual_tokens=visual,
    )


# --- Roofline time of a prefill: a lower bound from data sheets, not a measurement ---
#
# The sum over operators of max(operations / peak, bytes / bandwidth), with the operators of
# LLM-Viewer (Yuan et al. 2024), the source of the paper's "prefill time": projections, QK^T,
# softmax, AV, norms, residual adds, activation, lm_head. Weights and activations have 16 bits; each
# operator reads its inputs from memory and writes its output to it (no fusion, no FlashAttention).
#
# All 15 times of the dissertation (tables 5.1 and C.2; V100; LLaVA-1.5 7B and 13B, FastV, PruMerge,
# PruMerge+; rounded to milliseconds) are reproduced within 0.6 ms. Two would round to one less:
# 7B at 0.60 is 48.4 (printed: 49), PruMerge at 0.85 is 13.4 (printed: 14).

_BYTES = 2  # per weight and activation, float16 and bfloat16 alike


@dataclass(frozen=True)
class Device:
    """A GPU: dense 16-bit peak (operations/s, float32 accumulation) and bandwidth (bytes/s)."""

    name: str
    peak: float
    bandwidth: float


# From NVIDIA's data sheets; half of the figures with sparsity (L4, H100, H200). V100 is the PCIe
# card, which the paper's times assume; the SXM2 card has 125e12.
DEVICES = {
    device.name: device
    for device in (
        Device("V100", 112e12, 900e9),
        Device("A100-80GB", 312e12, 2039e9),
        Device("H100-SXM", 989.5e12, 3350e9),
        Device("H200", 989.5e12, 4800e9),
        Device("L4", 121e12, 300e9),
        Device("RTX-4090", 165.2e12, 1008e9),
    )
}


def device(name: str) -> Device:
    """Return the device called `name`; ValueError lists the known ones."""
    if name not in DEVICES:
        raise ValueError(f"device {name!r} is unknown; there are {', '.join(DEVICES)}")
    return DEVICES[name]


def prefill_seconds(model: CostModel, tokens: Tokens, units_on: int, on: Device) -> float:
    """Return the roofline seconds of one prompt, lm_head included.

    A unit of h query heads takes h/H of its layer's time, and the units on are the most expensive
    ones, as in the cost model's attribution.

    Args:
        units_on: a number, 0..K.
    """
    layout = model.layout
    lengths = model.lengths(tokens)
    layer_seconds = {n: _seconds(_layer_operators(model, float(n)), on) for n in set(lengths)}
    total = sum(layer_seconds[n] for n in lengths[: layout.first])
    total += sum(
        layer_seconds[lengths[layer]] * heads / layout.num_heads
        for layer, heads in model.charged_units(tokens, units_on)
    )
    weights = layout.hidden_size * model.vocab_size
    # one operation per multiply-accumulate as in LLM-Viewer; memory dominates in any case
    lm_head = (weights, weights + layout.hidden_size + model.vocab_size)
    return total + _seconds([lm_head], on)


def _layer_operators(model: CostModel, n: float) -> list[tuple[float, float]]:
    """Return (operations, values moved) of each operator of one decoder layer at n tokens."""
    layout = model.layout
    hidden, mlp = layout.hidden_size, layout.intermediate_size
    query, key = layout.num_heads * layout.head_dim, layout.num_kv_heads * layout.head_dim
    scores = n * n * layout.num_heads
    projections = [(hidden, query), (hidden, key), (hidden, key), (query, hidden)]
    projections += [(hidden, mlp)] * (model.mlp_matrices - 1) + [(mlp, hidden)]
    operators = [(2 * n * a * b, a * b + n * (a + b)) for a, b in projections]
    operators += [
        (2 * scores * layout.head_dim, n * (query + key) + scores),
        (5 * scores, 2 * scores),
        (2 * scores * layout.head_dim, scores + n * (query + key)),
    ]
    operators += [(7 * hidden * n, 2 * hidden * n)] * 2  # norms
    operators += [(hidden * n, 2 * hidden * n)] * 2  # residual adds
    operators += [(2 * hidden * n, 3 * hidden * n)]  # activation, at LLM-Viewer's width
    return operators


def _seconds(operators: list[tuple[float, float]], on: Device) -> float:
    return sum(
        max(operations / on.peak, _BYTES * values / on.bandwidth)
        for operations, values in operators
    )

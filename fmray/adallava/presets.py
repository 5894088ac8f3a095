"""The models of the paper as presets, and any other model by its Hugging Face config.

In: a preset's name, a directory, a `config.json` or a hub name. Out: a `CostedModel`: text config,
vision config and the mean prompt of the paper's benchmark, which is all the cost model needs. No
weights are loaded.
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

from fmray.adallava.layout import text_config_of


@dataclass(frozen=True)
class CostedModel:
    """What `fmray cost` prices. `visual_tokens` of the mean prompt `tokens` come from one image."""

    name: str
    text_config: PreTrainedConfig
    vision_config: PreTrainedConfig | None = None
    feature_layer: int = -2
    visual_tokens: int = 0
    tokens: Fraction | None = None


# Mean prompt on MME with LLaVA-1.5: 66.28 text tokens, the image, the latency token, one more.
_TEXT_TOKENS = Fraction("68.28")


def preset(name: str) -> CostedModel:
    """The preset called `name`: one of `PRESETS`, else ValueError.

    The prompt of mipha-3b is the paper's text length plus its 729 visual tokens: Phi's tokenizer
    may differ by a few tokens from Vicuna's, whose length this is.
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
    """A model by directory, `config.json` or hub name; ValueError if it has no readable config."""
    path = Path(source)
    try:
        if path.is_file():
            json.loads(path.read_text(encoding="utf-8"))  # for a message that names the line
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

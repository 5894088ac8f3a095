"""Small stock models that split images into tiles, and rows for them."""

from __future__ import annotations

import torch
from support.tiny_models import IMAGE, VISION, VOCABULARY, text_config
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SiglipVisionConfig,
)

TEXT = {"layers": 4, "hidden": 32, "intermediate": 64}
TILED = {
    "image_token_id": IMAGE,
    "vision_feature_layer": -1,
    "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
    "tie_word_embeddings": False,
}


def llava_next() -> nn.Module:
    """Return a stock LLaVA-NeXT with random weights."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text_config("llama", **TEXT), **TILED
    )
    return LlavaNextForConditionalGeneration(config)


def llava_onevision() -> nn.Module:
    """Return a stock LLaVA-OneVision with random weights."""
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=text_config("qwen2", **TEXT),
        vision_feature_select_strategy="full",
        video_token_id=4,
        **TILED,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def tiled_row(base: nn.Module, text: int, size: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Return an unpadded row: a token, an image of `size` pixels in up to five tiles, `text`
    tokens."""
    generator = torch.Generator().manual_seed(seed)
    images = {
        "pixel_values": torch.randn(1, 5, 3, 16, 16, generator=generator),
        "image_sizes": torch.tensor([size]),
    }
    with torch.no_grad():
        [features] = base.model.get_image_features(**images).pooler_output
    ids = torch.randint(7, VOCABULARY, (1, 1 + len(features) + text), generator=generator)
    ids[0, 1 : 1 + len(features)] = IMAGE
    return images | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

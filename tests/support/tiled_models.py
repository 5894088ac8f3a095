"""Small stock models whose pictures take several tiles, and rows for them."""

from __future__ import annotations

import torch
from support.tiny_models import IMAGE, VOCABULARY
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
WHOLE = {
    "image_token_id": IMAGE,
    "vision_feature_layer": -1,
    "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
    "tie_word_embeddings": False,
}


def llava_next() -> nn.Module:
    """A stock LLaVA-NeXT with random weights."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), **WHOLE
    )
    return LlavaNextForConditionalGeneration(config)


def llava_onevision() -> nn.Module:
    """A stock LLaVA-OneVision with random weights."""
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=Qwen2Config(**TEXT),
        vision_feature_select_strategy="full",
        video_token_id=4,
        **WHOLE,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def tiled_row(base: nn.Module, text: int, size: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """One unpadded row: a token, a picture of `size` pixels in up to five tiles, `text` tokens."""
    generator = torch.Generator().manual_seed(seed)
    pictures = {
        "pixel_values": torch.randn(1, 5, 3, 16, 16, generator=generator),
        "image_sizes": torch.tensor([size]),
    }
    with torch.no_grad():
        [features] = base.model.get_image_features(**pictures).pooler_output
    ids = torch.randint(7, VOCABULARY, (1, 1 + len(features) + text), generator=generator)
    ids[0, 1 : 1 + len(features)] = IMAGE
    return pictures | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

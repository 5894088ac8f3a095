"""Families whose pictures take several tiles: full plans are the stock model, small ones skip."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import IMAGE, VOCABULARY, adaptive
from torch import nn
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
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), **WHOLE
    )
    return LlavaNextForConditionalGeneration(config)


def llava_onevision() -> nn.Module:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=Qwen2Config(**TEXT),
        vision_feature_select_strategy="full",
        video_token_id=4,
        **WHOLE,
    )
    return LlavaOnevisionForConditionalGeneration(config)


@pytest.mark.parametrize("make", [llava_next, llava_onevision])
def test_tiled_pictures(make) -> None:
    torch.manual_seed(0)
    base = make().eval()
    data = {
        "pixel_values": torch.randn(2, 5, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 32], [32, 32]]),
    }
    with torch.no_grad():
        features = base.model.get_image_features(**data).pooler_output
    lengths = [len(image) + 6 for image in features]
    assert lengths[0] != lengths[1]
    ids = torch.zeros(2, max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(7, VOCABULARY, (length,))
        ids[row, 1 : length - 5] = IMAGE
    data |= {"input_ids": ids, "attention_mask": (ids > 0).long()}
    model = adaptive(base, latency_token="probe")
    attended = ids > 0
    with torch.no_grad():
        expected = base(**data).logits[attended]
        assert torch.equal(model(**data, budget=1.0).logits[attended], expected)
        skipped = model(**data, budget=0.75).logits[attended]
        masked = model(**data, budget=0.75, execution="masked").logits[attended]
    torch.testing.assert_close(skipped, masked, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(skipped, expected, atol=1e-2)

"""Families that cut images into tiles: full plans equal the stock model, small ones skip."""

from __future__ import annotations

import pytest
import torch
from support.tiled_models import llava_next, llava_onevision
from support.tiny_models import IMAGE, VOCABULARY, adaptive


@pytest.mark.parametrize("make", [llava_next, llava_onevision])
def test_models_with_tiled_images(make) -> None:
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

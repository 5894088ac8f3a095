"""Small stock models from configs, and random batches for them. No download."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from fmray.adallava import AdaptiveVLM, SwitchLayout

IMAGE, PAD, EOS, VOCABULARY = 3, 0, 2, 64
IMAGE_TOKENS = 4
TEXTS = {
    # grouped-query attention; 5 heads-groups that do not divide the channels evenly
    "llama": lambda **sizes: LlamaConfig(num_key_value_heads=2, **sizes),
    "qwen2": lambda **sizes: Qwen2Config(num_key_value_heads=2, **sizes),  # biases on q, k, v
    "phi": lambda **sizes: PhiConfig(partial_rotary_factor=0.5, **sizes),  # biases, parallel block
}


def tiny_llava(text: str = "llama", layers: int = 6, heads: int = 4, seed: int = 0) -> nn.Module:
    """A stock LLaVA, float32, eval mode, weights large enough that every layer matters."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 16 * heads,
        "intermediate_size": 90,  # not a multiple of the heads
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "initializer_range": 0.1,
    }
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=TEXTS[text](**sizes),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model


def tiny_qwen2_vl(seed: int = 0) -> nn.Module:
    """A stock Qwen2-VL with multimodal rotary positions, float32, eval mode."""
    torch.manual_seed(seed)
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 90,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 256,
            "initializer_range": 0.1,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": EOS,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
            },
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
        },
        image_token_id=IMAGE,
        vision_start_token_id=4,
        vision_end_token_id=5,
        video_token_id=6,
    )
    return Qwen2VLForConditionalGeneration(config).eval()


def adaptive(
    base: nn.Module, design: str = "layers", unit: int = 2, first: int | None = None, **options
):
    """An adaptive model whose scheduler has opinions (the real one starts indifferent)."""
    make = SwitchLayout.layers if design == "layers" else SwitchLayout.heads
    arguments = {} if design == "layers" else {"unit": unit}
    layout = make(base.config.text_config, first=first, **arguments)
    model = AdaptiveVLM.from_base(base, layout, **options)
    torch.manual_seed(1)
    for parameter in model.adaptive_parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def batch(
    lengths: list[int], side: str = "right", answers: list[int] | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Prompts of `lengths` tokens (4 image tokens each, one picture a row), padded; with answers:
    labels too.
    """
    generator = torch.Generator().manual_seed(seed)
    answers = answers or [0] * len(lengths)
    width = max(n + a for n, a in zip(lengths, answers, strict=True))
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, (n, a) in enumerate(zip(lengths, answers, strict=True)):
        start = 0 if side == "right" else width - n - a
        tokens = torch.randint(7, VOCABULARY, (n + a,), generator=generator)
        tokens[1 : 1 + IMAGE_TOKENS] = IMAGE
        ids[row, start : start + n + a] = tokens
        mask[row, start : start + n + a] = 1
        labels[row, start + n : start + n + a] = tokens[n:]
    result = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(len(lengths), 3, 16, 16, generator=generator),
    }
    if any(answers):
        result["labels"] = labels
    return result


def qwen_batch(lengths: list[int], side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """The same for Qwen2-VL: one picture of 1 x 4 x 4 patches (4 image tokens) a row."""
    made = batch(lengths, side, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    made["pixel_values"] = torch.randn(16 * len(lengths), 3 * 2 * 4 * 4, generator=generator)
    made["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(lengths))
    made["mm_token_type_ids"] = (made["input_ids"] == IMAGE).int()
    return made


def row_of(made: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch without its padding."""
    keep = made["attention_mask"][row].bool()
    one = {
        k: v[row][keep][None]
        for k, v in made.items()
        if k in ("input_ids", "attention_mask", "labels")
    }
    if "image_grid_thw" in made:
        one["pixel_values"] = made["pixel_values"][16 * row : 16 * row + 16]
        one["image_grid_thw"] = made["image_grid_thw"][row : row + 1]
        one["mm_token_type_ids"] = made["mm_token_type_ids"][row][keep][None]
    else:
        one["pixel_values"] = made["pixel_values"][row : row + 1]
    return one


def random_plans(rows: int, units: int, seed: int = 0) -> Tensor:
    """Plans with everything from nothing to all on."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.linspace(0, 1, rows)[:, None]
    return torch.rand(rows, units, generator=generator) < share

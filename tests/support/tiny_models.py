"""Small stock models from configs, and random batches for them. No download.

`text_config` and `VISION` are the one place for the sizes of models built from transformers'
configs, `SCRATCH` for those that `model.source: scratch` builds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from fmray.adallava import AdaptiveVLM, SwitchLayout

IMAGE, PAD, EOS, VOCABULARY = 3, 0, 2, 64
IMAGE_TOKENS = 4
VISION = {  # of a CLIP or SigLIP tower: an image is `IMAGE_TOKENS` patches
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SCRATCH = {  # `model.scratch` of a recipe
    "layers": 4,
    "hidden": 32,
    "heads": 4,
    "kv_heads": 2,
    "intermediate": 64,
    "vision_layers": 1,
    "vision_hidden": 32,
    "vision_heads": 2,
}
FAMILIES = {
    "llama": lambda **sizes: LlamaConfig(num_key_value_heads=2, **sizes),  # grouped queries
    "qwen2": lambda **sizes: Qwen2Config(num_key_value_heads=2, **sizes),  # biases on q, k, v
    "phi": lambda **sizes: PhiConfig(partial_rotary_factor=0.5, **sizes),  # biases, parallel block
}


def text_sizes(
    layers: int, heads: int = 4, hidden: int | None = None, intermediate: int = 90
) -> dict[str, Any]:
    """Return what all text configs share; weights are large enough that every layer matters.

    Args:
        hidden: default: 16 channels per head.
        intermediate: the default is not a multiple of the heads.
    """
    return {
        "hidden_size": 16 * heads if hidden is None else hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "initializer_range": 0.1,
    }


def text_config(family: str, **sizes: Any) -> PreTrainedConfig:
    """Return the config of a decoder of one of `FAMILIES`; `sizes` are those of `text_sizes`."""
    return FAMILIES[family](**text_sizes(**sizes))


def tiny_llava(text: str = "llama", layers: int = 6, heads: int = 4, seed: int = 0) -> nn.Module:
    """Return a stock LLaVA in float32 and eval mode."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text_config(text, layers=layers, heads=heads),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model


def tiny_qwen2_vl(seed: int = 0) -> nn.Module:
    """Return a stock Qwen2-VL, with multimodal rotary positions, in float32 and eval mode."""
    torch.manual_seed(seed)
    config = Qwen2VLConfig(
        text_config=text_sizes(layers=4)
        | {
            "num_key_value_heads": 2,
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
    """Return an adaptive model with a random scheduler (a new one rates all units alike)."""
    make = SwitchLayout.layers if design == "layers" else SwitchLayout.heads
    arguments = {} if design == "layers" else {"unit": unit}
    layout = make(base.config.get_text_config(), first=first, **arguments)
    model = AdaptiveVLM.from_base(base, layout, **options)
    torch.manual_seed(1)
    for parameter in model.adaptive_parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def batch(
    lengths: list[int], side: str = "right", answers: list[int] | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Return padded prompts of `lengths` tokens, with one image of 4 tokens per row.

    Args:
        answers: lengths of the answers after the prompts; the batch then has labels.
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
    """Return such a batch for Qwen2-VL: an image of 1 x 4 x 4 patches (4 tokens) per row."""
    made = batch(lengths, side, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    made["pixel_values"] = torch.randn(16 * len(lengths), 3 * 2 * 4 * 4, generator=generator)
    made["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(lengths))
    made["mm_token_type_ids"] = (made["input_ids"] == IMAGE).int()
    return made


def row_of(made: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Return one row of a batch without its padding."""
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
    """Return random plans [rows, units], from one with all units off to one with all on."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.linspace(0, 1, rows)[:, None]
    return torch.rand(rows, units, generator=generator) < share

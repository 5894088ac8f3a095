"""Small stock models of every vision-language family, each with a row that has an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from support.tiled_models import llava_next, llava_onevision, tiled_row
from support.tiny_models import (
    IMAGE,
    VISION,
    VOCABULARY,
    qwen_batch,
    text_config,
    text_sizes,
    tiny_llava,
    tiny_qwen2_vl,
)
from torch import Tensor, nn

Row = dict[str, Tensor]
TEXT: dict[str, Any] = {"layers": 4, "hidden": 32, "intermediate": 64}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
PIXTRAL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
GRID_VISION = {  # of the families that describe an image by its grid of patches
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
GRID_IDS = {"vision_start_token_id": 4, "vision_end_token_id": 5, "video_token_id": 6}


def row(model: nn.Module, images: Row, text: int = 5, around: tuple[int, ...] = ()) -> Row:
    """Return an unpadded row: a token, an image, `text` tokens.

    Args:
        around: ids before and after the image.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        features = torch.cat(tuple(model.model.get_image_features(**images).pooler_output))
    words = torch.randint(12, VOCABULARY, (1 + text,), generator=generator)
    before, after = around[:1], around[1:]
    ids = torch.tensor(
        [int(words[0]), *before, *[IMAGE] * len(features), *after, *words[1:].tolist()]
    )[None]
    made = images | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "image_grid_thw" in images:
        made["mm_token_type_ids"] = (ids == IMAGE).int()
    return made


def pixels(*shape: int) -> Tensor:
    """Return random pixel values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _padded_image() -> Row:
    """Return an image whose lower half is padding."""
    return {"pixel_values": pixels(1, 3, 16, 16), "image_sizes": torch.tensor([[8, 16]])}


def _grid_image() -> Row:
    """Return an image of 4 x 4 patches."""
    return {
        "pixel_values": pixels(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def _internvl() -> tuple[nn.Module, Row]:
    vision = {**VISION, "image_size": [16, 16], "patch_size": [4, 4]}
    config = hf.InternVLConfig(
        vision_config=vision,
        text_config=text_config("qwen2", **TEXT),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return hf.InternVLForConditionalGeneration(config), {"pixel_values": pixels(1, 3, 16, 16)}


def _mistral3() -> tuple[nn.Module, Row]:
    text = hf.MistralConfig(**text_sizes(**TEXT), num_key_value_heads=2, sliding_window=None)
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**PIXTRAL),
        text_config=text,
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )
    return hf.Mistral3ForConditionalGeneration(config), _padded_image()


def _pixtral() -> tuple[nn.Module, Row]:
    config = hf.LlavaConfig(
        vision_config=hf.PixtralVisionConfig(**PIXTRAL),
        text_config=text_config("llama", **TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return hf.LlavaForConditionalGeneration(config), _padded_image()


def _vipllava() -> tuple[nn.Module, Row]:
    config = hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=text_config("llama", **TEXT),
        image_token_index=IMAGE,
        vision_feature_layers=[-1, -2],
    )
    return hf.VipLlavaForConditionalGeneration(config), {"pixel_values": pixels(1, 3, 16, 16)}


def _ovis2() -> tuple[nn.Module, Row]:
    config = hf.Ovis2Config(
        vision_config={**VISION, "hidden_stride": 1, "vocab_size": 40, "image_size": 16},
        text_config=text_config("qwen2", **TEXT),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[7, 8, 9, 10, 11],
        vocab_size=VOCABULARY,
        hidden_size=TEXT["hidden"],
    )
    return hf.Ovis2ForConditionalGeneration(config), {"pixel_values": pixels(1, 3, 16, 16)}


def _idefics(name: str) -> Callable[[], tuple[nn.Module, Row]]:
    def make() -> tuple[nn.Module, Row]:
        config = getattr(hf, f"{name}Config")(
            vision_config={**VISION, "patch_size": 4},
            text_config=text_config("llama", **TEXT),
            image_token_id=IMAGE,
            scale_factor=2,
        )
        mask = torch.ones(1, 2, 16, 16, dtype=torch.long)
        mask[:, 1, 8:] = 0  # the second image is shorter
        images = {"pixel_values": pixels(1, 2, 3, 16, 16), "pixel_attention_mask": mask}
        return getattr(hf, f"{name}ForConditionalGeneration")(config), images

    return make


def _glm4v() -> tuple[nn.Module, Row]:
    text = text_sizes(layers=4) | {"num_key_value_heads": 2, "rope_parameters": ROPE}
    config = hf.Glm4vConfig(
        text_config=text,
        vision_config=GRID_VISION | {"depth": 2, "image_size": 16},
        image_token_id=IMAGE,
        image_start_token_id=4,
        image_end_token_id=5,
        video_token_id=6,
    )
    return hf.Glm4vForConditionalGeneration(config), _grid_image()


def _qwen2_5_vl() -> tuple[nn.Module, Row]:
    config = hf.Qwen2_5_VLConfig(
        text_config=text_sizes(layers=4) | {"num_key_value_heads": 2, "rope_parameters": ROPE},
        vision_config=GRID_VISION
        | {
            "depth": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        **GRID_IDS,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config), _grid_image()


def _qwen3_vl() -> tuple[nn.Module, Row]:
    config = hf.Qwen3VLConfig(
        text_config=text_sizes(layers=4)
        | {"num_key_value_heads": 2, "head_dim": 16, "rope_parameters": ROPE},
        vision_config=GRID_VISION
        | {
            "depth": 3,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=IMAGE,
        **GRID_IDS,
    )
    return hf.Qwen3VLForConditionalGeneration(config), _grid_image()


def _qwen2_vl() -> tuple[nn.Module, Row]:
    made = qwen_batch([9])
    return tiny_qwen2_vl(), {name: made[name] for name in ("pixel_values", "image_grid_thw")}


def _llava() -> tuple[nn.Module, Row]:
    return tiny_llava(layers=4), {"pixel_values": pixels(1, 3, 16, 16)}


MADE: dict[str, Callable[[], tuple[nn.Module, Row]]] = {
    "glm4v": _glm4v,
    "idefics3": _idefics("Idefics3"),
    "internvl": _internvl,
    "llava": _llava,
    "llava (pixtral)": _pixtral,
    "mistral3": _mistral3,
    "ovis2": _ovis2,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "smolvlm": _idefics("SmolVLM"),
    "vipllava": _vipllava,
}
TILED = {"llava_next": llava_next, "llava_onevision": llava_onevision}
KINDS = (*MADE, *TILED)


def vision_language(kind: str) -> tuple[nn.Module, Row]:
    """Return a stock model of a family, in float32 and eval mode, and a row with an image."""
    torch.manual_seed(0)
    if kind in TILED:
        base = TILED[kind]().eval()
        return base, tiled_row(base, 5, (24, 16), 0)
    base, images = MADE[kind]()
    base.eval()
    return base, row(base, images, around=(7, 8) if kind == "ovis2" else ())

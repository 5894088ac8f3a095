"""Models made from recipes: sizes, freezing, seeds, LoRA and its folding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import SCRATCH
from support.training import ADAPTIVE, load_recipe
from torch import nn
from transformers import AutoModelForImageTextToText

from fmray.adallava import AdaptiveVLM
from fmray.config import AdaLlavaRecipe, ScratchConfig
from fmray.data.processor import scratch_processor
from fmray.train.adallava.model import build_model, merge_lora

PROCESSOR = scratch_processor(["red green blue circle square"], ScratchConfig())


def recipe_of(tmp_path: Path, **sections: Any) -> AdaLlavaRecipe:
    return load_recipe(tmp_path, tmp_path, **sections).recipe


def inputs() -> dict[str, torch.Tensor]:
    image = PROCESSOR.image_token_id
    ids = torch.tensor([[1, image, image, image, image, 6, 5, 7, 2]])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn((1, 3, 32, 32), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
def test_scratch_models_run_and_become_adaptive(tmp_path: Path, family: str) -> None:
    scratch = SCRATCH | {"text_family": family}
    base = build_model(recipe_of(tmp_path, model={"scratch": scratch}), PROCESSOR).eval()
    assert base.config.text_config.model_type == family
    assert base(**inputs()).logits.shape == (1, 9, len(PROCESSOR.tokenizer))
    recipe = recipe_of(tmp_path, model={"scratch": scratch}, adaptive=ADAPTIVE)
    adaptive = build_model(recipe, PROCESSOR).eval()
    assert adaptive.layout.num_units == 3
    assert torch.equal(adaptive(**inputs()).logits, base(**inputs()).logits)  # the same seed


def test_equal_seeds_make_equal_models(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, adaptive=ADAPTIVE)
    torch.manual_seed(99)
    first = build_model(recipe, PROCESSOR).state_dict()
    torch.manual_seed(100)
    second = build_model(recipe, PROCESSOR).state_dict()
    other = build_model(recipe_of(tmp_path, adaptive=ADAPTIVE, seed=4), PROCESSOR).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "base.model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_frozen_parts_do_not_learn(tmp_path: Path, part: str) -> None:
    model = build_model(recipe_of(tmp_path, model={"freeze": [part]}), PROCESSOR)
    modules = {
        "vision": [model.model.vision_tower],
        "projector": [model.model.multi_modal_projector],
        "language": [model.model.language_model, model.lm_head],
    }
    for name, parts in modules.items():
        learns = {p.requires_grad for module in parts for p in module.parameters()}
        assert learns == {name != part}


def test_an_adaptive_directory_needs_an_adaptive_recipe(tmp_path: Path) -> None:
    build_model(recipe_of(tmp_path, adaptive=ADAPTIVE), PROCESSOR).save_pretrained(tmp_path / "m")
    model = {"source": str(tmp_path / "m")}
    again = build_model(recipe_of(tmp_path, model=model, adaptive=ADAPTIVE), PROCESSOR)
    assert isinstance(again, AdaptiveVLM)
    with pytest.raises(ValueError, match="has no `adaptive` section"):
        build_model(recipe_of(tmp_path, model=model), PROCESSOR)
    with pytest.raises(ValueError, match="make them equal, or start from the base model"):
        build_model(recipe_of(tmp_path, model=model, adaptive={"first": 2}), PROCESSOR)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "m")
    assert torch.equal(stock(**inputs()).logits, again.base(**inputs()).logits)


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"model.source .*nothing.* does not load"):
        build_model(recipe_of(tmp_path, model={"source": missing}), PROCESSOR)


@pytest.mark.parametrize("design", ["layers", "heads"])
def test_folded_lora_computes_the_same(tmp_path: Path, design: str) -> None:
    adaptive = ADAPTIVE | {"design": design, "unit": 2}
    lora = {"lora": {"rank": 4, "alpha": 8.0}}
    recipe = recipe_of(tmp_path, model=lora, adaptive=adaptive)
    model = build_model(recipe, PROCESSOR).eval()
    decoder = model.base.model.language_model
    learning = {name for name, p in decoder.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    linear = sum(isinstance(m, nn.Linear) for m in decoder.modules())
    assert len(learning) == 2 * 7 * 4 and linear == 3 * 7 * 4  # q k v o gate up down, 4 layers
    for name, parameter in decoder.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    plan = (torch.arange(model.layout.num_units) % 2 == 0)[None]
    labels = torch.full((1, 9), -100)
    labels[:, 7:] = inputs()["input_ids"][:, 7:]
    call = inputs() | {"labels": labels, "plan": plan, "execution": "masked"}
    with torch.no_grad():
        wanted = model(**call).logits
        plain = build_model(recipe, PROCESSOR, lora=False).eval()
        assert not torch.allclose(plain(**call).logits, wanted, atol=1e-2)
        plain.load_state_dict(merge_lora(model.state_dict(), alpha=8.0, rank=4), strict=True)
        torch.testing.assert_close(plain(**call).logits, wanted, atol=1e-5, rtol=1e-5)

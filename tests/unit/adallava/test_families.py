"""Every vision-language family: a full plan is the stock model, for images and for decoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.tiled_models import llava_next, llava_onevision
from support.tiny_models import (
    IMAGE,
    VOCABULARY,
    adaptive,
    text_config,
    text_sizes,
    tiny_llava,
)
from support.vision_language import KINDS, vision_language
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    Qwen3VLConfig,
)

from fmray.adallava import AdaptiveVLM, SwitchLayout
from fmray.adallava.families import FAMILIES
from fmray.adallava.proof import prove

NO_HEADS = {"glm4v"}  # a fused projection, which design H cannot cut
DESIGNS = [(kind, "layers") for kind in KINDS] + [
    (kind, "heads") for kind in KINDS if kind not in NO_HEADS
]


def test_every_family_has_a_model_here() -> None:
    assert {kind.partition(" ")[0] for kind in KINDS} == FAMILIES.keys()


@pytest.mark.parametrize(("kind", "design"), DESIGNS)
def test_a_family_is_proven_on_a_row_with_an_image(kind: str, design: str) -> None:
    base, row = vision_language(kind)
    differences = prove(adaptive(base, design, latency_token="probe"), row)
    assert differences["a full plan"] == 0
    assert max(differences.values()) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_answers_under_a_full_plan_are_those_of_the_stock_model(kind: str) -> None:
    base, row = vision_language(kind)
    model = adaptive(base, latency_token="probe")
    ours = model.generate(**row, budget=1, max_new_tokens=4)
    assert ours.tolist() == base.generate(**row, max_new_tokens=4, do_sample=False).tolist()


@pytest.mark.parametrize("kind", sorted(NO_HEADS))
def test_heads_of_a_fused_block_are_refused(kind: str) -> None:
    base, _ = vision_language(kind)
    with pytest.raises(ValueError, match="use design 'layers'"):
        adaptive(base, "heads")


@pytest.mark.parametrize("token", ["inline", "probe"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_deepstack_rows_do_not_depend_on_the_batch(token: str, padding: str) -> None:
    """Two rows with images of their own: masked, skipped and alone are the same."""
    base, row = vision_language("qwen3_vl")
    model = adaptive(base, latency_token=token)
    ids = row["input_ids"]
    blank = torch.zeros(1, 3, dtype=torch.long)
    order = (lambda a, b: (a, b)) if padding == "right" else (lambda a, b: (b, a))
    other = torch.cat((ids[:, :1], ids[:, 1:]), dim=1).clone()
    other[0, -2:] = torch.tensor([20, 21])
    shorter = torch.cat(order(other, blank), dim=1)
    longer = torch.cat((ids, ids[:, -3:]), dim=1)
    batch = {
        "input_ids": torch.cat((shorter, longer)),
        "attention_mask": torch.cat(
            (torch.cat(order(torch.ones_like(other), blank), dim=1), torch.ones_like(longer))
        ),
        "pixel_values": torch.cat((row["pixel_values"], row["pixel_values"] + 1)),
        "image_grid_thw": row["image_grid_thw"].repeat(2, 1),
    }
    batch["mm_token_type_ids"] = (batch["input_ids"] == base.config.image_token_id).int()
    plan = torch.tensor([[True, False], [False, True]])
    masked = model(**batch, plan=plan, execution="masked").logits
    skipped = model(**batch, plan=plan, execution="skipped").logits
    torch.testing.assert_close(masked, skipped, atol=1e-5, rtol=1e-4)
    alone = model(
        input_ids=longer,
        attention_mask=torch.ones_like(longer),
        pixel_values=row["pixel_values"] + 1,
        image_grid_thw=row["image_grid_thw"],
        mm_token_type_ids=batch["mm_token_type_ids"][1:],
        plan=plan[1:],
    ).logits
    torch.testing.assert_close(skipped[1:], alone, atol=1e-5, rtol=1e-4)


def test_deepstack_layers_must_always_run() -> None:
    base, _ = vision_language("qwen3_vl")
    assert isinstance(base.config, Qwen3VLConfig)
    with pytest.raises(ValueError, match="first 2 layers, which must always run: first is 1"):
        AdaptiveVLM.from_base(base, SwitchLayout.layers(base.config.get_text_config(), first=1))


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


# --- Refusals ---


def test_images_without_an_adapter_are_an_error() -> None:
    base = tiny_llava()
    base.config.model_type = "other_vlm"
    with pytest.raises(ValueError, match="no adapter for images in model type 'other_vlm'"):
        adaptive(base)


def test_a_window_is_an_error_however_short_the_proof() -> None:
    config = MistralConfig(**text_sizes(layers=4), num_key_value_heads=2, sliding_window=32)
    with pytest.raises(ValueError, match="attends to the last 32 tokens only"):
        adaptive(AutoModelForCausalLM.from_config(config))


def test_another_shape_is_an_error() -> None:
    config = OPTConfig(ffn_dim=64, hidden_size=32, num_attention_heads=2, vocab_size=64)
    config.intermediate_size = 64
    with pytest.raises(ValueError, match="no decoder of the usual shape"):
        adaptive(AutoModelForCausalLM.from_config(config))


def test_a_piece_that_is_left_out_is_found() -> None:
    """Granite multiplies its embeddings; hide the number, and the proof refuses the model."""
    sizes = text_sizes(layers=4) | {"num_key_value_heads": 2, "initializer_range": 0.1}
    base = AutoModelForCausalLM.from_config(GraniteConfig(**sizes, embedding_multiplier=3.0)).eval()
    adaptive(base)
    del base.config.embedding_multiplier
    with pytest.raises(ValueError, match="granite model cannot be made adaptive: a full plan"):
        adaptive(base)


# --- Text models ---


def test_a_text_model_is_saved_loaded_and_answers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(text_config("llama", layers=4)).eval()
    model = adaptive(base, latency_token="probe")
    model.save_pretrained(tmp_path / "model")
    loaded = AdaptiveVLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[1, 20, 30, 40], [1, 21, 31, 41]])
    for budget in (0.5, ["0.5", "1"]):
        expected = model.generate(ids, budget=budget, max_new_tokens=5)
        assert torch.equal(loaded.generate(ids, budget=budget, max_new_tokens=5), expected)
    stock = base.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(loaded.generate(ids, budget=1, max_new_tokens=5), stock)


def test_proof_without_weights_is_an_error() -> None:
    with torch.device("meta"):
        base = tiny_llava()
    with pytest.raises(ValueError, match="without weights proves nothing"):
        prove(adaptive(base))


def test_a_loaded_model_is_proven_once_per_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptive(tiny_llava(layers=4)).save_pretrained(tmp_path)
    proofs: list[str] = []
    monkeypatch.setattr("fmray.adallava.model.prove", lambda model: proofs.append("proven"))
    AdaptiveVLM.from_pretrained(tmp_path)
    assert proofs == []
    file = tmp_path / "adaptive.json"
    values = json.loads(file.read_text())
    del values["proven"]  # written by an earlier version of fmray
    file.write_text(json.dumps(values))
    AdaptiveVLM.from_pretrained(tmp_path)
    file.write_text(json.dumps(values | {"proven": "5.0.0"}))
    AdaptiveVLM.from_pretrained(tmp_path)
    assert proofs == ["proven"] * 2

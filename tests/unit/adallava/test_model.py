"""The adaptive model against the stock model it wraps, and against itself run in other ways."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import (
    IMAGE_TOKENS,
    VOCABULARY,
    adaptive,
    batch,
    qwen_batch,
    random_plans,
    row_of,
    tiny_llava,
    tiny_qwen2_vl,
)
from torch.utils.flop_counter import FlopCounterMode

from fmray.adallava import AdaptiveModel, AdaptiveVLM, CostModel
from fmray.adallava.passes import Draw, prefill

FAMILIES = ["llama", "qwen2", "phi", "qwen2_vl"]
DESIGNS = ["layers", "heads"]
TOKENS = ["inline", "probe"]
SIDES = ["right", "left"]


def make(family: str) -> torch.nn.Module:
    return tiny_qwen2_vl() if family == "qwen2_vl" else tiny_llava(family)


def inputs(
    family: str, lengths: list[int], side: str = "right", seed: int = 0
) -> dict[str, torch.Tensor]:
    return (qwen_batch if family == "qwen2_vl" else batch)(lengths, side, seed=seed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("execution", ["skipped", "masked"])
def test_full_probe_plan_is_the_stock_model(family: str, design: str, execution: str) -> None:
    base = make(family)
    model = adaptive(base, design, latency_token="probe")
    data = inputs(family, [9, 9, 9])
    with torch.no_grad():
        expected = base(**data).logits
        logits = model(**data, budget=1.0, execution=execution).logits
    if execution == "skipped":
        assert torch.equal(logits, expected)
    else:  # one more token in the matrix products of the lower layers
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", SIDES)
def test_full_probe_plan_is_the_stock_model_padded(family: str, side: str) -> None:
    base = make(family)
    model = adaptive(base, latency_token="probe")
    data = inputs(family, [7, 12, 9], side)
    attended = data["attention_mask"].bool()
    with torch.no_grad():
        expected = base(**data).logits[attended]
        assert torch.equal(model(**data, budget=1.0).logits[attended], expected)
        assert torch.equal(model(**data).logits[attended], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_inline_full_plan_is_the_stock_model_on_the_same_embeddings(family: str) -> None:
    """The stock decoder gives the same bits for embeddings with the latency token inserted."""
    base = make(family)
    model = adaptive(base, latency_token="inline")
    data = inputs(family, [9])
    extras = {k: v for k, v in data.items() if k in ("image_grid_thw", "mm_token_type_ids")}
    with torch.no_grad():
        logits = model(**data, budget="1").logits
        embeddings = model.backbone.embed(data["input_ids"], data["pixel_values"], extras)
        token = model.latency_encoder(torch.ones(1))
        positions = model.backbone.positions(
            data["input_ids"], data["attention_mask"], extras, False
        )
        if positions is not None:
            positions = torch.cat((positions, positions[..., -1:] + 1), dim=-1)
        hidden = base.model.language_model(
            inputs_embeds=torch.cat((embeddings, token[:, None]), dim=1), position_ids=positions
        ).last_hidden_state
        expected = base.lm_head(hidden)
    assert torch.equal(logits[:, -1], expected[:, -1])
    assert torch.equal(logits[:, :-1], expected[:, :-2])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("side", SIDES)
def test_masked_equals_skipped(family: str, design: str, token: str, side: str) -> None:
    model = adaptive(make(family), design, latency_token=token)
    data = inputs(family, [7, 12, 9, 8, 11], side)
    plan = random_plans(5, model.layout.num_units)
    attended = data["attention_mask"].bool()
    with torch.no_grad():
        skipped = model(**data, plan=plan, execution="skipped")
        masked = model(**data, plan=plan.float(), execution="masked")
        twice = model(**data, plan=plan, execution="skipped")
    torch.testing.assert_close(
        skipped.logits[attended], masked.logits[attended], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(skipped.plan_logits, masked.plan_logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(skipped.logits, twice.logits)  # the second time with cached cut weights


def test_heads_that_units_do_not_divide() -> None:
    """5 heads in units of 2: the last unit has one; 90 channels over 5 heads."""
    base = tiny_llava("phi", heads=5)
    model = adaptive(base, "heads", unit=2)
    assert model.layout.units_per_layer == 3
    plan = random_plans(8, model.layout.num_units)
    data = batch([9] * 8)
    with torch.no_grad():
        skipped = model(**data, plan=plan, execution="skipped").logits
        masked = model(**data, plan=plan.float(), execution="masked").logits
    torch.testing.assert_close(skipped, masked, atol=1e-4, rtol=1e-4)


def test_cut_weights_follow_changes_of_the_model() -> None:
    """A weight that changed after cutting is cut again."""
    model = adaptive(tiny_llava(), "heads")
    data, plan = batch([9, 9]), random_plans(2, model.layout.num_units, seed=3)
    plan[1, ::2] = True
    plan[1, 1::2] = False
    with torch.no_grad():
        before = model(**data, plan=plan).logits
        for layer in model.backbone.layers:
            layer.mlp.down_proj.weight.mul_(0.5)
        after = model(**data, plan=plan).logits
        masked = model(**data, plan=plan.float(), execution="masked").logits
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, masked, atol=1e-4, rtol=1e-4)


def test_layers_that_are_off_are_not_called() -> None:
    model = adaptive(tiny_llava(layers=8), first=2)
    calls: list[tuple[int, int]] = []
    for index, layer in enumerate(model.backbone.layers):
        layer.register_forward_hook(
            lambda _, given, __, index=index: calls.append((index, given[0].shape[0]))
        )
    plan = torch.tensor([[1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1]]).bool()
    with torch.no_grad():
        model(**batch([9, 9]), plan=plan)
    assert calls == [(0, 2), (1, 2), (2, 2), (5, 1), (7, 1)]
    calls.clear()
    model.generate(**batch([9, 9]), plan=plan, max_new_tokens=3, eos_token_id=VOCABULARY)
    assert calls == [(0, 2), (1, 2), (2, 2), (5, 1), (7, 1)] * 3


@pytest.mark.parametrize("design", DESIGNS)
def test_layers_that_are_off_store_no_keys(design: str) -> None:
    model = adaptive(tiny_llava(layers=4), design)
    data = batch([9, 9])
    plan = torch.zeros(2, model.layout.num_units, dtype=torch.bool)
    plan[0, -1] = True
    with torch.no_grad():
        prompt = model.embed_prompt(**data, budget=None, plan=plan, extras={})
        _, _, _, state = prefill(model, prompt, Draw(), keep=True)
    assert [len(caches) for caches in state.upper] == [0, 1]
    keys = state.upper[1][0].keys
    heads = model.layout.unit_slices(model.layout.units_per_layer - 1)[1]
    assert keys.shape[:2] == (1, heads.stop - heads.start)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("family", ["llama", "phi", "qwen2_vl"])
def test_cached_decoding_equals_recomputing(design: str, token: str, family: str) -> None:
    """32 greedy tokens against one pass over prompt and answer."""
    model = adaptive(make(family), design, latency_token=token)
    data = inputs(family, [9])
    plan = random_plans(5, model.layout.num_units, seed=5)[2:3]
    ids = model.generate(**data, plan=plan, max_new_tokens=32, eos_token_id=VOCABULARY)
    assert ids.shape == (1, 9 + 32)
    labels = ids.clone()
    labels[:, :9] = -100
    whole = {**data, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = (ids == 3).int()
    with torch.no_grad():
        logits = model(**whole, plan=plan, execution="masked").logits
    assert torch.equal(logits[:, 8:-1].argmax(-1), ids[:, 9:])


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ["llama", "phi", "qwen2_vl"])
def test_mixed_budgets_equal_one_row_at_a_time(
    design: str, token: str, side: str, family: str
) -> None:
    model = adaptive(make(family), design, latency_token=token)
    data = inputs(family, [7, 12, 9, 8], side)
    budgets = [0.5, "1", 0.75, 0.9]
    ids, plans = model.generate(**data, budget=budgets, max_new_tokens=8, return_plan=True)
    width = data["input_ids"].shape[1]
    for row, budget in enumerate(budgets):
        alone, plan = model.generate(
            **row_of(data, row), budget=budget, max_new_tokens=8, return_plan=True
        )
        answer = alone[0, row_of(data, row)["input_ids"].shape[1] :]
        assert torch.equal(plan[0], plans[row])
        assert torch.equal(ids[row, width : width + len(answer)], answer)


@pytest.mark.parametrize("family", ["llama", "phi", "qwen2_vl"])
@pytest.mark.parametrize("side", ["left", "none"])
def test_generate_at_full_budget_is_the_stock_generate(family: str, side: str) -> None:
    base = make(family)
    model = adaptive(base, latency_token="probe")
    data = inputs(family, [7, 12, 9] if side == "left" else [9, 9, 9], "left")
    expected = base.generate(**data, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(**data, budget=1, max_new_tokens=12), expected)
    assert torch.equal(model.generate(**data, max_new_tokens=12), expected)


@pytest.mark.parametrize("token", TOKENS)
def test_lower_layers_do_not_depend_on_the_budget(token: str) -> None:
    model = adaptive(tiny_llava(), latency_token=token)
    data = batch([9])
    seen = []
    for budget in (0.5, 0.7, 1.0):
        prompt = model.embed_prompt(**data, budget=budget, plan=None, extras={})
        with torch.no_grad():
            _, _, _, state = prefill(model, prompt, Draw(), keep=True)
        seen.append([(c.keys[:, :, :9], c.values[:, :, :9]) for c in state.lower])
    for other in seen[1:]:
        for (keys, values), (expected_keys, expected_values) in zip(other, seen[0], strict=True):
            assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values)


@pytest.mark.parametrize("token", TOKENS)
def test_plan_does_not_see_the_answer(token: str) -> None:
    """Other answer tokens, other lengths, other neighbours: the same plan logits."""
    model = adaptive(tiny_llava(), latency_token=token)
    data = batch([9, 7], answers=[3, 5])
    with torch.no_grad():
        first = model(**data, budget=0.75).plan_logits
        data["input_ids"] = torch.where(data["labels"] >= 0, 60, data["input_ids"])
        second = model(**data, budget=0.75).plan_logits
        alone = {k: v for k, v in row_of(data, 1).items() if k != "labels"}
        alone = {k: v[:, :7] if v.dim() == 2 else v for k, v in alone.items()}
        third = model(**alone, budget=0.75).plan_logits
    assert torch.equal(first, second)
    torch.testing.assert_close(third[0], second[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("token", TOKENS)
def test_every_parameter_gets_a_gradient(design: str, token: str) -> None:
    model = adaptive(tiny_llava(), design, latency_token=token).train()
    model.gradient_checkpointing_enable()
    data = batch([9, 7], answers=[3, 5])
    units = torch.tensor([1, model.layout.num_units])
    noise = torch.randn(2, model.layout.num_units)
    output = model(**data, units_on=units, noise=noise)
    assert output.plan.detach().unique().tolist() == [0.0, 1.0]
    assert output.plan.sum(1).tolist() == units.tolist()
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if "vision_tower" not in n}
    missing = [n for n, g in gradients.items() if g is None or not g.abs().sum() > 0]
    assert missing == []
    # recomputing in the backward pass changes nothing
    kept = {n: g.clone() for n, g in gradients.items()}
    model.zero_grad()
    model.gradient_checkpointing = False
    model(**data, units_on=units, noise=noise).loss.backward()
    for name, parameter in model.named_parameters():
        if name in kept:
            torch.testing.assert_close(parameter.grad, kept[name])


def test_loss_is_the_stock_loss_at_full_budget() -> None:
    base = tiny_llava()
    model = adaptive(base, latency_token="probe")
    data = batch([9, 7], answers=[3, 5])
    with torch.no_grad():
        torch.testing.assert_close(model(**data, budget=1.0).loss, base(**data).loss)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("scheduler", ["learned", "static", "random", "deterministic"])
def test_every_scheduler_keeps_the_budget(design: str, scheduler: str) -> None:
    model = adaptive(tiny_llava(), design, scheduler=scheduler)
    full = model.cost.layers_cost(10, model.layout.num_units)
    data = batch([9] * 6)
    budgets = [0.5, 0.55, "0.6", 0.75, 0.95, 1.0]
    with torch.no_grad():
        plans = model(**data, budget=budgets).plan
    for plan, budget in zip(plans, budgets, strict=True):
        assert model.cost.layers_cost(10, int(plan.sum())) <= float(budget) * full
    if scheduler != "deterministic":
        assert plans.sum(1).tolist() == [model.cost.max_units(b, 10) for b in budgets]


@pytest.mark.parametrize("scheduler", ["static", "random", "deterministic"])
def test_baseline_schedulers_train(scheduler: str) -> None:
    model = adaptive(tiny_llava(), scheduler=scheduler).train()
    data = batch([9, 7], answers=[3, 5])
    output = model(
        **data, units_on=torch.tensor([1, 2]), generator=torch.Generator().manual_seed(0)
    )
    output.loss.backward()
    assert torch.isfinite(output.loss)
    if scheduler != "random":
        assert all(p.grad.abs().sum() > 0 for p in model.scheduler.parameters())


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("text", ["llama", "qwen2", "phi"])
def test_cost_model_counts_what_runs(design: str, text: str) -> None:
    base = tiny_llava(text)
    model = adaptive(base, design)
    cost = CostModel(base.config.text_config, model.layout, "exact")
    data = batch([11])
    for plan in random_plans(6, model.layout.num_units, seed=2):
        model.execution.groups(plan[None])  # cut weights before counting
        prompt = model.embed_prompt(**data, budget=None, plan=plan[None], extras={})
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            hidden, *_ = prefill(model, prompt, Draw())
            model.backbone.logits(hidden[:, -1])
            flops = counter.get_total_flops()
        with torch.no_grad(), FlopCounterMode(display=False) as extra:
            model.latency_encoder(torch.ones(1))
            model.scheduler(torch.zeros(1, base.config.text_config.hidden_size))
        assert cost.prefill(12, plan.tolist()) == flops - extra.get_total_flops()


def test_text_only_name_is_an_alias() -> None:
    assert AdaptiveModel is AdaptiveVLM


def test_saved_model_reloads_bit_identically(tmp_path) -> None:
    from transformers import LlavaForConditionalGeneration

    base = tiny_llava()
    model = adaptive(base, "heads", latency_token="inline")
    data = batch([9, 7])
    model.save_pretrained(tmp_path / "saved")
    again = AdaptiveVLM.from_pretrained(tmp_path / "saved")
    assert again.layout == model.layout and again.latency_token == "inline"
    with torch.no_grad():
        assert torch.equal(again(**data, budget=0.7).logits, model(**data, budget=0.7).logits)
        stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
        assert torch.equal(stock(**data).logits, base(**data).logits)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    # the adaptive parts alone, with a base in another directory
    stock.config._name_or_path = str(tmp_path / "saved")
    light = AdaptiveVLM.from_base(stock, model.layout)
    light.load_state_dict(model.state_dict())
    light.save_pretrained(tmp_path / "light", include_base=False)
    assert not list((tmp_path / "light").glob("model*.safetensors"))
    with torch.no_grad():
        logits = AdaptiveVLM.from_pretrained(tmp_path / "light")(**data, budget=0.7).logits
        assert torch.equal(logits, model(**data, budget=0.7).logits)


def damage_missing_description(path):
    (path / "adaptive.json").unlink()


def damage_format(path):
    text = (path / "adaptive.json").read_text()
    (path / "adaptive.json").write_text(text.replace('"format": 1', '"format": 9'))


def damage_json(path):
    (path / "adaptive.json").write_text("{")


def damage_weights(path):
    (path / "adaptive.safetensors").write_bytes(b"no")


def damage_missing_weights(path):
    (path / "adaptive.safetensors").unlink()


def damage_scheduler(path):
    text = (path / "adaptive.json").read_text()
    (path / "adaptive.json").write_text(text.replace('"learned"', '"static"'))


def damage_layout(path):
    text = (path / "adaptive.json").read_text()
    (path / "adaptive.json").write_text(text.replace('"first": 3', '"first": 4'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing_description, "it has no adaptive.json"),
        (damage_format, "format 9; this version of fmray reads format 1"),
        (damage_json, "not the description of an adaptive model"),
        (damage_weights, "not a readable safetensors file"),
        (damage_missing_weights, "adaptive.safetensors is missing"),
        (damage_scheduler, "tensors do not fit"),
        (damage_layout, "asks for"),
    ],
)
def test_damaged_directories_are_errors(tmp_path, damage, message: str) -> None:
    adaptive(tiny_llava()).save_pretrained(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(ValueError, match=message):
        AdaptiveVLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (0.3, "smallest budget"),
        (1.2, "1"),
        (float("nan"), "nan"),
        ("much", "much"),
        (True, "True"),
        ([0.5, 0.6, 0.7], "3 budgets for 2 rows"),
        (torch.tensor([0.6], dtype=torch.bfloat16), "bfloat16"),
    ],
)
def test_wrong_budgets_are_errors(budget, message: str) -> None:
    model = adaptive(tiny_llava())
    with pytest.raises(ValueError, match=message):
        model(**batch([9, 9]), budget=budget)


def test_float32_budgets_are_read_as_written() -> None:
    """float32 0.6 is a little more than 0.6, which must not add a unit."""
    base = tiny_llava(layers=20)
    model = adaptive(base)
    tokens = torch.tensor([9])
    assert model.units_for(torch.tensor([0.6]), tokens).tolist() == [2]
    assert model.units_for(0.85, tokens).tolist() == [7]


def test_wrong_plans_are_errors() -> None:
    model = adaptive(tiny_llava())
    data = batch([9, 9])
    with pytest.raises(ValueError, match=r"plan must be \[2, 3\]"):
        model(**data, plan=torch.ones(2, 4).bool())
    with pytest.raises(ValueError, match="row 0 has 3 units on; its budget allows 0"):
        model(**data, plan=torch.ones(2, 3).bool(), budget=0.5)
    with pytest.raises(ValueError, match="no prompt"):
        model(input_ids=data["input_ids"][:, 5:], labels=data["input_ids"][:, 5:], budget=0.5)
    with pytest.raises(ValueError, match="masked"):
        model(**data, budget=0.5, execution="fast")


def test_image_token_count_matches_the_vision_tower() -> None:
    base = tiny_llava()
    features = base.get_image_features(batch([9])["pixel_values"]).pooler_output
    assert features[0].shape[0] == IMAGE_TOKENS


@pytest.mark.parametrize(
    "name", ["pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "input_features"]
)
def test_media_that_a_plan_would_ignore_are_an_error(name: str) -> None:
    model = adaptive(tiny_qwen2_vl())
    ids = torch.tensor([[7, 8, 9, 10]])
    media = {name: torch.ones(1, 3)}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=f"{name}: a qwen2_vl model under a budget takes text"):
            call(ids, budget=1.0, **media)
    with pytest.raises(ValueError, match=name):
        next(
            model.logits_under(
                torch.ones(1, model.layout.num_units, dtype=torch.bool), ids, **media
            )
        )
    model(ids, budget=1.0, **{name: None}, use_cache=False)  # nothing that could be ignored


def test_videos_reach_the_base_model_without_a_budget() -> None:
    base = tiny_qwen2_vl()
    model = adaptive(base)
    ids = torch.tensor([[7, 4, 6, 6, 5, 8]])  # two video tokens
    data = {
        "input_ids": ids,
        "mm_token_type_ids": 2 * (ids == 6).int(),
        "pixel_values_videos": torch.randn(8, 3 * 2 * 4 * 4),
        "video_grid_thw": torch.tensor([[1, 2, 4]]),
    }
    with torch.no_grad():
        assert torch.equal(model(**data).logits, base(**data).logits)

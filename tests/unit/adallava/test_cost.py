"""The cost model against published numbers, formulas written out and brute force."""

import itertools
import math
import pickle
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MixtralConfig, PhiConfig

from fmray.adallava.cost import CostModel, exact_number
from fmray.adallava.layout import SwitchLayout
from fmray.adallava.presets import preset

MEAN = preset("llava-1.5-7b").tokens
FASTV = [MEAN] * 2 + [MEAN - 288] * 30
PRUMERGE = MEAN - 576 + 39
PRUMERGE_PLUS = MEAN - 576 + 164


def published(name, convention="llm-viewer", design="layers", **options):
    text = preset(name).text_config
    return CostModel(text, getattr(SwitchLayout, design)(text, **options), convention)


# Dissertation tables 5.1 and C.2: trillions of operations at budgets 1, 0.85 and 0.60.
@pytest.mark.parametrize(
    ("name", "tokens", "cells"),
    [
        ("llava-1.5-7b", MEAN, (8.6, 7.2, 5.1)),
        ("llava-1.5-13b", MEAN, (16.7, 14.2, 10.0)),
        ("llava-1.5-7b", FASTV, (4.9, 4.2, 3.0)),
        ("llava-1.5-7b", PRUMERGE, (1.4, 1.2, 0.8)),
        ("llava-1.5-7b", PRUMERGE_PLUS, (3.0, 2.6, 1.8)),
    ],
    ids=["7b", "13b", "fastv", "prumerge", "prumerge+"],
)
def test_published_operations(name, tokens, cells):
    model = published(name)
    for budget, cell in zip((Fraction(1), Fraction("0.85"), Fraction("0.6")), cells, strict=True):
        units = math.floor(budget * model.layout.num_layers) - model.layout.first
        assert round(model.prefill(tokens, units) / 1e12, 1) == cell
        if tokens is not FASTV:
            assert model.max_units(budget, tokens) == units


def test_fastv_buys_18_layers_at_60_percent():
    model = published("llava-1.5-7b")
    assert model.max_units(0.6, FASTV) + 16 == 18
    assert round(100 * model.share(FASTV, 3), 1) == 61.4  # 19 layers, floor(32b), overshoot
    assert model.share(FASTV, 2) <= 0.6


def test_budgets_are_used_as_published():
    model = published("llava-1.5-7b")
    used = [model.share(644, model.max_units(b, 644)) / b for b in (0.95, 0.85, 0.75, 0.65)]
    assert [round(100 * share, 1) for share in used] == [98.7, 99.3, 100.0, 96.2]


@pytest.mark.parametrize(
    ("name", "design", "denominator"),
    [
        ("llava-1.5-7b", "layers", 32),
        ("llava-1.5-13b", "layers", 40),
        ("llava-1.5-7b", "heads", 128),
        ("llava-1.5-13b", "heads", 200),
    ],
)
@pytest.mark.parametrize("convention", ["exact", "llm-viewer"])
def test_budgets_on_a_grid_buy_their_units(name, design, denominator, convention):
    model = published(name, convention, design)
    tokens = random.Random(0).sample(range(1, 3000), 3)
    for hundredths in range(50, 101):
        units = hundredths * denominator // 100 - denominator // 2
        for budget in (hundredths / 100, f"{hundredths / 100}", Fraction(hundredths, 100)):
            assert [model.max_units(budget, n) for n in tokens] == [units] * 3
    for step in range(denominator // 2, denominator + 1):
        assert model.max_units(step / denominator, 644) == step - denominator // 2


def test_vision_operations():
    source = preset("llava-1.5-7b")
    model = published("llava-1.5-7b", "exact")
    cost = model.vision(source.vision_config)
    assert (cost.tokens, round(cost.tower / 1e12, 3), round(cost.projector / 1e12, 3)) == (
        576,
        0.365,
        0.024,
    )
    outside = cost.tower + cost.projector
    assert round(100 * outside / model.prefill(MEAN, 16), 1) == 4.5
    assert round(100 * outside / model.prefill(PRUMERGE, 16)) == 28
    assert model.vision(source.vision_config, 224).tokens == 256
    assert model.vision(preset("mipha-3b").vision_config).tokens == 729
    with pytest.raises(ValueError, match="'llama' vision tower"):
        model.vision(source.text_config)
    with pytest.raises(ValueError, match="feature_layer -26"):
        model.vision(source.vision_config, feature_layer=-26)


def test_llm_viewer_formula_written_out():
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=96,
        vocab_size=50,
    )  # fmt: skip
    cost = CostModel(config, SwitchLayout.layers(config), "llm-viewer")
    d, f, heads, n = 64, 96, 4, 31
    layer = 2 * n * (4 * d * d + 3 * d * f) + 4 * n * n * d + 5 * heads * n * n + 18 * d * n
    assert cost.layers_cost(n, 2) == 5 * layer
    assert cost.prefill(n, 2) == 5 * layer + d * 50
    one = 2 * (4 * d * d + 3 * d * f) + 4 * n * d + 5 * heads * n + 18 * d
    assert cost.decode(n, 0) == 3 * one + d * 50
    phi = PhiConfig(
        hidden_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, vocab_size=50,
    )  # fmt: skip
    cost = CostModel(phi, SwitchLayout.layers(phi), "llm-viewer")
    assert cost.mlp_matrices == 2
    assert cost.layers_cost(n, 3) == 6 * (layer - 2 * n * (d * d + d * f))


def random_model(draw, design):
    group, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    layers = draw(st.integers(2, 6))
    config = draw(st.sampled_from([LlamaConfig, PhiConfig]))(
        hidden_size=group * kv_heads * 4,
        num_hidden_layers=layers,
        num_attention_heads=group * kv_heads,
        num_key_value_heads=kv_heads,
        intermediate_size=group * kv_heads + draw(st.integers(0, 99)),
        vocab_size=30,
    )
    first = draw(st.integers(1, layers - 1))
    layout = (
        SwitchLayout.layers(config, first)
        if design == "layers"
        else SwitchLayout.heads(config, first, draw(st.integers(1, 9)))
    )
    return CostModel(config, layout, draw(st.sampled_from(["exact", "llm-viewer"])))


def random_tokens(draw, layers):
    length = st.integers(1, 3000) | st.floats(1, 3000).map(lambda value: round(value, 2))
    return draw(length | st.lists(length, min_size=layers, max_size=layers))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), design=st.sampled_from(["layers", "heads"]))
def test_a_budget_is_used_and_never_exceeded(data, design):
    model = random_model(data.draw, design)
    tokens = random_tokens(data.draw, model.layout.num_layers)
    smallest = model.min_budget(tokens)
    budget = data.draw(st.floats(smallest, 1))
    if data.draw(st.booleans()):
        budget = round(budget, 2)
        assume(smallest <= budget)
    units = model.max_units(budget, tokens)
    if data.draw(st.booleans()):
        budget = str(budget)
        assert model.max_units(budget, tokens) == units
    full = exact_layers(model, tokens, model.layout.num_units)
    assert (
        exact_layers(model, tokens, units)
        <= Fraction(budget if isinstance(budget, str) else str(budget)) * full
    )
    if units < model.layout.num_units:
        assert exact_layers(model, tokens, units + 1) > Fraction(str(budget)) * full
    assert model.max_units(smallest, tokens) == 0
    assert model.max_units(1, tokens) == model.layout.num_units
    assert model.max_units(model.share(tokens, units), tokens) == units
    assert float(model.layers_cost(tokens, units)) == float(exact_layers(model, tokens, units))


def layer_of(layout, unit):
    return layout.first + unit // layout.units_per_layer


def exact_layers(model, tokens, units_on):
    """Cost of the layers by brute force, independent of the cost model."""
    layout = model.layout
    lengths = tokens if isinstance(tokens, list) else [tokens] * layout.num_layers
    viewer = model.convention == "llm-viewer"
    query, key = layout.num_heads * layout.head_dim, layout.num_kv_heads * layout.head_dim
    d, f = layout.hidden_size, layout.intermediate_size
    costs = []
    for n in (Fraction(str(length)) for length in lengths):
        cost = 2 * n * d * (2 * query + 2 * key + model.mlp_matrices * f) + 4 * n * n * query
        costs.append(cost + (5 * layout.num_heads * n * n + 18 * d * n if viewer else 0))
    charges = []
    for unit in range(layout.num_units):
        heads = layout.unit_slices(unit % layout.units_per_layer)[0]
        share = Fraction(heads.stop - heads.start, layout.num_heads)
        charges.append(costs[layer_of(layout, unit)] * share)
    worst = sorted(charges, reverse=True)[:units_on]
    return sum(costs[: layout.first]) + sum(worst, Fraction())


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_plan_of_layers_exceeds_the_budget(data):
    model = random_model(data.draw, "layers")
    tokens = random_tokens(data.draw, model.layout.num_layers)
    budget = data.draw(st.floats(model.min_budget(tokens), 1))
    units, total = model.max_units(budget, tokens), model.layout.num_units
    plans = [
        [unit in chosen for unit in range(total)]
        for chosen in itertools.combinations(range(total), units)
    ]
    assert max(model.share(tokens, plan) for plan in plans) == model.share(tokens, units)
    assert model.share(tokens, units) <= budget * (1 + 1e-15)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_plans_of_heads_are_counted_at_their_true_sizes(data):
    model = random_model(data.draw, "heads")
    layout, n = model.layout, data.draw(st.integers(1, 2000))
    plan = data.draw(st.lists(st.booleans(), min_size=layout.num_units, max_size=layout.num_units))
    expected = model.layers_cost(n, 0)
    for index in range(layout.first, layout.num_layers):
        on = [
            layout.unit_slices(unit % layout.units_per_layer)
            for unit in range(layout.num_units)
            if plan[unit] and layer_of(layout, unit) == index
        ]
        heads, kv_heads, channels = (
            sum(part[kind].stop - part[kind].start for part in on) for kind in range(3)
        )
        width = layout.hidden_size * layout.head_dim
        expected += 4 * n * width * (heads + kv_heads) + 4 * n * n * layout.head_dim * heads
        expected += 2 * n * layout.hidden_size * model.mlp_matrices * channels
        if model.convention == "llm-viewer":
            expected += 5 * n * n * heads + (18 * layout.hidden_size * n if on else 0)
    assert model.layers_cost(n, plan) == expected
    assert model.layers_cost(n, np.array(plan)) == model.layers_cost(n, torch.tensor(plan))
    everything = [True] * layout.num_units
    assert model.layers_cost(n, everything) == model.layers_cost(n, layout.num_units)
    # against the charge: one channel per unit, and element-wise work of layers that run in part
    rounding = 2 * n * layout.hidden_size * (model.mlp_matrices + 9) * layout.num_units
    assert expected <= model.layers_cost(n, sum(plan)) + rounding


@pytest.mark.parametrize(
    ("name", "convention", "bound"),
    [
        ("llava-1.5-7b", "exact", 0),
        ("llava-1.5-13b", "exact", 2e-5),
        ("llava-1.5-7b", "llm-viewer", 7e-5),
        ("llava-1.5-13b", "llm-viewer", 7e-5),
    ],
)
def test_charge_of_heads_is_low_by_at_most_the_documented_bound(name, convention, bound):
    """The plan of k units with the largest MLP groups, spread over all layers."""
    model = published(name, convention, "heads")
    layout, full = model.layout, model.layers_cost(644, model.layout.num_units)
    widths = [layout.unit_slices(unit)[2] for unit in range(layout.units_per_layer)]

    def size(unit):
        part = widths[unit % layout.units_per_layer]
        return (part.start - part.stop, unit % layout.units_per_layer)

    plan, order = [False] * layout.num_units, sorted(range(layout.num_units), key=size)
    for count, unit in enumerate(order, 1):
        plan[unit] = True
        assert model.layers_cost(644, plan) - model.layers_cost(644, count) <= bound * full


def test_layers_run_counts_units_as_parts_of_layers():
    model = published("llava-1.5-13b", design="heads")
    assert model.layers_run(644, 0) == 20
    assert model.layers_run(644, 16) == Fraction("23.2")
    assert model.layers_run(644, 100) == 40
    with pytest.raises(ValueError, match="a plan"):
        model.layers_run(644, [True] * 100)


def test_mean_lengths_are_exact():
    model = published("llava-1.5-7b", "exact")
    assert isinstance(model.prefill(644, 3), int)
    mean = [model.prefill(n, 3) for n in (644.28, Fraction("644.28"), np.float64(644.28))]
    assert mean[0] == mean[1] == mean[2]
    assert model.prefill(644, 3) < mean[0] < model.prefill(645, 3)
    assert model.prefill(np.int64(644), 3) == model.prefill(np.full(32, 644), 3)
    assert model.prefill(torch.full((32,), 644), np.int64(3)) == model.prefill(644, 3)


def test_cost_model_survives_pickling():
    model = published("llava-1.5-7b")
    assert pickle.loads(pickle.dumps(model)).max_units("0.6", 644) == 3


@pytest.mark.parametrize(
    "budget",
    [True, False, None, "nan", math.nan, math.inf, -math.inf, "inf", "much", "", "60%", [0.6],
     1.01, "1.0000000000000000001", "1e999999999", 2, 0.49, "0.49", 0, "0", -0.6, "1e-999999999",
     "0e999999999", 1 + 0j, Fraction(499, 1000), np.float32(0.4), "0." + "6" * 99],
)  # fmt: skip
def test_wrong_budgets_name_the_smallest(budget):
    with pytest.raises(ValueError, match=r"the smallest budget here is 0\.5, the largest 1"):
        published("llava-1.5-7b").max_units(budget, 644)


def test_the_smallest_budget_is_accepted_although_it_is_no_decimal():
    config = LlamaConfig(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8
    )
    model = CostModel(config, SwitchLayout.layers(config))
    assert Fraction(str(model.min_budget(7))) >= Fraction(1, 3)
    assert model.max_units(model.min_budget(7), 7) == 0
    with pytest.raises(ValueError, match="less than the layers that always run"):
        model.max_units(0.3333, 7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.prefill(0, 1), "tokens is 0"),
        (lambda m: m.prefill(-3, 1), "positive length"),
        (lambda m: m.prefill(math.nan, 1), "tokens is 'nan'"),
        (lambda m: m.prefill(True, 1), "tokens is True"),
        (
            lambda m: m.prefill([644] * 31, 1),
            r"31 entries; it must be one length, or one per layer \(32\)",
        ),
        (lambda m: m.max_units(0.6, None), "tokens is None"),
        (lambda m: m.prefill(644, 17), r"0\.\.16"),
        (lambda m: m.prefill(644, -1), "units_on is -1"),
        (lambda m: m.prefill(644, True), "units_on is True"),
        (lambda m: m.prefill(644, 2.0), "units_on is 2.0"),
        (lambda m: m.prefill(644, [True] * 15), "a plan is 16"),
        (lambda m: m.prefill(644, [2] * 16), "truth values"),
    ],
)
def test_wrong_arguments_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(published("llava-1.5-7b"))


def test_unsupported_decoders_are_errors():
    config = LlamaConfig(num_hidden_layers=4)
    layout = SwitchLayout.layers(config)
    with pytest.raises(ValueError, match="'llm-viewer'"):
        CostModel(config, layout, "flops")
    with pytest.raises(ValueError, match="num_layers 4 but the config has 5"):
        CostModel(LlamaConfig(num_hidden_layers=5), layout)
    mixture = MixtralConfig(num_hidden_layers=4)
    with pytest.raises(ValueError, match="mixture of experts"):
        CostModel(mixture, SwitchLayout.layers(mixture))
    config.vocab_size = 0
    with pytest.raises(ValueError, match="vocab_size"):
        CostModel(config, layout)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_exact_number_is_the_decimal_as_written(value):
    assert exact_number(value, "x") == Fraction(str(value)) == exact_number(str(value), "x")

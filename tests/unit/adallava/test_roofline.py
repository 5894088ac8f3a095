"""Roofline times against the dissertation's V100 times and a formula written out."""

from fractions import Fraction

import pytest
from transformers import LlamaConfig

from fmray.adallava.cost import CostModel
from fmray.adallava.layout import SwitchLayout
from fmray.adallava.presets import DEVICES, Device, device, prefill_seconds, preset

MEAN = preset("llava-1.5-7b").tokens


# Dissertation tables 5.1 and C.2: milliseconds at budgets 1, 0.85 and 0.60.
@pytest.mark.parametrize(
    ("name", "tokens", "published"),
    [
        ("llava-1.5-7b", MEAN, (81, 69, 49)),
        ("llava-1.5-13b", MEAN, (157, 133, 94)),
        ("llava-1.5-7b", [MEAN] * 2 + [MEAN - 288] * 30, (47, 40, 29)),
        ("llava-1.5-7b", MEAN - 576 + 39, (16, 14, 10)),
        ("llava-1.5-7b", MEAN - 576 + 164, (29, 24, 17)),
    ],
    ids=["7b", "13b", "fastv", "prumerge", "prumerge+"],
)
def test_times_are_the_published_ones(name, tokens, published):
    text = preset(name).text_config
    model = CostModel(text, SwitchLayout.layers(text))
    for budget, milliseconds in zip(("1", "0.85", "0.6"), published, strict=True):
        units = int(Fraction(budget) * model.layout.num_layers) - model.layout.first
        measured = 1e3 * prefill_seconds(model, tokens, units, DEVICES["V100"])
        assert abs(measured - milliseconds) <= 0.6


def test_formula_written_out():
    config = LlamaConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        num_key_value_heads=1, vocab_size=10,
    )  # fmt: skip
    model = CostModel(config, SwitchLayout.layers(config))
    n, d, f = 5, 8, 16
    # infinite bandwidth leaves operations, an infinite peak leaves bytes
    operations = 2 * n * (2 * d * d + 2 * d * 4 + 3 * d * f) + 4 * n * n * d
    operations += 5 * 2 * n * n + 18 * d * n
    compute = prefill_seconds(model, n, 1, Device("compute", 1.0, float("inf")))
    assert compute == pytest.approx(2 * operations + d * 10)
    weights = 2 * d * d + 2 * d * 4 + 3 * d * f
    activations = n * (2 * (d + d) + 2 * (d + 4) + 3 * (d + f)) + 2 * n * (d + 4)
    activations += 4 * 2 * n * n + 4 * 2 * d * n + 3 * d * n
    memory = prefill_seconds(model, n, 1, Device("memory", float("inf"), 1.0))
    assert memory == pytest.approx(2 * (2 * (weights + activations) + d * 10 + d + 10))
    both = prefill_seconds(model, n, 1, Device("both", 1.0, 1.0))
    assert max(compute, memory) <= both <= compute + memory


def test_heads_take_their_share_of_a_layer():
    text = preset("llava-1.5-7b").text_config
    heads = CostModel(text, SwitchLayout.heads(text))
    layers = CostModel(text, SwitchLayout.layers(text))
    on = DEVICES["H200"]
    for units in range(17):
        assert prefill_seconds(heads, 644, 4 * units, on) == pytest.approx(
            prefill_seconds(layers, 644, units, on), rel=1e-12
        )


def test_unknown_device_is_an_error():
    assert device("L4").bandwidth == 300e9
    with pytest.raises(ValueError, match="'TPU' is unknown; there are V100, A100-80GB"):
        device("TPU")

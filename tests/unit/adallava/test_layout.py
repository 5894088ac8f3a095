"""The layout: heads and channels of each unit, for all decoder configs."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen2VLConfig,
)

from fmray.adallava.layout import SwitchLayout


def llama(**changes):
    values = {
        "hidden_size": 64,
        "num_hidden_layers": 7,
        "num_attention_heads": 8,
        "intermediate_size": 172,
    }
    return LlamaConfig(**{**values, **changes})


def test_numbers_of_units_are_the_published_ones():
    seven = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008
    )
    thirteen = LlamaConfig(
        hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13824
    )
    assert SwitchLayout.layers(seven).num_units == 16
    assert SwitchLayout.layers(thirteen).num_units == 20
    assert SwitchLayout.heads(seven).num_units == 64
    assert SwitchLayout.heads(seven, unit=4).num_units == 128
    layout = SwitchLayout.heads(thirteen)
    assert layout.num_units == 100
    sizes = [layout.unit_slices(unit)[2] for unit in range(5)]
    assert sorted(part.stop - part.start for part in sizes) == [2764, 2765, 2765, 2765, 2765]


def test_default_layout_and_slices():
    layout = SwitchLayout.layers(llama())
    assert (layout.first, layout.num_units, layout.units_per_layer) == (3, 4, 1)
    assert layout.unit_slices(0) == (slice(0, 8), slice(0, 8), slice(0, 172))
    heads = SwitchLayout.heads(llama(), first=5, unit=3)
    assert (heads.units_per_layer, heads.num_units) == (3, 6)
    assert [heads.unit_slices(u)[0] for u in range(3)] == [slice(0, 3), slice(3, 6), slice(6, 8)]


def test_key_value_groups_stay_complete():
    config = llama(num_attention_heads=12, num_key_value_heads=3, hidden_size=96)
    layout = SwitchLayout.heads(config, unit=8)  # two groups of four query heads
    assert layout.unit == 8
    assert [layout.unit_slices(u)[:2] for u in range(2)] == [
        (slice(0, 8), slice(0, 2)),
        (slice(8, 12), slice(2, 3)),
    ]
    assert SwitchLayout.heads(config, unit=1).unit == 4


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=128,
            head_dim=32,
        ),
        Qwen2Config(
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=128,
        ),
        PhiConfig(
            hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128
        ),
        LlavaConfig(text_config=llama(num_hidden_layers=4)),
        Qwen2VLConfig(
            text_config={
                "hidden_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 128,
            }
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_layout_reads_every_family(config):
    text = getattr(config, "text_config", config)
    layout = SwitchLayout.heads(config, unit=2)
    assert layout == SwitchLayout.heads(text, unit=2)
    assert layout.num_layers == 4
    assert layout.num_heads == text.num_attention_heads
    assert layout.num_kv_heads == (text.num_key_value_heads or text.num_attention_heads)
    assert layout.head_dim == (
        getattr(text, "head_dim", None) or text.hidden_size // layout.num_heads
    )
    assert SwitchLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@given(
    group=st.integers(1, 6),
    kv_heads=st.integers(1, 12),
    extra=st.integers(0, 300),
    unit=st.integers(1, 80),
    layers=st.integers(2, 9),
    data=st.data(),
)
def test_units_cover_each_layer_once(group, kv_heads, extra, unit, layers, data):
    heads = group * kv_heads
    config = LlamaConfig(
        hidden_size=heads * 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=heads + extra,
    )
    layout = SwitchLayout.heads(config, first=data.draw(st.integers(1, layers - 1)), unit=unit)
    parts = [layout.unit_slices(u) for u in range(layout.units_per_layer)]
    for kind, total in enumerate((heads, kv_heads, heads + extra)):
        assert [i for part in parts for i in range(part[kind].start, part[kind].stop)] == list(
            range(total)
        )
    for query, key, channels in parts:
        assert query.stop - query.start == group * (key.stop - key.start) > 0
        share = (heads + extra) * (query.stop - query.start) / heads
        assert abs(channels.stop - channels.start - share) < 1
    full = [
        channels.stop - channels.start
        for query, _, channels in parts
        if query.stop - query.start == layout.unit
    ]
    assert max(full) - min(full) <= 1
    assert layout.num_units == len(parts) * (layers - layout.first)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SwitchLayout.layers(llama(), first=0), "first is 0"),
        (lambda: SwitchLayout.layers(llama(), first=7), r"1\.\.6"),
        (lambda: SwitchLayout.layers(llama(), first=True), "first is True"),
        (lambda: SwitchLayout.layers(llama(), first=2.5), "first is 2.5"),
        (lambda: SwitchLayout.layers(llama(num_hidden_layers=1)), "num_layers is 1"),
        (lambda: SwitchLayout.heads(llama(), unit=0), "unit is 0"),
        (lambda: SwitchLayout.heads(llama(), unit="8"), "unit is '8'"),
        (lambda: SwitchLayout.layers({"hidden_size": 3}), "dict.num_attention_heads is None"),
        (lambda: SwitchLayout.layers(llama(intermediate_size=7)), "intermediate_size 7"),
        (lambda: SwitchLayout.layers(llama()).unit_slices(1), "0..0"),
        (lambda: SwitchLayout.from_dict({"design": "layers", "colour": 1}), "unknown keys"),
        (lambda: SwitchLayout("rows", 2, 1, 1, 1, 1, 1, 1, 1), "'rows'"),
        (lambda: SwitchLayout("heads", 2, 1, 4, 3, 1, 1, 4, 1), "multiple of num_kv_heads"),
        (lambda: SwitchLayout("heads", 2, 1, 4, 2, 1, 1, 4, 1), "unit 1 is not a multiple"),
    ],
)
def test_wrong_layouts_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()

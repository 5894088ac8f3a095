"""Arenas against a dictionary of tensors, for any order of joining and leaving rows."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import tiny_llava
from torch import nn

from fmray.adallava import SwitchLayout
from fmray.engine.kv_memory import Arena, DecodeCache, KVMemory, PrefillCache

HEADS, DIM = 2, 4


class Row:
    """Any object that is only equal to itself."""


def layout(design: str = "layers") -> SwitchLayout:
    config = tiny_llava(layers=4, heads=8).config.text_config  # 2 key/value heads of 16
    made = SwitchLayout.layers(config) if design == "layers" else SwitchLayout.heads(config, unit=4)
    assert made.num_kv_heads == HEADS
    return made


LAYOUTS = {design: layout(design) for design in ("layers", "heads")}

steps = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.integers(1, 90), st.integers(0, 15)),
        st.tuples(st.just("leave"), st.integers(0, 7), st.just(0)),
        st.tuples(st.just("grow"), st.just(0), st.just(0)),
    ),
    max_size=30,
)


@given(design=st.sampled_from(["layers", "heads"]), steps=steps, bound=st.integers(2, 14))
@settings(max_examples=150, deadline=None)
def test_arenas_keep_their_contents_and_bound(design: str, steps, bound: int) -> None:
    """Random rows and plans: contents survive moves, and bytes are bounded also during a move."""
    shape = LAYOUTS[design]
    units = shape.units_per_layer
    linear = nn.Linear(1, 1)
    memory = KVMemory(shape, torch.float32, bound * 8192, 6)
    peak = 0
    resize = Arena.resize

    def watched(arena: Arena, slots: int, capacity: int) -> None:
        nonlocal peak
        peak = max(peak, memory.bytes + arena.bytes_of(slots, capacity))
        resize(arena, slots, capacity)

    Arena.resize = watched
    try:
        lengths: dict[Row, int] = {}
        needs: dict[Row, int] = {}
        held: dict[tuple[Row, object], torch.Tensor] = {}
        for kind, first, bits in steps:
            if kind == "join":
                plan = [bool(bits >> unit & 1) for unit in range(shape.num_units)]
                if len(needs) == 6 or not memory.has_room(first, sum(plan)):
                    continue
                row = Row()
                memory.reserve(row, first, sum(plan))
                needs[row], lengths[row] = first, max(1, first // 2)
                for layer in range(4):
                    pattern = (True,) * units
                    if layer >= shape.first:
                        start = (layer - shape.first) * units
                        pattern = tuple(plan[start : start + units])
                    if not any(pattern):
                        continue
                    heads = memory.token.heads(pattern)
                    arena, slot = memory.place(row, (layer, pattern), layer, linear, heads, 1.0)
                    content = torch.randn(2, heads, lengths[row], shape.head_dim)
                    keys, values = PrefillCache(arena, slot).update(content[:1], content[1:])
                    assert torch.equal(keys[0], content[0]) and torch.equal(values[0], content[1])
                    held[row, (layer, pattern)] = content
            elif kind == "leave" and needs:
                row = list(needs)[first % len(needs)]
                memory.release(row)
                del needs[row], lengths[row]
                held = {key: value for key, value in held.items() if key[0] is not row}
            elif kind == "grow" and all(lengths[row] < needs[row] for row in needs):
                for (layer, pattern), arena in memory._arenas.items():
                    own = [lengths[row] for row in arena.rows]
                    new = torch.randn(2, len(own), arena.heads, 1, shape.head_dim)
                    places = torch.arange(len(own)), torch.tensor(own)
                    DecodeCache(arena, own, places).update(new[0], new[1])
                    for slot, row in enumerate(arena.rows):
                        key = row, (layer, pattern)
                        held[key] = torch.cat((held[key], new[:, slot]), dim=2)
                lengths = {row: length + 1 for row, length in lengths.items()}
            seen = {(row, key) for key, arena in memory._arenas.items() for row in arena.rows}
            assert seen == set(held)
            for (row, key), content in held.items():
                arena = memory._arenas[key]
                slot, length = arena.rows.index(row), content.shape[2]
                assert torch.equal(arena.keys[slot, :, :length], content[0])
                assert torch.equal(arena.values[slot, :, :length], content[1])
            assert memory.bytes <= memory.bound and memory.reserved <= memory.bound
        assert peak <= memory.bound
        for row in list(needs):
            memory.release(row)
        assert memory.bytes == memory.reserved == 0
    finally:
        Arena.resize = resize


def test_a_reused_slot_is_cleared() -> None:
    """NaN in one row's keys must not reach a later row through a mask (0 x NaN)."""
    shape = LAYOUTS["layers"]
    memory = KVMemory(shape, torch.float32, 1 << 20, 4)
    linear = nn.Linear(1, 1)
    rows = [Row() for _ in range(3)]
    for row in rows[:2]:
        memory.reserve(row, 8, 0)
        arena, slot = memory.place(row, 0, 0, linear, HEADS, 1.0)
        PrefillCache(arena, slot).update(*torch.full((2, 1, HEADS, 8, 16), float("nan")))
    memory.release(rows[0])
    memory.reserve(rows[2], 8, 0)
    arena, slot = memory.place(rows[2], 0, 0, linear, HEADS, 1.0)
    assert slot == 1 and bool((arena.keys[1] == 0).all()) and bool((arena.values[1] == 0).all())


def test_bytes_per_token() -> None:
    token = KVMemory(LAYOUTS["heads"], torch.bfloat16, 0, 1).token
    assert token.layer == 2 * HEADS * 16 * 2
    assert [token.of(k) for k in range(5)] == [
        2 * token.layer + k * token.layer // 2 for k in range(5)
    ]
    assert token.heads((True, False)) == 1 and token.heads((True, True)) == 2

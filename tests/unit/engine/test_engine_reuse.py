"""Cached features and prefixes equal recomputed ones, and the caches are bounded."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine import expected, model_of, request_for, row_for, run

from fmray.engine.engine import Engine
from fmray.engine.reuse import PrefixCache, TensorCache

NEW = 8


def longer(row: dict, tokens: int) -> dict:
    """One more turn: the same prefix and image, `tokens` more at the end."""
    extra = torch.arange(10, 10 + tokens)[None]
    made = dict(row, input_ids=torch.cat((row["input_ids"], extra), dim=1))
    made["attention_mask"] = torch.ones_like(made["input_ids"])
    if "mm_token_type_ids" in row:
        made["mm_token_type_ids"] = torch.cat(
            (row["mm_token_type_ids"], torch.zeros_like(extra).int()), dim=1
        )
    return made


def lower_keys(engine: Engine) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the one running request in the always-on layers."""
    [row] = engine._running
    arenas = engine.memory.arenas()[: engine.model.layout.first]
    return [(a.keys[0, :, : row.length], a.values[0, :, : row.length]) for a in arenas]


@pytest.mark.parametrize("token", ["probe", "inline"])
@pytest.mark.parametrize("design", ["layers", "heads"])
@pytest.mark.parametrize("family", ["llama", "phi", "llava_next", "qwen2_vl"])
def test_prefix_equals_recompute(family: str, design: str, token: str) -> None:
    """One budget first, then others, with the same and a longer prompt: the keys of the always-on
    layers and the answers equal those of an engine without caches.
    """
    model = model_of(family, design, token)
    row = row_for(model, family, 17)
    length = row["input_ids"].shape[1]
    engine = Engine(model, None, prefix_block=4)
    run(engine, [request_for(model, row, "first", "1", "image", max_new_tokens=NEW)])
    seen: list[int] = []
    hook = model.backbone.layers[0].register_forward_hook(
        lambda _, given, __: seen.append(given[0].shape[1])
    )
    for budget in ("0.5", "0.75", "1"):
        for turn in (row, longer(row, 7)):
            fresh = Engine(model, None, prefix_bytes=0, vision_bytes=0)
            request = request_for(model, turn, "a", budget, "image", max_new_tokens=NEW)
            fresh.start(request)
            events = fresh.step()
            seen.clear()
            engine.start(request)
            assert engine.step()[0].tokens == events[0].tokens
            # The lowest layer computes the rest of the prompt and the latency token.
            known = (length if turn is row or budget == "0.5" else length + 7) // 4 * 4
            assert sum(seen) == turn["input_ids"].shape[1] - known + 1
            if not engine.active:
                assert not fresh.active
                continue
            for ours, theirs in zip(lower_keys(engine), lower_keys(fresh), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
            transcript = run(engine)
            assert transcript.tokens == run(fresh).tokens
            assert events[0].tokens[0:1] + tuple(transcript.tokens["a"]) == tuple(
                expected(model, turn, budget, NEW)
            )
            result = transcript.last["a"].result
            assert result.prefix_tokens == known and result.vision_hit
    hook.remove()


def test_other_images_are_not_reused() -> None:
    model = model_of("llama", "layers", "probe")
    row = row_for(model, "llama", 17)
    other = dict(row, pixel_values=row["pixel_values"] + 1)
    engine = Engine(model, None, prefix_block=1)
    answers = {}
    for name, (asked, key) in {
        "a": (row, "one"),
        "b": (other, "two"),
        "c": (other, None),
        "d": (row, None),
        "e": (row, "one"),
    }.items():
        transcript = run(engine, [request_for(model, asked, name, "0.75", key, max_new_tokens=NEW)])
        answers[name] = (transcript.tokens[name], transcript.last[name].result)
        assert transcript.tokens[name] == expected(model, asked, "0.75", NEW)
    # All share the token before the image; without a key, nothing from the image on is cached.
    assert [answers[name][1].prefix_tokens for name in "abcde"] == [0, 1, 1, 1, 17]
    assert [answers[name][1].vision_hit for name in "abcde"] == [False, False, False, False, True]


def test_text_alone_is_reused_without_a_key() -> None:
    model = model_of("llama", "layers", "inline")
    row = {"input_ids": torch.arange(10, 30)[None]}
    engine = Engine(model, None, prefix_block=8)
    for budget, known in (("1", 0), ("0.5", 16)):
        transcript = run(engine, [request_for(model, row, "a", budget, max_new_tokens=NEW)])
        assert transcript.last["a"].result.prefix_tokens == known
        assert transcript.tokens["a"] == expected(model, row, budget, NEW)
        assert not transcript.last["a"].result.vision_hit


def test_the_vision_tower_runs_once_per_image() -> None:
    model = model_of("qwen2_vl", "layers", "probe")
    calls = []
    hook = model.base.model.visual.register_forward_hook(lambda *_: calls.append(1))
    engine = Engine(model, None, prefix_bytes=0)
    row = row_for(model, "qwen2_vl", 9)
    requests = [
        request_for(model, row, str(n), budget, "k", max_new_tokens=NEW)
        for n, budget in enumerate(("0.5", "1", "0.75"))
    ]
    transcript = run(engine, requests)
    hook.remove()
    assert len(calls) == 1
    assert [transcript.last[str(n)].result.vision_hit for n in range(3)] == [False, True, True]
    for n, budget in enumerate(("0.5", "1", "0.75")):
        assert transcript.tokens[str(n)] == expected(model, row, budget, NEW)
    assert engine.stats.vision_hits == 2 and engine.stats.vision_bytes == 4 * 64 * 4
    assert engine.stats.prefix_bytes == 0


def test_the_prefix_cache_stores_prompts_within_its_bound() -> None:
    """A token takes its keys, values and hidden state; the oldest blocks are evicted first."""
    model = model_of("llama", "layers", "inline")
    token = 2 * 2 * 2 * 16 * 4 + 64 * 4  # 2 layers, 2 heads of 16, and 64 of the hidden state
    engine = Engine(model, None, prefix_block=4, prefix_bytes=6 * 4 * token)
    first = {"input_ids": torch.arange(10, 27)[None]}  # 4 full blocks
    second = {"input_ids": torch.arange(30, 47)[None]}
    run(engine, [request_for(model, first, "a", max_new_tokens=NEW)])
    assert engine.stats.prefix_bytes == 4 * 4 * token
    run(engine, [request_for(model, second, "a", max_new_tokens=NEW)])
    assert engine.stats.prefix_bytes == 6 * 4 * token
    transcript = run(engine, [request_for(model, first, "a", max_new_tokens=NEW)])
    assert transcript.last["a"].result.prefix_tokens == 8  # its last blocks were evicted
    assert transcript.tokens["a"] == expected(model, first, "1", NEW)


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["put", "get", "touch"]), st.integers(0, 5), st.integers(0, 12)),
        max_size=40,
    ),
    bound=st.integers(0, 80),
)
@settings(max_examples=200, deadline=None)
def test_the_least_recently_used_entry_is_evicted_first(steps, bound: int) -> None:
    cache, plain = TensorCache(bound), OrderedDict()
    for kind, key, size in steps:
        if kind == "put":
            cache.put(key, (torch.zeros(size), torch.zeros(1)))
            plain.pop(key, None)
            if 4 * (size + 1) <= bound:
                plain[key] = size
            while sum(4 * (s + 1) for s in plain.values()) > bound:
                plain.popitem(last=False)
        else:
            cached = cache.get(key) if kind == "get" else cache.touch(key)
            assert bool(cached) == (key in plain)
            if key in plain:
                plain.move_to_end(key)
        assert len(cache) == len(plain)
        assert cache.bytes == sum(4 * (s + 1) for s in plain.values()) <= bound


@given(
    a=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    b=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    keys=st.tuples(st.sampled_from(["x", "y", None]), st.sampled_from(["x", "y", None])),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    block=st.integers(1, 4),
)
@settings(max_examples=300, deadline=None)
def test_prefix_keys_are_equal_where_prompts_are(a, b, keys, sizes, block: int) -> None:
    """Token 3 is the image token: blocks before it have the same key for every image."""
    from fmray.engine.requests import Request

    cache = PrefixCache(0, block, image_token=3)
    results = []
    for ids, key, size in zip((a, b), keys, sizes, strict=True):
        inputs = {
            "input_ids": torch.tensor([ids]),
            "pixel_values": torch.zeros(1),
            "image_sizes": torch.tensor([[size, size]]),
        }
        results.append(cache.keys(Request("r", inputs, key, 0)))
    for block_keys, ids, key in zip(results, (a, b), keys, strict=True):
        covered = ids if key is not None or 3 not in ids else ids[: ids.index(3)]
        assert len(block_keys) == len(covered) // block
    same_image = keys[0] == keys[1] and sizes[0] == sizes[1]
    for number, (one, two) in enumerate(zip(*results, strict=False)):
        end = (number + 1) * block
        same = a[:end] == b[:end] and (same_image or 3 not in a[:end])
        assert (one == two) == same
    with pytest.raises(ValueError, match="block"):
        PrefixCache(0, 0, 3)

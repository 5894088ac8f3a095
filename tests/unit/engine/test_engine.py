"""The engine: starting and ending requests, failures, memory and sampling."""

from __future__ import annotations

import gc
import resource

import pytest
import torch
from support.engine import model_of, request_for, row_for, run
from support.tiny_models import adaptive, tiny_llava
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from fmray.engine.engine import Engine
from fmray.engine.requests import Request, Sampling
from fmray.engine.tokens import generator_of, sample_tokens

NEW = 8


@pytest.fixture(scope="module")
def model():
    return model_of("llama", "layers", "probe")


@pytest.fixture
def row(model):
    return row_for(model, "llama", 9)


def test_off_layers_are_not_run_and_hold_no_keys(model, row) -> None:
    """Hooks count the rows in each layer's key projection; arenas contain these rows only."""
    engine = Engine(model, None, eos=())
    plans = {"a": [True, False], "b": [False, True], "c": [False, False], "d": [True, True]}
    calls: list[tuple[int, int, int]] = []
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(
            lambda _, given, __, index=index: calls.append((index, *given[0].shape[:2]))
        )
        for index, layer in enumerate(model.backbone.layers)
    ]
    for name, plan in plans.items():
        engine.start(request_for(model, row, name, plan=torch.tensor(plan), max_new_tokens=12))
    while engine.stats.prefill_steps < 4:
        engine.step()
    calls.clear()
    engine.step()
    for hook in hooks:
        hook.remove()
    assert engine.timing.kind == "decode" and engine.timing.rows == 4
    assert calls == [(0, 4, 1), (1, 4, 1), (2, 2, 1), (3, 2, 1)]
    held = {a.layer: sorted(r.request.id for r in a.rows) for a in engine.memory.arenas()}
    assert held == {0: list("abcd"), 1: list("abcd"), 2: ["a", "d"], 3: ["b", "d"]}
    assert engine.timing.units_on == 4 and engine.timing.layers == 4
    engine.cancel("d")
    engine.cancel("b")
    engine.step()
    assert {a.layer for a in engine.memory.arenas()} == {0, 1, 2}  # no arena without rows


def test_heads_hold_keys_of_their_units_only() -> None:
    model = model_of("llama", "heads", "inline")  # 2 units per layer, one key/value head each
    row = row_for(model, "llama", 9)
    engine = Engine(model, None, eos=())
    plans = [[1, 0, 0, 0], [1, 0, 0, 1], [0, 1, 1, 1]]
    for number, plan in enumerate(plans):
        plan = torch.tensor(plan).bool()
        engine.start(request_for(model, row, str(number), plan=plan, max_new_tokens=5))
    while engine.stats.decode_steps < 3 or engine.stats.prefill_steps < 3:
        engine.step()
    upper = [a for a in engine.memory.arenas() if a.layer >= 2]
    shapes = sorted((a.layer, a.keys.shape[1], len(a.rows)) for a in upper)
    assert shapes == [(2, 1, 1), (2, 1, 2), (3, 1, 1), (3, 2, 1)]
    before = engine.stats
    assert engine.step()
    after = engine.stats
    # Layer 2 has patterns 10 (two rows) and 01 (one row); layer 3 has 01 and 11, one row each.
    assert after.packed_calls - before.packed_calls == 4
    assert after.packed_unshared - before.packed_unshared == 3
    assert after.packed_unsaved - before.packed_unsaved == 2


def test_requests_start_while_there_are_rows_and_memory(model, row) -> None:
    token = 2 * 2 * 16 * 4  # bytes of keys and values per token and layer
    need = (9 + NEW) * token * (2 + 2 + 1)  # 2 always-on layers, 2 units, space to move one arena
    request = request_for(model, row, max_new_tokens=NEW)
    engine = Engine(model, None, max_rows=2, kv_bytes=2 * need)
    assert engine.fits(request) and engine.can_start(request)
    longer = request_for(model, row, "long", max_new_tokens=2 * NEW + 10)
    assert not engine.fits(longer) and not engine.can_start(longer)
    engine.start(request)
    assert engine.stats.kv_reserved == need
    with pytest.raises(ValueError, match="running already"):
        engine.start(request)
    smaller = request_for(model, row, "small", "0.5", max_new_tokens=NEW)
    engine.start(smaller)
    third = request_for(model, row, "third", max_new_tokens=1)
    assert not engine.can_start(third) and engine.active == 2
    with pytest.raises(ValueError, match="no room"):
        engine.start(third)
    run(engine)
    assert engine.can_start(third)
    with pytest.raises(ValueError, match="the model has 2"):
        engine.start(Request("x", row, None, 3))
    with pytest.raises(ValueError, match="the model has 2"):
        engine.start(Request("x", row, None, 2, torch.ones(3).bool()[:1]))
    with pytest.raises(ValueError, match="tokenizer"):
        engine.start(request_for(model, row, max_new_tokens=1, stop=("x",)))
    assert engine.active == 0 and engine.stats.kv_reserved == 0


def test_cancelling_takes_one_step_and_frees_memory(model, row) -> None:
    engine = Engine(model, None, eos=())
    for name in "abc":
        engine.start(request_for(model, row, name, max_new_tokens=50))
    for _ in range(4):
        engine.step()  # prefill, decode, prefill, decode; c waits
    held = engine.stats.kv_reserved
    engine.cancel("a")
    engine.cancel("c")
    engine.cancel("nobody")
    events = {e.request: e for e in engine.step()}
    assert events["a"].finished == events["c"].finished == "cancelled"
    assert events["a"].result.completion_tokens == 3 and events["c"].result.plan == ()
    assert events["b"].finished is None and engine.active == 1
    assert engine.stats.kv_reserved == held // 3
    engine.cancel("b")
    assert [e.finished for e in engine.step()] == ["cancelled"]
    assert engine.stats.kv_bytes == engine.stats.kv_reserved == 0 and engine.timing is None
    assert engine.step() == []


def test_a_failing_request_fails_alone(model, row, monkeypatch) -> None:
    engine = Engine(model, None, eos=())
    alone = run(Engine(model, None, eos=()), [request_for(model, row, "good", max_new_tokens=NEW)])
    broken = dict(row, pixel_values=row["pixel_values"].repeat(2, 1, 1, 1))  # one image too many
    poison = dict(row, pixel_values=row["pixel_values"] * float("nan"))
    good = request_for(model, row, "good", max_new_tokens=NEW)
    transcript = run(
        engine,
        [
            request_for(model, poison, "poison", max_new_tokens=NEW),
            good,
            request_for(model, broken, "broken", max_new_tokens=NEW),
        ],
    )
    assert transcript.last["broken"].finished == transcript.last["poison"].finished == "error"
    assert "do not match" in transcript.last["broken"].error
    assert "not finite" in transcript.last["poison"].error
    assert transcript.tokens["good"] == alone.tokens["good"]

    def fail(*_, **__):
        raise RuntimeError("out of luck")

    engine.start(good)
    engine.step()
    with monkeypatch.context() as patch:  # in an upper layer, when keys are in the arenas already
        patch.setattr(model.backbone.layers[3].mlp, "forward", fail)
        engine.start(request_for(model, row, "late", max_new_tokens=NEW))
        engine._prefill_next = True
        [event] = engine.step()
    assert event.request == "late" and event.error == "RuntimeError: out of luck"
    assert all(len(arena.rows) == 1 for arena in engine.memory.arenas())
    assert run(engine).tokens["good"] == alone.tokens["good"][1:]
    assert engine.stats.failed == 3 and engine.stats.kv_bytes == 0


def test_a_failed_decode_step_can_be_repeated(model, row, monkeypatch) -> None:
    expected = run(Engine(model, None, eos=()), [request_for(model, row, max_new_tokens=NEW)])
    engine = Engine(model, None, eos=())
    engine.start(request_for(model, row, max_new_tokens=NEW))
    first = engine.step()

    def fail(*_, **__):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(model.backbone.layers[3].mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="luck"):
            engine.step()
    assert [*first[0].tokens, *run(engine).tokens["a"]] == expected.tokens["a"]


def test_prefills_and_decode_steps_alternate(model, row) -> None:
    engine = Engine(model, None, eos=())
    for name in "abc":
        engine.start(request_for(model, row, name, "0.5", max_new_tokens=4))
    kinds = []
    while engine.active:
        engine.step()
        kinds.append((engine.timing.kind[0], engine.timing.rows))
    assert kinds == [("p", 1), ("d", 1), ("p", 1), ("d", 2), ("p", 1), ("d", 3), ("d", 2), ("d", 1)]
    assert engine.stats.completion_tokens == 12 and engine.stats.finished == 3


def test_invalid_settings_and_requests_are_an_error() -> None:
    model = adaptive(tiny_llava(layers=2))
    with pytest.raises(ValueError, match="max_rows"):
        Engine(model, None, max_rows=0)
    model.backbone.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="sdpa"):
        Engine(model, None)
    ids = torch.ones(1, 3, dtype=torch.long)
    for wrong in (
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": 1.5},
        {"stop": ("",)},
        {"stop": "abc"},
    ):
        with pytest.raises(ValueError):
            Sampling(**wrong)
    for inputs, options in (
        ({}, {}),
        ({"input_ids": ids[0]}, {}),
        ({"input_ids": ids[:, :0]}, {}),
        ({"input_ids": ids.repeat(2, 1)}, {}),
        ({"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1]])}, {}),
        ({"input_ids": ids}, {"units_on": -1}),
        ({"input_ids": ids}, {"plan": torch.ones(2)}),
        ({"input_ids": ids}, {"plan": torch.ones(2).bool()}),
    ):
        with pytest.raises(ValueError):
            Request("a", inputs, None, **({"units_on": 1} | options))


# --- Sampling -------------------------------------------------------------------------------


def test_sampled_answers_do_not_depend_on_other_rows(model) -> None:
    rows = [row_for(model, "llama", 8 + seed, seed) for seed in range(5)]
    sampling = {"temperature": 1.3, "top_p": 0.9, "max_new_tokens": 12}
    requests = [
        request_for(model, r, str(n), "0.75", seed=n, **sampling) for n, r in enumerate(rows)
    ]
    together = run(Engine(model, None, eos=()), requests).tokens
    for request in requests:
        alone = run(Engine(model, None, eos=()), [request]).tokens[request.id]
        assert alone == together[request.id]
    other = request_for(model, rows[0], "0", "0.75", seed=99, **sampling)
    assert run(Engine(model, None, eos=()), [other]).tokens["0"] != together["0"]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.2, 0.7, 1.0])
def test_samples_follow_the_distribution(temperature: float, top_p: float) -> None:
    """20000 samples against the probabilities of transformers' warpers."""
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    probabilities = scores.softmax(-1)[0]
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=3)
    generator = generator_of(sampling)
    tokens, finite = sample_tokens(logits.expand(20000, -1), [(sampling, generator)] * 20000)
    counts = torch.bincount(torch.tensor(tokens), minlength=12) / 20000
    assert all(finite)
    assert bool((counts[probabilities == 0] == 0).all())
    assert float((counts - probabilities).abs().max()) < 0.015  # four standard deviations


def test_sampling_extreme_logits() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, float("nan"), 1.0], [1.0, 2.0, 1e38]])
    cold = Sampling(temperature=1e-300)
    tokens, finite = sample_tokens(logits, [(cold, generator_of(cold))] * 3)
    assert (tokens[0], tokens[2]) == (1, 2) and finite == [True, False, True]
    tokens, finite = sample_tokens(logits, [(Sampling(), generator_of(Sampling()))] * 3)
    assert (tokens[0], tokens[2]) == (1, 2) and finite == [True, False, True]


# --- Memory ---------------------------------------------------------------------------------


def test_memory_does_not_grow() -> None:
    """700 mixed requests; `benchmarks/engine.py --soak` runs 10^4 of them."""
    model = adaptive(tiny_llava(layers=2, heads=2), latency_token="probe")
    engine = Engine(
        model, None, max_rows=4, prefix_bytes=1 << 15, prefix_block=2, vision_bytes=1 << 12
    )
    rows = [row_for(model, "llama", 6 + seed % 7, seed) for seed in range(40)]
    objects, resident, sent, started = 0, 0, 0, 0
    while sent < 700 or engine.active:
        while sent < 700:
            number = sent // 2 * 7 % 40  # each one twice in a row
            row, key = rows[number], f"k{number}"
            request = request_for(
                model, row, str(sent), "0.5" if sent % 2 else "1", key, max_new_tokens=2
            )
            if not engine.can_start(request):
                break
            engine.start(request)
            sent += 1
            if sent % 10 == 0:
                engine.cancel(str(sent - 1))
        engine.step()
        if sent == 300 and not started:
            started = 1
            gc.collect()
            objects = len(gc.get_objects())
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.collect()
    stats = engine.stats
    assert stats.finished + stats.cancelled == 700 and stats.cancelled >= 35
    assert stats.kv_bytes == stats.kv_reserved == 0
    assert 0 < stats.prefix_bytes <= 1 << 15 and 0 < stats.vision_bytes <= 1 << 12
    assert len(gc.get_objects()) - objects < 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 8 * 1024  # KiB
    assert stats.prefix_hits > 350

"""The engine's answers equal those of `generate` for each request alone, in all families."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from support.engine import (
    FAMILIES,
    Transcript,
    expected,
    model_of,
    request_for,
    row_for,
    run,
)
from torch import Tensor

from fmray.adallava import AdaptiveVLM
from fmray.engine.engine import Engine
from fmray.engine.kv_memory import TokenBytes

BUDGETS = ["0.5", "0.6", "0.75", "0.9", "1"]
NEW = 10  # tokens of the reference answers; shorter greedy answers are a prefix of them
MIXES = 6  # per kind of model; there are 24 kinds
PROMPTS = 6


@functools.cache
def pool(family: str, design: str, token: str) -> tuple[AdaptiveVLM, list[dict[str, Tensor]]]:
    model = model_of(family, design, token)
    lengths = [6, 7, 9, 13, 20, 31]
    rows = [row_for(model, family, lengths[seed], seed) for seed in range(PROMPTS)]
    # The last prompt is the one before with one more turn: same image, same prefix.
    last = dict(rows[-2])
    extra = rows[-1]["input_ids"][:, -5:]
    last["input_ids"] = torch.cat((last["input_ids"], extra), dim=1)
    last["attention_mask"] = torch.ones_like(last["input_ids"])
    if "mm_token_type_ids" in last:
        last["mm_token_type_ids"] = torch.cat(
            (last["mm_token_type_ids"], torch.zeros_like(extra).int()), dim=1
        )
    return model, [*rows[:-1], last]


@functools.cache
def answer(family: str, design: str, token: str, prompt: int, budget: str) -> list[int]:
    model, rows = pool(family, design, token)
    return expected(model, rows[prompt], budget, NEW)


@pytest.mark.parametrize("token", ["probe", "inline"])
@pytest.mark.parametrize("design", ["layers", "heads"])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_mixes_equal_generate(family: str, design: str, token: str) -> None:
    """Random budgets, lengths, arrivals, cancellations, cache sizes and memory sizes."""
    model, rows = pool(family, design, token)
    for seed in range(MIXES):
        rng = random.Random(f"{family} {design} {token} {seed}")
        longest = max(row["input_ids"].shape[1] for row in rows) + NEW + 1
        two_rows = (
            2
            * longest
            * (model.layout.num_layers + 1)
            * TokenBytes(model.layout, torch.float32).layer
        )
        engine = Engine(
            model,
            None,
            kv_bytes=rng.choice([two_rows, 1 << 30]),
            max_rows=rng.randint(1, 6),
            prefix_bytes=rng.choice([0, 1 << 14, 1 << 22]),
            prefix_block=rng.choice([1, 4, 16]),
            vision_bytes=rng.choice([0, 1 << 20]),
        )
        asks = {}
        for number in range(rng.randint(2, 7)):
            prompt, budget = rng.randrange(PROMPTS), rng.choice(BUDGETS)
            key = rng.choice([None, f"image {min(prompt, PROMPTS - 2)}"])
            asks[str(number)] = (prompt, budget, key, rng.randint(1, NEW), rng.randint(0, 8))
        cancels = {name: rng.randint(0, 12) for name in asks if rng.random() < 0.25}
        transcript, clock, waiting = Transcript(), 0, dict(asks)
        while waiting or engine.active:
            for name, (prompt, budget, key, new, arrival) in list(waiting.items()):
                row = rows[prompt]
                request = request_for(model, row, name, budget, key, max_new_tokens=new)
                if arrival <= clock and engine.can_start(request):
                    engine.start(request)
                    del waiting[name]
            for name, when in cancels.items():
                if when <= clock:
                    engine.cancel(name)
            transcript.add(engine.step())
            clock += 1
            assert max(engine.stats.kv_bytes, engine.stats.kv_reserved) <= engine.stats.kv_bound
        for name, (prompt, budget, _, new, _) in asks.items():
            reference = answer(family, design, token, prompt, budget)[:new]
            tokens, last = transcript.tokens[name], transcript.last[name]
            if last.finished == "cancelled":
                assert name in cancels
                assert tokens == reference[: len(tokens)]
                continue
            assert tokens == reference, (seed, name)
            assert last.finished == ("length" if len(tokens) == new else "stop"), last.error
            assert last.result.completion_tokens == len(tokens)
            assert len(last.result.plan) == model.layout.num_units
        assert engine.stats.kv_bytes == engine.stats.kv_reserved == 0


@pytest.mark.parametrize("token", ["probe", "inline"])
@pytest.mark.parametrize("family", ["llama", "phi", "qwen2_vl"])
def test_eager_attention_equals_generate(family: str, token: str) -> None:
    model = model_of(family, "layers", token, attention="eager")
    rows = [row_for(model, family, 6 + 5 * seed, seed) for seed in range(3)]
    references = {str(n): expected(model, row, BUDGETS[n], NEW) for n, row in enumerate(rows)}
    engine = Engine(model, None, prefix_block=2)
    for _ in range(2):  # the second time with cached prefixes
        requests = [
            request_for(model, row, str(n), BUDGETS[n], f"k{n}", max_new_tokens=NEW)
            for n, row in enumerate(rows)
        ]
        assert run(engine, requests).tokens == references
    assert engine.stats.prefix_tokens > 0


def test_a_given_plan_runs() -> None:
    model = model_of("llama", "layers", "probe")
    row = row_for(model, "llama", 9)
    plan = torch.tensor([False, True])
    ids = model.generate(**row, plan=plan[None], max_new_tokens=NEW, eos_token_id=99)
    engine = Engine(model, None, eos=())
    transcript = run(engine, [request_for(model, row, plan=plan, max_new_tokens=NEW)])
    assert transcript.tokens["a"] == ids[0, 9:].tolist()
    result = transcript.last["a"].result
    assert result.plan == (False, True) and result.units_on == 1
    assert result.share == model.cost.share(9, [False, True])


@pytest.mark.parametrize("scheduler", ["static", "random", "deterministic"])
def test_every_scheduler_equals_generate(scheduler: str) -> None:
    model = model_of("llama", "heads", "probe", scheduler=scheduler)
    rows = [row_for(model, "llama", 9, seed) for seed in range(3)]
    requests = [
        request_for(model, row, str(n), "0.75", seed=n, max_new_tokens=NEW)
        for n, row in enumerate(rows)
    ]
    transcript = run(Engine(model, None), requests)
    again = run(Engine(model, None), requests[2:])
    assert again.tokens["2"] == transcript.tokens["2"]
    assert again.last["2"].result.plan == transcript.last["2"].result.plan
    for n, row in enumerate(rows):
        plan = torch.tensor([transcript.last[str(n)].result.plan])
        assert int(plan.sum()) <= requests[n].units_on
        if scheduler != "random":
            reference = expected(model, row, "0.75", NEW)
        else:
            ids = model.generate(**row, plan=plan, max_new_tokens=NEW)[0, 9:].tolist()
            reference = ids[: ids.index(2)] if 2 in ids else ids
        assert transcript.tokens[str(n)] == reference

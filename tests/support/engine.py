"""Requests for tiny models, complete runs of the engine, and reference answers of `generate`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from support.tiled_models import llava_next, llava_onevision, tiled_row
from support.tiny_models import (
    EOS,
    adaptive,
    batch,
    qwen_batch,
    row_of,
    tiny_llava,
    tiny_qwen2_vl,
)
from torch import Tensor, nn

from fmray.adallava import AdaptiveVLM
from fmray.engine.engine import Engine
from fmray.engine.requests import Event, Request, Sampling

FAMILIES = ["llama", "qwen2", "phi", "llava_next", "llava_onevision", "qwen2_vl"]
SIZES = [(16, 32), (32, 32), (32, 16)]


def base_of(family: str, attention: str = "sdpa") -> nn.Module:
    """A tiny stock model of 4 decoder layers."""
    torch.manual_seed(0)
    make = {
        "llava_next": llava_next,
        "llava_onevision": llava_onevision,
        "qwen2_vl": tiny_qwen2_vl,
    }.get(family)
    base = (make() if make else tiny_llava(family, layers=4)).eval()
    base.set_attn_implementation(attention)
    base.generation_config.eos_token_id = EOS
    base.generation_config.pad_token_id = 0
    return base


def model_of(family: str, design: str, token: str, attention: str = "sdpa", **options):
    """A tiny adaptive model whose scheduler prefers some units."""
    return adaptive(base_of(family, attention), design, latency_token=token, **options)


def row_for(model: AdaptiveVLM, family: str, length: int, seed: int = 0) -> dict[str, Tensor]:
    """One unpadded row of `length` tokens with an image (tiled models: plus the image tokens)."""
    if family in ("llava_next", "llava_onevision"):
        return tiled_row(model.base, length, SIZES[seed % len(SIZES)], seed)
    make = qwen_batch if family == "qwen2_vl" else batch
    return row_of(make([length], seed=seed), 0)


def request_for(
    model: AdaptiveVLM,
    row: dict[str, Tensor],
    name: str = "a",
    budget: float | str = "1",
    image_key: str | None = None,
    plan: Tensor | None = None,
    **sampling: object,
) -> Request:
    """A request for a row with a budget or a plan."""
    if plan is None:
        units = int(model.units_for(budget, torch.tensor([row["input_ids"].shape[1]]))[0])
    else:
        units = int(plan.sum())
    return Request(name, row, image_key, units, plan, Sampling(**sampling))


def expected(
    model: AdaptiveVLM, row: dict[str, Tensor], budget: float | str, new: int
) -> list[int]:
    """The answer of `generate` for the row alone, without the end token."""
    ids = model.generate(**row, budget=budget, max_new_tokens=new)
    answer = ids[0, row["input_ids"].shape[1] :].tolist()
    return answer[: answer.index(EOS)] if EOS in answer else answer


@dataclass
class Transcript:
    """Tokens, text and last event of each request."""

    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    text: dict[str, str] = field(default_factory=lambda: defaultdict(str))
    last: dict[str, Event] = field(default_factory=dict)

    def add(self, events: Sequence[Event]) -> None:
        for event in events:
            assert event.request not in self.last, "an event after the last one"
            self.tokens[event.request] += event.tokens
            self.text[event.request] += event.text
            assert (event.finished is None) == (event.result is None)
            if event.finished:
                self.last[event.request] = event


def run(engine: Engine, requests: Sequence[Request] = ()) -> Transcript:
    """Start all requests and run the engine to the end."""
    transcript = Transcript()
    for request in requests:
        engine.start(request)
    while engine.active:
        transcript.add(engine.step())
    return transcript

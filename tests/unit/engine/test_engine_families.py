"""The engine takes every family: mixed budgets in one batch answer like `generate` alone."""

from __future__ import annotations

import pytest
import torch
from support.engine import expected, request_for, run
from support.tiny_models import EOS, adaptive, text_sizes
from support.vision_language import KINDS, vision_language
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fmray.engine.engine import Engine

TEXT_KINDS = ["llama", "qwen3", "granite", "phi3", "olmo2", "smollm3"]
NEW = 5


def text_model(kind: str) -> nn.Module:
    """A stock text model in float32."""
    torch.manual_seed(0)
    sizes = text_sizes(layers=4) | {"num_key_value_heads": 2}
    extra = {"head_dim": 16} if kind == "qwen3" else {}
    extra |= {"sliding_window": None} if kind == "phi3" else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **extra)).eval()


@pytest.mark.parametrize("token", ["inline", "probe"])
@pytest.mark.parametrize("kind", [*KINDS, *TEXT_KINDS])
def test_mixed_budgets_answer_like_generate(kind: str, token: str) -> None:
    if kind in TEXT_KINDS:
        base = text_model(kind)
        ids = torch.randint(12, 64, (1, 11), generator=torch.Generator().manual_seed(0))
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        base, row = vision_language(kind)
    base.generation_config.eos_token_id = EOS
    model = adaptive(base, latency_token=token)
    image = None if kind in TEXT_KINDS else "image"
    engine = Engine(
        model, None, max_rows=4, prefix_bytes=1 << 22, prefix_block=4, vision_bytes=1 << 20
    )
    budgets = {"a": "0.75", "b": "1", "c": "0.5", "d": "1"}
    requests = [
        request_for(model, row, name, budget, image, max_new_tokens=NEW)
        for name, budget in budgets.items()
    ]
    transcript = run(engine, requests[:2])  # the other two find the prefix in the cache
    transcript.tokens |= run(engine, requests[2:]).tokens
    for name, budget in budgets.items():
        assert transcript.tokens[name] == expected(model, row, budget, NEW)
    assert engine.stats.prefix_hits > 0

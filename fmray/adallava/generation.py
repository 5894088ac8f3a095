"""Answering: prefill under a plan, then one token at a time with only the switched-on layers.

In: an `AdaptiveVLM`, a padded batch of prompts, a budget for each. Out: token ids, prompts
included, as the stock `generate` gives them. One budget, many, either padding: rows share every
layer that more than one of them runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmray.adallava.passes import Draw, decode, prefill
from fmray.adallava.token_sampling import sample

if TYPE_CHECKING:
    from fmray.adallava.model import AdaptiveVLM, Budget


@torch.no_grad()
def generate(
    model: AdaptiveVLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    budget: Budget | Sequence[Budget] | Tensor | None = None,
    plan: Tensor | None = None,
    max_new_tokens: int = 20,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    return_plan: bool = False,
    **extras: Tensor,
) -> Tensor | tuple[Tensor, Tensor]:
    """Generate up to `max_new_tokens` for each prompt; the plan is fixed for the whole answer (eq.
    5.2).

    input_ids, attention_mask: [B, n], padded left or right. budget: one or one a row; plan: bool
    [B, K]; neither: the base model's own `generate`. Returns ids [B, n + new], ended rows filled
    with the padding id, and the plan [B, K] too if asked. Greedy unless do_sample (temperature,
    top_p, generator). Stops when all rows have ended.
    """
    if isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a positive integer, not {max_new_tokens!r}")
    defaults = model.base.generation_config
    eos = _ids(defaults.eos_token_id if eos_token_id is None else eos_token_id)
    pad = _pad_id(model, pad_token_id, eos)
    if budget is None and plan is None:
        chosen: dict[str, Any] = {"temperature": temperature, "top_p": top_p} if do_sample else {}
        ids = model.base.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            eos_token_id=eos or None,
            pad_token_id=pad,
            **chosen,
            **extras,
        )
        return (ids, None) if return_plan else ids
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    was_training = model.training
    model.eval()
    try:
        prompt = model.embed_prompt(input_ids, attention_mask, pixel_values, budget, plan, extras)
        hidden, chosen_plan, _, state = prefill(model, prompt, Draw(generator), keep=True)
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        inline = int(model.latency_token == "inline")
        last = prompt.end - 1 + inline
        logits = model.backbone.logits(hidden[rows, last])
        position = prompt.next_position + inline
        ended = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        answers = []
        while True:
            if do_sample:
                token = sample(logits, temperature, top_p, generator)
            else:
                token = logits.argmax(-1)
            token = torch.where(ended, pad, token)
            answers.append(token)
            for end_id in eos:
                ended = ended | (token == end_id)
            if len(answers) == max_new_tokens or bool(ended.all()):
                break
            logits = decode(model, token, position, state)
            position = position + 1
    finally:
        model.train(was_training)
    ids = torch.cat((input_ids, torch.stack(answers, dim=1)), dim=1)
    return (ids, chosen_plan) if return_plan else ids


def _ids(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _pad_id(model: AdaptiveVLM, asked: int | None, eos: list[int]) -> int:
    for value in (
        asked,
        model.base.generation_config.pad_token_id,
        model.backbone.config.pad_token_id,
    ):
        if value is not None:
            return value
    return eos[0] if eos else 0

"""Answers of an adaptive model: a prefill under plans, then one decoding step per token.

Rows with different plans share every layer that more than one of them runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fmray.adallava.passes import Adaptive, Draw, Prompt, decode, prefill


@torch.no_grad()
def answer(
    model: Adaptive,
    prompt: Prompt,
    choose: Callable[[Tensor], Tensor],
    *,
    max_new_tokens: int,
    eos: Sequence[int],
    pad: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Answer each prompt; the plan stays the same for the complete answer (eq. 5.2).

    Args:
        choose: logits [B, V] -> token ids [B].
        eos: ids that end a row.
        pad: id that fills rows that have ended.
        generator: for schedulers that draw plans.

    Returns:
        The new tokens [B, at most max_new_tokens] and the plan, bool [B, K].
    """
    # prefill: the first token is predicted from the latency token, or the last prompt token
    hidden, plan, _, state = prefill(model, prompt, Draw(generator), keep=True)
    inline = int(model.latency_token == "inline")
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    logits = model.backbone.logits(hidden[rows, prompt.end - 1 + inline])
    position = prompt.next_position + inline

    # decode until all rows have ended
    ended = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    tokens: list[Tensor] = []
    while True:
        token = torch.where(ended, pad, choose(logits))
        tokens.append(token)
        for end_id in eos:
            ended = ended | (token == end_id)
        if len(tokens) == max_new_tokens or bool(ended.all()):
            return torch.stack(tokens, dim=1), plan
        logits = decode(model, token, position, state)
        position = position + 1

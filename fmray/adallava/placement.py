"""Where the latency token goes: right after the prompt, whatever the padding.

In: padded batches [B, n]. Out: the end of each row's prompt, and sequences with one token more (or
its place taken).
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100  # label of a token that is not supervised


def prompt_ends(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """One past the last prompt token of each row, int64 [B]: before the first supervised token, or
    the row's end.

    Raises ValueError for a row whose answer has no prompt, or that is empty.
    """
    length = input_ids.shape[1]
    places = torch.arange(length, device=input_ids.device)
    attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    end = ((places + 1) * attended.bool()).amax(1)
    if labels is not None:
        supervised = labels != IGNORED
        first = torch.where(supervised, places, length).amin(1)
        end = torch.minimum(end, first)
    if end.device.type == "cpu" and bool((end < 1).any()):
        raise ValueError(f"row {int((end < 1).nonzero()[0])} has no prompt before its answer")
    return end


def insert_token(
    hidden: Tensor,
    token: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor | None,
    end: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Put token [B, d] at place `end` [B] of each row of hidden [B, n, d]; what follows moves one
    place on.

    Attention mask [B, n] and positions [B, n] or [3, B, n] (None stays None: counted from 0) grow
    with it.
    """
    places = torch.arange(hidden.shape[1] + 1, device=hidden.device)
    source = torch.where(places <= end[:, None], places, places - 1).clamp(max=hidden.shape[1] - 1)
    here = places == end[:, None]
    grown = hidden.gather(1, source[..., None].expand(-1, -1, hidden.shape[2]))
    grown = torch.where(here[..., None], token[:, None], grown)
    if attention_mask is not None:
        attention_mask = torch.where(here, 1, attention_mask.gather(1, source))
    if positions is not None:
        after = (places > end[:, None]).long()
        last = positions.gather(-1, index_like(end - 1, positions)) + 1
        positions = positions.gather(-1, source.expand(*positions.shape[:-2], -1, -1)) + after
        positions = torch.where(here, last, positions)
    return grown, attention_mask, positions


def without_last_prompt_token(hidden: Tensor, end: Tensor) -> Tensor:
    """[B, n + 1, d] -> [B, n, d]: the latency token takes the last prompt token's place, whose work
    it does.
    """
    places = torch.arange(hidden.shape[1] - 1, device=hidden.device)
    source = torch.where(places < end[:, None] - 1, places, places + 1)
    return hidden.gather(1, source[..., None].expand(-1, -1, hidden.shape[2]))


def index_like(index: Tensor, positions: Tensor) -> Tensor:
    """index [B] as a gather index over the last dimension of positions [B, n] or [3, B, n]."""
    return index[:, None].expand(*positions.shape[:-2], -1, -1)

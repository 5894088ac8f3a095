"""Which token comes next, for rows that are each drawn in their own way.

In: logits [R, V] and one `Sampling` and generator a row. Out: token ids. A row's draw uses one
number of its own generator, so it does not depend on the rows beside it (beyond the last bits of
the logits, which a matrix product of another number of rows may change).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmray.engine.requests import Sampling


def generator_of(sampling: Sampling) -> torch.Generator:
    """The row's own randomness, on the CPU whatever the model is on."""
    return torch.Generator().manual_seed(sampling.seed)


def draw(
    logits: Tensor, rows: Sequence[tuple[Sampling, torch.Generator]]
) -> tuple[list[int], list[bool]]:
    """One token a row, and whether the row's logits were numbers at all.

    temperature 0: the largest logit. Else the inverse of the distribution function of
    softmax(logits / temperature), cut to the smallest set of most probable tokens with at least
    top_p (the token that reaches it is in, as in transformers' TopPLogitsWarper).
    """
    best = logits.max(-1)
    tokens, sound = best.indices, best.values.isfinite()
    drawn = [row for row, (sampling, _) in enumerate(rows) if sampling.temperature > 0]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        chosen = [rows[row] for row in drawn]
        numbers = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for _, g in chosen])
        temperature = logits.new_tensor([s.temperature for s, _ in chosen], dtype=torch.float64)
        top_p = logits.new_tensor([s.top_p for s, _ in chosen], dtype=torch.float64)
        tokens = tokens.index_copy(
            0, index, _draw(logits[index], numbers.to(logits.device), temperature, top_p)
        )
    both = torch.stack((tokens, sound.long())).tolist()
    return both[0], [bool(value) for value in both[1]]


def _draw(logits: Tensor, numbers: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """logits [R, V], the rest [R] float64 -> token ids [R]."""
    scaled = (logits.double() - logits.double().amax(-1, keepdim=True)) / temperature[:, None]
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    reached = probabilities.cumsum(-1)
    kept = (reached - probabilities) < top_p[:, None]
    kept[:, 0] = True
    reached = (probabilities * kept).cumsum(-1)
    wanted = numbers[:, None] * reached[:, -1:]
    place = torch.searchsorted(reached, wanted, right=True)
    place = torch.minimum(place, kept.sum(-1, keepdim=True) - 1)
    return order.gather(1, place)[:, 0]

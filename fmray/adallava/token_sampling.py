"""Temperature and nucleus (top-p) sampling of the next token, for `generate` and the engine."""

from __future__ import annotations

import torch
from torch import Tensor


def nucleus(
    logits: Tensor, temperature: Tensor | float, top_p: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Probabilities of the next token after temperature and top-p, most probable token first.

    Keeps the smallest set of most probable tokens whose sum is at least `top_p`, with the token
    that reaches it, as transformers' TopPLogitsWarper does. Computed in float64.

    Args:
        logits: [R, V].
        temperature: above 0; one, or [R].
        top_p: in [0, 1]; one, or [R].

    Returns:
        Probabilities [R, V], 0 outside the nucleus and not renormalized, and token ids [R, V].
    """
    temperature = torch.as_tensor(temperature, dtype=torch.float64, device=logits.device)
    top_p = torch.as_tensor(top_p, dtype=torch.float64, device=logits.device)
    # Subtract the maximum first: a tiny temperature would overflow.
    shifted = logits.double() - logits.double().amax(-1, keepdim=True)
    scaled = shifted / temperature.reshape(-1, 1)
    scaled, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = scaled.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    keep = before < top_p.reshape(-1, 1)
    keep[:, 0] = True
    return probabilities * keep, tokens


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """One token per row [R], all rows drawn from the same generator.

    Raises:
        ValueError: temperature is not above 0, or top_p is negative.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature!r}")
    if not top_p >= 0:
        raise ValueError(f"top_p must be in [0, 1], not {top_p!r}")
    probabilities, tokens = nucleus(logits, temperature, top_p)
    # In the order of the vocabulary and in float32, so that a seed keeps its draws.
    probabilities = torch.zeros_like(probabilities).scatter(1, tokens, probabilities).float()
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def sample_rows(logits: Tensor, numbers: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """One token per row [R] from one uniform random number per row, by inverting the distribution.

    A row's token depends on its own logits and number only, never on the other rows.

    Args:
        logits: [R, V].
        numbers: float64 [R] in [0, 1).
        temperature: [R].
        top_p: [R].
    """
    probabilities, tokens = nucleus(logits, temperature, top_p)
    cumulative = probabilities.cumsum(-1)
    index = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)
    # Rounding may put the index one past the nucleus.
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return tokens.gather(1, torch.minimum(index, last.clamp(min=0)))[:, 0]

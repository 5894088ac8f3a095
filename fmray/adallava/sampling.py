"""Sampling of plans: which k of K units are on.

A plan is drawn from logits [B, K] by picking units one by one without replacement, each from the
softmax over the remaining ones (Plackett-Luce; Xu et al. 2025, section 5.2.3). The number of picks
differs by row, there is no loop over picks, and nothing synchronises with the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_noise(
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return standard Gumbel noise, float32. A `generator` must be on `device`."""
    exponential = torch.empty(shape, dtype=torch.float32, device=device)
    return -exponential.exponential_(generator=generator).log()


def sample_plan(
    logits: Tensor,
    units_on: Tensor,
    tau: float = 5.0,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Draw plans from the Plackett-Luce law with straight-through Gumbel-softmax picks.

    Ordering the units by logits + Gumbel noise is one Plackett-Luce draw. Pick j is the j-th unit
    of that order, and its gradient is that of a softmax at temperature `tau` over the units not yet
    picked. The plan is the sum of the first k picks: exactly 0 or 1 in the forward pass, with a
    gradient for every logit (eq. 5.7 and section 5.2.4; Jang et al. 2017).

    Args:
        logits: [B, K], any float type.
        units_on: [B] integers in 0..K.
        noise: [B, K] Gumbel noise, for draws that must not depend on how rows are split over ranks;
            default: drawn from `generator`.

    Returns:
        The plans, float32 [B, K].

    Raises:
        ValueError: wrong shapes, a k outside 0..K, or tau <= 0.
    """
    _check(logits, units_on)
    if not tau > 0:
        raise ValueError(f"tau must be positive, not {tau}")
    if noise is None:
        noise = gumbel_noise(tuple(logits.shape), generator, logits.device)
    elif noise.shape != logits.shape:
        raise ValueError(
            f"noise must be {list(logits.shape)} like the logits, not {list(noise.shape)}"
        )
    rows, units = logits.shape
    perturbed = logits.float() + noise.to(logits.device)
    order = perturbed.detach().argsort(dim=1, descending=True, stable=True)
    scaled = perturbed.gather(1, order) / tau
    # log-normaliser of pick j: over the units at places j, j+1, ... of the order
    remaining = scaled.flip(1).logcumsumexp(1).flip(1)
    place = torch.arange(units, device=logits.device)
    # [B, pick, place]: pick j weighs the places from j on, for the first k picks only
    counted = (place[None, :, None] <= place[None, None, :]) & (
        place[None, :, None] < units_on.to(logits.device)[:, None, None]
    )
    # masked before exp: an excluded pair may be large and would turn a zero gradient into NaN
    exponent = (scaled[:, None, :] - remaining[:, :, None]).masked_fill(~counted, float("-inf"))
    soft = torch.zeros_like(scaled).scatter(1, order, exponent.exp().sum(1))
    hard = torch.zeros_like(scaled).scatter(
        1, order, (place[None, :] < units_on.to(logits.device)[:, None]).float().expand(rows, units)
    )
    return hard + (soft - soft.detach())


def best_plan(logits: Tensor, units_on: Tensor) -> Tensor:
    """Return the most probable plan, the k largest logits, as bool [B, K].

    It is the set of the most probable *ordered* Plackett-Luce draw (section 5.2.4). Ties go to the
    lower index.

    Args:
        logits: [B, K].
        units_on: [B] integers in 0..K.
    """
    _check(logits, units_on)
    order = logits.float().argsort(dim=1, descending=True, stable=True)
    place = torch.arange(logits.shape[1], device=logits.device)
    on = place[None, :] < units_on.to(logits.device)[:, None]
    return torch.zeros_like(on).scatter(1, order, on)


def random_plan(units_on: Tensor, units: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw uniform k-subsets (the paper's random baseline): units_on [B] -> bool [B, units]."""
    noise = gumbel_noise((units_on.shape[0], units), generator, units_on.device)
    return best_plan(noise, units_on)


def threshold_plan(logits: Tensor, tau: float = 1.0) -> Tensor:
    """Turn on the units with positive logits (deterministic baseline): [B, K] -> float32 [B, K].

    The gradient is a straight-through sigmoid's. The plan does not depend on the budget: the
    training loss adds lambda * max(0, cost - b), and inference must cap it (section 5.2.3).
    """
    soft = torch.sigmoid(logits.float() / tau)
    hard = (logits.float() > 0).float()
    return hard + (soft - soft.detach())


def _check(logits: Tensor, units_on: Tensor) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits must be [B, K], not {list(logits.shape)}")
    if units_on.shape != logits.shape[:1]:
        raise ValueError(f"units_on must be [{logits.shape[0]}], not {list(units_on.shape)}")
    if units_on.is_floating_point() or units_on.dtype == torch.bool:
        raise ValueError(f"units_on must be integers, not {units_on.dtype}")
    # values are checked on the CPU only: on a GPU the check would synchronise at every step
    if units_on.device.type == "cpu" and units_on.numel():
        low, high = int(units_on.min()), int(units_on.max())
        if low < 0 or high > logits.shape[1]:
            raise ValueError(f"units_on must lie in 0..{logits.shape[1]}, not {low}..{high}")

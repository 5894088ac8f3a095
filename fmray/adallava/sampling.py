"""Drawing execution plans: which k of K switches are on.

In: the scheduler's logits [B, K] and the number of switches allowed on [B]. Out: plans [B, K]. A
plan is drawn by picking switches one by one without replacement, each from the softmax over what
remains (Plackett-Luce; Xu et al. 2025, section 5.2.3). Nothing here waits for the device: k differs
by row, and there is no loop over picks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_noise(
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard Gumbel noise, float32. `generator`, if given, must live on `device`."""
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

    The switches are ordered by logits + Gumbel noise, which is one Plackett-Luce draw; pick j is
    the j-th of that order, and its gradient is that of a softmax at temperature `tau` over the
    switches not yet picked. The plan is the sum of the first k picks: exactly 0 or 1 going forward,
    with a gradient for every logit (eq. 5.7 and section 5.2.4; Jang et al. 2017).

    logits: [B, K], any float type. units_on: [B] integers in 0..K. noise: [B, K] Gumbel noise drawn
    by the caller (for draws that must not depend on how rows are split over workers); else drawn
    here from `generator`. Returns float32 [B, K]. Raises ValueError for wrong shapes, a k outside
    0..K or tau <= 0.
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
    # log-normaliser of pick j: over the switches at places j, j+1, ... of the order
    remaining = scaled.flip(1).logcumsumexp(1).flip(1)
    place = torch.arange(units, device=logits.device)
    counted = (place[None, :, None] <= place[None, None, :]) & (
        place[None, :, None] < units_on.to(logits.device)[:, None, None]
    )  # [B, pick, place]: pick j gives weight to the places from j on, for the first k picks only
    # masked before exp: an excluded pair may be large and would turn a zero gradient into NaN
    exponent = (scaled[:, None, :] - remaining[:, :, None]).masked_fill(~counted, float("-inf"))
    soft = torch.zeros_like(scaled).scatter(1, order, exponent.exp().sum(1))
    hard = torch.zeros_like(scaled).scatter(
        1, order, (place[None, :] < units_on.to(logits.device)[:, None]).float().expand(rows, units)
    )
    return hard + (soft - soft.detach())


def best_plan(logits: Tensor, units_on: Tensor) -> Tensor:
    """The most probable plan: the k largest logits; ties go to the lower index.

    logits: [B, K]; units_on: [B] integers in 0..K. Returns bool [B, K]. The most probable *ordered*
    draw of the Plackett-Luce law starts with the largest logits in order, and its set is what is
    returned (section 5.2.4).
    """
    _check(logits, units_on)
    order = logits.float().argsort(dim=1, descending=True, stable=True)
    first = (
        torch.arange(logits.shape[1], device=logits.device)[None, :]
        < units_on.to(logits.device)[:, None]
    )
    return torch.zeros_like(first).scatter(1, order, first)


def random_plan(units_on: Tensor, units: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniform k-subsets (the paper's random baseline): bool [B, units] from units_on [B]."""
    noise = gumbel_noise((units_on.shape[0], units), generator, units_on.device)
    return best_plan(noise, units_on)


def threshold_plan(logits: Tensor, tau: float = 1.0) -> Tensor:
    """The deterministic baseline: a switch is on where its logit is positive, straight-through
    sigmoid gradient.

    logits: [B, K]. Returns float32 [B, K]. It does not know the budget: the training loss adds
    lambda * max(0, cost - b), and inference must not rely on it to keep one (section 5.2.3).
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
    # looked at only where looking is free: on a GPU it would be a synchronisation a step
    if units_on.device.type == "cpu" and units_on.numel():
        low, high = int(units_on.min()), int(units_on.max())
        if low < 0 or high > logits.shape[1]:
            raise ValueError(f"units_on must lie in 0..{logits.shape[1]}, not {low}..{high}")

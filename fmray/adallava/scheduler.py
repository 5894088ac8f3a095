"""The latency encoder and the schedulers: from a budget to one token, from that token to K logits.

In: the share of the decoder that will run, and the latency token's hidden state after the always-on
layers. Out: a token embedding [B, d] and switch logits [B, K] (Xu et al. 2025, section 5.2.5).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FREQUENCIES = 128


class LatencyEncoder(nn.Module):
    """Scalar share in [0, 1] -> 256 sinusoidal features -> LayerNorm -> Linear -> GELU -> Linear ->
    token [B, d].
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * FREQUENCIES)
        self.expand = nn.Linear(2 * FREQUENCIES, hidden_size)
        self.activation = nn.GELU()
        self.project = nn.Linear(hidden_size, hidden_size)

    def forward(self, share: Tensor) -> Tensor:
        """share: [B] float, the quantised budget (what will really run). Returns [B, d] in the
        weights' dtype.
        """
        # angles in float32 whatever the weights are: bfloat16 cannot tell 0.85 from 0.852
        index = torch.arange(FREQUENCIES, device=share.device, dtype=torch.float32)
        angles = share.float()[:, None] * 10000.0 ** (-index / FREQUENCIES)
        features = torch.cat((angles.sin(), angles.cos()), dim=1)
        features = self.norm(features.to(self.norm.weight.dtype))
        return self.project(self.activation(self.expand(features)))


class Scheduler(nn.Module):
    """Switch logits from the latency token's hidden state: Linear(d, K).

    Starts at zero, so that the first plans drawn are uniform over the k-subsets.
    """

    def __init__(self, hidden_size: int, units: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, units)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [B, d] -> logits [B, K]."""
        return self.linear(hidden)


class StaticScheduler(nn.Module):
    """One learned order of the switches for all inputs and budgets (baseline): logits that depend
    on nothing.
    """

    def __init__(self, units: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(units))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [B, d], only its batch size and dtype are used -> logits [B, K]."""
        return self.logits.to(hidden.dtype).expand(hidden.shape[0], -1)

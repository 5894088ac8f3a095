"""Our own small encoders: for pictures of 32 to 64 pixels, quick on a CPU, trained from scratch by
`fmray.fewshot.pretrain`.

In: normalised pixels [B, 3, H, W], H = W, a multiple of 8. Out: features [B, d]. Neither keeps
batch statistics: an image's features do not depend on the batch it came in, nor on how many workers
shared it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE = 32  # pixels, where nothing else is asked for


class SmallViT(nn.Module):
    """A vision transformer on 8x8-pixel steps: strided convolutions for a patch (Xiao et al. 2021),
    fixed sine positions (as MoCo v3's), pre-norm blocks, mean over tokens. 0.7 M parameters,
    d = 96.
    """

    def __init__(self, width: int = 96, depth: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 4, 3, stride=2, padding=1),
            nn.GroupNorm(8, width // 4),
            nn.GELU(),
            nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1),
            nn.GroupNorm(8, width // 2),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
        )
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        grid = self.stem(images)  # [B, width, H/8, W/8]
        tokens = grid.flatten(2).mT
        return self.norm(self.blocks(tokens + _positions(grid)).mean(1))


class SmallConv(nn.Module):
    """A residual network with group norm: four stages of one block, mean over places. 0.9 M
    parameters, d = 192.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 192)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 5, stride=2, padding=2, bias=False)
        before = (widths[0], *widths[:-1])
        self.stages = nn.Sequential(
            *(
                _Residual(inputs, outputs, stride=1 if stage == 0 else 2)
                for stage, (inputs, outputs) in enumerate(zip(before, widths, strict=True))
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(self.stages(self.stem(images))).mean((2, 3))


class _Block(nn.Module):
    """Self-attention and a two-layer perceptron, each on the normalised residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, T, width / heads]
            for part in self.qkv(self.norm_attention(tokens)).chunk(3, dim=-1)
        )
        attended = functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.output(attended.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm_mlp(tokens))


class _Residual(nn.Module):
    """A pre-activation residual block (He et al. 2016) with group norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm_first, self.norm_second = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = functional.relu(self.norm_first(inputs))
        return self.shortcut(inputs) + self.second(
            functional.relu(self.norm_second(self.first(hidden)))
        )


def _positions(grid: Tensor) -> Tensor:
    """Sines and cosines of row and column, [H * W, width], for a grid [B, width, H, W]."""
    _, width, height, columns = grid.shape
    steps = width // 4
    frequency = torch.exp(torch.arange(steps, device=grid.device) * (-math.log(1e4) / steps))
    row, column = (torch.arange(n, device=grid.device)[:, None] * frequency for n in grid.shape[2:])
    parts = [part[:, None].expand(height, columns, steps) for part in (row.sin(), row.cos())] + [
        part[None].expand(height, columns, steps) for part in (column.sin(), column.cos())
    ]
    return torch.cat(parts, dim=-1).flatten(0, 1).to(grid.dtype)

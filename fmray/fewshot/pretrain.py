"""Objectives that pretrain a small encoder (SimCLR, MoCo, supervised), and their augmentation.

An objective is a module around the encoder; a step calls `objective(first, second, labels)` with
two augmented views of a batch and gets the loss. The loop and the optimizer are the caller's. Only
the encoder is saved.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from fmray.fewshot.methods import classification_loss, linear_head

PROJECTION = 128  # features of the projector, which contrastive losses compare


def simclr_loss(first: Tensor, second: Tensor, temperature: float = 0.2) -> Tensor:
    """Return the NT-Xent loss (Chen et al. 2020, eq. 1), the mean over 2B views.

    Each view has to find the other view of its image among the 2B - 1 others.

    Args:
        first, second: [B, p], row i of both from image i; B >= 2.
    """
    images = len(first)
    if first.shape != second.shape or first.dim() != 2 or images < 2:
        raise ValueError(
            f"views must be two of [B, p] with B >= 2, not {list(first.shape)} and "
            f"{list(second.shape)}"
        )
    views = functional.normalize(torch.cat([first, second]).float(), dim=1)
    logits = views @ views.mT / temperature
    logits.fill_diagonal_(-torch.inf)  # a view is not its own partner
    partners = torch.arange(2 * images, device=views.device).roll(images)
    return functional.cross_entropy(logits, partners)


class SimCLR(nn.Module):
    """Contrasts the views of a batch with each other (Chen et al. 2020)."""

    def __init__(self, encoder: nn.Module, temperature: float = 0.2) -> None:
        super().__init__()
        self.encoder, self.temperature = encoder, temperature
        self.projector = _projector(encoder.features)

    def forward(self, first: Tensor, second: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss of two views [B, 3, H, W]; labels are ignored."""
        views = self.projector(self.encoder(torch.cat([first, second])))
        return simclr_loss(*views.chunk(2), self.temperature)


class MoCo(nn.Module):
    """Contrasts queries with a queue of keys from a slowly moving copy of the encoder.

    He et al. 2020; the projector is MoCo v2's. Call `update()` after each optimizer step to move
    the copy. With several ranks the caller has to broadcast buffers, as DistributedDataParallel
    does, so that all have the queue of rank 0.

    Args:
        queue: number of keys in the queue.
        momentum: of the copy.
    """

    def __init__(
        self,
        encoder: nn.Module,
        temperature: float = 0.2,
        queue: int = 4096,
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        self.encoder, self.temperature, self.momentum = encoder, temperature, momentum
        self.projector = _projector(encoder.features)
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("keys", functional.normalize(torch.randn(queue, PROJECTION), dim=1))
        self.register_buffer("next_key", torch.zeros((), dtype=torch.int64))

    def forward(self, first: Tensor, second: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the InfoNCE loss of two views [B, 3, H, W]; labels are ignored.

        The keys of the second view replace the oldest keys of the queue.
        """
        queries = functional.normalize(self.projector(self.encoder(first)).float(), dim=1)
        with torch.no_grad():
            keys = functional.normalize(self.key_projector(self.key_encoder(second)).float(), dim=1)
        positive = (queries * keys).sum(1, keepdim=True)
        negative = queries @ self.keys.clone().mT
        logits = torch.cat([positive, negative], dim=1) / self.temperature
        places = torch.arange(len(keys), device=keys.device) + self.next_key
        newest = keys[-len(self.keys) :]  # all keys, unless the queue is shorter than the batch
        self.keys[places[-len(newest) :] % len(self.keys)] = newest
        self.next_key.add_(len(keys)).remainder_(len(self.keys))
        return functional.cross_entropy(logits, torch.zeros_like(places))

    @torch.no_grad()
    def update(self) -> None:
        """Move the key encoder towards the encoder by the share 1 - momentum."""
        for slow, fast in (
            (self.key_encoder, self.encoder),
            (self.key_projector, self.projector),
        ):
            for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                old.lerp_(new, 1 - self.momentum)


class Supervised(nn.Module):
    """Classifies the first view with a linear head over all classes; ignores the second."""

    def __init__(self, encoder: nn.Module, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = linear_head(encoder.features, classes, seed)

    def forward(self, first: Tensor, second: Tensor | None, labels: Tensor) -> Tensor:
        """Return the cross entropy of images [B, 3, H, W] with labels [B]."""
        return classification_loss(self.encoder, self.head, first, labels)[0]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return one random view of each image: crop and resize, flip, colour jitter, sometimes grey.

    SimCLR's augmentation (Chen et al. 2020, appendix A) without blur, which small images do not
    survive. Crops have 20 to 100 % of the area and an aspect ratio of 3/4 to 4/3.

    Args:
        images: uint8 [B, 3, H, W].
        generator: on the CPU; all draws come from it. The pixels stay on their device.

    Returns:
        float32 [B, 3, H, W] in 0..1, for `Preprocess.normalise`.
    """
    count, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(count, generator=generator)).to(device)

    # crop, resize and flip are one affine map
    pixels = images.float() / 255
    area, ratio = uniform(0.2, 1), torch.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = ((area * r).sqrt().clamp(max=1) for r in (ratio, 1 / ratio))
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    boxes = torch.zeros(count, 2, 3, device=device)
    boxes[:, 0, 0], boxes[:, 1, 1] = width * flip, height
    boxes[:, 0, 2] = uniform(-1, 1) * (1 - width)
    boxes[:, 1, 2] = uniform(-1, 1) * (1 - height)
    grid = functional.affine_grid(boxes, list(images.shape), align_corners=False)
    pixels = functional.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)

    # colour jitter of most images, and no colour at all for a fifth
    grey = torch.tensor([0.299, 0.587, 0.114], device=device)
    jittered = uniform(0, 1) < 0.8
    brightness, contrast = uniform(0.6, 1.4), uniform(0.6, 1.4)
    colour, angle = uniform(0.6, 1.4), uniform(-0.1, 0.1) * 2 * math.pi
    colour = torch.where(uniform(0, 1) < 0.2, 0.0, torch.where(jittered, colour, 1.0))
    # saturation and hue are one matrix: it scales and rotates the part that is not grey
    matrix = grey.expand(count, 3, 3) + colour[:, None, None] * (
        _rotation(torch.where(jittered, angle, 0.0)) @ (torch.eye(3, device=device) - grey)
    )
    pixels = (matrix @ pixels.flatten(2)).unflatten(2, images.shape[2:])
    brightness = torch.where(jittered, brightness, 1.0)[:, None, None, None]
    contrast = torch.where(jittered, contrast, 1.0)[:, None, None, None]
    pixels = pixels * brightness
    mean = (grey[:, None, None] * pixels).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    return (mean + contrast * (pixels - mean)).clamp(0, 1)


def _rotation(angle: Tensor) -> Tensor:
    """Return rotations [B, 3, 3] of RGB about the grey axis (Rodrigues' formula)."""
    axis = 1 / math.sqrt(3)
    cross = axis * torch.tensor(
        [[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]], device=angle.device
    )
    sine, cosine = angle.sin()[:, None, None], angle.cos()[:, None, None]
    return torch.eye(3, device=angle.device) + sine * cross + (1 - cosine) * (cross @ cross)


def _projector(features: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(features, 2 * features), nn.ReLU(), nn.Linear(2 * features, PROJECTION)
    )

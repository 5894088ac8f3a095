"""Pretraining a small encoder: SimCLR, MoCo or supervised. What one step computes; the loop and the
optimizer are the caller's.

In: two augmented views of a batch of images. Out: a loss. Each objective is a module around the
encoder, called once a step as `objective(first, second, labels)`; only the encoder is kept.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from fmray.fewshot.methods import classification_loss, linear_head

PROJECTION = 128  # width of what contrastive losses compare


def simclr_loss(first: Tensor, second: Tensor, temperature: float = 0.2) -> Tensor:
    """NT-Xent (Chen et al. 2020, eq. 1): of the 2B - 1 other views, find the same image's.

    first, second: [B, p], row i of both from image i; B >= 2. Returns the mean over the 2B views.
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
    """Both views through encoder and projector, in one batch."""

    def __init__(self, encoder: nn.Module, temperature: float = 0.2) -> None:
        super().__init__()
        self.encoder, self.temperature = encoder, temperature
        self.projector = _projector(encoder.features)

    def forward(self, first: Tensor, second: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of images [B, 3, H, W], twice; labels are not looked at."""
        views = self.projector(self.encoder(torch.cat([first, second])))
        return simclr_loss(*views.chunk(2), self.temperature)


class MoCo(nn.Module):
    """Queries against a queue of keys from a slowly moving copy (He et al. 2020; the projector is
    MoCo v2's). `update()` after each optimizer step moves the copy.

    queue: keys kept; momentum: of the copy. Where workers share a step, the queue holds the first
    worker's keys only if the caller broadcasts buffers, as DistributedDataParallel does.
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
        """The InfoNCE loss of images [B, 3, H, W], twice; labels are not looked at.

        The second view's keys take the oldest places of the queue.
        """
        queries = functional.normalize(self.projector(self.encoder(first)).float(), dim=1)
        with torch.no_grad():
            keys = functional.normalize(self.key_projector(self.key_encoder(second)).float(), dim=1)
        positive = (queries * keys).sum(1, keepdim=True)
        negative = queries @ self.keys.clone().mT
        logits = torch.cat([positive, negative], dim=1) / self.temperature
        places = torch.arange(len(keys), device=keys.device) + self.next_key
        kept = keys[-len(self.keys) :]  # a queue shorter than the batch keeps its end
        self.keys[places[-len(kept) :] % len(self.keys)] = kept
        self.next_key.add_(len(keys)).remainder_(len(self.keys))
        return functional.cross_entropy(logits, torch.zeros_like(places))

    @torch.no_grad()
    def update(self) -> None:
        """Move the key encoder a part 1 - momentum towards the encoder."""
        for slow, fast in (
            (self.key_encoder, self.encoder),
            (self.key_projector, self.projector),
        ):
            for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                old.lerp_(new, 1 - self.momentum)


class Supervised(nn.Module):
    """A linear head over all classes, on the first view; the second is not looked at."""

    def __init__(self, encoder: nn.Module, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = linear_head(encoder.features, classes, seed)

    def forward(self, first: Tensor, second: Tensor | None, labels: Tensor) -> Tensor:
        """The cross entropy of images [B, 3, H, W] with labels [B]."""
        return classification_loss(self.encoder, self.head, first, labels)[0]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """One random view of each image: crop and resize, flip, colours, sometimes grey.

    images: uint8 [B, 3, H, W]; returns float32 of that shape in 0..1, for `Preprocess.normalise`.
    SimCLR's recipe (Chen et al. 2020, appendix A) without blur, which small pictures do not bear.
    All draws come from `generator`, on the CPU; the pixels stay on their device. Crops have 20 to
    100 % of the area and an aspect of 3/4 to 4/3.
    """
    count, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(count, generator=generator)).to(device)

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

    grey = torch.tensor([0.299, 0.587, 0.114], device=device)
    jittered = uniform(0, 1) < 0.8
    brightness, contrast = uniform(0.6, 1.4), uniform(0.6, 1.4)
    colour, angle = uniform(0.6, 1.4), uniform(-0.1, 0.1) * 2 * math.pi
    colour = torch.where(uniform(0, 1) < 0.2, 0.0, torch.where(jittered, colour, 1.0))
    # saturation and hue are one matrix: the colour's part that is not grey, shrunk and turned
    matrix = grey.expand(count, 3, 3) + colour[:, None, None] * (
        _turn(torch.where(jittered, angle, 0.0)) @ (torch.eye(3, device=device) - grey)
    )
    pixels = (matrix @ pixels.flatten(2)).unflatten(2, images.shape[2:])
    brightness = torch.where(jittered, brightness, 1.0)[:, None, None, None]
    contrast = torch.where(jittered, contrast, 1.0)[:, None, None, None]
    pixels = pixels * brightness
    mean = (grey[:, None, None] * pixels).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    return (mean + contrast * (pixels - mean)).clamp(0, 1)


def _turn(angle: Tensor) -> Tensor:
    """Rotations [B, 3, 3] of RGB about the grey axis (Rodrigues' formula)."""
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

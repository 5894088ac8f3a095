"""Finetuning an encoder: multitask, standard, and LP-FT. What one step computes; the loop, the
optimizer and the workers are the caller's.

In: an encoder and normalised pixels of one episode or one batch. Out: a loss to call backward on,
and the share of images that were right. Direct adaptation has no step: it is the encoder as it is.
Every loss calls the encoder once, so that DistributedDataParallel may wrap it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from fmray.fewshot.centroid import centroid_logits


def finetuning_mode(encoder: nn.Module) -> nn.Module:
    """Training mode with batch norms left in eval mode, and the encoder returned.

    An episode is a handful of classes: its batch statistics would give away which images came
    together, and they differ from those the encoder was pretrained with. To be called once before
    the first step, and after each evaluation.
    """
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return encoder


def log_temperature(temperature: float = 10.0) -> nn.Parameter:
    """The learnable temperature of the cosine, as its logarithm: a scalar parameter."""
    return nn.Parameter(torch.tensor(math.log(temperature)))


def multitask_loss(
    encoder: nn.Module, support: Tensor, query: Tensor, log_temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """The cross entropy of an episode's queries under the nearest-centroid classifier, and their
    accuracy (thesis, A.5). The loss of several episodes is the mean of theirs.

    support: [N, K, 3, H, W]; query: [N, Q, 3, H, W]; log_temperature: scalar. All of the encoder
    learns, through queries and centroids. Raises ValueError for features that are not finite.
    """
    ways, shots, queries = *support.shape[:2], query.shape[1]
    features = encoder(torch.cat([support.flatten(0, 1), query.flatten(0, 1)]))
    support_features, query_features = features.split([ways * shots, ways * queries])
    logits = centroid_logits(
        support_features.unflatten(0, (ways, shots)), query_features, log_temperature.exp()
    )
    return _score(logits, torch.arange(ways, device=logits.device).repeat_interleave(queries))


def classification_loss(
    encoder: nn.Module, head: nn.Linear, images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The cross entropy of images under a linear head over all training classes, and their
    accuracy: a step of standard finetuning, and of LP-FT's second part. The head is dropped at test
    (thesis, A.5).

    images: [B, 3, H, W]; labels: [B] in 0..C-1.
    """
    return _score(head(encoder(images).to(head.weight.dtype)), labels)


def linear_head(features: int, classes: int, seed: int) -> nn.Linear:
    """A linear head with torch's own random start, drawn from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(features, classes)


def linear_probe(
    features: Tensor,
    labels: Tensor,
    classes: int,
    steps: int,
    seed: int,
    lr: float = 0.1,
    batch: int = 1024,
) -> nn.Linear:
    """The first part of LP-FT (Kumar et al. 2022): a linear head for an encoder that stays frozen.

    features: [n, d] of the training images, from the encoder as it is (it is not called here);
    labels: [n] in 0..classes-1. SGD with momentum 0.9 and a cosine from `lr` to 0 on batches drawn
    from `seed`; features are standardised for it, and the scale is folded into the head, so that
    one rate does for any encoder. The same on every worker. The second part starts finetuning from
    this head: its first logits are the probe's. Raises ValueError for features that are not
    finite, or labels outside 0..classes-1.
    """
    if not torch.isfinite(features).all():
        raise ValueError("features must be finite, and some are NaN or infinite")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, not {low}..{high}")
    inputs = features.detach().float()
    mean, scale = inputs.mean(0), inputs.std(0, correction=0)
    scale = torch.where(scale > 1e-6 * inputs.abs().max(), scale, 1.0)  # a constant: left as it is
    inputs = (inputs - mean) / scale
    weight = torch.zeros(classes, inputs.shape[1], device=inputs.device, requires_grad=True)
    bias = torch.zeros(classes, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randperm(len(inputs), generator=generator)[:batch].to(inputs.device)
        loss, _ = _score(inputs[chosen] @ weight.mT + bias, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    head = linear_head(inputs.shape[1], classes, seed).to(inputs.device)
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias - (weight / scale) @ mean)
    return head


def _score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    accuracy = (logits.detach().argmax(1) == labels).float().mean()
    return functional.cross_entropy(logits, labels), accuracy

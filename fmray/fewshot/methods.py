"""The centroid classifier and the losses of finetuning: multitask, standard, LP-FT and MAML.

A loss takes an encoder and normalised pixels of one episode or batch, and returns the loss to call
backward on and the accuracy. The loop, the optimizer and the ranks are the caller's. Multitask and
standard finetuning call the encoder once a step, so that DistributedDataParallel may wrap it.
Direct adaptation has no step: it is the encoder itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fmray.errors import NotFinite

# --- Nearest-centroid classifier: tests every method, and trains multitask finetuning ---


def centroid_logits(support: Tensor, query: Tensor, temperature: float | Tensor = 10.0) -> Tensor:
    """Return temperature times the cosine of each query with each class centroid.

    The centroid of a class is the mean of its *raw* support features; it and the queries are then
    L2-normalised (thesis, A.5; Chen et al. 2021, Meta-Baseline).

    Args:
        support: [N, shots, d], or with leading dimensions [..., N, shots, d].
        query: [M, d], or with the same leading dimensions [..., M, d].

    Returns:
        [M, N] or [..., M, N], in float32 at least.

    Raises:
        ValueError: shapes that do not fit, no shots, or features that are not finite.
    """
    if support.dim() < 3 or support.shape[-2] == 0:
        raise ValueError(f"support must be [N, shots, d] with shots >= 1: {list(support.shape)}")
    return cosine_logits(_wide(support).mean(-2), query, temperature)


def cosine_logits(centroids: Tensor, query: Tensor, temperature: float | Tensor = 10.0) -> Tensor:
    """Return the logits of `centroid_logits` for given centroids [N, d]."""
    for name, features in (("support", centroids), ("query", query)):
        if not torch.isfinite(features).all():
            raise NotFinite(f"{name} features must be finite, and some are NaN or infinite")
    return _cosine_logits(centroids, query, temperature)


def _cosine_logits(centroids: Tensor, query: Tensor, temperature: float | Tensor) -> Tensor:
    """Return the logits, NaN for features that are not finite (a look at them takes time)."""
    if query.dim() < 2 or query.shape[:-2] + query.shape[-1:] != (
        centroids.shape[:-2] + centroids.shape[-1:]
    ):
        raise ValueError(
            f"query must be [M, d] with d = {centroids.shape[-1]} as in the support, "
            f"not {list(query.shape)}"
        )
    centroids = functional.normalize(_wide(centroids), dim=-1)
    return temperature * functional.normalize(_wide(query), dim=-1) @ centroids.mT


def _wide(features: Tensor) -> Tensor:
    """Convert to float32 at least: half precision cannot tell near neighbours' cosines apart."""
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features


# --- Multitask and standard finetuning, LP-FT ---


def finetuning_mode(encoder: nn.Module) -> nn.Module:
    """Set training mode, but keep batch norms in eval mode; return the encoder.

    An episode has a handful of classes: its batch statistics reveal which images belong together,
    and they differ from those of pretraining. Call it before the first step and after each
    evaluation.
    """
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return encoder


def log_temperature(temperature: float = 10.0) -> nn.Parameter:
    """Return the logarithm of the cosine's temperature as a scalar parameter to learn."""
    return nn.Parameter(torch.tensor(math.log(temperature)))


def multitask_loss(
    encoder: nn.Module, support: Tensor, query: Tensor, log_temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Return cross entropy and accuracy of an episode's queries, classified by nearest centroid.

    The loss of several episodes is the mean of theirs (thesis, A.5). Gradients reach the encoder
    through queries and centroids.

    Args:
        support: [N, K, 3, H, W].
        query: [N, Q, 3, H, W].
        log_temperature: scalar.
    """
    ways, shots, queries = *support.shape[:2], query.shape[1]
    features = encoder(torch.cat([support.flatten(0, 1), query.flatten(0, 1)]))
    support_features, query_features = features.split([ways * shots, ways * queries])
    centroids = _wide(support_features.unflatten(0, (ways, shots))).mean(-2)
    logits = _cosine_logits(centroids, query_features, log_temperature.exp())
    return _score(logits, torch.arange(ways, device=logits.device).repeat_interleave(queries))


def classification_loss(
    encoder: nn.Module, head: nn.Linear, images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return cross entropy and accuracy of images under a linear head over all training classes.

    The loss of standard finetuning and of the second part of LP-FT. The test drops the head
    (thesis, A.5).

    Args:
        images: [B, 3, H, W].
        labels: [B] in 0..C-1.
    """
    return _score(head(encoder(images).to(head.weight.dtype)), labels)


def linear_head(features: int, classes: int, seed: int) -> nn.Linear:
    """Return a linear head with torch's default initialisation, drawn from `seed` alone."""
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
    """Train a linear head on frozen features: the first part of LP-FT (Kumar et al. 2022).

    SGD with momentum 0.9 and a cosine schedule from `lr` to 0, on batches drawn from `seed`: every
    rank computes the same head. Features are standardised for it and the scale is folded into the
    head, so that one learning rate fits any encoder. The second part finetunes from this head: its
    first logits are the probe's.

    Args:
        features: [n, d] of the training images.
        labels: [n] in 0..classes-1.

    Raises:
        ValueError: features that are not finite, or labels outside 0..classes-1.
    """
    if not torch.isfinite(features).all():
        raise NotFinite("features must be finite, and some are NaN or infinite")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, not {low}..{high}")
    inputs = features.detach().float()
    mean, scale = inputs.mean(0), inputs.std(0, correction=0)
    scale = torch.where(scale > 1e-6 * inputs.abs().max(), scale, 1.0)  # constant features
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

    # the head of raw features: standardisation is folded into it
    head = linear_head(inputs.shape[1], classes, seed).to(inputs.device)
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias - (weight / scale) @ mean)
    return head


def _score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (cross entropy, accuracy)."""
    accuracy = (logits.detach().argmax(1) == labels).float().mean()
    return functional.cross_entropy(logits, labels), accuracy


# --- MAML (Finn et al. 2017) ---
#
# Learns weights from which a few gradient steps on the support of a task fit its queries.
# The steps change *fast weights*, new tensors made from the encoder's, so there is nothing to
# restore between tasks. Ways and classes change from task to task, so the last layer of each task
# is a linear head that starts at zero, as in Meta-Dataset (Triantafillou et al. 2020); the steps
# train it together with the encoder.

Weights = dict[str, Tensor]


def adapt(
    weights: Weights, loss: Callable[[Weights], Tensor], lr: float, steps: int, order: int
) -> Weights:
    """Return fast weights after `steps` of gradient descent from `weights`, which do not change.

    Args:
        loss: of a dict like `weights`; weights it does not depend on stay as they are.
        order: 2 keeps the graph of the steps, so that an outer loss is differentiated through
            them (w' = w - lr g(w): factors I - lr H); 1 treats g as a constant (factors I).
            The result is differentiable in `weights` either way.

    Raises:
        ValueError: another order.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, not {order}")
    fast = dict(weights)
    for _ in range(steps):
        gradients = torch.autograd.grad(
            loss(fast), list(fast.values()), create_graph=order == 2, allow_unused=True
        )
        fast = {
            name: weight if gradient is None else weight - lr * gradient
            for (name, weight), gradient in zip(fast.items(), gradients, strict=True)
        }
    return fast


def maml_loss(
    encoder: nn.Module,
    support: Tensor,
    query: Tensor,
    inner_lr: float,
    inner_steps: int,
    order: int,
) -> tuple[Tensor, Tensor]:
    """Return cross entropy and accuracy of an episode's queries after adapting to its support.

    The loss is differentiable in the encoder's parameters, to first or second order. Batch norms
    should be in eval mode (`finetuning_mode`).

    Args:
        encoder: the bare module: a wrapper that shards weights does not see the fast ones, so the
            caller averages gradients over ranks.
        support: [N, K, 3, H, W].
        query: [N, Q, 3, H, W].
    """
    (ways, shots), queries = support.shape[:2], query.shape[1]
    labels = torch.arange(ways, device=support.device)
    with torch.enable_grad():  # the steps need gradients even where the caller evaluates
        weights = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
        features = encoder.features
        zeros = torch.zeros(ways, features + 1, device=support.device, requires_grad=True)

        def logits(fast: Weights, images: Tensor) -> Tensor:
            parameters = {name: value for name, value in fast.items() if name != "head"}
            encoded = functional_call(encoder, parameters, (images.flatten(0, 1),))
            return functional.linear(encoded, fast["head"][:, :-1], fast["head"][:, -1])

        # fast attention kernels have no second derivative
        backends = [SDPBackend.MATH] if order == 2 else list(SDPBackend.__members__.values())
        with sdpa_kernel(backends):
            fast = adapt(
                weights | {"head": zeros},
                lambda fast: functional.cross_entropy(
                    logits(fast, support), labels.repeat_interleave(shots)
                ),
                inner_lr,
                inner_steps,
                order,
            )
            predicted = logits(fast, query)
    expected = labels.repeat_interleave(queries)
    accuracy = (predicted.detach().argmax(1) == expected).float().mean()
    return functional.cross_entropy(predicted, expected), accuracy

"""Finetuning an encoder: multitask, standard, and LP-FT. What one step computes; the loop, the
optimizer and the workers are the caller's.

In: an encoder and normalised pixels of one episode or one batch. Out: a loss to call backward on,
and the share of images that were right. Direct adaptation has no step: it is the encoder as it is.
Every loss calls the encoder once, so that DistributedDataParallel may wrap it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

# The nearest-centroid classifier: what every method here is tested with, and multitask finetuning
# is trained with.
#
# In: raw features of support and query images. Out: logits. The centroid of a class is the mean of
# its *raw* support features; it and the queries are then L2-normalised, and the logits are their
# cosines times a temperature (thesis, A.5; Chen et al. 2021, Meta-Baseline). Queries never touch
# centroids.


def centroid_logits(support: Tensor, query: Tensor, temperature: float | Tensor = 10.0) -> Tensor:
    """Temperature times the cosine of each query with each class centroid.

    support: [N, shots, d]; query: [M, d]; returns [M, N], in float32 at least. Both may have equal
    leading dimensions: [..., N, shots, d] and [..., M, d] give [..., M, N]. Raises ValueError for
    shapes that do not fit, no shots, and features that are not finite.
    """
    if support.dim() < 3 or support.shape[-2] == 0:
        raise ValueError(f"support must be [N, shots, d] with shots >= 1: {list(support.shape)}")
    return cosine_logits(_wide(support).mean(-2), query, temperature)


def cosine_logits(centroids: Tensor, query: Tensor, temperature: float | Tensor = 10.0) -> Tensor:
    """As `centroid_logits`, from centroids [N, d] that were made elsewhere."""
    if query.dim() < 2 or query.shape[:-2] + query.shape[-1:] != (
        centroids.shape[:-2] + centroids.shape[-1:]
    ):
        raise ValueError(
            f"query must be [M, d] with d = {centroids.shape[-1]} as in the support, "
            f"not {list(query.shape)}"
        )
    for name, features in (("support", centroids), ("query", query)):
        if not torch.isfinite(features).all():
            raise ValueError(f"{name} features must be finite, and some are NaN or infinite")
    centroids = functional.normalize(_wide(centroids), dim=-1)
    return temperature * functional.normalize(_wide(query), dim=-1) @ centroids.mT


def _wide(features: Tensor) -> Tensor:
    """At least float32: cosines of near neighbours differ by less than half precision resolves."""
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features


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


# MAML (Finn et al. 2017): learn weights from which a few gradient steps on a task's support do well
# on its queries.
#
# In: an encoder and one episode. Out: the loss of the queries after those steps, to call backward
# on. The steps are taken on *fast weights*, new tensors made from the encoder's own, which never
# change: there is nothing to restore between tasks. The last layer of a task is a linear head that
# starts at zero, as in Meta-Dataset (Triantafillou et al. 2020), since ways and classes change from
# task to task; the steps train it along with the encoder.

Weights = dict[str, Tensor]


def adapt(
    weights: Weights, loss: Callable[[Weights], Tensor], lr: float, steps: int, order: int
) -> Weights:
    """Fast weights after `steps` of gradient descent from `weights`, which are left alone.

    loss: of a dict like `weights`; those it does not depend on stay. order 2 keeps the steps' own
    gradients, so that an outer loss is differentiated through them (w' = w - lr g(w): factors
    I - lr H); order 1 takes them for constants (I). The result hangs on `weights` either way.
    Raises ValueError for an order other than 1 and 2.
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
    """The cross entropy of an episode's queries after adapting to its support, and their accuracy.

    support: [N, K, 3, H, W]; query: [N, Q, 3, H, W]. Differentiable in the encoder's own
    parameters, to first or second order. `encoder` must be the bare module: a wrapper that splits
    or gathers weights does not see fast ones, and the caller averages gradients over workers.
    Batch norms should be in eval mode (`finetuning_mode`). To evaluate: call, and ignore the loss.
    """
    (ways, shots), queries = support.shape[:2], query.shape[1]
    labels = torch.arange(ways, device=support.device)
    with torch.enable_grad():  # the steps need it, also where the caller evaluates
        weights = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
        features = encoder.features
        zeros = torch.zeros(ways, features + 1, device=support.device, requires_grad=True)

        def logits(fast: Weights, images: Tensor) -> Tensor:
            changed = {name: value for name, value in fast.items() if name != "head"}
            encoded = functional_call(encoder, changed, (images.flatten(0, 1),))
            return functional.linear(encoded, fast["head"][:, :-1], fast["head"][:, -1])

        # the kernels that are quick have no second derivative
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

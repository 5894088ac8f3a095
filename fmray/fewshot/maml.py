"""MAML (Finn et al. 2017): learn weights from which a few gradient steps on a task's support do
well on its queries.

In: an encoder and one episode. Out: the loss of the queries after those steps, to call backward on.
The steps are taken on *fast weights*, new tensors made from the encoder's own, which never change:
there is nothing to restore between tasks. The last layer of a task is a linear head that starts at
zero, as in Meta-Dataset (Triantafillou et al. 2020), since ways and classes change from task to
task; the steps train it along with the encoder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

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

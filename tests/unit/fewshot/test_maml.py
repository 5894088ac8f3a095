"""MAML against closed forms on quadratics, and on encoders against plain gradient descent."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fmray.fewshot import create_encoder, finetuning_mode
from fmray.fewshot.methods import adapt, maml_loss

VALUES = st.floats(-3, 3)


@settings(max_examples=50, deadline=None)
@given(
    start=VALUES,
    support=VALUES,
    query=VALUES,
    curvature=st.floats(0.1, 2),
    lr=st.floats(0.01, 0.4),
    steps=st.integers(1, 4),
)
def test_gradients_match_closed_form_on_a_quadratic(start, support, query, curvature, lr, steps):
    """The inner loss is a/2 (w - s)^2 and the outer one (w' - q)^2 / 2.

    Then w' = s + (1 - lr a)^n (w - s), and the outer gradient is w' - q to first order, times
    (1 - lr a)^n to second order.
    """
    factor = (1 - lr * curvature) ** steps
    reached = support + factor * (start - support)
    for order, expected in ((1, reached - query), (2, factor * (reached - query))):
        weight = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        fast = adapt(
            {"w": weight}, lambda w: curvature / 2 * (w["w"] - support) ** 2, lr, steps, order
        )
        assert fast["w"].item() == pytest.approx(reached, abs=1e-9)
        ((fast["w"] - query) ** 2 / 2).backward()
        assert weight.grad.item() == pytest.approx(expected, abs=1e-9)
        assert weight.item() == start


def test_weights_unused_by_the_loss_do_not_change():
    weights = {name: torch.ones(2, requires_grad=True) for name in ("used", "unused")}
    fast = adapt(weights, lambda w: w["used"].square().sum(), 0.1, 2, 1)
    assert fast["unused"] is weights["unused"]
    assert not torch.equal(fast["used"], weights["used"])
    with pytest.raises(ValueError, match="order must be 1 or 2, not 3"):
        adapt(weights, lambda w: w["used"].sum(), 0.1, 2, 3)


def make_episode(ways=3, shots=2, queries=2, size=32, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randn(ways, 1, 3, 1, 1, generator=generator)
    noise = torch.randn(ways, shots + queries, 3, size, size, generator=generator)
    images = (classes + noise).to(dtype)
    return images[:, :shots], images[:, shots:]


@pytest.mark.parametrize("name", ["small/vit", "timm/test_resnet"])
@pytest.mark.parametrize("order", [1, 2])
def test_fast_weights_match_gradient_descent_and_the_encoder_does_not_change(name, order):
    torch.manual_seed(0)
    encoder = finetuning_mode(create_encoder(name, pretrained=False, image_size=32))
    before = copy.deepcopy(encoder.state_dict())
    support, query = make_episode()
    loss, accuracy = maml_loss(encoder, support, query, 0.05, 3, order)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())

    # the same steps in place, on a copy
    twin, head = copy.deepcopy(encoder), nn.Linear(encoder.features, 3)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD([*twin.parameters(), *head.parameters()], lr=0.05)
    labels = torch.arange(3).repeat_interleave(2)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(twin(support.flatten(0, 1))), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    logits = head(twin(query.flatten(0, 1)))
    expected = nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert accuracy == (logits.argmax(1) == labels).float().mean()
    loss.backward()
    expected.backward()
    if order == 1:  # the gradient at the adapted weights
        for ours, theirs in zip(encoder.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    else:
        assert all(parameter.grad is not None for parameter in encoder.parameters())
    # the next task starts from the same weights
    again, _ = maml_loss(encoder, support, query, 0.05, 3, order)
    assert torch.equal(again, loss)


class Tanh(nn.Module):
    """A small smooth encoder, for finite differences."""

    features = 3

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3, bias=False)

    def forward(self, images):
        return torch.tanh(self.linear(images.flatten(1)))


def test_second_order_gradient_matches_finite_differences():
    torch.manual_seed(0)
    encoder = Tanh()
    support, query = make_episode(size=2)
    loss, _ = maml_loss(encoder, support, query, 0.3, 3, order=2)
    loss.backward()
    first = copy.deepcopy(encoder)
    first.zero_grad()
    maml_loss(first, support, query, 0.3, 3, order=1)[0].backward()
    numeric = torch.zeros_like(encoder.linear.weight)
    for index in range(numeric.numel()):
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(encoder)
            with torch.no_grad():
                moved.linear.weight.view(-1)[index] += sign * 1e-2
            ends.append(maml_loss(moved, support, query, 0.3, 3, order=2)[0].item())
        numeric.view(-1)[index] = (ends[0] - ends[1]) / 2e-2
    torch.testing.assert_close(encoder.linear.weight.grad, numeric, atol=2e-4, rtol=2e-2)
    # the first-order gradient does not
    assert (first.linear.weight.grad - numeric).abs().max() > 10 * (
        encoder.linear.weight.grad - numeric
    ).abs().max()


def test_loss_under_no_grad_is_the_same():
    encoder, (support, query) = Tanh(), make_episode(size=2)
    expected, _ = maml_loss(encoder, support, query, 0.3, 2, order=1)
    with torch.no_grad():
        loss, accuracy = maml_loss(encoder, support, query, 0.3, 2, order=1)
    assert torch.equal(loss, expected) and not loss.requires_grad
    assert 0 <= accuracy <= 1

"""Finetuning losses, against their definition, finite differences and scikit-learn."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from fmray.fewshot import create_encoder
from fmray.fewshot.methods import (
    classification_loss,
    finetuning_mode,
    linear_head,
    linear_probe,
    log_temperature,
    multitask_loss,
)


class Projection(nn.Module):
    """A linear encoder of 2x2 images."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 5, bias=False)

    def forward(self, images):
        return self.linear(images.flatten(1))


def make_episode(ways=3, shots=2, queries=4, size=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randn(ways, 1, 3, size, size, generator=generator)
    images = classes + torch.randn(ways, shots + queries, 3, size, size, generator=generator)
    return images[:, :shots], images[:, shots:]


def test_multitask_loss_matches_its_definition():
    encoder, temperature = Projection().double(), 7.0
    support, query = (part.double() for part in make_episode())
    loss, accuracy = multitask_loss(
        encoder, support, query, torch.tensor(math.log(temperature), dtype=torch.float64)
    )
    weight = encoder.linear.weight.detach().numpy()
    centroids = [support[n].flatten(1).numpy().mean(0) @ weight.T for n in range(3)]
    losses, right = [], []
    for n in range(3):
        for image in query[n].flatten(1).numpy():
            z = weight @ image
            cosines = [c @ z / np.linalg.norm(c) / np.linalg.norm(z) for c in centroids]
            exponents = np.exp(temperature * np.array(cosines))
            losses.append(-np.log(exponents[n] / exponents.sum()))
            right.append(np.argmax(cosines) == n)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-9)
    assert accuracy.item() == pytest.approx(np.mean(right))


def test_multitask_gradient_flows_through_centroids_and_temperature():
    encoder, temperature = Projection().double(), nn.Parameter(torch.tensor(1.0).double())
    support, query = (part.double() for part in make_episode())

    def loss_of(weight, temperature):
        projected = Projection().double()
        del projected.linear.weight
        projected.linear.weight = weight
        return multitask_loss(projected, support, query, temperature)[0]

    assert torch.autograd.gradcheck(loss_of, (encoder.linear.weight, temperature))


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_resnet", "small/conv"])
def test_multitask_learns_and_batch_norms_do_not_change(name):
    torch.manual_seed(0)
    encoder = finetuning_mode(create_encoder(name, pretrained=False, image_size=32))
    temperature = log_temperature()
    assert math.exp(temperature.item()) == pytest.approx(10)
    before = {k: v.clone() for k, v in encoder.named_buffers() if "running" in k}
    assert bool(before) == (name == "timm/test_resnet")
    optimizer = torch.optim.SGD([*encoder.parameters(), temperature], lr=0.01, momentum=0.9)
    support, query = make_episode(ways=4, size=32)
    losses = []
    for _ in range(5):
        loss, _ = multitask_loss(encoder, support, query, temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert encoder.training
    assert all(torch.equal(v, before[k]) for k, v in encoder.named_buffers() if "running" in k)
    assert all(p.grad is not None for p in [*encoder.parameters(), temperature])


@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
def test_features_that_are_not_finite_give_a_loss_that_is_not(weight):
    """The training loop stops then, or skips the step; see `fmray.train.finite`."""
    encoder = Projection()
    nn.init.constant_(encoder.linear.weight, weight)
    assert multitask_loss(encoder, *make_episode(), log_temperature())[0].isnan()


def make_features(seed=0, classes=4, images=200, dimensions=6):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    centres = torch.randn(classes, dimensions, generator=generator)
    features = 0.7 * centres[labels] + torch.randn(images, dimensions, generator=generator)
    # far from zero and of very different scales, as raw features are
    return features * torch.logspace(-3, 2, dimensions) + 50, labels


def test_linear_probe_matches_logistic_regression():
    features, labels = make_features()
    head = linear_probe(features, labels, 4, steps=3000, seed=0)
    mean, scale = features.mean(0), features.std(0)
    expected = LogisticRegression(C=1e6, max_iter=5000).fit((features - mean) / scale, labels)
    ours = head(features).softmax(1).detach().numpy()
    theirs = expected.predict_proba((features - mean) / scale)
    np.testing.assert_allclose(ours, theirs, atol=0.02)


def test_lp_ft_starts_from_the_probe_and_probing_does_not_change_the_encoder():
    torch.manual_seed(0)
    encoder = create_encoder("small/conv", pretrained=False)
    before = copy.deepcopy(encoder.state_dict())
    images, labels = torch.randn(24, 3, 32, 32), torch.arange(24) % 3
    with torch.no_grad():
        features = encoder(images)
    head = linear_probe(features, labels, 3, steps=50, seed=0)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    probe_logits = head(features).detach()
    finetuning_mode(encoder)
    torch.testing.assert_close(head(encoder(images)), probe_logits)
    loss, accuracy = classification_loss(encoder, head, images, labels)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(probe_logits, labels))
    assert accuracy == (probe_logits.argmax(1) == labels).float().mean() > 0.5
    loss.backward()  # finetuning then trains encoder and head
    assert all(p.grad is not None for p in [*encoder.parameters(), *head.parameters()])


def test_heads_depend_on_the_seed_alone():
    features, labels = make_features()
    torch.manual_seed(1)
    first = linear_head(6, 4, seed=3), linear_probe(features, labels, 4, steps=5, seed=3, batch=32)
    state = torch.get_rng_state()
    second = linear_head(6, 4, seed=3), linear_probe(features, labels, 4, steps=5, seed=3, batch=32)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)


def test_invalid_input_of_the_linear_probe_is_an_error():
    features, labels = make_features()
    with pytest.raises(ValueError, match=r"labels must lie in 0..2, not 0..3"):
        linear_probe(features, labels, 3, steps=1, seed=0)
    features[3, 2] = torch.nan
    with pytest.raises(ValueError, match="features must be finite"):
        linear_probe(features, labels, 4, steps=1, seed=0)

"""Pretraining: losses against brute force, augmentation against its definition, and learning."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fmray.fewshot import create_encoder
from fmray.fewshot.pretrain import MoCo, SimCLR, Supervised, augment, simclr_loss


def test_simclr_loss_matches_its_definition():
    generator = np.random.default_rng(0)
    views = generator.normal(size=(2, 4, 5))
    unit = (views / np.linalg.norm(views, axis=-1, keepdims=True)).reshape(8, 5)
    losses = []
    for i in range(8):
        partner = (i + 4) % 8
        similar = {k: math.exp(unit[i] @ unit[k] / 0.5) for k in range(8) if k != i}
        losses.append(-math.log(similar[partner] / sum(similar.values())))
    loss = simclr_loss(*torch.from_numpy(views), temperature=0.5)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-6)
    with pytest.raises(ValueError, match="B >= 2"):
        simclr_loss(torch.ones(1, 5), torch.ones(1, 5))


class Flat(nn.Module):
    """A linear encoder of 4x4 images."""

    features = 6

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 6)

    def forward(self, images):
        return self.linear(images.flatten(1))


def test_moco_loss_queue_and_momentum_match_their_definition():
    torch.manual_seed(0)
    moco = MoCo(Flat(), temperature=0.3, queue=10, momentum=0.9)
    first, second = torch.randn(2, 4, 3, 4, 4)
    queue = moco.keys.clone()
    with torch.no_grad():
        queries = moco.projector(moco.encoder(first)).numpy()
        keys = moco.key_projector(moco.key_encoder(second)).numpy()
    queries, keys = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, keys))
    losses = []
    for query, key in zip(queries, keys, strict=True):
        logits = np.array([query @ key, *(queue.numpy() @ query)]) / 0.3
        losses.append(-logits[0] + np.log(np.exp(logits).sum()))
    loss = moco(first, second)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in moco.key_encoder.parameters())
    assert all(p.grad is not None for p in moco.encoder.parameters())
    # first in, first out, around the end
    np.testing.assert_allclose(moco.keys[:4], keys, atol=1e-6)
    assert torch.equal(moco.keys[4:], queue[4:])
    moco(first, second)
    moco(first, second)
    np.testing.assert_allclose(moco.keys[[8, 9, 0, 1]], keys, atol=1e-6)
    np.testing.assert_allclose(moco.keys[[2, 3]], keys[2:], atol=1e-6)
    assert moco.next_key == 2
    old = moco.key_encoder.linear.weight.clone()
    with torch.no_grad():
        moco.encoder.linear.weight.add_(1)
    moco.update()
    torch.testing.assert_close(moco.key_encoder.linear.weight, old + 0.1)


def test_moco_queue_shorter_than_the_batch_holds_the_newest_keys():
    moco = MoCo(Flat(), queue=3)
    _, second = images = torch.randn(2, 7, 3, 4, 4)
    moco(*images)
    keys = nn.functional.normalize(moco.key_projector(moco.key_encoder(second)), dim=1)
    torch.testing.assert_close(moco.keys[[4 % 3, 5 % 3, 6 % 3]], keys[4:])


def test_augmentation_depends_on_the_generator_alone():
    images = torch.randint(0, 256, (16, 3, 32, 40), dtype=torch.uint8)
    first, again, other = (
        augment(images, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert first.shape == images.shape and first.dtype == torch.float32
    assert first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_augmentation_crops_within_the_image_and_flips():
    # red is the column, green the row: colours tell where the pixels of a view came from
    columns = torch.linspace(0, 255, 64).expand(64, 64)
    image = torch.stack([columns, columns.T, torch.zeros(64, 64)]).to(torch.uint8)
    grey = image[:1].expand(3, -1, -1)  # colour changes keep the order of grey values
    views = augment(grey.expand(400, -1, -1, -1), torch.Generator().manual_seed(0))
    steps = views[:, 0, 32, 1:] - views[:, 0, 32, :-1]
    rising, falling = (steps >= -1e-6).all(1), (steps <= 1e-6).all(1)
    assert (rising | falling).all()  # no reflection, no rotation
    assert 0.4 < rising.float().mean() < 0.6
    # grey stays grey
    torch.testing.assert_close(views[:, 0], views[:, 2], atol=1e-5, rtol=0)


def test_augmentation_sometimes_removes_colour():
    red = torch.zeros(1000, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 200
    views = augment(red, torch.Generator().manual_seed(0))
    grey = (views.amax((1, 2, 3)) - views.amin((1, 2, 3))) < 1e-5
    assert 0.15 < grey.float().mean() < 0.25
    unchanged = (views[:, 0] - 200 / 255).abs().amax((1, 2)) < 1e-5
    assert 0.1 < unchanged.float().mean() < 0.22  # neither jittered nor grey: 0.2 * 0.8


@pytest.mark.parametrize("objective", ["simclr", "supervised"])
def test_simclr_and_supervised_learn(objective):
    torch.manual_seed(0)
    encoder = create_encoder("small/conv", pretrained=False)
    images = nn.functional.interpolate(255 * torch.rand(16, 3, 4, 4), scale_factor=8)
    generator, labels = torch.Generator().manual_seed(0), torch.arange(16)
    first, second = (
        encoder.preprocess.normalise(augment(images.to(torch.uint8), generator)) for _ in range(2)
    )
    module = {
        "simclr": lambda: SimCLR(encoder),
        "supervised": lambda: Supervised(encoder, 16),
    }[objective]()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def accuracy() -> float:
        """Return the share of first views that are matched to their own image or label."""
        if objective == "supervised":
            return (module.head(encoder(first)).argmax(1) == labels).float().mean().item()
        views = (nn.functional.normalize(encoder(view), dim=1) for view in (first, second))
        return (torch.mm(next(views), next(views).mT).argmax(1) == labels).float().mean().item()

    before = accuracy()
    for _ in range(20):
        loss = module(first, second, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.4 and accuracy() > 0.8
    assert all(parameter.grad is not None for parameter in trained)


def test_moco_learns():
    torch.manual_seed(0)
    moco = MoCo(create_encoder("small/conv", pretrained=False), queue=64, momentum=0.9)
    trained = [parameter for parameter in moco.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    first, second = torch.randn(2, 16, 3, 32, 32)
    queue, losses = moco.keys.clone(), []
    for _ in range(6):
        moco.keys.copy_(queue)  # or the same few images would be their own negatives
        loss = moco(first, second)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moco.update()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is not None for parameter in trained)

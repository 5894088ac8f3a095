"""The module that a training engine wraps: the encoder and what a method trains on top of it.

Its forward takes one episode (uint8 support and query images, class labels) and returns (loss,
accuracy). All methods see the same images in the same steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmray.config.fewshot import FewshotTrainConfig
from fmray.fewshot import (
    Encoder,
    classification_loss,
    linear_head,
    linear_probe,
    log_temperature,
    multitask_loss,
)
from fmray.fewshot.methods import maml_loss
from fmray.train.fewshot.encoder import ImageReader, embed
from fmray.train.fewshot.tasks import TrainingSet

PROBE_BATCH = 256  # images per call of the encoder


def make_learner(
    encoder: Encoder,
    training: TrainingSet,
    images: ImageReader,
    config: FewshotTrainConfig,
    seed: int,
    device: torch.device,
) -> nn.Module:
    """Return the module of `config.method` on the device; for lp_ft, train its head first.

    Raises:
        ValueError: features that are not finite.
    """
    if config.method == "multitask":
        return MultitaskLearner(encoder, config.temperature).to(device)
    if config.method == "maml":
        return MamlLearner(encoder, config).to(device)
    if config.method == "standard":
        head = linear_head(encoder.features, training.num_classes, seed)
        return ClassificationLearner(encoder, head).to(device)
    assert config.method == "lp_ft", config.method
    rows, labels = training.used_rows()
    features = embed(encoder, images, rows, PROBE_BATCH)
    head = linear_probe(
        features,
        torch.from_numpy(labels).to(features.device),
        training.num_classes,
        config.probe_steps,
        seed,
    )
    return ClassificationLearner(encoder, head).to(device)


class MultitaskLearner(nn.Module):
    """Nearest-centroid loss of an episode, with a learnable temperature."""

    def __init__(self, encoder: Encoder, temperature: float) -> None:
        super().__init__()
        self.encoder = encoder
        # [1]: DeepSpeed cannot broadcast a parameter without dimensions
        self.log_temperature = nn.Parameter(log_temperature(temperature).detach().reshape(1))

    def forward(self, support: Tensor, query: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        normalise = self.encoder.preprocess.normalise
        return multitask_loss(
            self.encoder, normalise(support), normalise(query), self.log_temperature[0]
        )


class ClassificationLearner(nn.Module):
    """Cross entropy of all images of an episode over all training classes.

    The loss of standard finetuning and of LP-FT.
    """

    def __init__(self, encoder: Encoder, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, support: Tensor, query: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = torch.cat([support, query], dim=1)  # [N, K + Q, 3, size, size]
        targets = labels.repeat_interleave(images.shape[1])
        pixels = self.encoder.preprocess.normalise(images.flatten(0, 1))
        return classification_loss(self.encoder, self.head, pixels, targets)


class MamlLearner(nn.Module):
    """Loss of the queries after some steps on the support, from the same start in every task."""

    def __init__(self, encoder: Encoder, config: FewshotTrainConfig) -> None:
        super().__init__()
        self.encoder, self._config = encoder, config

    def forward(self, support: Tensor, query: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        normalise, config = self.encoder.preprocess.normalise, self._config
        return maml_loss(
            self.encoder,
            normalise(support),
            normalise(query),
            inner_lr=config.inner_lr,
            inner_steps=config.inner_steps,
            order=config.order,
        )

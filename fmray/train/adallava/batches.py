"""Batches for an adaptive model: forward arguments, the draw of budgets and noise, answer scores.

Nothing here depends on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fmray.data.loader import IGNORED, Batch

if TYPE_CHECKING:
    from transformers import ProcessorMixin


def model_inputs(batch: Batch, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the keyword arguments of a model's forward, on `device`, pixels in `dtype`."""
    batch = batch.to(device)
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "labels": batch.labels,
        **batch.extras,
    }
    if batch.pixel_values is not None:
        inputs["pixel_values"] = batch.pixel_values.to(dtype)
    return inputs


def blank_row(processor: ProcessorMixin) -> Batch:
    """Return one row with a grey image and no supervised token, for `with_image`."""
    size = getattr(processor.image_processor, "crop_size", None) or {"height": 64, "width": 64}
    grey = Image.new("RGB", (size["width"], size["height"]), (128, 128, 128))
    features = dict(processor(images=[grey], text=[processor.image_token], return_tensors="pt"))
    ids = features.pop("input_ids")
    return Batch(
        ids,
        features.pop("attention_mask"),
        torch.full_like(ids, IGNORED),
        features.pop("pixel_values"),
        {name: value for name, value in features.items() if name != "mm_token_type_ids"},
        [None],
        [0],
    )


def with_image(batch: Batch, blank: Batch) -> Batch:
    """Return the batch, with the blank row added if it contains text alone.

    Ranks exchange gradients (and, under ZeRO-3, weights) module by module. A rank whose micro batch
    has no image would skip the vision tower and the projector, and the others would wait for it or
    reduce the wrong tensors.
    """
    if batch.pixel_values is not None:
        return batch
    length = max(batch.input_ids.shape[1], blank.input_ids.shape[1])

    def join(name: str, value: int) -> Tensor:
        parts = [getattr(batch, name), getattr(blank, name)]
        return torch.cat(
            [functional.pad(part, (0, length - part.shape[1]), value=value) for part in parts]
        )

    return Batch(
        join("input_ids", 0),
        join("attention_mask", 0),
        join("labels", IGNORED),
        blank.pixel_values,
        blank.extras,
        [*batch.tags, *blank.tags],
        [*batch.rows, *blank.rows],
        batch.filler,
    )


def draw(batch: Batch, seed: int, step: int, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Draw the number of units on (int64 [B], uniform over `levels`) and Gumbel noise [B, K].

    A sample is identified by its row and the position of its first answer token, so that the draw
    does not depend on the rank or micro batch it is in. K is the last level.
    """
    first_answer = (batch.labels != IGNORED).int().argmax(1).tolist()
    units_on, noise = [], []
    for row, place in zip(batch.rows, first_answer, strict=True):
        generator = np.random.default_rng((seed, step, row, place))
        units_on.append(levels[int(generator.integers(len(levels)))])
        noise.append(generator.gumbel(size=levels[-1]))
    return torch.tensor(units_on), torch.from_numpy(np.stack(noise)).float()


def answer_tokens(batch: Batch) -> int:
    """Return the number of supervised target tokens; 0 for a filler batch."""
    return 0 if batch.filler else int((batch.labels[:, 1:] != IGNORED).sum())


def score_answers(
    logits: Tensor, labels: Tensor, unknown: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score teacher-forced answers, row by row.

    Args:
        logits: [B, n, V]; logits[:, i] predicts token i + 1.
        labels: [B, n], -100 outside answers.
        unknown: the token of words outside the vocabulary (`unknown_token`), which is never right:
            the model did not read the answer.

    Returns:
        Four float64 tensors [B]: 1 for a row with an answer; 1 if every answer token is the most
        probable one; number of answer tokens; their loss in nats.
    """
    predicted, wanted = logits[:, :-1], labels[:, 1:]
    supervised = wanted != IGNORED
    answered = supervised.any(1).double()
    hit = predicted.argmax(-1) == wanted
    if unknown is not None:
        hit &= wanted != unknown
    right = (hit | ~supervised).all(1).double() * answered
    loss = functional.cross_entropy(
        predicted.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return answered, right, supervised.sum(1).double(), loss.view_as(wanted).double().sum(1)

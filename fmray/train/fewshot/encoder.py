"""The encoder of a recipe: loaded, run over pictures, written.

In: the `encoder` section; an encoder and row ids. Out: an `Encoder`; features; a model directory.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fmray.fewshot import Encoder, create_encoder
from fmray.fewshot_config import EncoderConfig
from fmray.train.fewshot.pictures import Pictures


def load_encoder(config: EncoderConfig) -> Encoder:
    """The encoder a recipe names, with its weights."""
    return create_encoder(config.name, config.checkpoint, config.pretrained, config.image_size)


@torch.no_grad()
def embed(encoder: Encoder, pictures: Pictures, rows: np.ndarray, batch: int) -> Tensor:
    """float32 [n, d] features of rows [n], `batch` pictures a call, where the encoder is.

    Leaves the encoder in eval mode.
    """
    device = next(encoder.parameters()).device
    encoder.eval()
    parts = [
        encoder(pictures.preprocess.normalise(pictures[rows[start : start + batch]].to(device)))
        for start in range(0, len(rows), batch)
    ]
    return torch.cat(parts).float()


def export_encoder(encoder: Encoder, target: Path) -> None:
    """Save an encoder as a directory that `encoder.checkpoint` may name; moved when complete."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    encoder.save_pretrained(partial)
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)

"""Recipes of small few-shot jobs on the store of colours, for tests of finetuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from support.selection import color_recipe
from torch import Tensor

from fmray.config import LoadedRecipe
from fmray.config.fewshot import FewshotRecipe
from fmray.data.image_store import ImageStore
from fmray.fewshot import create_encoder

ENCODER = {"name": "small/conv", "pretrained": False, "image_size": 16}
TRAIN = {"steps": 6, "episodes_per_step": 2, "lr": 0.02}
EPISODES = {"ways": 3, "shots": 1, "queries": 4, "tasks": 7}


def fewshot_recipe(
    store: ImageStore, storage: Path, **sections: Any
) -> LoadedRecipe[FewshotRecipe]:
    """Return a recipe of six steps of two 3-way episodes on all tasks, in this process."""
    values: dict[str, Any] = {
        "encoder": ENCODER,
        "train": TRAIN,
        "episodes": EPISODES,
        "select": {"method": "all"},
        "evaluate": {"tasks": 20, "ways": 3, "shots": [1, 5], "queries": 4},
    }
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes
    return color_recipe(store, storage, **values)


def start_encoder(folder: Path) -> Path:
    """Write the encoder that finetuning starts from, always with the same weights."""
    torch.manual_seed(1)
    create_encoder(**ENCODER).save_pretrained(folder)
    return folder


def weights(model_dir: Path) -> dict[str, Tensor]:
    return load_file(model_dir / "model.safetensors")

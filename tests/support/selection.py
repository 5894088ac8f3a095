"""Collections of noise in known colours, and an encoder of mean colours."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from support.images import image_recipe, parquet, prepare_here
from torch import Tensor, nn

from fmray.config import LoadedRecipe
from fmray.config.fewshot import FewshotRecipe
from fmray.data.image_store import ImageStore
from fmray.fewshot import Encoder, Preprocess

COLORS = {
    "crimson": (200, 40, 40),
    "scarlet": (230, 60, 20),
    "sea": (20, 60, 220),
    "moss": (60, 150, 30),
    "target": (215, 50, 30),
}
SPLITS = ("train",) * 6 + ("val",) * 1 + ("test",) * 3


class MeanColors(nn.Module):
    """[B, 3, 8, 8] -> [B, 12]: mean colour of each quarter of an image.

    Its only parameter is a scale, so that the module has a device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * nn.functional.avg_pool2d(images, 4).flatten(1)


def color_encoder() -> Encoder:
    preprocess = Preprocess(8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return Encoder("test/colors", MeanColors(), preprocess, {})


def color_store(folder: Path, images: int = 12) -> ImageStore:
    """Return a store of `COLORS`: ten classes each, six of them for training.

    Args:
        images: per class.
    """
    collections = {}
    for number, (name, color) in enumerate(COLORS.items()):
        generator = np.random.default_rng(number)
        rows = []
        for label, split in enumerate(SPLITS):
            middle = np.array(color) + generator.normal(0, 12, 3)
            rows += [
                {
                    "image": _png(generator.normal(middle, 10, (8, 8, 3))),
                    "label": label,
                    "class_name": f"class {label}",
                    "split": split,
                }
                for _ in range(images)
            ]
        collections[name] = parquet(folder / f"{name}.parquet", rows)
    recipe = image_recipe(folder / "store", collections)
    prepare_here(recipe)
    return ImageStore.open(recipe.images.store)


def color_recipe(store: ImageStore, storage: Path, **sections: Any) -> LoadedRecipe[FewshotRecipe]:
    """Return a recipe on that store for the target `target`, in this process."""
    values: dict[str, Any] = {
        "name": "colors",
        "seed": 3,
        "images": {"store": store.path},
        "target": {"collection": "target", "unlabelled": 30},
        "episodes": {"ways": 3, "shots": 1, "queries": 4},
        "select": {"images_per_class": 10},
        "evaluate": {"shots": [1, 5]},
        "cluster": {"storage": storage, "workers": 0},
        "tracking": {"enabled": False},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    recipe = FewshotRecipe.model_validate(values)
    origins = {}

    def name(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                name(value, f"{prefix}{key}.")
            else:
                origins[prefix + key] = "test"

    name(recipe.model_dump(mode="json"), "")
    return LoadedRecipe(recipe, origins)


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, format="png")
    return file.getvalue()

"""Make image collections, and stores of them without Ray."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.tasks import run_here

from fmray.config.fewshot import FewshotRecipe
from fmray.data import image_ingest
from fmray.data.image_store import ImageManifest
from fmray.data.tfrecord import example, write_records


def noise_image(seed: int, side: int = 8) -> bytes:
    """Return a PNG of noise that depends only on the arguments."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()


def class_folders(path: Path, counts: Mapping[str, int], seed: int = 0, side: int = 8) -> Path:
    """Write class folders with `counts` images each; image i of all has the seed `seed + i`."""
    for name, count in counts.items():
        (path / name).mkdir(parents=True)
        for number in range(count):
            (path / name / f"{number}.png").write_bytes(noise_image(seed, side))
            seed += 1
    return path


def tfrecords(path: Path, counts: list[tuple[str, int]], splits: tuple[int, int, int]) -> Path:
    """Write Meta-Dataset records.

    Args:
        counts: (class name, number of images) by id.
        splits: number of classes in train, val and test.
    """
    path.mkdir(parents=True)
    seed = 0
    for number, (_, count) in enumerate(counts):
        records = [example(noise_image(seed + row), number) for row in range(count)]
        write_records(path / f"{number}.tfrecords", records)
        seed += count
    specification = {
        "__class__": "DatasetSpecification",
        "name": path.name,
        "classes_per_split": dict(zip(("TRAIN", "VALID", "TEST"), splits, strict=True)),
        "class_names": {str(number): name for number, (name, _) in enumerate(counts)},
        "images_per_class": {str(number): count for number, (_, count) in enumerate(counts)},
        "file_pattern": "{}.tfrecords",
    }
    (path / "dataset_spec.json").write_text(json.dumps(specification))
    return path


def parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 1000) -> Path:
    """Write rows to a Parquet file."""
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def image_recipe(store: Path, collections: Mapping[str, Any], **images: Any) -> FewshotRecipe:
    """Return a recipe; `collections`: name -> path, or the values of its section."""
    sections = {
        name: values if isinstance(values, dict) else {"path": values}
        for name, values in collections.items()
    }
    return FewshotRecipe.model_validate(
        {"name": "images", "images": {"store": store, "collections": sections, **images}}
    )


def prepare_here(recipe: FewshotRecipe) -> ImageManifest:
    """Call `prepare_images` without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_ingest, "run_tasks", run_here)
        return image_ingest.prepare_images(recipe)

"""A small store of shapes, recipes on it, and run folders, for tests of training and evaluation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tasks import run_here
from support.tiny_models import SCRATCH

from fmray.config import AdaLlavaRecipe, LoadedRecipe
from fmray.data import ingest
from fmray.runtime.run_log import read_log

ADAPTIVE = {"first": 1}
#: what other tests cover too, and only a complete run tries again
FULL = pytest.mark.skipif("FMRAY_TEST_FULL" not in os.environ, reason="FMRAY_TEST_FULL is not set")


def load_recipe(store: Path, storage: Path, **sections: Any) -> LoadedRecipe:
    """Return the recipe of a tiny model on `store`: eight steps of 16 samples, in this process."""
    values: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "model": {"scratch": SCRATCH, "freeze": []},
        "data": {
            "store": str(store),
            "max_length": 64,
            "shapes": {"pictures": 200, "validation_pictures": 20},
        },
        "train": {"lr": 2e-3, "steps": 8, "global_batch": 16, "micro_batch": 8, "eval_rows": 8},
        "cluster": {"storage": str(storage), "workers": 0, "cpus_per_worker": 0.5, "data_cpus": 0},
        "tracking": {"enabled": False},
    }
    for section, changes in sections.items():
        if isinstance(changes, dict) and isinstance(values.get(section), dict):
            values[section] = values[section] | changes
        else:
            values[section] = changes
    recipe = AdaLlavaRecipe.model_validate(values)
    return LoadedRecipe(recipe, dict.fromkeys(_keys(recipe.model_dump(mode="json"), ""), "test"))


def make_store(folder: Path, recipe: AdaLlavaRecipe | None = None) -> Path:
    """Prepare `<folder>/store` in this process, without Ray; default: `load_recipe`'s shapes."""
    store = folder / "store"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "run_tasks", run_here)
        ingest.prepare(recipe or load_recipe(store, folder).recipe)
    return store


def losses(run_dir: Path) -> list[float]:
    """Return the training loss of each step."""
    return [line["loss"] for line in read_log(run_dir / "log.jsonl") if "loss" in line]


def forget_after(run_dir: Path, step: int) -> None:
    """Remove what a run that died after the checkpoint of `step` would not have written."""
    for path in run_dir.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    shutil.rmtree(run_dir / "model")


def _keys(values: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name

"""Real photographs and questions go through ingest, training and evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import SCRATCH
from support.training import load_recipe, losses, make_store

from fmray.config import LoadedRecipe
from fmray.train.adallava.evaluate import evaluate_run
from fmray.train.launch import train


@pytest.fixture
def loaded(real_data: Path, tmp_path: Path) -> LoadedRecipe:
    folder = real_data / "vl" / "coco256"
    return load_recipe(
        tmp_path / "store",
        tmp_path,
        model={"scratch": SCRATCH | {"image_size": 64, "max_vocabulary": 2000}, "freeze": []},
        data={
            "store": str(tmp_path / "store"),
            "shapes": None,
            "train": str(folder / "llava_format.json"),
            "image_folder": str(folder / "images"),
            "validation_share": 0.1,
            "max_length": 1024,
            "on_bad_row": "skip",
        },
        adaptive={},
        train={"lr": 2e-3, "steps": 12, "global_batch": 16, "micro_batch": 4, "eval_rows": 4},
        evaluate={"budgets": (0.5, 1.0), "plans": ("learned", "random"), "rows": 4},
    )


def test_a_model_learns_from_photographs(loaded: LoadedRecipe, tmp_path: Path) -> None:
    make_store(tmp_path, loaded.recipe)
    result = train(loaded, "coco")
    values = losses(result.run_dir)
    assert len(values) == 12
    assert sum(values[-3:]) / 3 < values[0] - 0.3
    report = evaluate_run(loaded, "coco")
    assert {point.plans for point in report.points} == {"learned", "random"}
    assert report.base.questions >= 4

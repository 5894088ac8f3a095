"""Real photographs and questions go through ingest, training and evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.training import SCRATCH, load_recipe, make_store

from fmray.config import LoadedRecipe
from fmray.runtime.run_log import read_log
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
    losses = [x["loss"] for x in read_log(result.run_dir / "log.jsonl") if "loss" in x]
    assert len(losses) == 12
    assert sum(losses[-3:]) / 3 < losses[0] - 0.3
    found = evaluate_run(loaded, "coco")
    assert {point.plans for point in found.points} == {"learned", "random"}
    assert found.base.questions >= 4

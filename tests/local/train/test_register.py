"""From a recipe to the endpoint through the model registry, for both kinds of training."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.fewshot import fewshot_recipe
from support.selection import color_store
from support.serving import chat, client_of, data_url, encoded_image, make_app
from support.training import ADAPTIVE, load_recipe, make_store

from fmray.cli import main
from fmray.config import TrackingConfig
from fmray.config.serve import ServeConfig
from fmray.runtime.registry import production
from fmray.serve.app import find_directory
from fmray.serve.replica import load_chat_model
from fmray.train.launch import train

NAME = "tiny-model"


def test_a_trained_model_is_served_by_its_registered_name(tmp_path: Path) -> None:
    """Recipe -> training -> registry -> models:/NAME@production -> an answer over HTTP."""
    loaded = load_recipe(
        make_store(tmp_path),
        tmp_path / "runs",
        adaptive=ADAPTIVE,
        train={"lr": 2e-3, "steps": 2, "global_batch": 8, "micro_batch": 8, "eval_rows": 8},
        tracking={"enabled": True, "register_as": NAME},
    )
    result = train(loaded, "run")
    assert result.model_version == "1"

    settings = ServeConfig(
        model=f"models:/{NAME}@production", storage=tmp_path / "runs", calibration_s=0.5
    )
    assert find_directory(settings) == result.model_dir
    model = load_chat_model(settings, find_directory(settings))
    try:

        async def ask() -> dict:
            async with client_of(make_app(model)) as client:
                body = chat(data_url(encoded_image()), budget=1.0, max_tokens=2, model=NAME)
                response = await client.post("/v1/chat/completions", json=body)
                assert response.status_code == 200, response.text
                return response.json()

        answer = asyncio.run(ask())
    finally:
        model.close()
    assert answer["model"] == NAME
    assert answer["fmray"]["budget"] == 1.0


def test_a_finetuned_encoder_is_registered_by_recipe_and_by_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few-shot training registers by the same code; `fmray models register` makes version 2."""
    storage = tmp_path / "runs"
    tracking = {"enabled": True, "register_as": NAME}
    loaded = fewshot_recipe(
        color_store(tmp_path), storage, train={"steps": 1, "lr": 0.02}, tracking=tracking
    )
    result = train(loaded, "run")
    assert result.model_version == "1"
    assert main(["models", "register", "run", NAME, "--storage", str(storage)]) == 0
    assert f"models:/{NAME}@production (version 2)" in capsys.readouterr().out
    assert production(TrackingConfig(), storage, NAME) == result.model_dir


@pytest.mark.parametrize("files", [(), ("recipe.yaml",)])
def test_an_unfinished_run_is_not_registered(
    tmp_path: Path, files: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    for name in files:
        (tmp_path / "run" / name).write_text("name: a\n")
    assert main(["models", "register", "run", NAME, "--storage", str(tmp_path)]) == 2
    message = "the run has not finished" if files else "no run there"
    assert message in capsys.readouterr().err

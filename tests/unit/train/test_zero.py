"""DeepSpeed's settings, the parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.training import ADAPTIVE, load_recipe

from fmray.data.processor import scratch_processor
from fmray.train.adallava.model import build_model
from fmray.train.engine import engine_config, lr_factor, make_optimizer


def test_accumulation_follows_from_the_global_batch(tmp_path: Path) -> None:
    recipe = load_recipe(tmp_path, tmp_path).recipe  # 16 = 8 x 2
    configs = [engine_config(recipe, workers) for workers in (1, 2, 3)]
    assert [config["gradient_accumulation_steps"] for config in configs] == [2, 1, 1]
    assert [config["train_batch_size"] for config in configs] == [16, 16, 24]


def test_engine_config_follows_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(
        tmp_path,
        tmp_path,
        model={"dtype": "bfloat16"},
        zero={"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    ).recipe
    config = engine_config(recipe, 2)
    assert config["gradient_accumulation_steps"] == 1
    assert config["bf16"] == {"enabled": True}
    assert config["gradient_clipping"] == 1.0
    assert config["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "stage3_param_persistence_threshold": 100_000,
    }
    assert "checkpoint" not in config
    assert engine_config(recipe, 2, universal=True)["checkpoint"] == {"load_universal": True}


def test_lr_factor_warms_up_and_ends_at_zero() -> None:
    factors = [lr_factor(step, 100, 0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert lr_factor(0, 7, 0.0) == 1.0
    assert lr_factor(3, 7, 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi * 3 / 7)))


def test_the_adaptive_parts_have_their_own_learning_rate(tmp_path: Path) -> None:
    recipe = load_recipe(
        tmp_path, tmp_path, adaptive=ADAPTIVE, train={"lr": 1e-4, "scheduler_lr": 1e-2}
    ).recipe
    model = build_model(recipe, scratch_processor(["red blue"], recipe.model.scratch))
    base, adaptive = make_optimizer(model, recipe).param_groups
    assert (base["lr"], adaptive["lr"]) == (1e-4, 1e-2)
    assert {id(p) for p in adaptive["params"]} == {id(p) for p in model.adaptive_parameters()}
    assert {id(p) for p in base["params"]} == {id(p) for p in model.base.parameters()}
    assert isinstance(base["params"][0], torch.nn.Parameter)

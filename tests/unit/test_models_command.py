"""`fmray models check`: a model of a folder is proven, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import SCRATCH, text_sizes
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from fmray.cli import main
from fmray.config import ScratchConfig
from fmray.data.processor import scratch_processor
from fmray.train.adallava.model import scratch_model


def test_a_model_with_images_is_proven_for_both_designs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ScratchConfig(**SCRATCH)
    processor = scratch_processor(["what is this ?"], config)
    torch.manual_seed(0)
    scratch_model(config, processor, torch.float32, "sdpa").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert main(["models", "check", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("proven") == 2
    assert printed.count("a full plan: 0.0e+00") == 2


def test_a_text_model_needs_no_processor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LlamaForCausalLM(LlamaConfig(**text_sizes(layers=4))).save_pretrained(tmp_path)
    assert main(["models", "check", str(tmp_path), "--dtype", "bfloat16"]) == 0
    assert "design heads: proven" in capsys.readouterr().out


def test_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = MistralConfig(**text_sizes(layers=4), num_key_value_heads=2, sliding_window=16)
    MistralForCausalLM(config).save_pretrained(tmp_path / "window")
    for folder, reason in (("window", "last 16 tokens"), ("nothing", "does not load")):
        assert main(["models", "check", str(tmp_path / folder)]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1

"""Checkpoint, recipe, model and store of the previous release still load.

`previous_release.tar.xz` was made by commit 0b9661c, the last one before the restructuring: a model
of two layers, trained for four steps, of which the checkpoint of step 2 is kept (without the
scripts that DeepSpeed copies into checkpoints).
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

from fmray.adallava import AdaptiveVLM
from fmray.config import AdaLlavaRecipe, load
from fmray.runtime.run_log import read_log
from fmray.train.launch import train

ARCHIVE = Path(__file__).parents[2] / "data" / "previous_release.tar.xz"


@pytest.fixture
def previous(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_run_resumes_and_takes_the_same_steps(
    previous: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 3 and 4 have the losses, gradient norms and scores that the previous release logged."""
    run_dir = previous / "runs" / "run"
    wanted = read_log(run_dir / "log.jsonl")
    overrides = [f"cluster.storage={previous / 'runs'}", f"data.store={previous / 'store'}"]
    loaded = load(run_dir / "recipe.yaml", overrides)
    assert isinstance(loaded.recipe, AdaLlavaRecipe)
    train(loaded, "run")
    assert "made with another version of the image decoder" in capsys.readouterr().out
    lines = read_log(run_dir / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    assert lines[:2] == wanted[:2]
    timings = {"tokens_per_s", "waiting_share"}
    for line, expected in zip(lines, wanted, strict=True):
        assert line.keys() == expected.keys()
        for name in line.keys() - timings:
            assert line[name] == pytest.approx(expected[name], rel=1e-4), (line["step"], name)


def test_an_exported_model_answers(previous: Path) -> None:
    model = AdaptiveVLM.from_pretrained(previous / "runs" / "run" / "model").eval()
    assert model.layout.num_units == 1
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        output = model(ids, torch.ones_like(ids), None, budget=0.5)
    assert output.logits.shape[:2] == ids.shape
    assert not output.plan.any()

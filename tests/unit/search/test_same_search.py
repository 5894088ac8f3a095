"""Which search resumes: the same settings, data and model, wherever they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fmray.config import AdaLlavaRecipe, SearchRecipe
from fmray.search.run import _check_same_search
from fmray.train import resume
from fmray.train.resume import same_training

SEARCH = SearchRecipe(name="search", base=Path("base.yaml"), space="budgets")
HASHES = {f"content.{part}": part[0] * 64 for part in ("records", "images", "processor")}


def base(folder: str, **train: Any) -> AdaLlavaRecipe:
    data = {"store": f"{folder}/store", "train": f"{folder}/train.json"}
    return AdaLlavaRecipe.model_validate({"name": "base", "data": data, "train": train})


def test_a_moved_search_resumes_and_one_on_other_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "search.json"
    monkeypatch.setattr(resume, "content", lambda recipe: HASHES)
    _check_same_search(SEARCH, base("/old"), path)
    _check_same_search(SEARCH, base("/new"), path)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"base\.train\.lr was 1e-05 and is 0\.1; set it back"):
        _check_same_search(SEARCH, base("/new", lr=0.1), path)
    monkeypatch.setattr(resume, "content", lambda r: HASHES | {"content.images": "f" * 64})
    with pytest.raises(ValueError, match=r"search\.json cannot be resumed: the images of the st"):
        _check_same_search(SEARCH, base("/new"), path)

    # one of an earlier version: with paths, without hashes and later settings
    values = {k: v for k, v in json.loads(path.read_text()).items() if k[:8] != "content."}
    values |= {"base.data.store": "/old/store", "base_set": ["data.store=/old/store"]}
    del values["base.data.check_images"]
    path.write_text(json.dumps(values))
    _check_same_search(SEARCH, base("/new"), path)
    assert "records, images, processor cannot be compared" in capsys.readouterr().out
    assert json.loads(path.read_text())["content.images"] == "f" * 64


def test_a_trial_is_the_same_wherever_its_data_are() -> None:
    assert same_training(base("/old"), base("/new"))
    assert not same_training(base("/old"), base("/old", lr=0.1))

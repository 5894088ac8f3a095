"""What is compared when a run resumes: the model's hash, contents, settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fmray.config import AdaLlavaRecipe
from fmray.config.fewshot import FewshotRecipe
from fmray.train import resume
from fmray.train.checkpoint import TrainState
from fmray.train.resume import check_resume, compare, model_digest, training_settings

CONTENT = {
    "content.records": "a" * 64,
    "content.images": "b" * 64,
    "content.processor": "c" * 64,
    "content.model": "d" * 64,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return the folder of a model of two shards."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8}')
    names = {"a": "one.safetensors", "b": "two.safetensors"}
    for seed, (name, file) in enumerate(names.items()):
        torch.manual_seed(seed)
        save_file({name: torch.randn(3000), f"{name}.bias": torch.randn(4)}, folder / file)
    index = {"weight_map": names | {"a.bias": names["a"], "b.bias": names["b"]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def train_again(model: Path) -> None:
    tensors = load_file(model / "two.safetensors")
    tensors["b"] *= 1.001
    save_file(tensors, model / "two.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        train_again,
        lambda model: (model / "config.json").write_text('{"hidden_size": 9}'),
        lambda model: shutil.copy(model / "one.safetensors", model / "two.safetensors"),
    ],
)
def test_a_models_hash_is_that_of_its_content(
    model: Path, tmp_path: Path, change: Callable[[Path], Any]
) -> None:
    digest = model_digest(model)
    (model / "README.md").write_text("a model")
    assert model_digest(Path(shutil.copytree(model, tmp_path / "elsewhere"))) == digest
    change(model)
    assert model_digest(model) not in (None, digest)


def test_a_model_that_is_not_here_has_no_hash(model: Path) -> None:
    (model / "two.safetensors").unlink()  # as a download that was interrupted
    assert model_digest(model) is None
    assert model_digest("nobody/nothing") is None
    assert model_digest("no name of the hub!") is None


def test_a_weights_file_is_hashed_by_samples(tmp_path: Path) -> None:
    large = tmp_path / "large.safetensors"
    size = 15 * 2**30
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})
    with large.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + size)  # sparse
    before = model_digest(large)
    with large.open("r+b") as file:
        file.seek(8 + len(header) + size // 2)
        file.write(b"trained")
    assert model_digest(large) != before

    torch.save({"w": torch.zeros(500_000)}, tmp_path / "w.pth")
    before = model_digest(tmp_path / "w.pth")
    torch.save({"w": torch.full((500_000,), 1e-3)}, tmp_path / "w.pth")
    assert model_digest(tmp_path / "w.pth") != before


def recipe(**sections: Any) -> AdaLlavaRecipe:
    return AdaLlavaRecipe.model_validate({"name": "test", **sections})


def state(settings: dict[str, Any]) -> TrainState:
    settings = json.loads(json.dumps(settings))
    return TrainState(4, 0, 4, 0, 1, 2, "", settings, None, None)


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return `run_settings` of a recipe with given hashes."""

    def settings(recipe: AdaLlavaRecipe, **changed: str) -> dict[str, Any]:
        hashes = CONTENT | {f"content.{part}": digest for part, digest in changed.items()}
        monkeypatch.setattr(resume, "content", lambda recipe: hashes)
        return resume.run_settings(recipe)

    return settings


def test_paths_do_not_matter_and_contents_do(settings_of: Callable[..., Any]) -> None:
    old = recipe(
        model={"source": "/old/model"},
        data={"store": "/old/store", "train": "/old/data.json", "image_folder": "/old/images"},
    )
    new = recipe(model={"source": "/new/model"}, data={"store": "s", "train": "data.json"})
    before = state(settings_of(old))
    assert check_resume(before, new, settings_of(new), "step 4") == []
    for part, text in {
        "records": "the records of the store",
        "images": "the images of the store",
        "processor": "the processor of the store",
        "model": "the model to start from",
    }.items():
        digest = CONTENT[f"content.{part}"][:12]
        message = rf"step 4 cannot be resumed: {text} changed \(sha256 {digest} -> ffffffffffff\);"
        with pytest.raises(ValueError, match=message):
            check_resume(before, new, settings_of(new, **{part: "f" * 64}), "step 4")


def test_the_schedule_and_how_a_run_is_carried_out_may_change(
    settings_of: Callable[..., Any],
) -> None:
    train = {"lr": 1e-3, "steps": 10, "eval_every": 5}
    before = state(settings_of(recipe(train=train)))
    new = recipe(train={"lr": 1e-4, "steps": 20, "checkpoint_every": 5}, data={"loader_threads": 2})
    assert check_resume(before, new, settings_of(new), "step 4") == [
        "data.loader_threads: 1 -> 2",
        "train.checkpoint_every: null -> 5",
        "train.eval_every: 5 -> null",
        "train.lr: 0.001 -> 0.0001",
        "train.steps: 10 -> 20",
    ]
    new = recipe(train=train | {"weight_decay": 0.1}, data={"max_length": 64})
    with pytest.raises(ValueError, match=r"data\.max_length was 2048 and is 64; train\.weight_dec"):
        check_resume(before, new, settings_of(new), "step 4")


def test_a_checkpoint_without_hashes_resumes_with_a_line(settings_of: Callable[..., Any]) -> None:
    """Settings that it lacks, since a later version has added them, had their defaults."""
    now = settings_of(recipe(model={"source": "/new/model"}))
    old = {name: value for name, value in now.items() if not name.startswith("content.")}
    old |= {"model.source": "/old/model", "data.train": "/old/data.json"}
    del old["model.lora"], old["train.eval_every"]
    new = recipe(model={"source": "/new/model"}, train={"eval_every": 2})
    [line] = check_resume(state(old), new, settings_of(new), "step 4")
    assert line.startswith("the store's records, images, processor cannot be compared with step 4")
    other = recipe(model={"source": "hub/name"})
    with pytest.raises(ValueError, match=r"model\.source was '/old/model' and is 'hub/name'"):
        check_resume(state(old), other, settings_of(other), "step 4")
    other = recipe(model={"source": "/new/model", "lora": {"rank": 4}})
    with pytest.raises(ValueError, match=r"model\.lora\.rank was None and is 4"):
        check_resume(state(old), other, settings_of(other), "step 4")


def test_a_model_of_the_hub_that_is_not_here_is_compared_by_name() -> None:
    before = CONTENT | {"model.source": "hub/name"}
    now = {name: value for name, value in before.items() if name != "content.model"}
    assert compare(before, now, "step 4", {}) == []
    with pytest.raises(ValueError, match=r"model\.source was 'hub/name' and is 'hub/other'"):
        compare(before, now | {"model.source": "hub/other"}, "step 4", {})


def test_keys_of_a_comparisons_cells_hold_no_hashes() -> None:
    """Else no cell of an earlier version would be found."""
    names = training_settings(FewshotRecipe(name="cells"), ["a"]).keys()
    assert {"train.lr", "train.steps", "seed", "tasks", "encoder.name"} <= names
    assert not names & {"train.eval_every", "train.checkpoint_every", "content.images"}

"""The same bytes have the same pixels in training, few-shot jobs, the endpoint and `fmray ask`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.data_store import make_store
from support.image_cases import SIDE, image_cases
from support.images import image_recipe, parquet, prepare_here, tfrecords
from support.serving import data_url

from fmray.commands.ask import read_image
from fmray.config import ScratchConfig
from fmray.data.image_store import ImageStore
from fmray.data.images import DECODER_VERSION, decode_image
from fmray.data.ingest import ShardTask
from fmray.data.loader import Collator
from fmray.data.processor import scratch_processor
from fmray.data.store import StoreSplit
from fmray.data.tfrecord import example, write_records
from fmray.fewshot import Preprocess
from fmray.serve.images import read_images
from fmray.train.fewshot.encoder import ImageReader

CASES = image_cases()
ORIGINAL_SIZE = Preprocess(SIDE, squash=True)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return {name: pixels(decode_image(case.encoded).image) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All cases as files without a suffix, each in a class folder of its own."""
    folder = tmp_path_factory.mktemp("files")
    paths = {}
    for number, (name, case) in enumerate(CASES.items()):
        paths[name] = folder / f"{number:03d}" / "image"
        paths[name].parent.mkdir()
        paths[name].write_bytes(case.encoded)
    return paths


class RecordingCollator(Collator):
    """Keeps the images instead of giving them to the processor."""

    images: list[Image.Image]

    def _image_features(self, images: list[Any]) -> dict[str, Any]:
        self.images = images
        return {"expansions": [np.array([self.processor.image_token_id])] * len(images)}


def test_training(tmp_path: Path, files: dict[str, Path], expected: dict[str, np.ndarray]) -> None:
    folder = next(iter(files.values())).parents[1]
    turns = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
    records = [
        {"id": name, "image": str(path.relative_to(folder)), "conversations": turns}
        for name, path in files.items()
    ]
    processor = scratch_processor(["what ? red"], ScratchConfig())
    store = make_store(tmp_path / "store", records, folder, processor)
    collator = RecordingCollator(StoreSplit(store, "train"), processor, "turn")
    collator(np.arange(len(records)), np.zeros(len(records), dtype=int))
    for name, image in zip(files, collator.images, strict=True):
        np.testing.assert_array_equal(pixels(image), expected[name], err_msg=name)

    # what was changed is counted in the part
    part = pq.read_schema(next((store / "train").glob("*.parquet"))).metadata
    changes = json.loads(part[b"fmray.result"])["image_changes"]
    assert changes["turned"] == 29 and changes["scaled"] >= 5


@pytest.mark.parametrize("source", ["folders", "parquet", "meta_dataset"])
def test_fewshot(
    tmp_path: Path, files: dict[str, Path], expected: dict[str, np.ndarray], source: str
) -> None:
    if source == "folders":
        path = next(iter(files.values())).parents[1]
    elif source == "parquet":
        rows = [
            {"image": file.read_bytes(), "class_name": file.parent.name} for file in files.values()
        ]
        path = parquet(tmp_path / "cases.parquet", rows)
    else:
        names = [(file.parent.name, 1) for file in files.values()]
        path = tfrecords(tmp_path / "records", names, (len(names) - 2, 1, 1))
        for number, file in enumerate(files.values()):
            write_records(path / f"{number}.tfrecords", [example(file.read_bytes(), number)])
    recipe = image_recipe(tmp_path / "store", {"c": path}, on_bad_row="error")
    prepare_here(recipe)
    store = ImageStore.open(tmp_path / "store")
    entries = {entry.name: entry.first for entry in store.classes}
    assert len(entries) == len(files)
    rows = np.array([entries[file.parent.name] for file in files.values()])
    read = ImageReader(store, ORIGINAL_SIZE)[rows].permute(0, 2, 3, 1).numpy()
    for name, image in zip(files, read, strict=True):
        np.testing.assert_array_equal(image, expected[name], err_msg=name)


def test_endpoint(expected: dict[str, np.ndarray]) -> None:
    for name, case in CASES.items():
        url = data_url(case.encoded)
        if decode_image(case.encoded).format in ("JPEG", "PNG", "WEBP"):
            (image,) = read_images([url], SIDE * SIDE)
            np.testing.assert_array_equal(pixels(image.image), expected[name], err_msg=name)
        else:
            with pytest.raises(ValueError, match="not a JPEG, PNG or WebP file"):
                read_images([url], SIDE * SIDE)


def test_ask(files: dict[str, Path], expected: dict[str, np.ndarray]) -> None:
    for name, file in files.items():
        np.testing.assert_array_equal(pixels(read_image(file).image), expected[name])
    with pytest.raises(ValueError, match=r"test_same_pixels\.py: not a readable image: no image"):
        read_image(Path(__file__))


def test_stores_of_another_decoder_are_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, Path]
) -> None:
    task = ShardTask("train", "part", "file", b"[]", "folder", "processor", "hash", 9, "null", True)
    key = task.key()
    recipe = image_recipe(tmp_path / "s", {"c": next(iter(files.values())).parents[1]})
    before = prepare_here(recipe).collections
    for module in ("ingest", "image_ingest", "image_shuffle"):
        monkeypatch.setattr(f"fmray.data.{module}.DECODER_VERSION", DECODER_VERSION + 1)
    assert task.key() != key
    assert prepare_here(recipe).collections != before

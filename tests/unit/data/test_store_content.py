"""The hashes of a store's content, and replaced images; stores are made in this process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.tasks import run_here

from fmray.config import AdaLlavaRecipe
from fmray.data import ingest
from fmray.data.ingest import prepare
from fmray.data.store import Manifest

ROWS = 12


def image(path: Path, value: int) -> None:
    Image.fromarray(np.full((16, 16, 3), value, dtype=np.uint8)).save(path, format="BMP")


def write_source(folder: Path, rows: int = ROWS) -> None:
    (folder / "images").mkdir(parents=True)
    records = []
    for row in range(rows):
        image(folder / "images" / f"{row}.bmp", row)
        conversation = [
            {"from": "human", "value": "<image>\nwhich ?"},
            {"from": "gpt", "value": f"number {row % 5}"},
        ]
        records.append({"id": f"r{row}", "image": f"{row}.bmp", "conversations": conversation})
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "validation.json").write_text(json.dumps(records[:2]))


def edit(folder: Path, change: Callable[[list[Any]], list[Any] | None]) -> None:
    records = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps(change(records) or records))


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Manifest]:
    """Return a function that prepares `<folder>/store` from the source in `folder`."""
    monkeypatch.setattr(ingest, "run_tasks", run_here)

    def make_store(folder: Path, **data: Any) -> Manifest:
        paths = {"train": "train.json", "validation": "validation.json", "image_folder": "images"}
        paths = {name: str(folder / path) for name, path in paths.items()}
        values = {"store": str(folder / "store"), "rows_per_shard": 4, "max_length": 64}
        recipe = {"name": "test", "data": values | paths | data}
        return prepare(AdaLlavaRecipe.model_validate(recipe))

    return make_store


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_source(tmp_path / "source")
    return tmp_path / "source"


def test_content_does_not_depend_on_places_shards_and_order(
    make: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "a", rows=130)
    content = make(tmp_path / "a", rows_per_shard=64).content
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # with other times
    shutil.rmtree(tmp_path / "b" / "store")
    monkeypatch.setattr(ingest, "run_tasks", lambda f, tasks, c: run_here(f, tasks[::-1], c))
    assert make(tmp_path / "b", rows_per_shard=192).content == content
    # training reads other row groups then, so its batches are others
    assert make(tmp_path / "b", rows_per_shard=100).content != content


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda rows: rows[0].update(conversations=rows[1]["conversations"]), {"records"}),
        (
            lambda rows: rows + [dict(row, id=row["id"] + "b") for row in rows],
            {"records", "images"},
        ),
        (lambda rows: rows[::-1], {"records", "images"}),
        (lambda rows: rows[3].update(image="4.bmp"), {"images"}),
        (lambda rows: rows[3].update(tags=["hard"]), {"records"}),
    ],
)
def test_content_shows_what_changed(
    make: Callable[..., Manifest], source: Path, change: Any, changed: set[str]
) -> None:
    before = make(source)
    edit(source, change)
    after = make(source)
    assert {
        part for part in before.content if before.content[part] != after.content[part]
    } == changed
    assert before.fingerprint(source) != after.fingerprint(source)


def test_replaced_images_are_noticed_and_only_their_shards_are_written(
    make: Callable[..., Manifest], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = make(source)
    assert make(source) == before and "up to date" in capsys.readouterr().out
    untouched = source / "store" / "train" / "part-00000.parquet"
    written = untouched.stat().st_mtime_ns
    image(source / "images" / "6.bmp", 200)
    after = make(source)
    out = capsys.readouterr().out
    assert "1 of 4 shards written, 1 because image files were replaced, 12 train rows" in out
    assert after.content["records"] == before.content["records"]
    assert after.content["images"] != before.content["images"]
    assert untouched.stat().st_mtime_ns == written
    [row] = pq.read_table(source / "store" / "train" / "part-00001.parquet").slice(2, 1).to_pylist()
    assert row["image"] == (source / "images" / "6.bmp").read_bytes()
    assert make(source) == after and "up to date" in capsys.readouterr().out


def test_touched_images_have_the_same_content(
    make: Callable[..., Manifest], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = make(source)
    for path in (source / "images").iterdir():
        os.utime(path, (1, 1))
    assert make(source, check_images="hash") == before
    assert "up to date" in capsys.readouterr().out
    assert make(source).content == before.content
    assert "4 because image files were replaced by equal ones" in capsys.readouterr().out


def test_hashes_notice_images_of_the_same_size_and_time(
    make: Callable[..., Manifest], source: Path
) -> None:
    before, path = make(source), source / "images" / "6.bmp"
    times = path.stat()
    image(path, 200)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert make(source) == before
    assert make(source, check_images="hash").content["images"] != before.content["images"]


def test_a_store_of_an_earlier_version_gets_hashes(
    make: Callable[..., Manifest], source: Path
) -> None:
    before = make(source)
    path = Manifest.path(source / "store")
    values = json.loads(path.read_text())
    del values["content"]
    path.write_text(json.dumps(values))
    assert Manifest.read(source / "store").content == {}
    assert make(source) == before

"""Image ingest with Ray workers: the same store as in one process, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.images import class_folders, image_recipe, prepare_here, tfrecords

from fmray.data import image_ingest
from fmray.data.image_ingest import prepare_images
from fmray.data.image_store import ImageStore

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_workers_make_the_same_store_as_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_ingest, "PORTION", 2000)
    sources = {
        "tree": class_folders(tmp_path / "tree", {"a": 30, "b": 20}),
        "records": tfrecords(tmp_path / "r", [("x", 9), ("y", 9), ("z", 9)], (1, 1, 1)),
    }
    recipe = image_recipe(tmp_path / "ray", sources)
    manifest = prepare_images(recipe)
    assert manifest == prepare_here(image_recipe(tmp_path / "here", sources))
    local, remote = ImageStore.open(tmp_path / "here"), ImageStore.open(tmp_path / "ray")
    assert local.classes == remote.classes
    assert local.images(range(77)) == remote.images(range(77))
    for part in (tmp_path / "here").glob("images/*/*/*.parquet"):
        twin = tmp_path / "ray" / part.relative_to(tmp_path / "here")
        assert part.read_bytes() == twin.read_bytes()

    calls: list[object] = []
    monkeypatch.setattr(image_ingest, "run_tasks", lambda *given: calls.append(given) or iter(()))
    assert prepare_images(recipe) == manifest and not calls


def test_corrupt_record_is_an_error_until_it_is_fixed(tmp_path: Path) -> None:
    records = tfrecords(tmp_path / "r", [("x", 3), ("y", 3)], (1, 0, 1))
    content = (records / "1.tfrecords").read_bytes()
    (records / "1.tfrecords").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"1\.tfrecords: row 2: byte \d+: the record needs"):
        prepare_images(image_recipe(tmp_path / "store", {"records": records}))
    assert not (tmp_path / "store/manifest.json").exists()
    (records / "1.tfrecords").write_bytes(content)
    assert prepare_images(image_recipe(tmp_path / "store", {"records": records})).rows == 6

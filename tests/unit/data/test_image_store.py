"""The image store: content, random order, incremental updates, and memory use."""

from __future__ import annotations

import csv
import io
import os
import threading
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.images import (
    class_folders,
    image_recipe,
    noise_image,
    parquet,
    prepare_here,
    tfrecords,
)

from fmray.config.fewshot import FewshotRecipe
from fmray.data import image_ingest, image_store
from fmray.data.image_store import ImageManifest, ImageStore
from fmray.data.tfrecord import example, write_records


def contents(store: ImageStore) -> dict[tuple[str, str, str], list[bytes]]:
    """Return (collection, split, class) -> images in the order of the store."""
    return {
        (entry.collection, entry.split, entry.name): store.images(
            range(entry.first, entry.first + entry.count)
        )
        for entry in store.classes
    }


def files(store: Path) -> dict[str, int]:
    """Return the modification times of parts and collection files."""
    names = ("images/*/*/*.parquet", "images/*/collection.json")
    return {str(f): f.stat().st_mtime_ns for name in names for f in store.glob(name)}


def test_store_contains_exactly_the_source_images(real_data: Path, tmp_path: Path) -> None:
    names = ("cifar10", "mnist", "pacs_photo", "mscoco")
    sources = {name: real_data / "images" / f"{name}.parquet" for name in names}
    manifest = prepare_here(image_recipe(tmp_path, sources, rows_per_group=25))
    store = ImageStore.open(tmp_path)
    expected = defaultdict(list)
    for name, path in sources.items():
        for row in pq.read_table(path).to_pylist():
            expected[name, row["split"], row["class_name"]].append(row["image"])
    stored = contents(store)
    assert stored.keys() == expected.keys() and store.num_rows == manifest.rows
    for key, images in stored.items():
        assert sorted(images) == sorted(expected[key])
    assert sum(images != expected[key] for key, images in stored.items()) > 50  # shuffled

    for name, path in sources.items():
        table = pq.read_table(path, columns=["label", "class_name"])
        pairs = set(zip(*(column.to_pylist() for column in table), strict=True))
        selected = store.select(name)
        assert set(enumerate(selected.class_names)) == pairs
        for split in ("train", "val", "test"):
            part = store.select(name, split)
            batches = list(store.batches(name, split, 17))
            streamed = [row for rows, _ in batches for row in rows]
            assert streamed == list(part.rows) and all(len(rows) <= 17 for rows, _ in batches)
            images = [image for _, images in batches for image in images]
            assert store.images(part.rows[::-1]) == images[::-1]
            assert store.views(part.rows[::-1]) == images[::-1]
    mixed = np.random.default_rng(0).permutation(store.num_rows)
    in_order = store.images(range(store.num_rows))
    assert store.views(mixed) == [in_order[row] for row in mixed]

    for file in tmp_path.glob("images/*/*/*.parquet"):
        groups = pq.ParquetFile(file)
        for number in range(groups.num_row_groups):
            group = groups.read_row_group(number)
            assert len(set(group["label"].to_pylist())) == 1 and len(group) <= 25
    index = pq.read_table(tmp_path / "index.parquet").to_pylist()
    for piece in index:
        group = pq.ParquetFile(tmp_path / piece["file"]).read_row_group(piece["row_group"])
        assert group["class_name"][0].as_py() == piece["class_name"]


def test_order_depends_on_the_seed_but_not_on_how_the_source_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = class_folders(tmp_path / "tree", {"a": 40, "b": 3, "c": 20})
    for name, portion in (("whole", 1 << 26), ("cut", 1500), ("other", 1 << 26)):
        monkeypatch.setattr(image_ingest, "PORTION", portion)
        recipe = image_recipe(tmp_path / name, {"c": tree})
        seed = 5 if name == "other" else 0
        prepare_here(FewshotRecipe.model_validate(recipe.model_dump() | {"seed": seed}))
    assert len(list((tmp_path / "cut").glob("images/c/train/part-*"))) > 3
    whole, cut, other = (
        contents(ImageStore.open(tmp_path / name)) for name in ("whole", "cut", "other")
    )
    assert whole == cut
    for (collection, _, name), images in whole.items():
        others = next(i for (c, _, n), i in other.items() if (c, n) == (collection, name))
        assert set(images) == set(others) and (images != others or len(images) == 3)


def test_order_within_a_class_is_uniform(tmp_path: Path) -> None:
    """Half of the first 200 images of the source are among the first 200 stored ones.

    Hypergeometric, 5 standard deviations.
    """
    tree = class_folders(tmp_path / "tree", {"a": 400})
    prepare_here(image_recipe(tmp_path / "store", {"c": tree}))
    images = ImageStore.open(tmp_path / "store").images(range(400))
    early = {(tree / "a" / f"{number}.png").read_bytes() for number in range(200)}
    count = sum(image in early for image in images[:200])
    assert abs(count - 100) < 5 * np.sqrt(200 * 0.25 * 200 / 399)


def test_duplicates_are_skipped_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_ingest, "PORTION", 2000)  # duplicates lie in different runs
    monkeypatch.setattr(image_ingest, "DUPLICATES_ROWS", 7)  # and digests in different searches
    tree = class_folders(tmp_path / "tree", {"a": 20, "b": 20})
    for source, copy in (("a/0", "a/copy"), ("a/1", "b/x"), ("a/1", "b/y")):
        (tree / f"{copy}.png").write_bytes((tree / f"{source}.png").read_bytes())
    manifest = prepare_here(image_recipe(tmp_path / "store", {"c": tree}))
    assert (manifest.rows, manifest.duplicates) == (40, 3)
    rows = list(csv.reader((tmp_path / "store/duplicates.tsv").open(), delimiter="\t"))[1:]
    assert rows == [
        ["c", "a", "a/copy.png", "a", "a/0.png"],
        ["c", "b", "b/x.png", "a", "a/1.png"],
        ["c", "b", "b/y.png", "a", "a/1.png"],
    ]
    images = ImageStore.open(tmp_path / "store").images(range(40))
    assert len(set(images)) == 40


def test_class_with_only_duplicates_is_an_error(tmp_path: Path) -> None:
    tree = class_folders(tmp_path / "tree", {"a": 2, "b": 0})
    (tree / "b" / "0.png").write_bytes((tree / "a" / "1.png").read_bytes())
    with pytest.raises(ValueError, match="class 'b' has no images left: 1 are duplicates"):
        prepare_here(image_recipe(tmp_path / "store", {"c": tree}))
    with pytest.raises(ValueError, match="no complete image store"):
        ImageStore.open(tmp_path / "store")


def test_second_run_writes_nothing_and_a_change_only_its_collection(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = {
        "folders": class_folders(tmp_path / "tree", {"a": 4, "b": 4}),
        "records": tfrecords(tmp_path / "r", [("x", 3), ("y", 3)], (1, 0, 1)),
    }
    recipe = image_recipe(tmp_path / "store", sources)
    first = prepare_here(recipe)
    printed = capsys.readouterr().out
    assert printed.index("classes split by") < printed.index("duplicates  bad")
    before = files(tmp_path / "store")
    assert prepare_here(recipe) == first and files(tmp_path / "store") == before
    assert "0 of 2 collections made" in capsys.readouterr().out

    (tmp_path / "tree/a/new.png").write_bytes(noise_image(99))
    second = prepare_here(recipe)
    changed = {path for path, time in files(tmp_path / "store").items() if before.get(path) != time}
    assert changed and all("/folders/" in path for path in changed)
    assert second.rows == first.rows + 1 and second.fingerprint != first.fingerprint

    setting = image_recipe(tmp_path / "store", sources, rows_per_group=2)
    prepare_here(setting)
    assert "2 of 2 collections made" in capsys.readouterr().out
    assert not (tmp_path / "store/work/folders").exists()


def test_replaced_images_are_noticed_and_touched_ones_have_the_same_content(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, store = class_folders(tmp_path / "a", {"x": 3, "y": 3, "z": 3}), tmp_path / "store"

    def made(check: str) -> ImageManifest:
        return prepare_here(image_recipe(store, {"a": folder}, check_images=check))

    before = made("hash")
    image = folder / "x" / "0.png"
    os.utime(image, (1, 1))
    assert made("hash") == before
    assert "0 of 1 collections made" in capsys.readouterr().out
    assert made("stat").fingerprint == before.fingerprint

    content = image.read_bytes()
    image.write_bytes(noise_image(77))
    assert made("stat").fingerprint != before.fingerprint
    image.write_bytes(content)
    os.utime(image, (1, 1))
    assert made("hash").fingerprint == before.fingerprint


@pytest.mark.parametrize("step", ["sort_images", "write_part"])
def test_killed_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    monkeypatch.setattr(image_ingest, "PORTION", 1500)
    tree = class_folders(tmp_path / "tree", {"a": 30, "b": 10})
    recipe = image_recipe(tmp_path / "store", {"c": tree})
    done: list[str] = []
    function = getattr(image_ingest, step)

    def fail_at_fourth(task: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(task.path)
        return function(task)

    monkeypatch.setattr(image_ingest, step, fail_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        prepare_here(recipe)
    assert not (tmp_path / "store/manifest.json").exists()
    again: list[str] = []
    monkeypatch.setattr(image_ingest, step, lambda task: again.append(task.path) or function(task))
    prepare_here(recipe)
    assert again and not set(again) & set(done)
    prepare_here(image_recipe(tmp_path / "other", {"c": tree}))
    stores = [ImageStore.open(tmp_path / name) for name in ("store", "other")]
    assert contents(stores[0]) == contents(stores[1])
    assert stores[0].fingerprint == stores[1].fingerprint


def test_reverted_change_after_a_killed_run_restores_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = class_folders(tmp_path / "tree", {"a": 8})
    recipe = image_recipe(tmp_path / "store", {"c": tree})
    prepare_here(recipe)
    before = contents(ImageStore.open(tmp_path / "store"))
    other = FewshotRecipe.model_validate(recipe.model_dump() | {"seed": 7})
    with monkeypatch.context() as patch:
        patch.setattr(image_ingest, "_collect", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_here(other)
    prepare_here(recipe)
    assert contents(ImageStore.open(tmp_path / "store")) == before


def test_class_larger_than_memory_is_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One class of 24 portions; the buffers of Python and Arrow stay below 6 portions."""
    portion, count = 1 << 20, 520
    generator = np.random.default_rng(0)

    def images() -> Iterator[bytes]:
        for _ in range(count):
            file = io.BytesIO()
            pixels = generator.integers(0, 256, (128, 128, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, format="bmp")
            yield file.getvalue()

    records = tfrecords(tmp_path / "records", [("a", count)], (1, 0, 0))
    write_records(records / "0.tfrecords", (example(image, 0) for image in images()))
    assert (records / "0.tfrecords").stat().st_size > 24 * portion
    rows = [{"image": image, "class_name": "a", "split": "train"} for image in images()]
    table = parquet(tmp_path / "one.parquet", rows, row_group_size=16)
    del rows
    monkeypatch.setattr(image_ingest, "PORTION", portion)
    monkeypatch.setattr(image_store, "MAP_BATCH_BYTES", portion)
    for number, path in enumerate((records, table)):
        usual = pa.default_memory_pool()
        pool = pa.proxy_memory_pool(usual)
        pa.set_memory_pool(pool)
        tracemalloc.start()
        try:
            target = tmp_path / f"store{number}"
            recipe = image_recipe(target, {"c": path}, rows_per_group=8)
            assert prepare_here(recipe).rows == count
            store = ImageStore.open(target)
            store.images([0, count - 1])
            assert sum(len(batch) for _, batch in store.batches("c", "all", 16)) == count
            _, python = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(usual)
        assert python + pool.max_memory() < 6 * portion, path


def test_threads_read_concurrently(tmp_path: Path) -> None:
    tree = class_folders(tmp_path / "tree", {"a": 30, "b": 30, "c": 30})
    prepare_here(image_recipe(tmp_path / "store", {"c": tree}))
    expected = [
        image
        for images in contents(ImageStore.open(tmp_path / "store")).values()
        for image in images
    ]
    store, wrong = ImageStore.open(tmp_path / "store", tmp_path / "cache"), []

    def read(seed: int) -> None:
        for rows in np.random.default_rng(seed).integers(0, 90, (50, 20)):
            wrong.extend([seed] * (store.images(rows) != [expected[row] for row in rows]))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong
    assert {file.suffix for file in (tmp_path / "cache" / store.fingerprint).iterdir()} == {
        ".arrow",
        ".lock",
    }


def test_unknown_names_and_rows_are_errors(tmp_path: Path) -> None:
    tree = class_folders(tmp_path / "tree", {"a": 2})
    prepare_here(image_recipe(tmp_path / "store", {"c": tree}))
    store = ImageStore.open(tmp_path / "store")
    with pytest.raises(ValueError, match="no collection 'd'; it has c"):
        store.select("d")
    with pytest.raises(ValueError, match="split 'valid': should be"):
        store.select("c", "valid")
    with pytest.raises(ValueError, match="no row 2; rows are 0 to 1"):
        store.images([0, 2])
    (tmp_path / "store/manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="no image store manifest"):
        ImageStore.open(tmp_path / "store")
    with pytest.raises(ValueError, match=r"images\.collections: nothing to prepare"):
        prepare_here(image_recipe(tmp_path / "store", {}))


def test_omniglot_groups_are_alphabets(real_data: Path, tmp_path: Path) -> None:
    specification = real_data / "meta_dataset/dataset_specs/omniglot_dataset_spec.json"
    values = {
        "path": real_data / "images/omniglot.parquet",
        "specification": specification,
    }
    flat = real_data / "images/cifar10.parquet"
    prepare_here(image_recipe(tmp_path, {"omniglot": values, "cifar10": flat}))
    store = ImageStore.open(tmp_path)
    names = store.select("omniglot").class_names
    groups = store.groups("omniglot", "train")
    alphabets = [{names[label].rpartition("-")[0] for label in group} for group in groups]
    assert all(len(alphabet) == 1 for alphabet in alphabets) and len(alphabets) == 7
    assert [len(group) for group in store.groups("omniglot", "val")] == [17]  # Tagalog
    assert store.groups("cifar10", "train") is None
    assert set(np.concatenate(groups)) == set(store.select("omniglot", "train").labels)

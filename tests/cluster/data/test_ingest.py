"""Ingest with Ray workers: reproducible shards, resuming, bad rows, and errors."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from fmray.config import AdaLlavaRecipe, ClusterConfig
from fmray.data import ingest
from fmray.data.ingest import SCHEMA, prepare
from fmray.data.processor import load_processor
from fmray.data.ray_tasks import run_tasks
from fmray.data.records import chat_messages, find_bad_rows, read_records
from fmray.errors import raised_by_fmray
from fmray.train.adallava.model import build_model

pytestmark = pytest.mark.usefixtures("ray_cluster")


def recipe(store: Path, **data: Any) -> AdaLlavaRecipe:
    return AdaLlavaRecipe.model_validate({"name": "test", "data": {"store": str(store), **data}})


def llava_file(folder: Path, rows: int, side: int = 20) -> Path:
    """Write a LLaVA file of `rows` records with one image of noise each."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    records = []
    for row in range(rows):
        pixels = generator.integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{row}.png")
        conversation = [
            {"from": "human", "value": "<image>\nhow bright ?"},
            {"from": "gpt", "value": f"level {pixels.mean():.0f}"},
        ]
        records.append({"id": f"r{row}", "image": f"{row}.png", "conversations": conversation})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def parts(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.glob("*/part-*.parquet"))
    }


def rows_of(store: Path, split: str) -> list[dict[str, Any]]:
    files = sorted((store / split).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_second_run_on_generated_shapes_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    settings = recipe(store, shapes={"pictures": 150, "validation_pictures": 20}, rows_per_shard=70)
    manifest = prepare(settings)
    assert manifest.counts["train"] == {"rows": 150, "answers": 600, "shards": 3}
    assert manifest.counts["validation"] == {"rows": 20, "answers": 80, "shards": 1}
    assert pq.read_schema(store / "train" / "part-00000.parquet").remove_metadata() == SCHEMA
    assert pq.ParquetFile(store / "train" / "part-00000.parquet").num_row_groups == 2
    stored, source = rows_of(store, "train"), json.loads((store / "source/train.json").read_text())
    assert [row["row"] for row in stored] == list(range(150))
    processor = load_processor(store / "processor")
    for row, record in zip(stored, source, strict=True):
        assert row["id"] == record["id"] and row["tags"] == record["tags"]
        assert row["conversations"] == record["conversations"]
        assert row["image"] == (store / "source" / record["image"]).read_bytes()
        text = processor.apply_chat_template(chat_messages(record["conversations"]))
        image = Image.open(io.BytesIO(row["image"]))
        real = processor(images=[image], text=[text])["input_ids"][0]
        assert row["turn_tokens"][-1] == len(real)

    before, calls = parts(store), []
    monkeypatch.setattr(ingest, "run_tasks", lambda *given: calls.append(given) or iter(()))
    assert prepare(settings) == manifest
    assert not calls and parts(store) == before


def test_parts_are_reproducible_and_only_changed_ones_are_written(
    tmp_path: Path,
) -> None:
    file = llava_file(tmp_path / "in", 60)
    options = {"train": str(file), "rows_per_shard": 16, "validation_share": 0.2}
    manifest = prepare(recipe(tmp_path / "a", **options))
    prepare(recipe(tmp_path / "b", **options))
    assert parts(tmp_path / "a") == parts(tmp_path / "b")
    ids = [{row["id"] for row in rows_of(tmp_path / "a", split)} for split in manifest.counts]
    assert len(ids[0]) + len(ids[1]) == 60 and not ids[0] & ids[1] and ids[1]

    damaged = tmp_path / "a" / "train" / "part-00001.parquet"
    before = parts(tmp_path / "a")
    written = (tmp_path / "a/train/part-00000.parquet").stat().st_mtime_ns
    damaged.write_bytes(damaged.read_bytes()[:100])
    (tmp_path / "a" / "manifest.json").unlink()
    prepare(recipe(tmp_path / "a", **options))
    assert parts(tmp_path / "a") == before
    assert (tmp_path / "a/train/part-00000.parquet").stat().st_mtime_ns == written
    prepare(recipe(tmp_path / "a", **{**options, "rows_per_shard": 60}))
    assert len(parts(tmp_path / "a")) == 2


def test_killed_run_resumes(tmp_path: Path) -> None:
    file = llava_file(tmp_path / "in", 400, side=160)
    options = {"train": str(file), "rows_per_shard": 8}
    values = recipe(tmp_path / "killed", **options).model_dump(mode="json")
    script = (
        "import ray\n"
        "from fmray.config import AdaLlavaRecipe\n"
        "from fmray.data.ingest import prepare\n"
        "ray.init(address='local', num_cpus=1, include_dashboard=False)\n"
        f"prepare(AdaLlavaRecipe.model_validate({values}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 180
    while len(parts(tmp_path / "killed")) < 5 and time.monotonic() < deadline:
        assert process.poll() is None, "ingest ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # workers exit after their driver
    survived = parts(tmp_path / "killed")
    assert 5 <= len(survived) < 40
    assert not (tmp_path / "killed" / "manifest.json").exists()
    times = {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in survived}

    prepare(recipe(tmp_path / "killed", **options))
    prepare(recipe(tmp_path / "complete", **options))
    assert parts(tmp_path / "killed") == parts(tmp_path / "complete")
    assert all((tmp_path / "killed" / n).stat().st_mtime_ns == at for n, at in times.items())
    assert not list((tmp_path / "killed").rglob("*.partial"))


def test_bad_rows_are_listed_and_are_errors_or_skipped(tmp_path: Path) -> None:
    file = llava_file(tmp_path / "in", 30)
    records = json.loads(file.read_text())
    (tmp_path / "in/3.png").unlink()
    (tmp_path / "in/5.png").write_bytes(b"this is not an image")
    content = (tmp_path / "in/7.png").read_bytes()
    (tmp_path / "in/7.png").write_bytes(content[: len(content) // 2])
    records[9]["conversations"][0]["value"] += " please" * 300
    file.write_text(json.dumps(records))
    options = {"train": str(file), "rows_per_shard": 10, "max_length": 100}
    options["validation_share"] = 0.2
    store = tmp_path / "store"
    with pytest.raises(ValueError) as raised:
        prepare(recipe(store, **options))
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("4 bad rows (all in ") and "data.on_bad_row: skip" in lines[0]
    listed = [json.loads(line) for line in (store / "bad_rows.jsonl").read_text().splitlines()]
    reasons = ["missing image: ", "broken image: ", "broken image: ", "too long: 312 tokens"]
    assert [row["row"] for row in listed] == [3, 5, 7, 9]
    for row, reason, line in zip(listed, reasons, lines[1:], strict=True):
        assert row["file"] == str(file) and row["id"] == f"r{row['row']}"
        assert row["reason"].startswith(reason) and row["reason"] in line
    assert not (store / "manifest.json").exists() and not list(store.rglob("*.partial"))
    assert parts(store) and "train/part-00000.parquet" not in parts(store)  # complete or missing

    manifest = prepare(recipe(store, **options, on_bad_row="skip"))
    assert manifest.bad_rows == 4
    assert manifest.counts["train"]["rows"] + manifest.counts["validation"]["rows"] == 26
    again = parts(store)
    assert prepare(recipe(store, **options, on_bad_row="skip")) == manifest
    assert parts(store) == again

    Image.new("RGB", (9, 9)).save(tmp_path / "in/3.png")  # fixed
    assert prepare(recipe(store, **options, on_bad_row="skip")).bad_rows == 3
    assert 3 in {row["row"] for split in manifest.counts for row in rows_of(store, split)}


def test_invalid_records_are_errors_before_anything_is_written(tmp_path: Path) -> None:
    file = llava_file(tmp_path / "in", 30)
    records = json.loads(file.read_text())
    records[2]["conversations"].reverse()
    records[4] = records[6]
    records.append("not a record")
    file.write_text(json.dumps(records))
    store = tmp_path / "store"
    with pytest.raises(ValueError, match="3 bad rows") as raised:
        prepare(recipe(store, train=str(file), validation_share=0.2))
    assert "row 2 (id 'r2'): the first turn is from gpt" in str(raised.value)
    assert "row 6 (id 'r6'): duplicate" in str(raised.value)
    assert "row 30: not an object but text" in str(raised.value)
    assert [path.name for path in store.iterdir()] == ["bad_rows.jsonl"]
    manifest = prepare(recipe(store, train=str(file), validation_share=0.2, on_bad_row="skip"))
    assert manifest.bad_rows == 3
    stored = {row["row"] for split in manifest.counts for row in rows_of(store, split)}
    assert stored == set(range(30)) - {2, 6}


def test_missing_files_are_errors(tmp_path: Path) -> None:
    file = llava_file(tmp_path / "in", 3)
    cases = {
        "data: nothing to prepare": {},
        r"data.train: .*gone.json: no such file": {"train": str(tmp_path / "gone.json")},
        r"data.validation: .*gone.json: no such file": {
            "train": str(file),
            "validation": str(tmp_path / "gone.json"),
        },
        r"data.image_folder: .*gone: no such folder": {
            "train": str(file),
            "image_folder": str(tmp_path / "gone"),
        },
        "data.validation_share: 1e-09 of 3 rows leave none for the validation split": {
            "train": str(file),
            "validation_share": 1e-9,
        },
    }
    for number, (message, data) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=message):
            prepare(recipe(tmp_path / str(number), **data))
    settings = recipe(tmp_path / "m", train=str(file)).model_dump(mode="json")
    settings["model"]["source"] = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"model.source: .*nowhere: contains no processor"):
        prepare(AdaLlavaRecipe.model_validate(settings))


def test_directory_of_a_trained_model_uses_the_same_store(tmp_path: Path) -> None:
    options = {"shapes": {"pictures": 30, "validation_pictures": 5}}
    settings = recipe(tmp_path / "store", **options).model_dump(mode="json")
    manifest = prepare(AdaLlavaRecipe.model_validate(settings))
    processor = load_processor(tmp_path / "store" / "processor")
    for part in (processor, build_model(AdaLlavaRecipe.model_validate(settings), processor)):
        part.save_pretrained(tmp_path / "model")
    settings["model"]["source"] = str(tmp_path / "model")
    before = (tmp_path / "store" / "manifest.json").stat().st_mtime_ns
    assert prepare(AdaLlavaRecipe.model_validate(settings)) == manifest
    assert (tmp_path / "store" / "manifest.json").stat().st_mtime_ns == before


def test_real_images_and_questions(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "vl" / "coco256"
    file = folder / "llava_format.json"
    settings = recipe(
        tmp_path / "store", train=str(file), image_folder=str(folder / "images"), rows_per_shard=64
    )
    manifest = prepare(settings)
    records = json.loads(file.read_text())
    assert not find_bad_rows(file, records)
    assert sum(count["rows"] for count in manifest.counts.values()) == len(records)
    for row in rows_of(tmp_path / "store", "validation"):
        record = records[row["row"]]
        assert row["image"] == (folder / "images" / record["image"]).read_bytes()
        assert len(row["turn_tokens"]) == len(record["conversations"]) // 2


def test_users_mistake_in_a_task_is_raised_without_rays_wrapper(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone.json: no such file") as raised:
        list(run_tasks(read_records, [tmp_path / "gone.json"], ClusterConfig()))
    assert type(raised.value) is ValueError and raised_by_fmray(raised.value)
    with pytest.raises(ray.exceptions.RayError, match="Expecting value"):
        list(run_tasks(json.loads, ["not JSON"], ClusterConfig()))

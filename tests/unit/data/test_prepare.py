"""What `prepare` reports about records: keys, words and answers that are not used. Without Ray."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from fmray.config import AdaLlavaRecipe
from fmray.data import ingest
from fmray.data.store import Manifest

ASK = {"from": "human", "value": "what color ?"}
RED = {"from": "gpt", "value": "red"}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ingest, "run_tasks", lambda work, tasks, _: ((task, work(task)) for task in tasks)
    )


def prepare(folder: Path, records: list[Any], **changed: Any) -> Manifest:
    """Prepare records as both splits."""
    file = folder / "train.json"
    file.write_text(json.dumps(records))
    data = {"store": str(folder / "store"), "train": str(file), "validation": str(file)}
    recipe = {"name": "test", "data": {**data, **changed.pop("data", {})}, **changed}
    return ingest.prepare(AdaLlavaRecipe.model_validate(recipe))


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / "store" / split / "part-00000.parquet").to_pylist()


def test_unused_keys_are_reported_once_with_a_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"id": i, "conversations": [ASK, RED], "system_prompt": "brief"} for i in range(8)]
    records.append({"id": 8, "conversations": [ASK, {**RED, "weight": 0}]})
    manifest = prepare(tmp_path, records)
    assert manifest.unused_keys == {"system_prompt": 16, "conversations.weight": 2}  # both splits
    wanted = "  16 records have `system_prompt`, which is not used"
    assert capsys.readouterr().out.count(wanted) == 1
    assert Manifest.read(tmp_path / "store") == manifest
    assert prepare(tmp_path, records) == manifest
    assert wanted in capsys.readouterr().out  # also of a store that is up to date


def test_videos_among_the_records_are_bad_rows(tmp_path: Path) -> None:
    video = {"id": "v", "video": "a.mp4", "conversations": [ASK, RED]}
    with pytest.raises(ValueError, match="2 bad rows") as raised:
        prepare(tmp_path, [{"id": "a", "conversations": [ASK, RED]}, video])
    assert "row 1 (id 'v'): video is not supported" in str(raised.value)


def test_the_share_of_unknown_words_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """60 one-word answers, of which a vocabulary of 16 knows none."""
    ask = {"from": "human", "value": "say it now please or else again and then stop"}
    records = [
        {"id": i, "conversations": [ask, {"from": "gpt", "value": f"answer{i}"}]} for i in range(60)
    ]
    small = {"model": {"scratch": {"max_vocabulary": 16}}}
    manifest = prepare(tmp_path, records, **small)
    assert manifest.answer_counts == {"words": 120, "unknown": 120}
    shown = capsys.readouterr().out
    assert "100.0% of the words in answers (120 of 120) are unknown to the tokenizer" in shown
    assert "an answer with one never counts as right: raise model.scratch.max_vocabulary" in shown
    assert prepare(tmp_path, records).answer_counts == {"words": 120}
    assert "are unknown" not in capsys.readouterr().out


def test_answers_that_are_too_long_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"id": i, "conversations": [ASK, RED] * 20} for i in range(2)]
    manifest = prepare(tmp_path, records, data={"max_length": 64})
    too_long = manifest.answer_counts["too_long"]
    assert 0 < too_long < 80
    assert f"{too_long} answers of more than 64 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_rows_without_id_take_their_number_and_images_meet_their_names(
    tmp_path: Path, form: str
) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    file = tmp_path / unicodedata.normalize(form, "café.png")
    Image.new("RGB", (8, 8), (255, 0, 0)).save(file)
    ask = {"from": "human", "value": "<image>\nwhat color ?"}
    record = {"image": unicodedata.normalize(other, "café.png"), "conversations": [ask, RED]}
    texts = [{"conversations": [ASK, {"from": "gpt", "value": word}]} for word in ("red", "blue")]
    manifest = prepare(tmp_path, [record, *texts])
    assert manifest.bad_rows == 0
    stored = rows_of(tmp_path, "train")
    assert [row["id"] for row in stored] == ["0", "1", "2"]
    assert stored[0]["image"] == file.read_bytes()
    time = file.stat().st_mtime_ns + 10**9
    Image.new("RGB", (8, 8), (0, 0, 255)).save(file)  # a replaced image is noticed
    os.utime(file, ns=(time, time))
    prepare(tmp_path, [record, *texts])
    assert rows_of(tmp_path, "train")[0]["image"] == file.read_bytes()


def test_rows_about_one_image_are_in_one_split_without_ids(tmp_path: Path) -> None:
    for name in "abcdefgh":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    ask = {"from": "human", "value": "<image>\nwhat color ?"}
    records = [
        {"image": f"{name}.png", "conversations": [ask, {"from": "gpt", "value": word}]}
        for name in "abcdefgh"
        for word in ("red", "green", "blue")
    ]
    prepare(tmp_path, records, data={"validation": None, "validation_share": 0.4})
    images = [
        {records[row["row"]]["image"] for row in rows_of(tmp_path, split)}
        for split in ("train", "validation")
    ]
    assert images[0] and images[1] and not images[0] & images[1]

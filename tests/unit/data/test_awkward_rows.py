"""Records as other tools write them: each is stored as it is meant, or is a bad row with a reason.

Both checks run, that of the file (`find_bad_rows`) and that of the shard (`write_shard`).
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from fmray.config import ScratchConfig
from fmray.data.ingest import ShardTask, write_shard
from fmray.data.processor import fingerprint, scratch_processor
from fmray.data.records import find_bad_rows

Turn = tuple[str, Any]
IMAGE = {"image": "0.png"}
ASK: Turn = ("human", "<image> color ?")
RED: Turn = ("gpt", "red")
OF_MESSAGES = {
    "messages": [{"role": "user", "content": "<image> ?"}, {"role": "assistant", "content": "red"}]
}

# name -> turns, other keys, and the start of the reason; None: the row is stored
ROWS: dict[str, tuple[list[Turn], dict[str, Any], str | None]] = {
    "text only": ([("human", "say hello"), ("gpt", "hello")], {}, None),
    "mark at the end": ([("human", "color ?\n<image>"), RED], IMAGE, None),
    "mark in the middle": ([("human", "look at <image> and tell"), RED], IMAGE, None),
    "no question": ([("human", "<image>"), RED], IMAGE, None),
    "no second question": ([ASK, RED, ("human", ""), ("gpt", "blue")], IMAGE, None),
    "words of the template": ([ASK, ("gpt", "USER: hi ASSISTANT: hello")], IMAGE, None),
    "leading spaces": ([ASK, ("gpt", "    return red\n")], IMAGE, None),
    "null image": ([("human", "say hi"), ("gpt", "hi")], {"image": None}, None),
    "private marks": ([("human", "<image> \ue0000\ue001"), ("gpt", "\ue0001\ue001")], IMAGE, None),
    "emoji": ([ASK, ("gpt", "\U0001f600\u200d\U0001f525 \u7ea2\u8272\u3002")], IMAGE, None),
    "null video": ([ASK, RED], {**IMAGE, "video": None}, None),
    "integer id": ([ASK, RED], {**IMAGE, "id": 17}, None),
    "no id": ([ASK, RED], {**IMAGE, "id": None}, None),
    "float id": ([ASK, RED], {**IMAGE, "id": 17.0}, "id is a number; should be text or an integer"),
    "tag of HTML": ([("human", "what is <image> ?"), RED], {}, "1 <image> marks but no image"),
    "no mark": ([("human", "color ?"), RED], IMAGE, "0 <image> marks for one image"),
    "mark in a later turn": ([("human", "hi"), RED, ASK, RED], IMAGE, "<image> in turn 2"),
    "two images": ([ASK, RED], {"image": ["0.png", "0.png"]}, "image is a list"),
    "images": ([ASK, RED], {"images": ["0.png"]}, "images is not supported"),
    "images on text": ([("human", "hi"), RED], {"images": ["0.png"]}, "images is not supported"),
    "video": ([("human", "<video> ?"), RED], {"video": "a.mp4"}, "video is not supported"),
    "audio": ([("human", "?"), RED], {"audio": "a.wav"}, "audio is not supported"),
    "system turn": ([("system", "be brief"), ASK, RED], IMAGE, "turn 0: unknown from 'system'"),
    "other roles": ([("user", "<image>"), ("assistant", "red")], IMAGE, "turn 0: unknown from"),
    "gpt first": ([("gpt", "hello"), ASK, RED], IMAGE, "the first turn is from gpt"),
    "human last": ([ASK, RED, ("human", "thanks")], IMAGE, "no answer: the last turn is from hum"),
    "number": ([ASK, ("gpt", 3)], IMAGE, "turn 1: value is a number"),
    "null answer": ([ASK, ("gpt", None)], IMAGE, "turn 1: value is null"),
    "empty answer": ([ASK, ("gpt", "")], IMAGE, "no answer: turn 1 is empty"),
    "empty image": ([("human", "hi"), RED], {"image": ""}, "image is empty text"),
    "messages": ([], OF_MESSAGES, "conversations is empty or missing"),
    "end token in an answer": ([ASK, ("gpt", "<s> and </s>")], IMAGE, "turn 1 contains '</s>'"),
    "end token in a question": ([("human", "<image> </s> ?"), RED], IMAGE, "turn 0 contains"),
    "unknown token": ([ASK, ("gpt", "it is <unk>")], IMAGE, "turn 1 contains '<unk>', a control"),
    "pad token": ([ASK, ("gpt", "it is <pad> here")], IMAGE, "turn 1 contains '<pad>'"),
    "long question": ([("human", "<image> " + "word " * 500), RED], IMAGE, "too long: "),
    "long second turn": ([ASK, RED, ("human", "word " * 500), RED], IMAGE, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Row -> the reason why it is bad, or what is stored."""
    folder = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (40, 32), (255, 0, 0)).save(folder / "0.png")
    records = [
        {"id": name, "conversations": [{"from": f, "value": v} for f, v in turns], **more}
        for name, (turns, more, _) in ROWS.items()
    ]
    bad = {row.row: row.reason for row in find_bad_rows(folder / "train.json", records)}
    processor = scratch_processor(["what color ? red blue"], ScratchConfig())
    processor.save_pretrained(folder / "processor")
    task = ShardTask(
        split="train",
        path=str(folder / "part-00000.parquet"),
        file="train.json",
        rows=json.dumps([[i, record] for i, record in enumerate(records) if i not in bad]).encode(),
        image_folder=str(folder),
        processor=str(folder / "processor"),
        processor_hash=fingerprint(processor),
        max_length=128,
        shapes="null",
        write_bad=True,
    )
    bad |= {row["row"]: row["reason"] for row in write_shard(task).bad_rows}
    stored = {row["row"]: row for row in pq.read_table(task.path).to_pylist()}
    assert not bad.keys() & stored.keys()
    return bad | stored


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_stored_or_has_its_reason(name: str, outcome: dict[int, Any]) -> None:
    row = list(ROWS).index(name)
    turns, more, reason = ROWS[name]
    if reason is not None:
        assert isinstance(outcome[row], str) and outcome[row].startswith(reason)
        return
    assert isinstance(outcome[row], dict), outcome[row]
    stored = outcome[row]
    assert [(turn["from"], turn["value"]) for turn in stored["conversations"]] == turns
    assert (stored["image"] is None) == (more.get("image") is None)
    given = more.get("id", name)
    assert stored["id"] == str(row if given is None else given)

"""Records: each kind of bad record has its reason, and no record crashes the reader."""

from __future__ import annotations

import gzip
import json
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmray.config import ScratchConfig
from fmray.data.ingest import SCHEMA
from fmray.data.processor import scratch_processor
from fmray.data.records import (
    check_record,
    encode,
    find_bad_rows,
    find_control_token,
    read_records,
    record_id,
    unused_keys,
)
from fmray.runtime.files import find_file

ASK = {"from": "human", "value": "<image>\nwhat ?"}
ANSWER = {"from": "gpt", "value": "red"}
GOOD = {"id": "a", "image": "a.png", "conversations": [ASK, ANSWER]}


def turns(*changed: Any) -> dict[str, Any]:
    return {**GOOD, "conversations": list(changed)}


BAD = {
    "not an object but text": "record",
    "not an object but a list": [],
    "not an object but null": None,
    "id is true or false; should be text or an integer, or left out": {**GOOD, "id": True},
    "id is a number": {**GOOD, "id": 17.0},
    "id is empty text": {**GOOD, "id": ""},
    "video is not supported; a record may have one image": {**GOOD, "video": "a.mp4"},
    "audio is not supported": {**GOOD, "audio": ["a.wav"]},
    "images is not supported": {**GOOD, "images": ["a.png", "b.png"]},
    "image is a list; should be one file name": {**GOOD, "image": ["a.png", "b.png"]},
    "image is empty text": {**GOOD, "image": ""},
    "image '../../secret.png' is not a path inside": {**GOOD, "image": "../../secret.png"},
    "image '/etc/passwd' is not a path inside": {**GOOD, "image": "/etc/passwd"},
    "conversations is empty or missing": {**GOOD, "conversations": []},
    "conversations is empty or missing; ": {**GOOD, "conversations": "hello"},
    "turn 1 is text; should be {from, value}": turns(ASK, "red"),
    "turn 1: unknown from 'bot'; should be human or gpt": turns(
        ASK, {"from": "bot", "value": "red"}
    ),
    "turn 0: unknown from None": turns({"value": "<image> what ?"}, ANSWER),
    "turn 0: unknown from ['human']": turns({"from": ["human"], "value": "<image>"}, ANSWER),
    "turn 1: value is a number; should be text": turns(ASK, {"from": "gpt", "value": 3}),
    "turn 1: value is null": turns(ASK, {"from": "gpt"}),
    "the first turn is from gpt; should be a question from human": turns(ANSWER, ASK),
    "wrong turn order: turn 1 is from human, should be gpt": turns(ASK, ASK),
    "no answer: turn 1 is empty": turns(ASK, {"from": "gpt", "value": " \n"}),
    "no answer: the last turn is from human": turns(ASK),
    "half a surrogate pair": turns(ASK, {"from": "gpt", "value": "\ud83d"}),
    "0 <image> marks for one image; should be 1": turns(
        {"from": "human", "value": "what ?"}, ANSWER
    ),
    "2 <image> marks for one image": turns({"from": "human", "value": "<image><image>"}, ANSWER),
    "<image> in turn 1": turns(ASK, {"from": "gpt", "value": "<image>"}),
    "<image> in turn 2": turns(ASK, ANSWER, ASK, ANSWER),
    "1 <image> marks but no image": {"id": 1, "conversations": [ASK, ANSWER]},
    "tags should be a list with one text": {**GOOD, "tags": "color"},
    "2 tags for 1 answers; should be one for each": {**GOOD, "tags": ["color", "shape"]},
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_record_has_its_reason(reason: str) -> None:
    assert (check_record(BAD[reason]) or "").startswith(reason) or reason in (
        check_record(BAD[reason]) or ""
    )


def test_good_records_are_accepted() -> None:
    text_only = [{"from": "human", "value": "what ?"}, ANSWER]
    for good in (
        GOOD,
        {**GOOD, "id": 17, "model": "extra keys are counted by unused_keys"},
        {**GOOD, "video": None, "images": []},
        {key: GOOD[key] for key in ("image", "conversations")},
        {**GOOD, "tags": ["color"]},
        {"id": "b", "conversations": text_only},
        {"id": "b", "image": None, "conversations": text_only},
        turns({"from": "human", "value": "what is it?\n<image>"}, ANSWER),
    ):
        assert check_record(good) is None


def test_keys_that_nothing_reads_are_counted() -> None:
    weighted = turns(ASK, {**ANSWER, "weight": 0}, ASK, {**ANSWER, "weight": 1})
    rows = [{**GOOD, "system_prompt": "be brief", "model": ""}] * 8 + [weighted, GOOD]
    assert unused_keys(rows) == {"conversations.weight": 1, "system_prompt": 8}


def test_repeated_record_is_bad_but_a_repeated_id_is_not(tmp_path: Path) -> None:
    other = turns(ASK, {"from": "gpt", "value": "blue"})
    bad = find_bad_rows(tmp_path / "x.json", [GOOD, other, dict(GOOD)])
    assert [(row.row, row.id) for row in bad] == [(2, "a")]
    assert "duplicate: same id, image and conversations as row 0" in str(bad[0])
    assert str(bad[0]).startswith(f"{tmp_path}/x.json: row 2 (id 'a'): ")


ROWS = json.dumps([GOOD]).encode()
FILES = {
    "no such file": None,
    "contains no records": b"[]",
    "contains no records;": b"  \n",
    "not UTF-8 at byte 2": b'["\xff"]',
    "not valid JSON: Expecting ',' delimiter: line 3 column 1 (char 5)": b'[{}\n\n"',
    "not valid JSON: Exceeds the limit": b"[" + b"1" * 5000 + b"]",
    "nested too deeply": b"[" * 200_000,
    "should be JSON or JSONL, is gzip-compressed; unpack it with gunzip": gzip.compress(ROWS),
    "is compressed with Zstandard": b"\x28\xb5\x2f\xfd" + b"\0" * 9,
    "is a Parquet file; export it": b"PAR1" + b"\0" * 9 + b"PAR1",
    "is UTF-16 text; convert it with iconv -f UTF-16 -t UTF-8": ROWS.decode().encode("utf-16"),
    "is UTF-16LE text": ROWS.decode().encode("utf-16-le"),
    "a git-LFS pointer instead of the content": b"version https://git-lfs.github.com/spec/v1\n",
    "a web page instead of the content": b"\n<!DOCTYPE html>",
    "an object that holds its 1 records in 'data'; should be that list": b'{"data": %s}' % ROWS,
    "an object that holds its 1 records in 'rows'": b'{\n "a": 1,\n "rows": %s\n}' % ROWS,
    "an object over several lines; should be a list": json.dumps(GOOD, indent=1).encode(),
    "not valid JSON: line 1, column 1": b"id,image\n1,a.png\n",
    "not valid JSON: Extra data: line 2 column 1": ROWS + b"\n" + ROWS,
}


@pytest.mark.parametrize("message", FILES)
def test_unreadable_file_is_an_error(message: str, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    if FILES[message] is not None:
        file.write_bytes(FILES[message])
    with pytest.raises(ValueError) as raised:
        read_records(file)
    assert str(raised.value).startswith(f"{file}: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(("on_disk", "in_text"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_meet_in_either_unicode_form(tmp_path: Path, on_disk: str, in_text: str) -> None:
    folder = tmp_path / unicodedata.normalize(in_text, "données")
    folder.mkdir()
    file = folder / unicodedata.normalize(on_disk, "café.png")
    file.touch()
    name = unicodedata.normalize(in_text, "données/café.png")
    assert find_file(tmp_path, name) == file
    assert find_file(tmp_path, name + "x") == tmp_path / (name + "x")  # missing


def test_broken_jsonl_line_is_a_bad_row(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{{broken\n{json.dumps({**GOOD, 'id': 2})}\n")
    records = read_records(file)
    assert [record_id(record) for record in records] == ["a", None, "2"]
    (bad,) = find_bad_rows(file, records)
    assert bad.row == 1 and bad.reason.startswith("not valid JSON: line 3, column 2")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=10,
)
senders = st.sampled_from(["human", "gpt", "system", ""]) | json_values
values = (
    st.sampled_from(["<image>\nwhat ?", "red", "", "<image>", "\ud800", "</s>"])
    | st.text()
    | json_values
)
records = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text() | json_values,
        "image": st.sampled_from(["a.png", "../a.png", None]) | json_values,
        "conversations": json_values
        | st.lists(
            st.fixed_dictionaries({}, optional={"from": senders, "value": values}), max_size=4
        )
        | st.tuples(
            st.text().map(lambda text: {"from": "human", "value": "<image>" + text}),
            st.text().map(lambda text: {"from": "gpt", "value": text}),
        ).map(list),
        "tags": st.lists(st.text(), max_size=2) | json_values,
    },
)
PROCESSOR = scratch_processor(["what ?", "red"], ScratchConfig())


@settings(max_examples=400, deadline=None)
@given(st.lists(records | json_values, max_size=3))
def test_any_record_is_bad_or_can_be_stored(rows: list[Any]) -> None:
    bad = {row.row for row in find_bad_rows(Path("x"), rows)}
    for row, record in enumerate(rows):
        if row in bad:
            continue
        stored = {
            "id": record_id(record),
            "image": b"",
            "conversations": [
                {k: turn[k] for k in ("from", "value")} for turn in record["conversations"]
            ],
            "tags": record.get("tags"),
            "turn_tokens": [1],
            "row": row,
        }
        assert pa.Table.from_pylist([stored], schema=SCHEMA).num_rows == 1
        encoded = encode(PROCESSOR, stored["conversations"])
        assert len(encoded.ends) == len(record["conversations"]) // 2
        assert all(start < end for start, end in zip(encoded.starts, encoded.ends, strict=True))


@pytest.mark.parametrize(
    ("turn", "token", "question", "answer"),
    [
        (1, "</s>", "html ?", "use <s> and </s> around it"),
        (0, "</s>", "what does </s> mean ?", "red"),
        (1, "<unk>", "unknown ?", "it is <unk>"),
        (1, "<pad>", "padding ?", "it is <pad> here"),
        (0, "</s>", "<<image>/s> ?", "red"),  # the mark is taken out
    ],
)
def test_control_token_in_a_text_is_found(
    turn: int, token: str, question: str, answer: str
) -> None:
    mark = "" if "<image>" in question else "<image>\n"
    turns = [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    reason = f"turn {turn} contains {token!r}, a control token of the model"
    assert find_control_token(PROCESSOR, turns) == reason


def test_words_of_the_chat_template_are_text_but_not_its_added_marks() -> None:
    said = {"from": "gpt", "value": "USER: hi ASSISTANT: hello <|turn|>"}
    assert find_control_token(PROCESSOR, [ASK, said]) is None
    marked = scratch_processor(["what ?", "red"], ScratchConfig())
    marked.tokenizer.add_tokens("<|turn|>")  # as ordinary text, not as a special token
    marked.chat_template = marked.chat_template.replace("' ASSISTANT: '", "'<|turn|>'")
    assert find_control_token(marked, [ASK, said]) == (
        "turn 1 contains '<|turn|>', a control token of the model"
    )

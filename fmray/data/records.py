"""Instruction records at the door: LLaVA JSON or JSONL files, and what makes a record bad.

In: a file from outside. Out: its records in order, and for each bad one a reason a person can act
on. Nothing in a record may crash the reader; only a file that cannot be read at all is an error
here.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fmray.data.encoding import IMAGE_MARK, ROLES

BAD_ROWS = "bad_rows.jsonl"
HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can write it, UTF-8 cannot


@dataclass(frozen=True)
class BadRow:
    """A record that is not used: where it is and why. `row` counts from 0; None: a file's only
    one."""

    file: str
    row: int | None
    id: str | None
    reason: str

    def __str__(self) -> str:
        name = "" if self.id is None else f" (id {self.id!r})"
        row = "" if self.row is None else f": row {self.row}"
        return f"{self.file}{row}{name}: {self.reason}"

    def to_json(self) -> str:
        """One line of `bad_rows.jsonl`."""
        return json.dumps(asdict(self), sort_keys=True)


def stop_at_bad_rows(store: Path, bad: list[BadRow], key: str, on_bad_row: str) -> None:
    """Keep the list of bad rows, `<store>/bad_rows.jsonl`, as it is now.

    Args:
        key: the setting that says `on_bad_row`, for the message.

    Raises:
        ValueError: there are some, and they are errors.
    """
    listing = store / BAD_ROWS
    if not bad:
        listing.unlink(missing_ok=True)
        return
    store.mkdir(parents=True, exist_ok=True)
    bad = sorted(bad, key=lambda row: (row.file, row.row or 0))
    temporary = listing.with_name(BAD_ROWS + ".tmp")
    temporary.write_text("".join(row.to_json() + "\n" for row in bad))
    temporary.replace(listing)
    if on_bad_row == "error":
        first = "\n  ".join(str(row) for row in bad[:5])
        raise ValueError(
            f"{len(bad)} bad rows (all in {listing}); mend them or set {key}: skip\n  {first}"
        )


@dataclass(frozen=True)
class Unreadable:
    """Stands for a JSONL line that is not JSON."""

    reason: str


def read_records(path: Path) -> list[Any]:
    """All records of a JSON array, or of a file with one JSON value a line (blank lines do not
    count).

    Raises ValueError where the file is missing, not UTF-8, empty, or an array that is not valid
    JSON (with line, column and character). A JSONL line that is not JSON becomes an `Unreadable`,
    so that it can be skipped.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name a LLaVA JSON or JSONL file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
    if text.lstrip()[:1] == "[":
        try:
            records = json.loads(text)
        except (
            ValueError
        ) as error:  # says line, column and char; a 5000-digit number is no JSONDecodeError
            raise ValueError(f"{path}: not valid JSON: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{path}: nested too deeply to be a list of records") from error
    else:
        lines = enumerate(text.split("\n"), start=1)
        records = [_read_line(line, number) for number, line in lines if line.strip()]
    if not records:
        raise ValueError(
            f"{path}: holds no records; should be objects with id, image and conversations"
        )
    return records


def check_record(record: Any) -> str | None:
    """Why a record cannot be used, judged without its image; None for a good one."""
    if isinstance(record, Unreadable):
        return record.reason
    if not isinstance(record, dict):
        return f"not an object but {_kind(record)}; should be {{id, image, conversations}}"
    if record_id(record) is None:
        return "no id; should be a string or a whole number"
    image = record.get("image")
    if image is not None:
        if not isinstance(image, str) or not image:
            return f"image is {_kind(image)}; should be one file name"
        if HALF_PAIR.search(image) or "\0" in image:
            return f"image {image!r} is not a file name"
        if PurePosixPath(image).is_absolute() or ".." in PurePosixPath(image).parts:
            return f"image {image!r} is not a path inside the image folder"
    conversation = record.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        return "conversations is empty or missing; should be a list of human and gpt turns"
    return _check_turns(conversation, image) or _check_tags(
        record.get("tags"), len(conversation) // 2
    )


def record_id(record: Any) -> str | None:
    """The id of a record as text; None where there is none."""
    value = record.get("id") if isinstance(record, dict) else None
    if isinstance(value, str):
        return value if value and not HALF_PAIR.search(value) else None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def find_bad_rows(file: Path, records: list[Any]) -> list[BadRow]:
    """Bad records of a file, repeated ones included.

    LLaVA's own mixture uses one id for several conversations about one picture: a record is a
    repetition only when id, image and conversations are the same.
    """
    bad, seen = [], {}
    for row, record in enumerate(records):
        reason = check_record(record)
        if reason is None:
            content = json.dumps([record_id(record), record.get("image"), record["conversations"]])
            first = seen.setdefault(hashlib.blake2b(content.encode(), digest_size=16).digest(), row)
            if first != row:
                reason = f"duplicate: same id, image and conversations as row {first}"
        if reason is not None:
            bad.append(BadRow(str(file), row, record_id(record), reason))
    return bad


def _read_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return Unreadable(f"not valid JSON: line {number}, column {error.colno}: {error.msg}")
    except ValueError as error:
        return Unreadable(f"not valid JSON: line {number}: {error}")
    except RecursionError:
        return Unreadable(f"line {number} is nested too deeply")


def _check_turns(conversation: list[Any], image: str | None) -> str | None:
    marks = 0
    for index, turn in enumerate(conversation):
        if not isinstance(turn, dict):
            return f"turn {index} is {_kind(turn)}; should be {{from, value}}"
        sender, value = turn.get("from"), turn.get("value")
        if not isinstance(sender, str) or sender not in ROLES:
            return f"turn {index}: unknown from {sender!r}; should be human or gpt"
        if not isinstance(value, str):
            return f"turn {index}: value is {_kind(value)}; should be text"
        expected = ("human", "gpt")[index % 2]
        if sender != expected:
            return f"wrong turn order: turn {index} is from {sender}, should be {expected}"
        if sender == "gpt" and not value.strip():
            return f"no answer: turn {index} is empty"
        if HALF_PAIR.search(value):
            return f"turn {index}: value holds half a surrogate pair, which is no text"
        if index > 0 and IMAGE_MARK in value:
            return f"{IMAGE_MARK} in turn {index}; it belongs into the first question only"
        marks += value.count(IMAGE_MARK)
    if len(conversation) % 2:
        return "no answer: the last turn is from human"
    if image is not None and marks != 1:
        return f"{marks} {IMAGE_MARK} marks for one image; should be 1"
    if image is None and marks:
        return f"{marks} {IMAGE_MARK} marks but no image"
    return None


def _check_tags(tags: Any, answers: int) -> str | None:
    if tags is None:
        return None
    if not isinstance(tags, list) or not all(
        isinstance(tag, str) and not HALF_PAIR.search(tag) for tag in tags
    ):
        return "tags should be a list with one text for each answer"
    return (
        None
        if len(tags) == answers
        else f"{len(tags)} tags for {answers} answers; should be one for each"
    )


def _kind(value: Any) -> str:
    """What a JSON value is, in a JSON user's words."""
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    if value == "":
        return "empty text"
    return names.get(type(value), "a number")

"""LLaVA records: read them, check them, and encode their conversations as tokens.

A record is a JSON object `{id, image, conversations, tags}` from a file that somebody else wrote;
only `conversations` must be there. Keys that nothing reads are counted (`unused_keys`).
Only a file that cannot be read at all is an error; a bad record becomes a `BadRow` with a reason
that a person can act on, and no record makes the reader crash.

`encode` gives the token ids of a conversation and the spans of its answers. Ingest counts tokens
with it and the loader builds batches with it, so the lengths in a store are those of the batches.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from fmray.runtime.files import check_content, dumps, kind_of, write_atomic

if TYPE_CHECKING:
    from transformers import ProcessorMixin

BAD_ROWS = "bad_rows.jsonl"
ROLES = {"human": "user", "gpt": "assistant"}
KEYS, TURN_KEYS = {"id", "image", "conversations", "tags"}, {"from", "value"}
# media that other tools' formats have; a record that holds one cannot be learned without it
MEDIA_KEYS = ("images", "video", "videos", "audio", "audios", "speech", "sound")
EMPTY: tuple[Any, ...] = (None, "", [], {})
IMAGE_MARK = "<image>"  # LLaVA's, in the first human turn, whatever the processor's own token is
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # valid in JSON, cannot be encoded as UTF-8

# --- Bad rows ---


@dataclass(frozen=True)
class BadRow:
    """A record that is not used, with its place and the reason."""

    file: str
    row: int | None  # from 0; None if the file is a single record
    id: str | None
    reason: str

    def __str__(self) -> str:
        name = "" if self.id is None else f" (id {self.id!r})"
        row = "" if self.row is None else f": row {self.row}"
        return f"{self.file}{row}{name}: {self.reason}"

    def to_json(self) -> str:
        """Return the line for `bad_rows.jsonl`."""
        return dumps(asdict(self), sort_keys=True)


def stop_at_bad_rows(store: Path, bad: list[BadRow], key: str, on_bad_row: str) -> None:
    """Write `<store>/bad_rows.jsonl`, or remove it if there are no bad rows.

    Args:
        key: name of the setting that holds `on_bad_row`, for the message.

    Raises:
        ValueError: there are bad rows and `on_bad_row` is "error".
    """
    path = store / BAD_ROWS
    if not bad:
        path.unlink(missing_ok=True)
        return
    store.mkdir(parents=True, exist_ok=True)
    bad = sorted(bad, key=lambda row: (row.file, row.row or 0))
    write_atomic(path, "".join(row.to_json() + "\n" for row in bad))
    if on_bad_row == "error":
        examples = "\n  ".join(str(row) for row in bad[:5])
        raise ValueError(
            f"{len(bad)} bad rows (all in {path}); fix them or set {key}: skip\n  {examples}"
        )


# --- Reading and checking records ---


@dataclass(frozen=True)
class Unreadable:
    """Placeholder for a JSONL line that is not valid JSON."""

    reason: str


def read_records(path: Path) -> list[Any]:
    """Read a JSON array, or a file with one JSON value per line; blank lines are ignored.

    A JSONL line that is not valid JSON becomes an `Unreadable`, so that it can be skipped.

    Raises:
        ValueError: the file is missing, empty, of another kind (compressed, Parquet, UTF-16, an
            object that holds the list), or an array that is not valid JSON (with line, column and
            character).
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name a LLaVA JSON or JSONL file")
    check_content(path)
    with path.open("rb") as file:
        kind = kind_of(file.read(512))
    if kind is not None:
        raise ValueError(f"{path}: should be JSON or JSONL, is {kind}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
    if text.lstrip()[:1] == "[":
        try:
            records = json.loads(text)
        except ValueError as error:  # also raised for a number of 5000 digits
            raise ValueError(f"{path}: not valid JSON: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{path}: nested too deeply to be a list of records") from error
    else:
        lines = enumerate(text.split("\n"), start=1)
        records = [_read_line(line, number) for number, line in lines if line.strip()]
        fault = _fault_of_lines(text, records)
        if fault is not None:
            raise ValueError(f"{path}: {fault}")
    if not records:
        raise ValueError(
            f"{path}: contains no records; should be objects with id, image and conversations"
        )
    return records


def _fault_of_lines(text: str, records: list[Any]) -> str | None:
    """Return why a file with one JSON value per line cannot be JSONL; None if it can."""
    if len(records) != 1 and not (records and isinstance(records[0], Unreadable)):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        unreadable = [record.reason for record in records if isinstance(record, Unreadable)]
        return unreadable[0] if len(unreadable) == len(records) else None
    if not isinstance(value, dict):
        return None
    for key, inner in value.items():
        records_in = isinstance(inner, list) and inner and isinstance(inner[0], dict)
        if records_in and "conversations" not in value:
            return f"an object that holds its {len(inner)} records in {key!r}; should be that list"
    return None if len(records) == 1 else "an object over several lines; should be a list"


def _read_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return Unreadable(f"not valid JSON: line {number}, column {error.colno}: {error.msg}")
    except ValueError as error:
        return Unreadable(f"not valid JSON: line {number}: {error}")
    except RecursionError:
        return Unreadable(f"line {number} is nested too deeply")


def find_bad_rows(file: Path, records: list[Any]) -> list[BadRow]:
    """Return the bad records of a file, duplicates included.

    LLaVA's own mixture uses one id for several conversations about one image, so a record is a
    duplicate only if id, image and conversations are all the same.
    """
    bad: list[BadRow] = []
    row_of: dict[bytes, int] = {}  # hash of a record's content -> first row with it
    for row, record in enumerate(records):
        reason = check_record(record)
        if reason is None:
            content = dumps([record_id(record), record.get("image"), record["conversations"]])
            digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
            original = row_of.setdefault(digest, row)
            if original != row:
                reason = f"duplicate: same id, image and conversations as row {original}"
        if reason is not None:
            bad.append(BadRow(str(file), row, record_id(record), reason))
    return bad


def unused_keys(records: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Return keys of good records that nothing reads, with the number of records that have them.

    A key of a turn is written `conversations.KEY`; a key without content does not count.
    """
    counts: Counter[str] = Counter()
    for record in records:
        keys = {key for key, value in record.items() if key not in KEYS and value not in EMPTY}
        for turn in record["conversations"]:
            keys |= {
                f"conversations.{key}"
                for key, value in turn.items()
                if key not in TURN_KEYS and value not in EMPTY
            }
        counts.update(keys)
    return dict(sorted(counts.items()))


def record_id(record: Any) -> str | None:
    """Return the id of a record as text, or None if it has no valid id."""
    value = record.get("id") if isinstance(record, dict) else None
    if isinstance(value, str):
        return value if value and not LONE_SURROGATE.search(value) else None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def check_record(record: Any) -> str | None:
    """Return why a record is bad, without reading its image; None if it is good."""
    if isinstance(record, Unreadable):
        return record.reason
    if not isinstance(record, dict):
        return f"not an object but {_kind(record)}; should be {{id, image, conversations}}"
    if record.get("id") is not None and record_id(record) is None:
        return f"id is {_kind(record['id'])}; should be text or an integer, or left out"
    conversation = record.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        return "conversations is empty or missing; should be a list of human and gpt turns"
    for key in MEDIA_KEYS:
        if record.get(key) not in EMPTY:
            return f"{key} is not supported; a record may have one image, in `image`"
    image = record.get("image")
    if image is not None:
        if not isinstance(image, str) or not image:
            return f"image is {_kind(image)}; should be one file name"
        if LONE_SURROGATE.search(image) or "\0" in image:
            return f"image {image!r} is not a file name"
        if PurePosixPath(image).is_absolute() or ".." in PurePosixPath(image).parts:
            return f"image {image!r} is not a path inside the image folder"
    return _check_turns(conversation, image) or _check_tags(
        record.get("tags"), len(conversation) // 2
    )


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
        if sender != expected and index == 0:
            return "the first turn is from gpt; should be a question from human (delete that turn)"
        if sender != expected:
            return f"wrong turn order: turn {index} is from {sender}, should be {expected}"
        if sender == "gpt" and not value.strip():
            return f"no answer: turn {index} is empty"
        if LONE_SURROGATE.search(value):
            return f"turn {index}: value contains half a surrogate pair, which is not text"
        if index > 0 and IMAGE_MARK in value:
            return f"{IMAGE_MARK} in turn {index}; only the first question may contain it"
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
        isinstance(tag, str) and not LONE_SURROGATE.search(tag) for tag in tags
    ):
        return "tags should be a list with one text for each answer"
    if len(tags) != answers:
        return f"{len(tags)} tags for {answers} answers; should be one for each"
    return None


def _kind(value: Any) -> str:
    """Return the type of a JSON value, in JSON's words."""
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


# --- Conversations as tokens ---

# processor -> form of a conversation -> its rendered pieces, with marks in place of texts
_FORMS: weakref.WeakKeyDictionary[ProcessorMixin, dict[Any, list[tuple[str, str]]]]
_FORMS = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Encoded:
    """The tokens of a conversation; answer k is `ids[starts[k]:ends[k]]`.

    An answer's span includes its end-of-answer token.
    """

    ids: np.ndarray  # [n] int64; the image is one token
    starts: list[int]
    ends: list[int]
    image_at: int | None  # index of the image token; None without an image

    def turn_tokens(self, image_tokens: int) -> list[int]:
        """Return the length up to the end of each answer if the image takes `image_tokens`."""
        extra = image_tokens - 1 if self.image_at is not None else 0
        return [end + extra for end in self.ends]


@functools.lru_cache(maxsize=4096)  # photographs share their sizes
def image_tokens(processor: ProcessorMixin, size: tuple[int, int]) -> int:
    """Return how many tokens an image of `size` (width, height) takes; reads no pixels."""
    width, height = size
    return int(
        processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0]
    )


@functools.lru_cache(maxsize=8)
def control_tokens(processor: ProcessorMixin) -> list[str]:
    """Return the special tokens, and the other added tokens that the chat template writes.

    Other added tokens may be ordinary words, which the model's maker added to the vocabulary. A
    token of one or two characters cannot be told from ordinary text.
    """
    tokenizer = processor.tokenizer
    added = tokenizer.added_tokens_decoder.values()
    tokens = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    tokens |= {getattr(processor, name, None) or "" for name in ("image_token", "video_token")}
    turns = [
        {"role": role, "content": [{"type": "text", "text": "x"}]}
        for role in ("system", "user", "assistant", "user")
    ]
    for messages in (turns, turns[1:]):  # some templates accept no system message
        with contextlib.suppress(jinja2.TemplateError):
            text = processor.apply_chat_template(messages, add_generation_prompt=True)
            tokens |= {str(token) for token in added if str(token) in text}
    return sorted(token for token in tokens if len(token.strip()) >= 3)


def find_control_token(
    processor: ProcessorMixin, conversation: Sequence[dict[str, str]]
) -> str | None:
    """Return why the texts of a conversation cannot be learned: a control token; None if none.

    Words such as "ASSISTANT:" may be part of a text.
    """
    for turn, message in enumerate(chat_messages(conversation)):
        text = message["content"][-1]["text"]
        for token in control_tokens(processor):
            if token in text and not re.fullmatch(r"\w+:?", token):
                return f"turn {turn} contains {token!r}, a control token of the model"
    return None


def chat_messages(conversation: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Convert a checked LLaVA conversation to transformers chat messages.

    The image goes before the text of its question, wherever its mark was.
    """
    messages = []
    for turn in conversation:
        text = turn["value"].replace(IMAGE_MARK, "").strip()
        content: list[dict[str, str]] = [{"type": "text", "text": text}]
        if IMAGE_MARK in turn["value"]:
            content.insert(0, {"type": "image"})
        messages.append({"role": ROLES[turn["from"]], "content": content})
    return messages


def needs_special_tokens(processor: ProcessorMixin, text: str) -> bool:
    """Return `add_special_tokens` for a rendered text, as apply_chat_template sets it: no second
    BOS token if the template writes it."""
    bos = processor.tokenizer.bos_token
    return not (bos and text.startswith(bos))


def encode(processor: ProcessorMixin, conversation: Sequence[dict[str, str]]) -> Encoded:
    """Render a conversation with the chat template, tokenize it, and locate the answers.

    Where the template does not end an answer with a special token (LLaVA 1.5's does not), the
    tokenizer's end-of-sequence token is added, as LLaVA's own training code does: without it a
    model never learns to stop.

    Raises:
        ValueError: the template changes the text of earlier turns as the conversation grows, or
            writes no image token.
    """
    text, spans = _render(processor, chat_messages(conversation))
    tokenizer = processor.tokenizer
    special = needs_special_tokens(processor, text)
    tokens = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
    ids = np.array(tokens["input_ids"], dtype=np.int64)

    # character spans of the answers -> token spans
    offsets = np.array(tokens["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    starts, ends = [], []
    for start, end in spans:
        inside = np.flatnonzero(
            (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 1] > offsets[:, 0])
        )
        starts.append(int(inside[0]))
        ends.append(int(inside[-1]) + 1)

    image_at = None
    if any(IMAGE_MARK in turn["value"] for turn in conversation):
        places = np.flatnonzero(ids == processor.image_token_id)
        if len(places) != 1:
            raise ValueError(
                f"chat template: {len(places)} image tokens ({processor.image_token!r}) for one "
                "image; the template must write the processor's image token once for each"
            )
        image_at = int(places[0])
    return Encoded(ids, starts, ends, image_at)


def _render(
    processor: ProcessorMixin, messages: list[dict[str, Any]]
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation, and the characters [start, end) of each answer in it."""
    tokenizer = processor.tokenizer
    text, spans = "", []
    texts = [m["content"][-1]["text"] for m in messages if m["role"] == "assistant"]
    for (prompt, answer), said in zip(_pieces(processor, messages), texts, strict=True):
        text += prompt
        start = len(text) + len(answer) - len(answer.lstrip())
        stripped = answer.rstrip()
        # what the template wrote after the answer's text, which may itself end in a special token
        end = stripped[stripped.find(said) + len(said) :] if said in stripped else stripped
        if any(end.endswith(token) for token in tokenizer.all_special_tokens):
            spans.append((start, len(text) + len(stripped)))
            text += answer
        else:
            text += stripped + tokenizer.eos_token
            spans.append((start, len(text)))
    return text, spans


def _pieces(processor: ProcessorMixin, messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the rendered text as pairs (text before an answer, answer with its end), in order.

    Templates render slowly, and locating the pieces takes two renderings per answer. So this is
    done once per form of conversation (roles and images), with marks in place of texts; then the
    texts are filled in, and one rendering of the real conversation checks the result.
    """
    forms = _FORMS.setdefault(processor, {})
    template = processor.chat_template
    form = (template, *((message["role"], len(message["content"])) for message in messages))
    if form not in forms:
        marked = [
            {
                "role": message["role"],
                "content": [*message["content"][:-1], {"type": "text", "text": f"\ue000{i}\ue001"}],
            }
            for i, message in enumerate(messages)
        ]
        forms[form] = _split(processor, marked)
    texts = [message["content"][-1]["text"] for message in messages]

    def fill(piece: str) -> str:
        return re.sub("\ue000([0-9]+)\ue001", lambda mark: texts[int(mark[1])], piece)

    pieces = [(fill(prompt), fill(answer)) for prompt, answer in forms[form]]
    rendered = processor.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False
    )
    if "".join(prompt + answer for prompt, answer in pieces) == rendered:
        return pieces
    return _split(processor, messages)  # the template's output depends on the texts


def _split(processor: ProcessorMixin, messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Locate the pieces by rendering every prefix of the conversation; see `_pieces`."""
    tokenizer, template = processor.tokenizer, processor.chat_template
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = tokenizer.apply_chat_template(
        [messages[:index] for index in answers],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )
    prefixes = tokenizer.apply_chat_template(
        [messages[: index + 1] for index in answers], chat_template=template, tokenize=False
    )
    pieces, before = [], ""
    for prompt, prefix in zip(prompts, prefixes, strict=True):
        if not (prompt.startswith(before) and prefix.startswith(prompt)):
            raise ValueError(
                "chat template: the text of earlier turns changes as the conversation grows, so "
                "answers cannot be located "
                f"({_difference(before, prompt)}; {_difference(prompt, prefix)})"
            )
        pieces.append((prompt[len(before) :], prefix[len(prompt) :]))
        before = prefix
    return pieces


def _difference(expected: str, text: str) -> str:
    """Describe where `text` stops starting with `expected`, in a few words for an error line."""
    for index, (a, b) in enumerate(zip(expected, text, strict=False)):
        if a != b:
            return f"{expected[index : index + 20]!r} became {text[index : index + 20]!r}"
    if len(text) >= len(expected):
        return "same so far"
    return f"{expected[len(text) :][:20]!r} was dropped"

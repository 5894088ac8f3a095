"""Instruction records at the door: LLaVA JSON or JSONL files, and what makes a record bad.

In: a file from outside. Out: its records in order, and for each bad one a reason a person can act
on. Nothing in a record may crash the reader; only a file that cannot be read at all is an error
here.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import struct
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from transformers import ProcessorMixin


# LLaVA conversations -> token ids and the spans that are learned.
#
# In: a processor with a chat template, one conversation. Out: its tokens with one placeholder for
# the image, and where each answer lies. Ingest counts tokens with it, the loader makes batches with
# it, so both agree.

ROLES = {"human": "user", "gpt": "assistant"}
IMAGE_MARK = "<image>"  # LLaVA's, in the first human turn, whatever the processor's own token is

# What Pillow raises on files that are not the picture they claim to be.
BROKEN_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# processor -> form of conversation -> its rendered pieces, with marks for texts
_FORMS: weakref.WeakKeyDictionary[ProcessorMixin, dict[Any, list[tuple[str, str]]]]
_FORMS = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Encoded:
    """One conversation: `ids` [n] int64 with the image as a single token; answer k is
    ids[starts[k]:ends[k]].

    An answer's span ends with its end-of-answer token. `image_at` is the index of the image token,
    None without one.
    """

    ids: np.ndarray
    starts: list[int]
    ends: list[int]
    image_at: int | None

    def turn_tokens(self, image_tokens: int) -> list[int]:
        """Length up to and with each answer when the image takes `image_tokens` tokens."""
        extra = image_tokens - 1 if self.image_at is not None else 0
        return [end + extra for end in self.ends]


def decode_image(encoded: bytes) -> Image.Image:
    """RGB picture; raises one of `BROKEN_IMAGE` where the bytes are not a whole picture."""
    with Image.open(io.BytesIO(encoded)) as image:
        return image.convert("RGB")


def chat_messages(conversation: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """A checked LLaVA conversation as transformers chat messages; the image goes before its
    question's text."""
    messages = []
    for turn in conversation:
        text = turn["value"].replace(IMAGE_MARK, "").strip()
        content: list[dict[str, str]] = [{"type": "text", "text": text}]
        if IMAGE_MARK in turn["value"]:
            content.insert(0, {"type": "image"})
        messages.append({"role": ROLES[turn["from"]], "content": content})
    return messages


def encode(processor: ProcessorMixin, conversation: Sequence[dict[str, str]]) -> Encoded:
    """Render with the processor's chat template, tokenise, and find the answers.

    Where the template ends an answer without a special token (LLaVA 1.5's does), the tokenizer's
    end-of-sequence token is put there, as LLaVA's own training code does: without it a model never
    learns to stop.

    Raises ValueError when the template rewrites earlier turns as the conversation grows, or has no
    image token.
    """
    text, spans = _render(processor, chat_messages(conversation))
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token
    tokens = tokenizer(
        text,
        return_offsets_mapping=True,
        # as apply_chat_template does: a template that writes the first token itself gets no second
        # one
        add_special_tokens=not (bos and text.startswith(bos)),
    )
    ids = np.array(tokens["input_ids"], dtype=np.int64)
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
        found = np.flatnonzero(ids == processor.image_token_id)
        if len(found) != 1:
            raise ValueError(
                f"chat template: {len(found)} image tokens ({processor.image_token!r}) for one "
                "image; the template must write the processor's image token once for each"
            )
        image_at = int(found[0])
    return Encoded(ids, starts, ends, image_at)


@functools.lru_cache(maxsize=4096)  # photographs share their sizes
def image_tokens(processor: ProcessorMixin, size: tuple[int, int]) -> int:
    """How many tokens a picture of `size` (width, height) takes; needs no pixels."""
    width, height = size
    return int(
        processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0]
    )


def _render(
    processor: ProcessorMixin, messages: list[dict[str, Any]]
) -> tuple[str, list[tuple[int, int]]]:
    """Text of the whole conversation, and the characters [start, end) of each answer in it."""
    tokenizer = processor.tokenizer
    text, spans = "", []
    for prompt, answer in _pieces(processor, messages):
        text += prompt
        start = len(text) + len(answer) - len(answer.lstrip())
        stripped = answer.rstrip()
        if any(stripped.endswith(token) for token in tokenizer.all_special_tokens):
            spans.append((start, len(text) + len(stripped)))
            text += answer
        else:
            text += stripped + tokenizer.eos_token
            spans.append((start, len(text)))
    return text, spans


def _pieces(processor: ProcessorMixin, messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The rendered text as (what comes before an answer, the answer with its end), in order.

    Templates are slow to render, and where the pieces lie takes two renderings an answer. That is
    done once for each form of conversation, with marks for texts; the texts are put in, and one
    rendering of the real conversation checks the result.
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
    whole = processor.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False
    )
    if "".join(prompt + answer for prompt, answer in pieces) == whole:
        return pieces
    return _split(processor, messages)  # a template that looks into the texts


def _split(processor: ProcessorMixin, messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """`_pieces` by rendering every beginning of the conversation."""
    tokenizer, template = processor.tokenizer, processor.chat_template
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = tokenizer.apply_chat_template(
        [messages[:index] for index in answers],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )
    wholes = tokenizer.apply_chat_template(
        [messages[: index + 1] for index in answers], chat_template=template, tokenize=False
    )
    pieces, before = [], ""
    for prompt, whole in zip(prompts, wholes, strict=True):
        if not (prompt.startswith(before) and whole.startswith(prompt)):
            raise ValueError(
                "chat template: the text of earlier turns changes as the conversation grows, so "
                "answers cannot be located "
                f"({_difference(before, prompt)}; {_difference(prompt, whole)})"
            )
        pieces.append((prompt[len(before) :], whole[len(prompt) :]))
        before = whole
    return pieces


def _difference(shorter: str, longer: str) -> str:
    """What a prefix should have been and was, cut short, for an error line."""
    for index, (a, b) in enumerate(zip(shorter, longer, strict=False)):
        if a != b:
            return f"{shorter[index : index + 20]!r} became {longer[index : index + 20]!r}"
    return (
        "same so far"
        if len(longer) >= len(shorter)
        else f"{shorter[len(longer) :][:20]!r} was dropped"
    )


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

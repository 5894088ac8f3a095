"""LLaVA conversations -> token ids and the spans that are learned.

In: a processor with a chat template, one conversation. Out: its tokens with one placeholder for the
image, and where each answer lies. Ingest counts tokens with it, the loader makes batches with it,
so both agree.
"""

from __future__ import annotations

import functools
import io
import re
import struct
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from transformers import ProcessorMixin

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

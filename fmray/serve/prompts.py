"""From a checked request to one row for the engine: pictures, chat template, token ids.

In: a `ChatRequest` and the model's processor. Out: `Prompt`. Decoding and processing take
milliseconds to seconds, so it runs in a thread, off the event loop. What a client may not ask for
is an `ApiError`; none repeats its text.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
from torch import Tensor

from fmray.data.processor import fingerprint
from fmray.serve.images import Picture, read_pictures
from fmray.serve.openai_api import ApiError, ChatRequest, ImagePart, TextPart
from fmray.serve.settings import ServeConfig

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_SHORTEST_CONTROL = 3  # characters; a shorter token is not told from text


@dataclass(frozen=True, eq=False)
class Prompt:
    """inputs: one unpadded row as the processor gives it. image_key: hash of its pictures and their
    preprocessing, None without one. max_new_tokens: what may be generated.
    """

    inputs: dict[str, Tensor]
    image_key: str | None
    max_new_tokens: int

    @property
    def tokens(self) -> int:
        """Length, image tokens included."""
        return self.inputs["input_ids"].shape[1]


class PromptMaker:
    """Makes prompts with one processor. Safe to call from several threads."""

    def __init__(self, processor: ProcessorMixin, settings: ServeConfig, context: int) -> None:
        """context: how many tokens the decoder can hold, the latency token's place left out."""
        self._processor, self._settings, self._context = processor, settings, context
        self._fingerprint = fingerprint(processor)
        self._control = _control_tokens(processor)
        self._lock = threading.Lock()  # tokenizers change state while they encode

    def make(self, request: ChatRequest) -> Prompt:
        """The prompt of a request. Raises ApiError (400)."""
        settings = self._settings
        if len(request.messages) > settings.max_messages:
            raise _wrong("messages", f"more than {settings.max_messages} messages")
        if request.messages[-1].role == "assistant":
            raise _wrong("messages", "the last message must not be the assistant's")
        asked = request.asked_tokens
        if asked is not None and asked > settings.max_output_tokens:
            raise _wrong("max_tokens", f"at most {settings.max_output_tokens} here")
        parts = [part for message in request.messages for part in message.parts]
        self._check_texts([part.text for part in parts if isinstance(part, TextPart)])
        urls = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        if len(urls) > settings.max_images:
            raise _wrong("messages", f"more than {settings.max_images} pictures")
        try:
            pictures = read_pictures(urls, settings.max_pixels)
        except ValueError as error:
            raise ApiError(400, str(error), code="invalid_image", param="messages") from None
        inputs = self._process(request, pictures)
        room = self._context - inputs["input_ids"].shape[1]
        if room < (asked or 1):
            raise ApiError(
                400,
                f"{inputs['input_ids'].shape[1]} tokens of prompt and {asked or 1} of answer do "
                f"not fit into this model's {self._context}",
                code="context_length_exceeded",
                param="messages",
            )
        return Prompt(
            inputs, self._image_key(pictures), asked or min(settings.max_new_tokens, room)
        )

    def _check_texts(self, texts: list[str]) -> None:
        if sum(map(len, texts)) > self._settings.max_characters:
            raise _wrong("messages", f"more than {self._settings.max_characters} characters")
        for token in self._control:
            if any(token in text for text in texts):
                raise _wrong(
                    "messages",
                    f"the text holds this model's control token {token!r}; pictures go into "
                    "image_url parts, and turns into messages",
                )

    def _process(self, request: ChatRequest, pictures: list[Picture]) -> dict[str, Tensor]:
        processor = self._processor
        with self._lock:
            try:
                text = processor.apply_chat_template(
                    chat_messages(request), add_generation_prompt=True
                )
            except jinja2.TemplateError:
                raise _wrong(
                    "messages", "this model's chat template does not take these roles in this order"
                ) from None
            start = processor.tokenizer.bos_token
            inputs = dict(
                processor(
                    images=[picture.image for picture in pictures] or None,
                    text=text,
                    return_tensors="pt",
                    # as in training: a template that writes the first token itself gets no second
                    add_special_tokens=not (start and text.startswith(start)),
                )
            )
        inputs.pop("token_type_ids", None)
        return inputs

    def _image_key(self, pictures: list[Picture]) -> str | None:
        if not pictures:
            return None
        digests = [self._fingerprint, *(picture.digest for picture in pictures)]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def chat_messages(request: ChatRequest) -> list[dict[str, Any]]:
    """The request's messages as transformers takes them.

    Texts are stripped and a message's only picture goes before its text, as in training; several
    pictures stay where they are.
    """
    messages = []
    for message in request.messages:
        content: list[dict[str, str]] = [
            {"type": "text", "text": part.text.strip()}
            if isinstance(part, TextPart)
            else {"type": "image"}
            for part in message.parts
        ]
        if sum(part["type"] == "image" for part in content) == 1:
            content.sort(key=lambda part: part["type"] == "text")
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": content})
    return messages


def _control_tokens(processor: ProcessorMixin) -> list[str]:
    tokenizer = processor.tokenizer
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = {*tokenizer.all_special_tokens, *added, getattr(processor, "image_token", None) or ""}
    return sorted(token for token in tokens if len(token) >= _SHORTEST_CONTROL)


def _wrong(param: str, text: str) -> ApiError:
    return ApiError(400, f"{param}: {text}", code="invalid_value", param=param)

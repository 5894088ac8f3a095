"""From a chat request to the engine's `Ask`: images, chat template, token ids.

This takes milliseconds to seconds, so it runs in a thread, off the event loop; images are decoded
in the processes of an `ImagePool`. Errors never repeat what the client sent.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import jinja2
from torch import Tensor

from fmray.config.serve import ServeConfig
from fmray.data.processor import fingerprint
from fmray.data.records import control_tokens, needs_special_tokens
from fmray.engine.policy import Ask
from fmray.engine.requests import Sampling
from fmray.serve.images import Decode, RequestImage, read_images
from fmray.serve.openai import ApiError, ChatRequest, ImagePart, TextPart

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from fmray.engine.forecast import Moment


class PromptBuilder:
    """Builds engine requests with one processor. Safe to call from several threads."""

    def __init__(self, processor: ProcessorMixin, settings: ServeConfig, context: int) -> None:
        """Build prompts for a model that holds `context` tokens of prompt and answer."""
        self._processor, self._settings, self._context = processor, settings, context
        self._fingerprint = fingerprint(processor)
        self._control_tokens = control_tokens(processor)
        self._lock = threading.Lock()  # tokenizers change state while they encode

    def build(self, request: ChatRequest, caller: str, decode: Decode = read_images) -> Ask:
        """Return the engine's form of a request, under a new id.

        Args:
            decode: Takes the URLs of the images and their largest number of pixels.

        Raises:
            ApiError: 400 if the request exceeds a limit or its images or texts are not accepted.
        """
        settings = self._settings
        # Limits that need no decoding
        if len(request.messages) > settings.max_messages:
            raise _invalid("messages", f"at most {settings.max_messages} messages are accepted")
        if request.messages[-1].role == "assistant":
            raise _invalid("messages", "the last message must not be from the assistant")
        limit = request.token_limit
        if limit is not None and limit > settings.max_output_tokens:
            raise _invalid("max_tokens", f"must be at most {settings.max_output_tokens}")
        parts = [part for message in request.messages for part in message.parts]
        if sum(len(part.text) for part in parts if isinstance(part, TextPart)) > (
            settings.max_characters
        ):
            limit = settings.max_characters
            raise _invalid("messages", f"at most {limit} characters of text are accepted")
        urls = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        if len(urls) > settings.max_images:
            raise _invalid("messages", f"at most {settings.max_images} images are accepted")

        # Images and token ids
        try:
            images = decode(urls, settings.max_pixels)
        except ValueError as error:
            raise ApiError(400, str(error), code="invalid_image", param="messages") from None
        inputs = self._process(request, images)
        prompt_tokens = inputs["input_ids"].shape[1]
        tokens_left = self._context - prompt_tokens
        if tokens_left < (limit or 1):
            raise ApiError(
                400,
                f"a prompt of {prompt_tokens} tokens and an answer of {limit or 1} exceed this "
                f"model's context of {self._context} tokens",
                code="context_length_exceeded",
                param="messages",
            )

        max_new_tokens = limit or min(settings.max_new_tokens, tokens_left)
        try:
            return Ask(
                id=f"chatcmpl-{secrets.token_hex(12)}",
                caller=caller,
                inputs=inputs,
                image_key=self._image_key(images),
                sampling=_sampling(request, max_new_tokens),
                budget=request.budget,
                deadline_ms=request.deadline_ms,
                deadline_of=_deadline_of(request),
                strict=request.strict,
            )
        except ValueError as error:
            raise ApiError(400, str(error), code="invalid_value") from None

    def _process(self, request: ChatRequest, images: list[RequestImage]) -> dict[str, Tensor]:
        """Return one unpadded row, as the processor makes it."""
        processor = self._processor
        messages = chat_messages(request)
        with self._lock:
            try:
                text = processor.apply_chat_template(messages, add_generation_prompt=True)
                neutral = processor.apply_chat_template(
                    _without_texts(messages), add_generation_prompt=True
                )
            except jinja2.TemplateError:
                raise _invalid(
                    "messages", "this model's chat template rejects this order of roles"
                ) from None
            self._check_control_tokens(text, neutral)
            try:
                inputs = dict(
                    processor(
                        images=[image.image for image in images] or None,
                        text=text,
                        return_tensors="pt",
                        add_special_tokens=needs_special_tokens(processor, text),
                    )
                )
            except ValueError:
                raise _invalid(
                    "messages", "this model's processor rejects these texts and images"
                ) from None
        inputs.pop("token_type_ids", None)
        return inputs

    def _check_control_tokens(self, text: str, neutral: str) -> None:
        """Check that a rendered prompt has the control tokens of the template, and no others.

        The template joins texts, so a token may be split over parts and messages of the request.

        Args:
            neutral: the same conversation with harmless texts, rendered.

        Raises:
            ApiError: 400 naming the token that a text contains.
        """
        tokenizer = self._processor.tokenizer
        for token in self._control_tokens:
            if text.count(token) != neutral.count(token):
                raise _control_token_error(token)
        # Tokenizers that normalize text find tokens that are spelled differently.
        ids, neutral_ids = (
            Counter(tokenizer(side, add_special_tokens=False)["input_ids"])
            for side in (text, neutral)
        )
        for token in self._control_tokens:
            number = tokenizer.convert_tokens_to_ids(token)
            if number != tokenizer.unk_token_id and ids[number] != neutral_ids[number]:
                raise _control_token_error(token)

    def _image_key(self, images: list[RequestImage]) -> str | None:
        """Return a hash of the images and their preprocessing, None without images."""
        if not images:
            return None
        digests = [self._fingerprint, *(image.digest for image in images)]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def chat_messages(request: ChatRequest) -> list[dict[str, Any]]:
    """Return the messages in the form that transformers expects.

    As in training, texts are stripped and a single image is placed before the text. Several images
    stay where they are.
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


def _sampling(request: ChatRequest, max_new_tokens: int) -> Sampling:
    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=secrets.randbits(31) if request.seed is None else request.seed,
        stop=tuple(request.stop or ()),
    )


def _deadline_of(request: ChatRequest) -> Moment:
    """Return what a deadline applies to; by default the answer if its length is limited."""
    if request.deadline_of is not None:
        return request.deadline_of
    limited = request.deadline_ms is not None and request.token_limit is not None
    return "answer" if limited else "first_token"


def _without_texts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with a letter in place of each text."""
    return [
        message
        | {"content": [part | {"text": "x"} if part.get("text") else part for part in parts]}
        for message in messages
        for parts in [message["content"]]
    ]


def _control_token_error(token: str) -> ApiError:
    return _invalid(
        "messages",
        f"the text contains this model's control token {token!r}; send images as image_url parts "
        "and turns as messages",
    )


def _invalid(param: str, text: str) -> ApiError:
    return ApiError(400, f"{param}: {text}", code="invalid_value", param=param)

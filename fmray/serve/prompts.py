"""From a checked request to one row for the engine: pictures, chat template, token ids.

In: a `ChatRequest` and the model's processor. Out: `Prompt`. Decoding and processing take
milliseconds to seconds, so it runs in a thread, off the event loop. What a client may not ask for
is an `ApiError`; none repeats its text.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
from PIL import Image
from torch import Tensor

from fmray.config.serve import ServeConfig
from fmray.data.processor import fingerprint
from fmray.data.records import BROKEN_IMAGE
from fmray.serve.openai import ApiError, ChatRequest, ImagePart, TextPart

if TYPE_CHECKING:
    from transformers import ProcessorMixin


# Pictures of a request: from a `data:` URL to pixels, with nothing believed before it is checked.
#
# In: a URL as the client sent it. Out: an RGB picture and the hash of its bytes. Format, frames and
# the number of pixels are read from the header; only then is anything decoded. Runs in a thread,
# off the event loop. No error repeats what was sent.

FORMATS = {"image/jpeg": "JPEG", "image/jpg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}
ACCEPTED = "JPEG, PNG or WebP"
# A processor that scales the shorter side up would make a picture of 1 x 10^6 pixels enormous.
_LONGEST_ASPECT = 20
_ORIENTATION = 0x0112  # of EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _RefusedError(ValueError):
    """A whole picture that is not taken; not to be mixed up with what readers raise."""


@dataclass(frozen=True)
class Picture:
    """image: RGB, upright. digest: sha256 of the bytes it came from. pixels: width x height."""

    image: Image.Image
    digest: str
    pixels: int


def read_data_url(url: str) -> tuple[str, bytes]:
    """Format and bytes of a base64 `data:` URL.

    Raises ValueError for any other URL: nothing is ever fetched.
    """
    if url[:5].lower() != "data:":
        scheme = url.partition(":")[0].lower() if ":" in url[:16] else ""
        kind = scheme if scheme in ("http", "https", "file", "ftp", "blob") else "other"
        raise ValueError(
            f"{kind} URLs are not fetched by this server; send the picture itself as "
            "data:image/png;base64,... (JPEG, PNG or WebP)"
        )
    head, comma, payload = url[5:].partition(",")
    media, *parameters = head[:256].split(";")
    if not comma or len(head) > 256 or "base64" not in [part.strip() for part in parameters]:
        raise ValueError("a picture must be data:image/...;base64,...")
    kind = FORMATS.get(media.strip().lower())
    if kind is None:
        raise ValueError(f"a picture must be {ACCEPTED}, and its data: URL must say which")
    try:
        encoded = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters that are not ASCII
        raise ValueError("the picture's base64 is broken or cut off") from None
    if not encoded:
        raise ValueError("the picture is empty")
    return kind, encoded


def decode(kind: str, encoded: bytes, max_pixels: int) -> Picture:
    """Decode bytes that claim to be of format `kind`, of at most `max_pixels` pixels.

    A JPEG's further embedded pictures (MPO, as telephones write) are not looked at; moving pictures
    are refused. EXIF orientation is applied. Raises ValueError for what is not such a picture.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=(kind,)) as image:
            width, height = image.size
            if min(width, height) < 1 or width * height > max_pixels:
                raise _RefusedError(f"the picture has more than {max_pixels} pixels")
            if max(width, height) > _LONGEST_ASPECT * min(width, height):
                raise _RefusedError(f"the picture is over {_LONGEST_ASPECT} times as long as wide")
            if kind != "JPEG" and getattr(image, "n_frames", 1) != 1:
                raise _RefusedError("the picture moves; send one frame")
            turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION))
            pixels = image.convert("RGB")
    except _RefusedError:
        raise
    except BROKEN_IMAGE:
        raise ValueError(f"the picture is no whole {kind} file") from None
    if turn is not None:
        pixels = pixels.transpose(turn)
    return Picture(pixels, hashlib.sha256(encoded).hexdigest(), width * height)


def read_pictures(urls: list[str], max_pixels: int) -> list[Picture]:
    """All pictures of a request, of at most `max_pixels` pixels together.

    Raises ValueError that counts the picture from 1.
    """
    pictures, left = [], max_pixels
    for number, url in enumerate(urls, start=1):
        try:
            picture = decode(*read_data_url(url), left)
        except ValueError as error:
            raise ValueError(f"picture {number}: {error}") from None
        left -= picture.pixels
        pictures.append(picture)
    return pictures


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

"""The images of a request: read from `data:` URLs, checked and decoded.

Nothing is ever fetched. The number of pixels is read from the header, and only an acceptable image
is decoded. Errors never repeat what the client sent. Imports neither torch nor transformers:
`fmray.serve.image_worker` runs this in small processes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

from PIL import Image

from fmray.data.images import BrokenImageError, ImageError, decode_image

ACCEPTED = "JPEG, PNG or WebP"
_SIGNATURE = re.compile(
    rb"(?P<JPEG>\xff\xd8\xff)|(?P<PNG>\x89PNG\r\n)|(?P<WEBP>RIFF.{4}WEBP)", re.S
)
_URL_SAFE = str.maketrans("-_", "+/")
# A processor that scales the shorter side up would make an image of 1 x 10^6 pixels enormous.
_MAX_ASPECT = 20


@dataclass(frozen=True)
class RequestImage:
    """An image of a request."""

    image: Image.Image  # RGB, upright
    digest: str  # sha256 of the encoded bytes
    pixels: int  # width x height


Decode = Callable[[list[str], int], list[RequestImage]]  # as `read_images`


def read_data_url(url: str) -> tuple[str, bytes]:
    """Return the format and the bytes of a base64 `data:` URL.

    The bytes tell the format: many clients declare a wrong one. The base64 may be broken into
    lines, percent-encoded, without padding, or in the URL-safe alphabet.

    Raises:
        ValueError: If it is any other URL, or its content is not base64.
    """
    url = url.strip()
    if url[:5].lower() != "data:":
        scheme = url.partition(":")[0].lower() if ":" in url[:16] else ""
        kind = scheme if scheme in ("http", "https", "file", "ftp", "blob") else "other"
        raise ValueError(
            f"this server does not fetch {kind} URLs; send the image itself as "
            f"data:image/png;base64,... ({ACCEPTED})"
        )
    head, comma, payload = url[5:].partition(",")
    parameters = [part.strip().lower() for part in head[:256].split(";")[1:]]
    if not comma or len(head) > 256 or "base64" not in parameters:
        raise ValueError("an image must be data:image/...;base64,...")
    payload = "".join(payload.split())
    if "%" in payload:
        payload = unquote(payload)
    payload = payload.translate(_URL_SAFE).rstrip("=")
    try:
        encoded = base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters outside ASCII
        raise ValueError("the image's base64 is invalid or truncated") from None
    signature = _SIGNATURE.match(encoded)
    if signature is None:
        raise ValueError(f"the image is empty or not a {ACCEPTED} file")
    return str(signature.lastgroup), encoded


def decode(kind: str, encoded: bytes, max_pixels: int) -> RequestImage:
    """Decode an image of format `kind` with at most `max_pixels` pixels, as `decode_image` does.

    Raises:
        ValueError: If the bytes are not such an image.
    """
    try:
        image = decode_image(encoded, max_pixels, (kind,)).image
    except BrokenImageError:  # its text may quote the file
        raise ValueError(f"the image is not a complete {kind} file") from None
    except ImageError as error:
        raise ValueError(f"the image is not accepted: {error}") from None
    width, height = image.size
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise ValueError(
            f"the image's longer side is more than {_MAX_ASPECT} times the shorter one"
        )
    return RequestImage(image, hashlib.sha256(encoded).hexdigest(), width * height)


def read_images(urls: list[str], max_pixels: int) -> list[RequestImage]:
    """Decode all images of a request, with at most `max_pixels` pixels in total.

    Raises:
        ValueError: If one of them is not accepted; the message gives its number, from 1.
    """
    images, pixels_left = [], max_pixels
    for number, url in enumerate(urls, start=1):
        try:
            image = decode(*read_data_url(url), pixels_left)
        except ValueError as error:
            raise ValueError(f"image {number}: {error}") from None
        pixels_left -= image.pixels
        images.append(image)
    return images

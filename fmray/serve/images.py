"""Pictures of a request: from a `data:` URL to pixels, with nothing believed before it is checked.

In: a URL as the client sent it. Out: an RGB picture and the hash of its bytes. Format, frames and
the number of pixels are read from the header; only then is anything decoded. Runs in a thread, off
the event loop. No error repeats what was sent.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from dataclasses import dataclass

from PIL import Image

from fmray.data.encoding import BROKEN_IMAGE

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

"""Encoded images that differ in what a decoder must do to them, with the pixels that are right.

A case is a file of 32 x 32 pixels, the colours that the upright image has at its top left, top
right, bottom left and bottom right, and the changes that decoding counts.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms

SIDE = 32
RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
CORNERS = (RED, GREEN, BLUE, YELLOW)
# orientation -> quadrants of the stored image, so that the upright one has `CORNERS`
STORED = {
    1: (RED, GREEN, BLUE, YELLOW),
    2: (GREEN, RED, YELLOW, BLUE),
    3: (YELLOW, BLUE, GREEN, RED),
    4: (BLUE, YELLOW, RED, GREEN),
    5: (RED, BLUE, GREEN, YELLOW),
    6: (GREEN, YELLOW, RED, BLUE),
    7: (YELLOW, GREEN, BLUE, RED),
    8: (BLUE, RED, YELLOW, GREEN),
}


@dataclass(frozen=True)
class ImageCase:
    """A file and what it should be decoded to."""

    encoded: bytes
    corners: tuple[tuple[int, int, int], ...]
    changes: tuple[str, ...]


def image_file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return the encoded image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def quadrants(colors: tuple[tuple[int, int, int], ...] = CORNERS) -> Image.Image:
    """Return an RGB image of four squares, row by row."""
    image, half = Image.new("RGB", (SIDE, SIDE)), SIDE // 2
    for number, color in enumerate(colors):
        image.paste(color, (number % 2 * half, number // 2 * half, SIDE, SIDE))
    return image


def grey(left: float, right: float, kind: type) -> Image.Image:
    """Return a grey image whose halves have two values of a NumPy type."""
    values = np.full((SIDE, SIDE), left, kind)
    values[:, SIDE // 2 :] = right
    return Image.fromarray(values)


def halves(left: int, right: int) -> tuple[tuple[int, int, int], ...]:
    """Return the corners of an image with a left and a right grey."""
    return ((left,) * 3, (right,) * 3) * 2


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth: int, color: int, rows: bytes, *extra: bytes) -> bytes:
    """Return a PNG file of SIDE x SIDE pixels from its unfiltered rows.

    Args:
        extra: chunks before the pixels.
    """
    head = struct.pack(">IIBBBBB", SIDE, SIDE, depth, color, 0, 0, 0)
    size = len(rows) // SIDE
    lines = b"".join(b"\0" + rows[row * size : (row + 1) * size] for row in range(SIDE))
    body = [chunk(b"IHDR", head), *extra, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff(bits: int, photometric: int, data: bytes) -> bytes:
    """Return an uncompressed grey TIFF file of SIDE x SIDE pixels."""
    entries = {256: SIDE, 257: SIDE, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1}
    entries |= {278: SIDE, 279: len(data)}
    entries[273] = 8 + 2 + 12 * len(entries) + 4  # the pixels follow the directory
    fields = (struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + b"".join(fields) + bytes(4) + data


def swapped_profile() -> bytes:
    """Return sRGB's colour profile with the primaries of red and blue exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"tmpX").replace(b"bXYZ", b"rXYZ").replace(b"tmpX", b"bXYZ")


def scan_bomb(copies: int, side: int = 64) -> bytes:
    """Return a progressive JPEG file whose last scan is repeated."""
    encoded = image_file(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = encoded.rindex(b"\xff\xda")
    return encoded[:-2] + encoded[last:-2] * copies + encoded[-2:]


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _turned(kind: str, orientation: int) -> ImageCase:
    options: dict[str, Any] = {"JPEG": {"quality": 98}, "WEBP": {"lossless": True}}.get(kind, {})
    stored = quadrants(STORED[orientation])
    if kind == "TIFF":
        options["tiffinfo"] = {0x0112: orientation}
    else:
        options["exif"] = _exif(orientation)
    changes = () if orientation == 1 else ("turned",)
    return ImageCase(image_file(stored, kind, **options), CORNERS, changes)


def _animation(kind: str) -> bytes:
    frames = [quadrants(), Image.new("RGB", (SIDE, SIDE), "black")]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    return image_file(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def _transparent(mode: str) -> Image.Image:
    """Return a black image whose right half is transparent."""
    image = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, SIDE // 2, SIDE))
    return image.convert(mode)


def image_cases() -> dict[str, ImageCase]:
    """Return all cases by name."""
    cases = {
        f"{kind.lower()} orientation {number}": _turned(kind, number)
        for kind in ("JPEG", "PNG", "TIFF", "WEBP")
        for number in range(1, 9)
    }
    on_white = halves(0, 255)
    rgb16 = np.zeros((SIDE, SIDE, 3), ">u2")
    rgb16[:, : SIDE // 2, 0] = 65535
    rgb16[:, SIDE // 2 :] = 0x8000
    palette = Image.new("P", (SIDE, SIDE), 0)
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.paste(1, (SIDE // 2, 0, SIDE, SIDE))
    grey16 = grey(16384, 65535, np.uint16)
    profile = swapped_profile()
    cmyk = Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0))
    red = (RED,) * 4
    cases |= {
        "rgb": ImageCase(image_file(quadrants()), CORNERS, ()),
        "grey": ImageCase(image_file(grey(64, 255, np.uint8)), halves(64, 255), ()),
        "one bit": ImageCase(image_file(Image.new("1", (SIDE, SIDE), 1)), halves(255, 255), ()),
        "16-bit grey png": ImageCase(image_file(grey16), halves(64, 255), ("scaled",)),
        "16-bit grey tiff": ImageCase(image_file(grey16, "TIFF"), halves(64, 255), ("scaled",)),
        "16-bit grey tiff, big-endian": ImageCase(
            image_file(Image.fromarray(np.asarray(grey16).astype(">u2")), "TIFF"),
            halves(64, 255),
            ("scaled",),
        ),
        "12-bit grey tiff": ImageCase(
            # two pixels of 1024, of a range of 4095
            tiff(12, 1, b"\x40\x04\x00" * (SIDE // 2) * SIDE),
            halves(64, 64),
            ("scaled",),
        ),
        "16-bit grey tiff whose white is 0": ImageCase(
            tiff(16, 0, np.asarray(grey16).tobytes()), halves(191, 0), ("scaled",)
        ),
        "16-bit grey pgm": ImageCase(image_file(grey16, "PPM"), halves(64, 255), ("scaled",)),
        "16-bit grey png with a transparent value": ImageCase(
            png(16, 0, np.asarray(grey16).astype(">u2").tobytes(), chunk(b"tRNS", b"\x40\x00")),
            halves(255, 255),
            ("scaled", "composited"),
        ),
        "16-bit rgb png": ImageCase(png(16, 2, rgb16.tobytes()), (RED, (128,) * 3) * 2, ()),
        "32-bit integers": ImageCase(
            image_file(grey(100, 4096, np.int32), "TIFF"), on_white, ("stretched",)
        ),
        "floats in 0..1": ImageCase(
            image_file(grey(0.25, 1, np.float32), "TIFF"), halves(64, 255), ("scaled",)
        ),
        "other floats": ImageCase(
            image_file(grey(-3, 70, np.float32), "TIFF"), on_white, ("stretched",)
        ),
        "rgba": ImageCase(image_file(_transparent("RGBA")), on_white, ("composited",)),
        "rgba webp": ImageCase(
            image_file(_transparent("RGBA"), "WEBP", lossless=True), on_white, ("composited",)
        ),
        "la": ImageCase(image_file(_transparent("LA")), on_white, ("composited",)),
        "palette with a transparent entry": ImageCase(
            image_file(palette, transparency=1), on_white, ("composited",)
        ),
        "palette with alphas": ImageCase(
            image_file(palette, transparency=bytes([0, 255])), halves(255, 0), ("composited",)
        ),
        "rgb with a transparent colour": ImageCase(
            image_file(quadrants(), transparency=RED), (WHITE, *CORNERS[1:]), ("composited",)
        ),
        "opaque rgba": ImageCase(image_file(quadrants().convert("RGBA")), CORNERS, ()),
        "animated gif": ImageCase(_animation("GIF"), CORNERS, ("first_frame",)),
        "animated png": ImageCase(_animation("PNG"), CORNERS, ("first_frame",)),
        "animated webp": ImageCase(_animation("WEBP"), CORNERS, ("first_frame",)),
        "tiff of two pages": ImageCase(_animation("TIFF"), CORNERS, ("first_frame",)),
        "photo with a preview": ImageCase(
            image_file(quadrants(), "MPO", save_all=True, append_images=[quadrants()], quality=98),
            CORNERS,
            (),
        ),
        "cmyk": ImageCase(image_file(cmyk, "JPEG", quality=98), red, ("cmyk",)),
        "cmyk tiff": ImageCase(image_file(cmyk, "TIFF"), red, ("cmyk",)),
        "srgb profile": ImageCase(
            image_file(
                quadrants(),
                icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
            ),
            CORNERS,
            (),
        ),
        "red and blue swapped by the profile": ImageCase(
            image_file(quadrants((RED, BLUE, WHITE, BLACK)), icc_profile=profile),
            (BLUE, RED, WHITE, BLACK),
            ("profile",),
        ),
        "swapped, transparent and lying": ImageCase(
            image_file(
                quadrants((RED, BLUE, BLUE, BLUE)),
                icc_profile=profile,
                transparency=RED,
                exif=_exif(3),
            ),
            (RED, RED, RED, WHITE),
            ("profile", "composited", "turned"),
        ),
        "broken profile": ImageCase(
            image_file(quadrants(), icc_profile=b"no profile" * 20), CORNERS, ("bad_profile",)
        ),
        "profile of another mode": ImageCase(
            image_file(grey(64, 255, np.uint8), icc_profile=profile),
            halves(64, 255),
            ("bad_profile",),
        ),
    }
    return cases

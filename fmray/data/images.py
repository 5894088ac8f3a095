"""Decode images: the only place where fmray reads pixels.

Data preparation, training, the few-shot jobs, the endpoint and `fmray ask` all call `decode_image`,
so that the same bytes have the same pixels everywhere:

- the first frame of an animation, the first page of a TIFF file;
- 8 bits a channel. A 16-bit grey is scaled by its range (65535; 4095 if a TIFF file has 12 bits).
  Grey floats within 0..1 are scaled by 1. All other 32-bit greys have no range that is known, so
  each image is stretched from its least value to its greatest;
- sRGB, by the colour profile of the file if it has one;
- white behind transparent pixels;
- upright, by the EXIF orientation.

`DecodedImage.changes` names what was done to an image, so that callers can count and print it.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

DECODER_VERSION = 2  # increase it when an image gets other pixels: old stores become stale

# Pillow's formats without those that run programs, render, or recognise a file by next to nothing
Image.init()
# Pillow warns of damaged metadata on the terminal; what matters to a user is in `DecodedImage`
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
FORMATS = tuple(
    name
    for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN
)
MAX_PIXELS = 178_956_970  # as in Pillow, which takes a larger image for a decompression bomb
MAX_SCANS = 64  # encoders write about ten
MAX_SEGMENTS = 4096  # of a JPEG file; a PNG file may have one more per KiB
MAX_PROFILE_BYTES = 4 * 2**20
SAME_COLOUR = 3  # of 255; colours that differ by less are those of sRGB

# change -> how a summary describes it, after the number of images
CHANGES = {
    "turned": "turned by EXIF",
    "scaled": "16-bit or float grey scaled to 8 bits",
    "stretched": "32-bit grey stretched from the least to the greatest value",
    "composited": "transparent, put on white",
    "first_frame": "reduced to the first frame",
    "cmyk": "converted from CMYK",
    "profile": "converted to sRGB by the colour profile",
    "bad_profile": "with an unusable colour profile, which is ignored",
}

_NOT_DECODED = {  # pattern of the first bytes -> what the file is
    rb"version https://git-lfs": "a Git LFS pointer instead of the image; run git lfs pull",
    rb"....ftyp(hei|hev|mif|msf)": "HEIC, which is not supported; convert it to JPEG or PNG",
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|II\*\0|MM\0\*": "an image whose header is damaged,"
    " or of a kind that is not supported",
}
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
# A JPEG marker. After 0xFF, 0x00 is data, and D0 to D7 restart the coding within a scan.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_SCAN, _END = 0xDA, 0xD9
_PNG = b"\x89PNG\r\n\x1a\n"


class ImageError(ValueError):
    """An image that is not decoded; the text says why, without the file's content or name."""


class BrokenImageError(ImageError):
    """Bytes that Pillow cannot decode; the text is Pillow's own and may quote some of them."""


@dataclass(frozen=True)
class DecodedImage:
    """An image, ready for a processor."""

    image: Image.Image  # RGB, upright
    format: str  # Pillow's name of the file's format
    changes: tuple[str, ...]  # keys of `CHANGES`


def decode_image(
    encoded: bytes | memoryview, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS
) -> DecodedImage:
    """Decode an image as the module describes.

    Args:
        formats: Pillow's names of the formats to try; the content decides which one it is.

    Raises:
        ImageError: the bytes are not a complete image of these formats, or one that is too large
            or takes too long to decode.
    """
    changes: list[str] = []
    try:
        _check_segments(encoded)
        with Image.open(io.BytesIO(encoded), formats=formats) as file:
            kind = str(file.format)
            _check_limits(file.size, max_pixels)
            # cameras append previews to a JPEG file (MPO): these are no frames of an animation
            if kind != "MPO" and getattr(file, "is_animated", False):
                changes.append("first_frame")
            # Pillow turns TIFF itself, and reads a PNG's EXIF with the pixels
            turned = kind == "TIFF" and _orientation(file) in _UPRIGHT
            file.load()
            upright = _UPRIGHT.get(_orientation(file))
            image = _flattened(file, changes)
    except ImageError:
        raise
    except UnidentifiedImageError:  # its text has a memory address
        raise ImageError(_what_it_is(encoded)) from None
    except Image.DecompressionBombError:
        raise ImageError(f"more than {min(max_pixels, MAX_PIXELS)} pixels") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers raise what they stumble over
        text = str(error) or type(error).__name__
        raise BrokenImageError(text) from error
    if upright is not None:
        image = image.transpose(upright)
    if turned or upright is not None:
        changes.append("turned")
    return DecodedImage(image, "JPEG" if kind == "MPO" else kind, tuple(changes))


def looks_like_image(path: Path) -> bool:
    """Return whether a file begins as an image does; a broken image and a HEIC file do, too."""
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except UnidentifiedImageError:
        with path.open("rb") as file:
            head = file.read(64)
        return any(re.match(pattern, head, re.DOTALL) for pattern in _NOT_DECODED)
    except Exception:  # noqa: BLE001 - decoding it will tell what is wrong
        return True


def describe_changes(counts: Mapping[str, int]) -> str:
    """Return the number of images of each change as text; empty if nothing was changed."""
    parts = [f"{counts[name]} {text}" for name, text in CHANGES.items() if counts.get(name)]
    return "images: " + ", ".join(parts) if parts else ""


# --- What is not decoded ---


def _what_it_is(encoded: bytes | memoryview) -> str:
    if not len(encoded):
        return "empty file"
    for pattern, text in _NOT_DECODED.items():
        if re.match(pattern, encoded, re.DOTALL):
            return text
    return f"no image format that fmray reads ({', '.join(FORMATS)})"


def _check_limits(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if min(width, height) < 1:
        raise ImageError("no pixels")
    if width * height > max_pixels:
        raise ImageError(f"more than {max_pixels} pixels")


def _check_segments(encoded: bytes | memoryview) -> None:
    """Refuse files whose few bytes take long: Pillow steps through segments and chunks in Python.

    Linear in the file's size, and takes few steps.
    """
    if encoded[:2] == b"\xff\xd8":
        _check_jpeg(encoded)
    elif encoded[:8] == _PNG:
        at = len(_PNG)
        for _ in range(MAX_SEGMENTS + len(encoded) // 1024):
            if at >= len(encoded):
                return
            at += 12 + int.from_bytes(encoded[at : at + 4], "big")  # length, name and checksum
        raise ImageError("too many PNG chunks")


def _check_jpeg(encoded: bytes | memoryview) -> None:
    """Refuse JPEG files with many scans: each costs a few bytes, and walks over all pixels again.

    Segments are skipped by their length, and the coded data of a scan by a search.
    """
    at, scans, filler = 2, 0, 0
    for _ in range(MAX_SEGMENTS):
        marker = _MARKER.search(encoded, at)
        start = marker.start() if marker else len(encoded)
        filler += start - at if not scans else 0
        if filler > MAX_SEGMENTS:
            raise ImageError("too many bytes between JPEG segments")
        if marker is None or encoded[start + 1] == _END:
            return
        scans += encoded[start + 1] == _SCAN
        if scans > MAX_SCANS:
            raise ImageError(f"more than {MAX_SCANS} JPEG scans")
        at = start + 2 + int.from_bytes(encoded[start + 2 : start + 4], "big")
    raise ImageError("too many JPEG segments")


# --- Conversions ---


def _orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation, also from XMP; None if there is none that can be read."""
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - EXIF that is not readable says nothing about the pixels
        return None


def _flattened(image: Image.Image, changes: list[str]) -> Image.Image:
    """Return an image in RGB: 8 bits, sRGB, on white."""
    profile = image.info.get("icc_profile")

    # apart: transparency, and colours in mode L, RGB or CMYK
    mode, transparency = image.mode, image.info.get("transparency")
    alpha: Image.Image | None = None
    if mode in ("I", "F") or mode.startswith("I;16"):
        image, alpha = _eight_bits(image, transparency, changes)
    else:
        if mode in ("La", "RGBa"):
            image = image.convert(mode.upper())
        elif mode == "PA" or transparency is not None:
            image = image.convert("LA" if mode in ("1", "L") else "RGBA")
        if image.mode in ("LA", "RGBA"):
            alpha = image.getchannel("A")
        if image.mode != "CMYK":
            image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")

    # colours in RGB
    transform = None
    if profile:
        try:
            transform = _to_srgb(profile, image.mode)
        except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
            changes.append("bad_profile")
    if transform is not None:
        image = ImageCms.applyTransform(image, transform)
        changes.append("profile")
    elif image.mode == "CMYK":
        changes.append("cmyk")
    image = image.convert("RGB")

    # white behind it
    if alpha is not None and alpha.getextrema()[0] < 255:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
        changes.append("composited")
    return image


def _eight_bits(
    image: Image.Image, transparency: object, changes: list[str]
) -> tuple[Image.Image, Image.Image | None]:
    """Return a grey image of 16 or 32 bits in mode L, and its transparency."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of TIFF
    low, high = 0.0, 1.0
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise ImageError("grey values that are not finite")
        known = bool(values.min() >= 0 and values.max() <= 1)
    elif image.mode == "I":
        known, high = image.format in ("PNG", "PPM"), 65535.0  # 16 bits, held in 32
    else:
        bits = tags.get(_TIFF_BITS, (16,))[0]
        known, high = True, float(2**bits - 1)
    changes.append("scaled" if known else "stretched")
    if not known:
        low, high = float(values.min()), float(values.max())
    scaled = (values.astype(np.float32) - low) * (255 / ((high - low) or 1.0))
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8-bit greys only
        scaled = 255 - scaled
    grey = Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8))
    if transparency is None:
        return grey, None
    return grey, Image.fromarray(np.where(values == transparency, 0, 255).astype(np.uint8))


@functools.lru_cache(maxsize=8)  # a data set has few profiles
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of colours in `mode` to sRGB; None if it would change next to nothing.

    Raises:
        ImageCms.PyCMSError, OSError, ValueError: the profile is broken or is not one for `mode`.
    """
    if len(profile) > MAX_PROFILE_BYTES:
        raise ValueError(f"more than {MAX_PROFILE_BYTES} bytes")
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        flags=ImageCms.Flags.NOCACHE,  # threads share the transform, but could not share its cache
    )
    if mode == "CMYK":
        return transform

    # most profiles are sRGB's, by many names: compare colours
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    colours = Image.fromarray(grid if mode == "RGB" else grid[..., 0])
    before = np.asarray(colours.convert("RGB"), dtype=np.int16)
    after = np.asarray(ImageCms.applyTransform(colours, transform), dtype=np.int16)
    return None if np.abs(after - before).max() <= SAME_COLOUR else transform

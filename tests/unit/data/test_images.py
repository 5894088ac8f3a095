"""One decoder: the pixels that are right, what it counts, and what it refuses."""

from __future__ import annotations

import contextlib
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.image_cases import (
    SIDE,
    ImageCase,
    chunk,
    image_cases,
    image_file,
    png,
    quadrants,
    scan_bomb,
    tiff,
)

from fmray.data.images import (
    CHANGES,
    MAX_SCANS,
    ImageError,
    decode_image,
    describe_changes,
)

CASES = image_cases()
PNG = image_file(quadrants())
NOISE = image_file(Image.effect_noise((64, 64), 90), "JPEG")


def corners(image: Image.Image) -> np.ndarray:
    """Return the colour in the middle of each quadrant, int [4, 3]."""
    pixels = np.asarray(image, dtype=int)
    return pixels[[8, 8, 24, 24], [8, 24, 8, 24]]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_pixels_are_right(case: ImageCase) -> None:
    for encoded in (case.encoded, memoryview(case.encoded)):
        decoded = decode_image(encoded)
        assert decoded.image.mode == "RGB" and decoded.image.size == (SIDE, SIDE)
        assert np.abs(corners(decoded.image) - case.corners).max() <= 4  # JPEG is lossy
        assert decoded.changes == case.changes


def test_a_lying_image_gets_its_other_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP"):
        encoded = image_file(Image.new("RGB", (40, 20)), kind, exif=exif)
        assert decode_image(encoded).image.size == (20, 40)


def test_changes_are_described_with_their_numbers() -> None:
    counts = {"turned": 312, "scaled": 4, "profile": 0}
    assert describe_changes(counts) == (
        "images: 312 turned by EXIF, 4 16-bit or float grey scaled to 8 bits"
    )
    assert describe_changes({}) == ""
    assert {change for case in CASES.values() for change in case.changes} == set(CHANGES)


def test_threads_share_a_colour_profile() -> None:
    encoded = CASES["red and blue swapped by the profile"].encoded
    with ThreadPoolExecutor(4) as pool:
        decoded = pool.map(lambda _: decode_image(encoded).image.tobytes(), range(40))
    assert len(set(decoded)) == 1


# --- What is refused ---

BOMB = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
FLOAT_RGB = tiff(32, 2, bytes(SIDE * SIDE * 12)).replace(
    struct.pack("<HHII", 277, 4, 1, 1), struct.pack("<HHII", 277, 4, 1, 3)
)
TEXT = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**21), 9))
REFUSED = {
    "nothing": (b"", "empty file"),
    "text": (b"hello", "no image format that fmray reads"),
    "html": (b"<!DOCTYPE html><html>404</html>", "no image format"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image format"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "HEIC, which is not supported"),
    "cut png": (PNG[: len(PNG) // 2], ""),
    "cut jpeg": (NOISE[: len(NOISE) // 2], "truncated"),
    "jpeg without its last bytes": (NOISE[:-15], "truncated"),
    "wrong checksum": (PNG[:29] + bytes([PNG[29] ^ 1]) + PNG[30:], "header is damaged"),
    "decompression bomb": (BOMB + chunk(b"IDAT", zlib.compress(bytes(999))), "more than 17895697"),
    "text bomb": (png(8, 0, bytes(SIDE * SIDE), TEXT), "too large"),
    "float rgb": (FLOAT_RGB, "a kind that is not supported"),
    "many text bombs": (png(8, 0, bytes(SIDE * SIDE), *[TEXT] * 500), "too large"),
    "scan bomb": (scan_bomb(1000), "more than 64 JPEG scans"),
    "not finite": (
        image_file(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"),
        "not finite",
    ),
}


@pytest.mark.parametrize("encoded, reason", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_has_a_reason(encoded: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as error:
        decode_image(encoded)
    assert reason in str(error.value) and "0x" not in str(error.value)
    assert str(error.value)


def test_limits_of_the_caller() -> None:
    assert decode_image(PNG, SIDE * SIDE, ("PNG",)).format == "PNG"
    with pytest.raises(ImageError, match=f"more than {SIDE * SIDE - 1} pixels"):
        decode_image(PNG, SIDE * SIDE - 1)
    with pytest.raises(ImageError, match="of a kind that is not supported"):
        decode_image(PNG, formats=("JPEG",))


def test_progressive_images_have_few_scans() -> None:
    ordinary = image_file(quadrants(), "JPEG", progressive=True)
    assert ordinary.count(b"\xff\xda") > 5
    decode_image(ordinary)
    last = MAX_SCANS - ordinary.count(b"\xff\xda")
    decode_image(scan_bomb(last - 4))
    # scans of an appended image, or bytes of a comment that look like scans, do not count
    decode_image(ordinary + b"\xff\xda" * 100)
    comment = b"\xff\xfe" + struct.pack(">H", 402) + b"\xff\xda" * 200
    decode_image(ordinary[:2] + comment + ordinary[2:])


JPEG = image_file(Image.new("L", (8, 8)), "JPEG", progressive=True)
HEADS = {"jpeg": JPEG[: JPEG.index(b"\xff\xda")], "scan": JPEG[:-2], "png": PNG[:33]}
PARTS = {
    "scans": b"\xff\xda\0\2",
    "fill": b"\xff",
    "restarts": b"\xff\xd0",
    "data": b"\xff\0",
    "comments": b"\xff\xfe\0\2",
    "zeros": b"\0",
    "chunks": chunk(b"teSt", b""),
    "texts": chunk(b"tEXt", b"a\0b"),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_refusing_is_linear(head: bytes, part: bytes) -> None:
    """Time of n and of 4n bytes after the header of a file."""

    def seconds(size: int) -> float:
        data = head + part * (size // len(part))
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            with contextlib.suppress(ImageError):
                decode_image(data)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(1_000_000) < 8 * seconds(250_000) + 0.02


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([case.encoded for case in CASES.values()]),
    st.binary(max_size=60),
    st.integers(0, 400),
)
def test_corrupt_files_are_decoded_or_an_image_error(
    encoded: bytes, noise: bytes, place: int
) -> None:
    broken = encoded[:place] + noise + encoded[place + len(noise) :]
    with contextlib.suppress(ImageError):
        assert decode_image(broken, 10_000).image.mode == "RGB"

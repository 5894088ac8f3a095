"""Read and write TFRecord files of `tf.train.Example` without TensorFlow.

Reads the examples of Meta-Dataset, which have an image and a label, and verifies every checksum. A
record is a u64 length, the masked CRC-32C of those eight bytes, the data, and the masked CRC-32C of
the data; all little-endian.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected
BLOCK = 1024  # bytes per table look-up
LENGTH, CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")

# --- Checksums ---


@functools.cache
def _tables() -> np.ndarray:
    """Return uint32 [BLOCK, 256]: what each byte value adds to the checksum at each position."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(POLYNOMIAL), table >> 1)
    tables = np.empty((BLOCK, 256), dtype=np.uint32)
    tables[-1] = table
    for position in range(BLOCK - 2, -1, -1):  # one more zero byte follows
        tables[position] = table[tables[position + 1] & 0xFF] ^ (tables[position + 1] >> 8)
    return tables


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of `data` (RFC 3720, B.4).

    The checksum is linear over GF(2), so that of a block is the exclusive or of what each byte adds
    at its position: one vectorized look-up. Leading zeros add nothing.
    """
    tables, size = _tables(), len(data)
    if size < 4:
        state = 0xFFFFFFFF
        for byte in data:
            state = int(tables[-1, (state ^ byte) & 0xFF]) ^ (state >> 8)
        return state ^ 0xFFFFFFFF
    padding = -size % BLOCK
    if size <= BLOCK:
        tables, padding = tables[BLOCK - size :], 0
    blocks = np.zeros(padding + size, dtype=np.uint8)
    blocks[padding:] = np.frombuffer(data, dtype=np.uint8)
    blocks[padding : padding + 4] ^= 0xFF  # the state at the start
    blocks = blocks.reshape(-1, len(tables))
    flat, offsets = tables.reshape(-1), np.arange(len(tables)) * 256
    state = 0
    for start in range(0, len(blocks), 64):
        for added in np.bitwise_xor.reduce(flat[blocks[start : start + 64] + offsets], axis=1):
            for position in range(4):  # the state so far acts like the block's first bytes
                added ^= tables[position, (state >> 8 * position) & 0xFF]
            state = int(added)
    return state ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """Return the checksum as TFRecord files store it: rotated, plus a constant."""
    checksum = crc32c(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


# --- Files ---


def read_records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the records in order, each with its byte offset.

    Raises:
        ValueError: a checksum is wrong or the file is truncated; with file and byte.
    """
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        offset = 0
        while offset < end:
            head = file.read(LENGTH.size + CHECKSUM.size)
            if len(head) < LENGTH.size + CHECKSUM.size:
                raise ValueError(f"{path}: byte {offset}: the file ends within a record's length")
            (length,), (stored,) = LENGTH.unpack_from(head), CHECKSUM.unpack_from(head, LENGTH.size)
            if masked_crc32c(head[: LENGTH.size]) != stored:
                raise ValueError(f"{path}: byte {offset}: wrong checksum of the record's length")
            following = offset + len(head) + length + CHECKSUM.size
            if following > end:
                raise ValueError(
                    f"{path}: byte {offset}: the record needs {following - offset} bytes, the file"
                    f" ends after {end - offset}"
                )
            data = file.read(length)
            if masked_crc32c(data) != CHECKSUM.unpack(file.read(CHECKSUM.size))[0]:
                raise ValueError(f"{path}: byte {offset}: wrong checksum of the record's data")
            yield offset, data
            offset = following


def write_records(path: Path, records: Iterable[bytes]) -> None:
    """Write records to a file; used by tests and benchmarks."""
    with path.open("wb") as file:
        for data in records:
            length = LENGTH.pack(len(data))
            file.write(length + CHECKSUM.pack(masked_crc32c(length)))
            file.write(data + CHECKSUM.pack(masked_crc32c(data)))


# --- Examples ---


def parse_example(data: bytes) -> tuple[bytes, int]:
    """Return image and label of a `tf.train.Example` with features `image` and `label`.

    Raises:
        ValueError: the bytes are not such an example.
    """
    features: dict[bytes, bytes] = {}
    for part in _fields(data, 1):
        for entry in _fields(part, 1):
            names, values = list(_fields(entry, 1)), list(_fields(entry, 2))
            if names and values:
                features[bytes(names[-1])] = values[-1]
    missing = [name for name in ("image", "label") if name.encode() not in features]
    if missing:
        raise ValueError(f"the example has no feature {missing[0]!r}")
    images = [value for part in _fields(features[b"image"], 1) for value in _fields(part, 1)]
    labels = [value for part in _fields(features[b"label"], 3) for value in _fields(part, 1)]
    label, end = _varint(labels[0], 0) if labels else (0, 0)
    # packed numbers are a single value
    if len(images) != 1 or len(labels) != 1 or end != len(labels[0]):
        raise ValueError("the example should have one image (bytes) and one label (int64)")
    return bytes(images[0]), label - (1 << 64) if label >> 63 else label


def example(image: bytes, label: int) -> bytes:
    """Return a `tf.train.Example` as `parse_example` reads it; used by tests and benchmarks."""
    number = _encoded(label % (1 << 64))
    values = [(b"image", _field(1, _field(1, image))), (b"label", _field(3, _field(1, number)))]
    entries = [_field(1, _field(1, name) + _field(2, value)) for name, value in values]
    return _field(1, b"".join(entries))


def _fields(data: bytes | memoryview, number: int) -> Iterator[memoryview]:
    """Yield the values of a field of a protobuf message; a number as its bytes."""
    data, at = memoryview(data), 0
    while at < len(data):
        key, at = _varint(data, at)
        kind, begin = key & 7, at
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 1:
            at += 8
        elif kind == 2:
            length, begin = _varint(data, at)
            at = begin + length
        elif kind == 5:
            at += 4
        else:
            raise ValueError(f"not a protobuf message: wire type {kind}")
        if at > len(data):
            raise ValueError("not a protobuf message: a field is longer than the message")
        if key >> 3 == number:
            yield data[begin:at]


def _varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """Return the base-128 number at `at`, and the index after it."""
    value = 0
    for position in range(10):
        if at + position >= len(data):
            break
        byte = data[at + position]
        value |= (byte & 0x7F) << 7 * position
        if byte < 0x80:
            if value >> 64:
                break
            return value, at + position + 1
    raise ValueError("not a protobuf message: a number does not end within 64 bits")


def _encoded(value: int) -> bytes:
    """Encode a base-128 number."""
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _field(number: int, value: bytes) -> bytes:
    """Encode a length-delimited field, such as a packed number."""
    return _encoded(number << 3 | 2) + _encoded(len(value)) + value

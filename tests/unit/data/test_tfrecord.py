"""TFRecord files: checksums, damaged files and examples, against independent oracles."""

from __future__ import annotations

import functools
import struct
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from fmray.data.tfrecord import (
    crc32c,
    example,
    masked_crc32c,
    parse_example,
    read_records,
    write_records,
)


def bitwise_crc32c(data: bytes) -> int:
    """Compute the checksum from its definition, bit by bit."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


@functools.cache
def example_message() -> type:
    """Return `tf.train.Example` as a class of the protobuf library."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tf", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, int, str]) -> None:
        added = file.message_type.add(name=name)
        for field, number, label, kind, type_name in fields:
            added.field.add(
                name=field, number=number, label=label, type=kind, type_name=type_name or None
            )

    message("BytesList", ("value", 1, 3, 12, ""))
    message("FloatList", ("value", 1, 3, 2, ""))
    message("Int64List", ("value", 1, 3, 3, ""))
    message(
        "Feature",
        ("bytes_list", 1, 1, 11, ".tf.BytesList"),
        ("float_list", 2, 1, 11, ".tf.FloatList"),
        ("int64_list", 3, 1, 11, ".tf.Int64List"),
    )
    message("Features", ("feature", 1, 3, 11, ".tf.Features.FeatureEntry"))
    entry = file.message_type[-1].nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=1, type=9)
    entry.field.add(name="value", number=2, label=1, type=11, type_name=".tf.Feature")
    message("Example", ("features", 1, 1, 11, ".tf.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))


def test_published_checksums() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    # RFC 3720, B.4
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


@given(st.binary(max_size=64))
def test_short_checksums(data: bytes) -> None:
    assert crc32c(data) == bitwise_crc32c(data)


@pytest.mark.parametrize("size", [1023, 1024, 1025, 2047, 2048, 2049, 70_000])
def test_checksums_over_blocks(size: int) -> None:
    data = bytes(number * number % 251 for number in range(size))
    assert crc32c(data) == bitwise_crc32c(data)


def test_written_file_has_tensorflows_format(tmp_path: Path) -> None:
    write_records(tmp_path / "a", [b"123456789"])
    checksum = 0xE3069283
    masked = ((checksum >> 15 | checksum << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32
    length = struct.pack("<Q", 9)
    head = length + struct.pack("<I", masked_crc32c(length))
    assert (tmp_path / "a").read_bytes() == head + b"123456789" + struct.pack("<I", masked)


@given(st.lists(st.binary(max_size=2000), max_size=5))
def test_written_records_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, records: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("records") / "a"
    write_records(path, records)
    result = list(read_records(path))
    assert [data for _, data in result] == records
    starts = [sum(16 + len(data) for data in records[:n]) for n in range(len(records))]
    assert [offset for offset, _ in result] == starts


def test_every_flipped_byte_is_an_error_of_its_record(tmp_path: Path) -> None:
    records = [b"first image", b"", b"a third"]
    write_records(tmp_path / "a", records)
    content = (tmp_path / "a").read_bytes()
    starts = [0, 27, 43]
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        (tmp_path / "b").write_bytes(damaged)
        begin = max(start for start in starts if start <= place)
        with pytest.raises(ValueError, match=rf"/b: byte {begin}: wrong checksum"):
            list(read_records(tmp_path / "b"))


def test_every_truncation_is_an_error_of_its_record(tmp_path: Path) -> None:
    write_records(tmp_path / "a", [b"first image", b"a second"])
    content = (tmp_path / "a").read_bytes()
    for size in range(1, len(content)):
        (tmp_path / "b").write_bytes(content[:size])
        if size == 27:  # one complete record
            assert len(list(read_records(tmp_path / "b"))) == 1
            continue
        begin = 0 if size < 27 else 27
        with pytest.raises(ValueError, match=rf"/b: byte {begin}: the (file ends|record needs)"):
            list(read_records(tmp_path / "b"))


@given(st.binary(max_size=300), st.integers(-(2**63), 2**63 - 1))
def test_examples_match_the_protobuf_library(image: bytes, label: int) -> None:
    message = example_message()()
    message.features.feature["label"].int64_list.value.append(label)
    message.features.feature["image"].bytes_list.value.append(image)
    message.features.feature["other"].float_list.value.append(1.5)
    assert parse_example(message.SerializeToString()) == (image, label)
    read = example_message().FromString(example(image, label))
    assert list(read.features.feature["image"].bytes_list.value) == [image]
    assert list(read.features.feature["label"].int64_list.value) == [label]


@given(st.binary(max_size=60))
def test_noise_is_not_an_example(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"example|protobuf"):
        parse_example(data)


def test_missing_feature_is_an_error() -> None:
    message = example_message()()
    message.features.feature["image"].bytes_list.value.append(b"x")
    with pytest.raises(ValueError, match="no feature 'label'"):
        parse_example(message.SerializeToString())
    message.features.feature["label"].int64_list.value.extend([1, 2])
    with pytest.raises(ValueError, match="one label"):
        parse_example(message.SerializeToString())

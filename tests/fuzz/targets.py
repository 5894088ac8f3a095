"""What is fuzzed: every reader of bytes that come from outside.

A target reads one input. It returns if the input is valid, and raises one of `Target.refusals` with
one line of text if it is not. Anything else is a bug: another exception, a message of several
lines, or a result that breaks the reader's promise (asserted in the target).
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from fmray.config import KINDS, load
from fmray.config.arguments import job_path
from fmray.data import tfrecord
from fmray.data.images import ImageError, decode_image
from fmray.data.records import chat_messages, find_bad_rows, read_records
from fmray.errors import ConfigError
from fmray.fewshot.specification import DatasetSpecification
from fmray.runtime.files import files_of, manifest_text
from fmray.serve.openai import ApiError, parse_request
from fmray.train.checkpoint import TrainState, parse_state

MAX_MESSAGE = 4000  # characters of an error


@dataclass(frozen=True)
class Target:
    """One reader, with inputs to start from."""

    read: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    #: byte strings that mean something to the format; mutations insert them
    tokens: tuple[bytes, ...]

    def __call__(self, data: bytes) -> bool:
        """Read one input; return whether it is valid.

        Raises:
            Exception: a bug in the reader.
        """
        try:
            self.read(data)
        except self.refusals as error:
            message = str(error)
            assert message and "\n" not in message and len(message) < MAX_MESSAGE, repr(message)
            return False
        return True


@cache
def _scratch() -> Path:
    """Return the file that readers of files read; in memory where the machine has /dev/shm."""
    shm = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="fmray-fuzz-", dir=shm if shm.is_dir() else None)
    return Path(folder) / "input"


def _as_file(data: bytes) -> Path:
    path = _scratch()
    path.write_bytes(data)
    return path


# --- Requests to the endpoint ---


def _read_request(data: bytes) -> None:
    request = parse_request(data)
    assert request.messages and all(message.parts is not None for message in request.messages)


def _request_seeds() -> list[bytes]:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    text = {"type": "text", "text": 'what is {1} in [2], "3" ?'}
    bodies = [
        {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": "short"},
                {"role": "user", "content": [image, text]},
                {"role": "assistant", "content": ""},
                {"role": "user", "content": "\u00e9\U0001f600"},
            ],
            "budget": 0.5,
            "max_tokens": 3,
            "temperature": 0.7,
            "seed": 1,
            "stop": ["a", "b"],
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ]
    return [json.dumps(body).encode() for body in bodies]


# --- Images ---


def _read_image(data: bytes) -> None:
    decoded = decode_image(data, max_pixels=1 << 16)
    assert decoded.image.mode == "RGB" and decoded.image.width * decoded.image.height <= 1 << 16


def _image_seeds() -> list[bytes]:
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    grey16 = Image.fromarray(rng.integers(0, 1 << 16, (5, 4)).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: list[tuple[Image.Image, str, dict[str, object]]] = [
        (color, "JPEG", {"exif": exif}),
        (color, "JPEG", {"progressive": True}),
        (color.convert("CMYK"), "JPEG", {}),
        (color, "PNG", {"exif": exif}),
        (grey16, "PNG", {}),
        (color.convert("RGBA"), "PNG", {}),
        (color.convert("P"), "PNG", {"transparency": 3}),
        (color, "GIF", {"save_all": True, "append_images": [color.rotate(90)]}),
        (color, "WEBP", {"lossless": True, "exif": exif}),
        (color, "TIFF", {"exif": exif}),
        (grey16, "TIFF", {}),
        (color, "BMP", {}),
    ]
    seeds = []
    for image, kind, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        seeds.append(buffer.getvalue())
    return seeds


# --- Meta-Dataset ---


def _read_tfrecord(data: bytes) -> None:
    end = 0
    for offset, content in tfrecord.read_records(_as_file(data)):
        assert offset == end  # records follow each other
        end += len(content) + 16
    assert end == len(data)


def _tfrecord_seeds() -> list[bytes]:
    path = _as_file(b"")
    seeds = [b""]
    for records in ([b"abc"], [b"", b"x" * 3000], _example_seeds()):
        tfrecord.write_records(path, records)
        seeds.append(path.read_bytes())
    return seeds


def _read_example(data: bytes) -> None:
    image, label = tfrecord.parse_example(data)
    assert isinstance(image, bytes) and -(1 << 63) <= label < 1 << 63


def _example_seeds() -> list[bytes]:
    return [tfrecord.example(b"image", 3), tfrecord.example(b"", -1)]


def _read_specification(data: bytes) -> None:
    specification = DatasetSpecification.read(_as_file(data))
    assert isinstance(specification.name, str) and isinstance(specification.file_pattern, str)
    assert all(isinstance(name, str) for name in specification.class_names)
    for split in ("train", "val", "test"):
        classes = specification.classes(split)
        assert all(0 <= number < len(specification.class_names) for number in classes)


def _specification_seeds() -> list[bytes]:
    flat = {
        "__class__": "DatasetSpecification",
        "name": "tiny",
        "class_names": {"0": "a", "1": "b", "2": "c"},
        "classes_per_split": {"TRAIN": 1, "VALID": 1, "TEST": 1},
        "images_per_class": {"0": 3, "1": 4, "2": 5},
        "file_pattern": "{}.tfrecords",
    }
    return [json.dumps(flat).encode()]


# --- Recipes ---


def _read_recipe(data: bytes) -> None:
    load(_as_file(data), kinds=tuple(KINDS.values())).dump()


def _recipe_seeds() -> list[bytes]:
    """The recipes that extend no other: `extends` names a file."""
    texts = [path.read_bytes() for path in sorted(job_path("recipes").glob("*.yaml"))]
    own = b"name: own\nkind: adallava\ntrain: {lr: 1e-5, betas: [0.9, 0.98], steps: 010}\nseed: 3\n"
    return [own, *(text for text in texts if b"extends" not in text and len(text) < 2000)]


# --- Instruction data ---


def _read_instructions(data: bytes) -> None:
    path = _as_file(data)
    records = read_records(path)
    bad = {row.row for row in find_bad_rows(path, records)}
    for number, record in enumerate(records):
        if number not in bad:
            assert chat_messages(record["conversations"])
            image = record.get("image")
            assert image is None or not PurePosixPath(image).is_absolute()


def _instruction_seeds() -> list[bytes]:
    turns = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
    rows = [
        {"id": "a", "image": "a/b.png", "conversations": turns},
        {"id": 2, "conversations": [{"from": "human", "value": "hi"}, turns[1]]},
    ]
    lines = b"\n".join(json.dumps(row).encode() for row in rows)
    return [json.dumps(rows, indent=1).encode(), lines, b"\xef\xbb\xbf" + lines + b"\r\n"]


# --- Checkpoints ---


def _read_manifest(data: bytes) -> None:
    for name, entry in files_of(data.decode()).items():
        path = PurePosixPath(name)
        assert not path.is_absolute() and ".." not in path.parts and path.name
        assert isinstance(entry["bytes"], int) and entry["bytes"] >= 0
        assert len(bytes.fromhex(entry["sha256"])) == 32


def _manifest_seeds() -> list[bytes]:
    entry = {"bytes": 3, "sha256": "ab" * 32}
    return [manifest_text({"state.json": entry, "model/weights.bin": entry}).encode()]


def _read_state(data: bytes) -> None:
    state = parse_state(data.decode(), "state.json")
    assert isinstance(state.step, int) and isinstance(state.settings, dict)


def _state_seeds() -> list[bytes]:
    state = TrainState(3, 0, 3, 1, 2, 2, "ab12", {"train.lr": 0.1}, None, None)
    return [json.dumps(asdict(state)).encode()]


JSON_TOKENS = (b"[", b"]", b"{", b"}", b'"', b'\\"', b":", b",", b"null", b"1e999", b"NaN")
TARGETS = {
    "request": Target(_read_request, (ApiError,), _request_seeds, JSON_TOKENS),
    "image": Target(
        _read_image, (ImageError,), _image_seeds, (b"\xff\xda", b"IDAT", b"\xff\xff\xff\xff")
    ),
    "tfrecord": Target(_read_tfrecord, (ValueError,), _tfrecord_seeds, (b"\x00" * 8,)),
    "example": Target(_read_example, (ValueError,), _example_seeds, (b"\x0a", b"\xff" * 9)),
    "specification": Target(_read_specification, (ValueError,), _specification_seeds, JSON_TOKENS),
    "recipe": Target(
        _read_recipe,
        (ConfigError,),
        _recipe_seeds,
        (b"\n", b"- ", b": ", b"&a", b"*a", b"!!", b"extends: ", b"|", b"\t", b"1e5", b".nan"),
    ),
    "instructions": Target(_read_instructions, (ValueError,), _instruction_seeds, JSON_TOKENS),
    "manifest": Target(_read_manifest, (ValueError,), _manifest_seeds, (*JSON_TOKENS, b"../")),
    "state": Target(_read_state, (ValueError,), _state_seeds, JSON_TOKENS),
}

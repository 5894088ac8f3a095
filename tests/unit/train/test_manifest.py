"""Manifests name the file that is missing, truncated or altered; such checkpoints are skipped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from fmray.runtime.files import MANIFEST, describe_files, fault, write_manifest
from fmray.train.checkpoint import find_checkpoint, prune_checkpoints

FILES = {"a.pt": b"weights" * 1000, "deepspeed/rank_0.pt": b"\0" * 4096, "deepspeed/empty": b""}


def make(folder: Path) -> Path:
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    write_manifest(folder, describe_files(folder, [folder / name for name in FILES]))
    return folder


def test_the_manifest_lists_sizes_and_digests(tmp_path: Path) -> None:
    entries = json.loads((make(tmp_path) / MANIFEST).read_text())["files"]
    assert {name: entry["bytes"] for name, entry in entries.items()} == {
        name: len(data) for name, data in FILES.items()
    }
    for name, data in FILES.items():
        assert entries[name]["sha256"] == hashlib.sha256(data).hexdigest()
    assert fault(tmp_path, hashes=True) is None
    (tmp_path / "universal").mkdir()  # the conversion is not part of the manifest
    assert fault(tmp_path, hashes=True) is None


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    (tmp_path / name).write_bytes(FILES[name] + b"x")
    size = len(FILES[name])
    assert fault(tmp_path, hashes=False) == f"{name} has {size + 1} bytes instead of {size}"
    (tmp_path / name).unlink()
    assert fault(tmp_path, hashes=False) == f"{name} is missing"


def test_a_flipped_bit_is_found_by_exactly_one_rank(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "deepspeed/rank_0.pt").write_bytes(b"\0" * 4095 + b"\1")
    assert fault(tmp_path, hashes=False) is None
    wanted = "deepspeed/rank_0.pt was altered: its SHA-256 differs from the manifest"
    assert fault(tmp_path, hashes=True) == wanted
    assert [fault(tmp_path, True, share, 3) for share in range(3)].count(wanted) == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"files": []}', '{"files": {"a.pt": {}}}', '{"files": {"a": 1}}']
)
def test_a_broken_manifest_is_a_fault(tmp_path: Path, text: str) -> None:
    make(tmp_path)
    (tmp_path / MANIFEST).write_text(text)
    assert fault(tmp_path, hashes=False).startswith(f"{MANIFEST} is damaged")
    (tmp_path / MANIFEST).unlink()
    assert "is missing, so the folder is incomplete" in fault(tmp_path, hashes=False)


def test_the_newest_intact_checkpoint_is_found(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    first, second, third = (make(tmp_path / f"checkpoint-0000000{n}") for n in (3, 6, 9))
    assert find_checkpoint(tmp_path) == third
    (third / "a.pt").write_bytes(b"")
    assert find_checkpoint(tmp_path) == second
    (second / "deepspeed/empty").unlink()
    assert find_checkpoint(tmp_path) == first
    (first / MANIFEST).unlink()
    with pytest.raises(ValueError) as error:  # not a silent restart from step 0
        find_checkpoint(tmp_path)
    text = str(error.value)
    assert "checkpoint-00000009: a.pt has 0 bytes instead of 7000; checkpoint-00000006" in text
    assert text.endswith("restore one, or remove them to start from step 0")


@pytest.mark.parametrize(
    ("step", "keep", "best", "kept"),
    [
        (9, 2, None, [6, 9]),
        (9, 2, 3, [3, 9]),
        (9, 1, 3, [9]),
        (9, 3, 9, [3, 6, 9]),
        (6, 2, None, [3, 6]),  # 9 is rolled back
        (6, 1, 9, [6]),
    ],
)
def test_pruning_keeps_the_checkpoint_just_made(
    tmp_path: Path, step: int, keep: int, best: int | None, kept: list[int]
) -> None:
    for n in (3, 6, 9):
        make(tmp_path / f"checkpoint-0000000{n}")
    prune_checkpoints(tmp_path, step, keep, best)
    assert sorted(int(path.name[-1]) for path in tmp_path.glob("checkpoint-*")) == kept

"""The mirror of a run: complete folders only, damaged files named, unusable stores explained."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest
from support.s3 import S3

from fmray.config import ClusterConfig
from fmray.runtime.files import MANIFEST, Entry, describe_files, write_manifest
from fmray.train.mirror import Mirror, open_mirror

FILES = {"a.pt": b"weights" * 1000, "deepspeed/rank_0.pt": os.urandom(12 << 20), "b/empty": b""}
NAME = "checkpoint-00000003"


@pytest.fixture(params=["s3", "folder"])
def mirror(request: pytest.FixtureRequest, tmp_path: Path) -> Mirror:
    """The mirror of `<tmp_path>/run`, in an S3 store or a folder."""
    if request.param == "folder":
        return Mirror(str(tmp_path / "elsewhere"), tmp_path / "run")
    server: S3 = request.getfixturevalue("s3")
    return Mirror(server.uri(tmp_path.name), tmp_path / "run")


def make(folder: Path) -> dict[str, Entry]:
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    files = describe_files(folder, [folder / name for name in FILES])
    write_manifest(folder, files)
    return files


def copy(mirror: Mirror, folder: Path) -> dict[str, Entry]:
    files = make(folder)
    mirror.put(f"{folder.name}/{name}" for name in files)
    mirror.seal(folder.name, files)
    return files


def test_fetched_files_equal_the_uploaded_ones(mirror: Mirror, tmp_path: Path) -> None:
    """The upload of a file of twelve MiB has several parts."""
    assert mirror.checkpoints() == []
    files = copy(mirror, tmp_path / "run" / NAME)
    assert mirror.checkpoints() == [NAME]
    assert mirror.manifest(NAME) == files
    elsewhere = tmp_path / "other" / "run"
    there = Mirror(mirror.uri, elsewhere)
    for name, entry in files.items():
        assert there.get(f"{NAME}/{name}", entry) is None
        assert (elsewhere / NAME / name).read_bytes() == FILES[name]
    # a file that matches is not fetched again
    (there_file := elsewhere / NAME / "a.pt").touch()
    before = there_file.stat().st_ino
    assert there.get(f"{NAME}/a.pt", files["a.pt"]) is None
    assert there_file.stat().st_ino == before


def test_a_checkpoint_without_a_manifest_is_not_listed(mirror: Mirror, tmp_path: Path) -> None:
    for step in (3, 6, 9):
        copy(mirror, tmp_path / "run" / f"checkpoint-0000000{step}")
    mirror.put(["checkpoint-00000009/a.pt"])
    partly = tmp_path / "run" / "checkpoint-00000012"
    make(partly)
    mirror.put(["checkpoint-00000012/a.pt"])  # then the process was killed
    assert [name[-1] for name in mirror.checkpoints()] == ["9", "6", "3"]
    mirror.remove("checkpoint-00000006")
    mirror.remove("checkpoint-00000006")  # a second time does nothing
    assert [name[-1] for name in mirror.checkpoints()] == ["9", "3"]
    mirror.prune({"checkpoint-00000003"})
    assert mirror.checkpoints() == [NAME]
    with pytest.raises(FileNotFoundError):
        mirror.read("checkpoint-00000012/a.pt")


def test_an_earlier_worker_group_seals_and_removes_nothing(mirror: Mirror, tmp_path: Path) -> None:
    mirror.claim()
    files = copy(mirror, tmp_path / "run" / NAME)
    other = Mirror(mirror.uri, tmp_path / "other" / "run")
    other.claim()
    for change in (
        lambda: mirror.seal("checkpoint-00000004", files),
        lambda: mirror.remove(NAME),
        lambda: mirror.prune(()),
    ):
        with pytest.raises(OSError, match="another worker group of run run has started"):
            change()
    assert other.checkpoints() == [NAME]
    other.remove(NAME)
    assert other.checkpoints() == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (FILES["a.pt"][:-1], "has 6999 bytes instead of 7000"),
        (b"\0" + FILES["a.pt"][1:], "was altered"),
    ],
)
def test_a_truncated_or_altered_object_is_named(
    s3: S3, tmp_path: Path, data: bytes, words: str
) -> None:
    mirror = Mirror(s3.uri(tmp_path.name), tmp_path / "run")
    files = copy(mirror, tmp_path / "run" / NAME)
    s3.write(f"{tmp_path.name}/run/{NAME}/a.pt", data)
    there = Mirror(mirror.uri, tmp_path / "other" / "run")
    wrong = there.get(f"{NAME}/a.pt", files["a.pt"])
    assert wrong.startswith(f"{NAME}/a.pt {words}") and "in s3://checkpoints/" in wrong
    assert list((tmp_path / "other" / "run" / NAME).iterdir()) == []
    assert there.get(f"{NAME}/c.pt", files["a.pt"]).startswith(f"{NAME}/c.pt is missing in s3://")
    s3.write(f"{tmp_path.name}/run/{NAME}/{MANIFEST}", json.dumps({"files": 3}).encode())
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        there.manifest(NAME)


def error_of(uri: str, tmp_path: Path) -> str:
    """Return the error of a store that cannot be used; it comes within seconds."""
    cluster = ClusterConfig(storage=tmp_path, mirror=uri)
    began = time.monotonic()
    with pytest.raises(ValueError) as error:
        open_mirror(cluster, tmp_path / "run")
    assert time.monotonic() - began < 30
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_unusable_store_is_one_line(s3: S3, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # without listening
        port = free.getsockname()[1]
        text = error_of(f"s3://b/p?scheme=http&endpoint_override=127.0.0.1:{port}", tmp_path)
    assert text.startswith("cluster.mirror: s3://b/p") and "cannot be used: " in text
    text = error_of(s3.uri("prefix", bucket="no-such-bucket"), tmp_path)
    assert "no-such-bucket" in text and "that the bucket exists" in text
    text = error_of("none://there", tmp_path)
    assert "cluster.mirror: none://there cannot be used" in text
    assert "is cluster.storage itself" in error_of(str(tmp_path), tmp_path)
    assert open_mirror(ClusterConfig(storage=tmp_path), tmp_path / "run") is None

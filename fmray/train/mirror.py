"""The copy of a run in another store: S3-compatible, or any file system that pyarrow opens.

In: `cluster.mirror` and a run's folder. Out: `<cluster.mirror>/<run id>/` with what makes the run
go on elsewhere: checkpoints, log, model. A folder's manifest is the last of its files to come and
the first to go: what has none is not there. Which rank copies what, and when, is `copies.py`'s.
`.owner` says who copies: the last worker group that has begun.

Credentials are the environment's or the instance's. An S3 store that does not answer is an error
within a minute.
"""

from __future__ import annotations

import io
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qsl, urlsplit

import pyarrow
from pyarrow import fs

from fmray.config import ClusterConfig
from fmray.train.manifest import MANIFEST, Entry, files_of, manifest_text, sha256

CONNECT_SECONDS = 5
SILENT_SECONDS = 20  # without a byte; tried three times, as connecting is
CHUNK = 16 << 20
OWNER = ".owner"


class Mirror:
    """What is copied of the run in `run_dir`. Raises OSError when the store fails."""

    def __init__(self, uri: str, run_dir: Path) -> None:
        self.uri, self._run_dir = uri, run_dir
        self._store, path = _open(uri)
        self._root = f"{path}/{run_dir.name}"
        self._claim: str | None = None

    def __str__(self) -> str:
        return f"{self.uri.partition('?')[0]}/{self._run_dir.name}"

    def claim(self) -> None:
        """From now on no earlier one that has claimed the run seals or removes a folder."""
        self._claim = uuid.uuid4().hex
        self._write(OWNER, io.BytesIO(self._claim.encode()))

    def _check(self) -> None:
        """When the head node is lost, workers outlive their job for minutes."""
        if self._claim is not None and self.read(OWNER) != self._claim:
            raise PermissionError(f"another worker group of run {self._run_dir.name} has begun")

    def is_folder(self, folder: Path) -> bool:
        """Whether the copies would lie in `folder`."""
        return self._store.type_name == "local" and Path(self._root).resolve() == folder.resolve()

    def checkpoints(self) -> list[str]:
        """Names of the complete ones, newest first."""
        return [name for name, complete in self._folders() if complete]

    def read(self, name: str) -> str:
        """The text of a small file; FileNotFoundError where there is none."""
        with self._store.open_input_stream(f"{self._root}/{name}") as stream:
            return stream.read().decode()

    def manifest(self, folder: str) -> dict[str, Entry]:
        """The files of a complete folder. ValueError for a manifest that is not one."""
        return files_of(self.read(f"{folder}/{MANIFEST}"))

    def put(self, names: Iterable[str]) -> None:
        """Copy files, by their names in the run's folder."""
        for name in names:
            with (self._run_dir / name).open("rb") as file:
                self._write(name, file)

    def get(self, name: str, entry: Entry | None = None, into: Path | None = None) -> str | None:
        """Fetch a file into the run's folder, or another; what is wrong with it, or None.

        entry: what it should be; one that is there and is that is not fetched.
        """
        target = (into or self._run_dir) / name
        if entry is not None and _is(target, entry):
            return None
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        try:
            with (
                self._store.open_input_stream(f"{self._root}/{name}") as stream,
                partial.open("wb") as file,
            ):
                shutil.copyfileobj(stream, file, CHUNK)
                os.fsync(file.fileno())
        except FileNotFoundError:
            return f"{name} is missing in {self}"
        if entry is not None and not _is(partial, entry):
            size = partial.stat().st_size
            partial.unlink()
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']} in {self}"
            return f"{name} was altered in {self}: its SHA-256 is not the manifest's"
        os.replace(partial, target)
        return None

    def seal(self, folder: str, files: dict[str, Entry]) -> None:
        """Say that all of `folder` has been copied. OSError after another's `claim`."""
        self._check()
        self._write(f"{folder}/{MANIFEST}", io.BytesIO(manifest_text(files).encode()))

    def remove(self, folder: str) -> None:
        """Remove a folder, its manifest first. OSError after another's `claim`."""
        self._check()
        path = f"{self._root}/{folder}"
        for name in (f"{path}/{MANIFEST}", path):
            kind = self._store.get_file_info(name).type
            if kind == fs.FileType.File:
                self._store.delete_file(name)
            elif kind == fs.FileType.Directory:
                self._store.delete_dir(name)

    def prune(self, keep: Iterable[str]) -> None:
        """Remove all checkpoints but these, and what was left of uploads that were cut off."""
        for name, _ in self._folders():
            if name not in keep:
                self.remove(name)

    def _folders(self) -> list[tuple[str, bool]]:
        """(name, complete) of the checkpoints, newest first."""
        found = self._store.get_file_info(
            fs.FileSelector(self._root, recursive=True, allow_not_found=True)
        )
        folders: dict[str, bool] = {}
        for info in found:
            if info.type == fs.FileType.File and "/checkpoint-" in info.path:
                name, _, file = info.path[len(self._root) + 1 :].partition("/")
                folders[name] = folders.get(name, False) or file == MANIFEST
        return sorted(folders.items(), reverse=True)

    def _write(self, name: str, source: BinaryIO) -> None:
        path = f"{self._root}/{name}"
        if self._store.type_name == "local":  # object stores have no folders to make
            self._store.create_dir(path.rpartition("/")[0])
        with self._store.open_output_stream(path) as stream:
            shutil.copyfileobj(source, stream, CHUNK)


def open_mirror(cluster: ClusterConfig, run_dir: Path) -> Mirror | None:
    """The mirror of a run, None where the recipe names none; it is asked for what it holds.

    Raises ValueError for one that cannot be opened.
    """
    if cluster.mirror is None:
        return None
    with user_mistakes(cluster.mirror):
        mirror = Mirror(cluster.mirror, run_dir)
        mirror.checkpoints()
    if mirror.is_folder(run_dir):
        raise ValueError(f"cluster.mirror: {cluster.mirror} is cluster.storage itself")
    return mirror


@contextmanager
def user_mistakes(uri: str) -> Iterator[None]:
    """What the store says becomes a ValueError of one line."""
    try:
        yield
    except (OSError, pyarrow.ArrowInvalid) as error:
        text = " ".join(str(error).split())
        raise ValueError(
            f"cluster.mirror: {uri} cannot be used: {text}; check the address, that the bucket is"
            " there, and the credentials in the environment"
        ) from error


def _open(uri: str) -> tuple[fs.FileSystem, str]:
    """A file system, and the path in it."""
    parts = urlsplit(uri)
    if parts.scheme != "s3":
        store, path = fs.FileSystem.from_uri(uri)
        return store, path.rstrip("/")
    options = dict(parse_qsl(parts.query))
    if not options.keys() & {"region", "endpoint_override"}:
        options["region"] = fs.resolve_s3_region(parts.netloc)
    store = fs.S3FileSystem(
        connect_timeout=CONNECT_SECONDS,
        request_timeout=SILENT_SECONDS,
        allow_delayed_open=True,  # one request for a small file
        **options,
    )
    if store.get_file_info(parts.netloc).type == fs.FileType.NotFound:
        raise FileNotFoundError(f"there is no bucket {parts.netloc}")
    return store, (parts.netloc + parts.path).rstrip("/")


def _is(path: Path, entry: Entry) -> bool:
    return (
        path.is_file() and path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]
    )

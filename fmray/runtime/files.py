"""Atomic files and folders, digests, and manifests of folders that several ranks write.

Files and folders are written under a temporary name, synced to disk, and then renamed, so that a
reader sees the old content or the new content and a crash leaves the old. The temporary name is
`.NAME.partial` in the same folder; a leftover of a killed process is overwritten by the next write.

A manifest (`manifest.json`) lists the size and SHA-256 of every file in a folder and is written
last: a folder without one is incomplete.

Imports only the standard library, so that every package may use it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

MANIFEST = "manifest.json"


class Entry(TypedDict):
    """Size and digest of one file."""

    bytes: int
    sha256: str  # hex digits


@contextmanager
def atomic_path(path: Path, durable: bool = True, unique: bool = False) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `path` when the block ends without an error.

    Args:
        durable: sync content and folder entry to disk. False for what is rewritten every few
            seconds, such as a status file.
        unique: the temporary name contains the process id, for a file that several processes may
            write at the same time.
    """
    mark = f".{os.getpid()}" if unique else ""
    temporary = path.with_name(f".{path.name}{mark}.partial")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # only after an error: it has been renamed otherwise
    if durable:
        sync(path.parent)


def write_atomic(path: Path, content: str | bytes, durable: bool = True) -> None:
    """Write text (UTF-8) or bytes to `path`; see `atomic_path`."""
    with atomic_path(path, durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any, durable: bool = True, indent: int | None = 1) -> None:
    """Write `value` as JSON that every parser reads; see `atomic_path`.

    Raises:
        ValueError: the value contains NaN or an infinity.
    """
    write_atomic(path, json.dumps(value, indent=indent, allow_nan=False) + "\n", durable)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder, which is renamed to `path` when the block ends without an error.

    Replaces what is at `path`. The files are synced to disk before the rename.
    """
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # only after an error


def replace_folder(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path`, and remove the folder that was there."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


# --- Manifests ---


def describe_files(folder: Path, paths: Iterable[Path]) -> dict[str, Entry]:
    """Sync files below `folder` to disk; return size and SHA-256 by their path in it."""
    paths = list(paths)
    for path in paths:
        sync(path)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in paths
    }


def write_manifest(folder: Path, files: dict[str, Entry]) -> None:
    """Write the manifest of `folder`, which declares it complete, after all of its files."""
    write_atomic(folder / MANIFEST, manifest_text(files))


def manifest_text(files: dict[str, Entry]) -> str:
    """Return the content of a `manifest.json` that lists `files`."""
    return json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n"


def files_of(text: str) -> dict[str, Entry]:
    """Return the files that the content of a `manifest.json` lists.

    Raises:
        ValueError: the content is not a manifest.
    """
    try:
        files = json.loads(text)["files"]
        return {k: {"bytes": v["bytes"], "sha256": v["sha256"]} for k, v in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is damaged ({type(error).__name__}: {error})") from error


def sync(path: Path) -> None:
    """Wait until a file, or the list of files of a folder, is on disk (NFS: on the server)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fault(
    folder: Path,
    hashes: bool,
    share: int = 0,
    shares: int = 1,
    needed: Callable[[dict[str, Entry]], dict[str, Entry]] = dict,
) -> str | None:
    """Compare a folder with its manifest; return the first fault as text, or None.

    Args:
        hashes: compare digests too, of every `shares`-th file from the `share`-th on, so that
            several ranks check a folder together. Existence and sizes are compared for all files.
        needed: selects the files that must exist from those of the manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return f"{MANIFEST} is missing, so the folder is incomplete"
    try:
        files = needed(files_of(path.read_text(encoding="utf-8")))
    except ValueError as error:
        return str(error)
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
    for name, entry in list(files.items())[share::shares] if hashes else ():
        if sha256(folder / name) != entry["sha256"]:
            return f"{name} was altered: its SHA-256 differs from the manifest"
    return None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

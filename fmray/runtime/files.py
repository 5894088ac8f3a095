"""Whether a folder still holds what was written to it: sizes and SHA-256 of its files.

In: a folder that several ranks write to. Out: `manifest.json` in it, and later the first file that
is missing, cut off or altered. A folder without a manifest was never complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypedDict

MANIFEST = "manifest.json"


class Entry(TypedDict):
    """One file. bytes: its size; sha256: in hex digits."""

    bytes: int
    sha256: str


def describe_files(folder: Path, paths: Iterable[Path]) -> dict[str, Entry]:
    """Size and SHA-256 of files below `folder`, by their name in it; they are on disk then."""
    paths = list(paths)
    for path in paths:
        sync(path)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in paths
    }


def write_manifest(folder: Path, files: dict[str, Entry]) -> None:
    """Say that `folder` is complete; the last file that is written to it."""
    (folder / MANIFEST).write_text(manifest_text(files), encoding="utf-8")
    sync(folder / MANIFEST)


def manifest_text(files: dict[str, Entry]) -> str:
    """What `manifest.json` holds."""
    return json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n"


def files_of(text: str) -> dict[str, Entry]:
    """The files that a `manifest.json` names. Raises ValueError when it is not one."""
    try:
        files = json.loads(text)["files"]
        return {k: {"bytes": v["bytes"], "sha256": v["sha256"]} for k, v in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{MANIFEST} is not what was written ({type(error).__name__}: {error})"
        ) from error


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk (with NFS: on the server)."""
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
    """The first file that is not as it was written and why, or None.

    hashes: compare contents, not sizes alone; of every `shares`-th file, from the `share`-th, so
    that several ranks read a folder together. needed: those of the files that must be there.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return f"there is no {MANIFEST}, so it was never complete"
    try:
        files = needed(files_of(path.read_text(encoding="utf-8")))
    except ValueError as error:
        return str(error)
    wanted = [(k, v["bytes"], v["sha256"]) for k, v in files.items()]
    for name, size, _ in wanted:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    for name, _, digest in wanted[share::shares] if hashes else ():
        if sha256(folder / name) != digest:
            return f"{name} was altered: its SHA-256 is not the manifest's"
    return None


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

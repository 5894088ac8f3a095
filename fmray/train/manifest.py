"""Whether a folder still holds what was written to it: sizes and SHA-256 of its files.

In: a folder that several ranks write to. Out: `manifest.json` in it, and later the first file that
is missing, cut off or altered. A folder without a manifest was never complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

MANIFEST = "manifest.json"


class Entry(TypedDict):
    """One file. bytes: its size; sha256: in hex digits."""

    bytes: int
    sha256: str


def describe_files(folder: Path, paths: Iterable[Path]) -> dict[str, Entry]:
    """Size and SHA-256 of files below `folder`, by their name in it."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in paths
    }


def write_manifest(folder: Path, files: dict[str, Entry]) -> None:
    """Say that `folder` is complete; the last file that is written to it."""
    text = json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def fault(folder: Path, hashes: bool, share: int = 0, shares: int = 1) -> str | None:
    """The first file that is not as it was written and why, or None.

    hashes: compare contents, not sizes alone; of every `shares`-th file, from the `share`-th, so
    that several ranks read a folder together.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return f"there is no {MANIFEST}, so it was never complete"
    try:
        files: dict[str, Entry] = json.loads(path.read_text(encoding="utf-8"))["files"]
        wanted = [(name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is not what was written ({type(error).__name__}: {error})"
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

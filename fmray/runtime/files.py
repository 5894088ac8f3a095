"""Atomic files and folders, digests, manifests of folders, and checks of files with weights.

Files and folders are written under a temporary name, synced to disk, and then renamed, so that a
reader sees the old content or the new content and a crash leaves the old. The temporary name is
`.NAME.partial` in the same folder; a leftover of a killed process is overwritten by the next write.

A manifest (`manifest.json`) lists the size and SHA-256 of every file in a folder and is written
last: a folder without one is incomplete.

`check_weights` finds files with weights that are cut, missing or something else, in milliseconds.
`find_file` finds a file whatever Unicode form its name has on disk; `kind_of` says what a file is
that is not the text it should be. All JSON that fmray writes comes from `dumps`, which has no NaN.

Imports only the standard library, so that every package may use it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath, PurePosixPath
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
    """Write `value` as JSON; see `dumps` and `atomic_path`."""
    write_atomic(path, dumps(value, indent=indent) + "\n", durable)


def dumps(value: Any, **options: Any) -> str:
    """Return `value` as JSON that every parser reads: a number that is not finite becomes `null`.

    Args:
        options: of `json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_null_for_nan(value), allow_nan=False, **options)


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _null_for_nan(child) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_nan(child) for child in value]
    return value


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
    return dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n"


def files_of(text: str) -> dict[str, Entry]:
    """Return the files that the content of a `manifest.json` lists.

    Raises:
        ValueError: the content is not a manifest, or it names a file outside of its folder.
    """
    try:
        files = json.loads(text)["files"]
        entries = {k: {"bytes": v["bytes"], "sha256": v["sha256"]} for k, v in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is damaged ({type(error).__name__}: {error})") from error
    for name, entry in entries.items():
        path, size = PurePosixPath(name), entry["bytes"]
        if path.is_absolute() or ".." in path.parts or not path.name or "\0" in name:
            raise ValueError(f"{MANIFEST} is damaged: {name!r} is not a file in its folder")
        if type(size) is not int or size < 0 or not _is_sha256(entry["sha256"]):
            raise ValueError(f"{MANIFEST} is damaged: size or SHA-256 of {name!r}")
    return entries


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


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


def digest_of(value: Any, **options: Any) -> str:
    """Return the SHA-256, in hex digits, of a value's JSON with sorted keys.

    Args:
        options: of `json.dumps`.
    """
    return hashlib.sha256(dumps(value, sort_keys=True, **options).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Files with the weights of models ---

LARGEST_HEADER = 100_000_000  # bytes, of a safetensors file: the library's own limit
AGAIN = "copy or download it again"


def check_weights(path: Path) -> None:
    """Check a file of weights, or those of a Hugging Face model in a folder; reads no weights.

    A folder without weights passes.

    Raises:
        ValueError: a file is missing, cut, or something else than weights.
    """
    for file, names in weight_files(path).items() if path.is_dir() else [(path, set())]:
        missing = names - tensor_shapes(file).keys() if file.suffix == ".safetensors" else set()
        if missing:
            raise ValueError(
                f"{file}: it does not contain {min(missing)}, which the index lists; {AGAIN}"
            )
        if file.suffix != ".safetensors":
            _check_torch_file(file)


def weight_files(folder: Path, partial: bool = False) -> dict[Path, set[str]]:
    """Return the files that transformers loads weights from; {} if the folder has none.

    Args:
        partial: return {} if files are missing: the hub's cache may lack some.

    Returns:
        By file, the tensors that the index lists for it (none for a single file).

    Raises:
        ValueError: the index is not readable, or a file that it lists is missing.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return {folder / name: set()}
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        files: dict[Path, set[str]] = {}
        try:
            for tensor, shard in read_json(index)["weight_map"].items():
                files.setdefault(folder / shard, set()).add(tensor)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not an index of weights; {AGAIN}") from error
        missing = sorted(file.name for file in files if not file.is_file())
        if missing and partial:
            return {}
        if missing:
            raise ValueError(
                f"{folder}: {len(missing)} of the {len(files)} files that {index.name} lists are"
                f" missing ({missing[0]}{', ...' if missing[1:] else ''}); {AGAIN}"
            )
        return files
    return {}


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Return the shapes of the tensors in a safetensors file; raises as `read_header` does."""
    return {name: list(tensor.get("shape", ())) for name, tensor in read_header(file)[1].items()}


def read_header(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Read the header of a safetensors file.

    Returns:
        Where the data begins, and by tensor `dtype`, `shape` and `data_offsets` (begin and end).

    Raises:
        ValueError: it is no safetensors file, or a part of one.
    """
    check_content(file)
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if size < 8 or length > LARGEST_HEADER:
            raise ValueError(f"{file}: not a safetensors file; {AGAIN}")
        header = content.read(length)
    try:
        tensors = json.loads(header) if len(header) == length else {}
        tensors.pop("__metadata__", None)
        ends = [int(tensor["data_offsets"][1]) for tensor in tensors.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{file}: its header is damaged; {AGAIN}") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        what = "cut" if size < expected else "damaged"
        raise ValueError(
            f"{file}: {what}: it has {size} bytes, its header describes {expected}; {AGAIN}"
        )
    return 8 + length, tensors


def _check_torch_file(file: Path) -> None:
    check_content(file)
    with file.open("rb") as content:
        start = content.read(4)
    if start == b"PK\x03\x04":  # since torch 1.6 a zip archive, whose directory is at its end
        try:
            zipfile.ZipFile(file).close()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{file}: cut: it has no zip directory at its end; {AGAIN}") from error
    elif start[:1] != b"\x80":  # a pickle, as older versions write
        raise ValueError(f"{file}: not a file of torch.save; {AGAIN}")


def read_json(file: Path) -> Any:
    """Read a JSON file that came with a model.

    Raises:
        ValueError: it is something else.
    """
    check_content(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not readable as JSON ({error}); {AGAIN}") from error


def check_content(file: Path) -> None:
    """Raise ValueError for what a failed download leaves: an LFS pointer, a web page, nothing."""
    with file.open("rb") as content:
        start = content.read(256)
    if not start:
        raise ValueError(f"{file}: empty; {AGAIN}")
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        raise ValueError(
            f"{file}: a git-LFS pointer instead of the content; run `git lfs pull` in the clone,"
            " or download it again"
        )
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise ValueError(f"{file}: a web page instead of the content; download it again")


# --- Names and kinds of files ---


def find_file(folder: Path, name: str) -> Path:
    """Return the path of `name` (with or without folders) in `folder`.

    An accented letter is one code point (Unicode's NFC, as most text has it) or two (NFD, as macOS
    writes names), so each part of the name is looked up in both forms. A file that is missing in
    every form has its plain path.
    """
    plain = folder / name
    if name.isascii() or os.path.exists(plain):
        return plain
    path = folder
    for part in PurePath(name).parts:
        forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        path = next((path / form for form in forms if os.path.exists(path / form)), path / part)
    return path


# first bytes of a file -> what it is and what to do
_KINDS = {
    b"\x1f\x8b": "gzip-compressed; unpack it with gunzip",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard; unpack it with unzstd",
    b"BZh": "compressed with bzip2; unpack it with bunzip2",
    b"\xfd7zXZ": "compressed with xz; unpack it with unxz",
    b"PK\x03\x04": "a ZIP archive; unpack it with unzip",
    b"PAR1": "a Parquet file; export it, with pandas: read_parquet(FILE).to_json(orient='records')",
    b"ARROW1": "an Arrow file; export it as JSON",
    b"SQLite format 3": "an SQLite database; export it as JSON",
}


def kind_of(head: bytes) -> str | None:
    """Return what a file is and what to do, by its first bytes; None if it may be UTF-8 text."""
    for start, kind in _KINDS.items():
        if head.startswith(start):
            return kind
    encoding = json.detect_encoding(head)  # by the byte order mark and the place of zero bytes
    if not encoding.startswith("utf-8"):
        name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")  # as iconv spells it
        return f"{name} text; convert it with iconv -f {name} -t UTF-8"
    return None

"""What lies at the path of an image collection: its classes and splits, and its images.

In: Meta-Dataset's TFRecords with their specification, a tree of class folders, or labelled Parquet.
Out: a `Collection` with the pieces that tasks read, and the images of a piece one by one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import UnidentifiedImageError

from fmray.config.fewshot import CollectionConfig
from fmray.data.image_store import SPECIFICATION, SPLITS
from fmray.data.records import BROKEN_IMAGE, BadRow, decode_image
from fmray.data.tfrecord import parse_example, read_records
from fmray.fewshot.specification import SPLIT_NAMES, DatasetSpecification

# Which split each class of a collection is in: as the data says, by a file, or by a seeded hash.
#
# In: class names, and what says their split. Out: class name -> train, val or test. A class is in
# one split: its images are never divided.

HELD_OUT = 0.15  # of the classes, in each of val and test
WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def hash_split(names: Iterable[str], seed: int) -> dict[str, str]:
    """Split by the order of a seeded hash of the names: 15 % of the classes (2 at least) each to
    val and test, but never so many that train has none. Same names, same split, in any collection.
    """
    ordered = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    held = min(max(2, round(HELD_OUT * len(ordered))), (len(ordered) - 1) // 2)
    splits = ["val"] * held + ["test"] * held + ["train"] * (len(ordered) - 2 * held)
    return dict(zip(ordered, splits, strict=True))


def file_split(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Split by a JSON file {train|val|test: [class names]}; Meta-Dataset's `valid` is val.

    The file may name classes that are not there.

    Raises:
        ValueError: it is no such file, names a class twice, or leaves one of `names` out.
    """
    try:
        listed = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name a JSON file of class splits") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(listed, dict) or not all(isinstance(part, list) for part in listed.values()):
        raise ValueError(f"{path}: should be {{train|val|test: [class names]}}")
    split: dict[str, str] = {}
    for key, part in listed.items():
        if key not in WORDS:
            raise ValueError(f"{path}: {key}: no such split; should be train, val or test")
        for name in part:
            if name in split:
                raise ValueError(f"{path}: class {name!r} is listed twice ({split[name]}, {key})")
            split[name] = WORDS[key]
    for name in names:
        if name not in split:
            raise ValueError(f"{path}: class {name!r} has no split; list it in train, val or test")
    return {name: split[name] for name in names}


def merge_splits(where: str, found: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Class name -> split from (class name, word for its split) pairs of the data itself.

    Raises:
        ValueError: a word that means no split, or a class in two splits.
    """
    split: dict[str, str] = {}
    for name, word in found:
        if word not in WORDS:
            raise ValueError(
                f"{where}: class {name!r}: split is {word!r}; should be train, val or test"
            )
        if split.setdefault(name, WORDS[word]) != WORDS[word]:
            raise ValueError(
                f"{where}: class {name!r} is in {split[name]} and in {WORDS[word]}; a class has one"
                " split: mend it, or set split: hash to split anew"
            )
    return split


def splits_table(splits: dict[str, tuple[str, dict[str, str]]]) -> str:
    """Classes a split of each collection, as text. splits: collection -> (where its split is from,
    class name -> split)."""
    width = max(map(len, ["collection", *splits]))
    lines = [f"{'collection':{width}}  train   val  test  classes split by"]
    for name, (source, split) in splits.items():
        counts = "  ".join(f"{list(split.values()).count(part):4d}" for part in SPLITS)
        lines.append(f"{name:{width}}   {counts}  {source}")
    return "\n".join(lines)


SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
ROWS_AT_ONCE = 64  # of Parquet


@dataclass(frozen=True)
class Piece:
    """A stretch of source, read in order. `root`: the collection's path; `bytes`: of images, about;
    `changed`: modification time, ns; `class_name`: of all its images, None where a column says;
    `row_groups`: of a Parquet file, from and to; `class_id` and `images`: as the specification has
    them, for a TFRecord file."""

    root: str
    path: str
    bytes: int
    changed: int
    class_name: str | None = None
    row_groups: tuple[int, int] | None = None
    class_id: int | None = None
    images: int | None = None


@dataclass
class Collection:
    """`splits`: class name -> split, by name; `split_source`: what says so, in words;
    `bad`: classes without images."""

    name: str
    pieces: list[Piece]
    splits: dict[str, str]
    split_source: str
    specification: Path | None = None
    bad: list[BadRow] = field(default_factory=list)


@dataclass(frozen=True)
class FoundImage:
    """An image of a collection: encoded bytes, checked to decode."""

    image: bytes
    class_name: str
    source: str


def find_collection(name: str, config: CollectionConfig, seed: int, portion: int) -> Collection:
    """Look at a collection without reading its images.

    Args:
        portion: bytes of a piece of Parquet, about.

    Raises:
        ValueError: there is none, its classes contradict their specification, or have no split.
    """
    path = config.path.resolve()
    if not path.exists():
        raise ValueError(f"images.collections.{name}.path: {path}: no such file or folder")
    beside = path / SPECIFICATION
    specification_path = config.specification or (beside if beside.is_file() else None)
    kind = config.format or _format(path)
    specification = DatasetSpecification.read(specification_path) if specification_path else None
    bad: list[BadRow] = []
    if kind == "meta_dataset":
        if specification is None:
            raise ValueError(
                f"{path}: no {SPECIFICATION}; set images.collections.{name}.specification"
            )
        pieces, given = _records(path, specification, bad), {}
    elif kind == "parquet":
        pieces, given = _parquet(path, portion, config.split == "given")
    else:
        pieces, given = _folders(path, bad, config.split == "given")
    names = sorted(given) or sorted({piece.class_name for piece in pieces if piece.class_name})
    if not names:
        raise ValueError(f"{path}: no images found; is it of another format than {kind}?")
    source = str(config.split)
    if config.split == "given" and specification is not None:
        splits, source = _specified(path, names, given, specification), "its specification"
    elif config.split == "given" and any(given.values()):
        splits, source = merge_splits(str(path), given.items()), "the data"
    elif config.split in ("given", "hash"):
        splits, source = hash_split(names, seed), f"hash, seed {seed}"
    else:
        splits = file_split(Path(config.split), names)
    splits = {name: splits[name] for name in names}
    if config.split != "given":
        specification_path = None  # its groups are of its own splits
    return Collection(name, pieces, splits, source, specification_path, bad)


def read_piece(piece: Piece) -> Iterator[FoundImage | BadRow]:
    """The images of a piece in order, with what is wrong in their places."""
    if piece.row_groups is not None:
        return _read_parquet(piece, *piece.row_groups)
    if piece.class_id is not None:
        return _read_tfrecords(piece)
    return _read_file(piece)


def _format(path: Path) -> str:
    if path.is_file():
        return "parquet"
    if (path / SPECIFICATION).is_file() or any(path.glob("*.tfrecords")):
        return "meta_dataset"
    return "parquet" if any(path.glob("*.parquet")) else "folders"


def _specified(
    path: Path, names: list[str], given: dict[str, str], specification: DatasetSpecification
) -> dict[str, str]:
    """Splits by a specification, which the data must not contradict."""
    known = {
        specification.class_names[number]: split
        for split in SPLIT_NAMES
        for number in specification.classes(split)
    }
    for name in names:
        if name not in known:
            raise ValueError(
                f"{path}: class {name!r} is not in the specification of {specification.name}"
            )
        if given.get(name) and WORDS.get(given[name]) != known[name]:
            raise ValueError(
                f"{path}: class {name!r} is {given[name]} here, and {known[name]} in the"
                f" specification of {specification.name}"
            )
    return known


def _records(path: Path, specification: DatasetSpecification, bad: list[BadRow]) -> list[Piece]:
    """Each class is a file named after its id."""
    if specification.file_pattern != "{}.tfrecords":
        raise ValueError(
            f"{path}: file_pattern {specification.file_pattern!r}; should be {{}}.tfrecords"
        )
    pieces, files = [], {file.name: file for file in path.glob("*.tfrecords")}
    for number, name in enumerate(specification.class_names):
        file, count = files.pop(f"{number}.tfrecords", None), specification.images[number]
        if file is None or not file.stat().st_size:
            lack = "no such file" if file is None else "an empty file"
            reason = f"class {name!r} has no images: {lack}; the specification says {count}"
            bad.append(BadRow(str(path / f"{number}.tfrecords"), None, None, reason))
        else:
            piece = Piece(str(path), *_stamp(file), name, class_id=number, images=count)
            pieces.append(piece)
    if files:
        raise ValueError(
            f"{path / min(files)}: no class of the specification of {specification.name}, whose"
            f" ids are 0 to {len(specification.class_names) - 1}"
        )
    return pieces


def _folders(path: Path, bad: list[BadRow], given: bool) -> tuple[list[Piece], dict[str, str]]:
    """Class folders, or train, val and test folders of class folders; images at any depth."""
    tops = sorted(entry for entry in path.iterdir() if entry.is_dir() and entry.name[0] != ".")
    split_tree = bool(tops) and all(entry.name in WORDS for entry in tops)
    found = [(folder, "") for folder in tops]
    if split_tree:
        found = [(f, top.name) for top in tops for f in sorted(top.iterdir()) if f.is_dir()]
    if split_tree and given:
        merge_splits(str(path), [(folder.name, split) for folder, split in found])
    pieces, splits = [], {}
    for folder, split in found:
        files = [
            Path(parent, name)
            for parent, _, names in os.walk(folder)
            for name in names
            if Path(name).suffix.lower() in SUFFIXES
        ]
        if not files:
            reason = "the class has no images: no file in it has a suffix of an image"
            bad.append(BadRow(str(folder), None, None, reason))
            continue
        splits[folder.name] = split
        pieces += [Piece(str(path), *_stamp(file), folder.name) for file in sorted(files)]
    return pieces, splits


def _parquet(path: Path, portion: int, given: bool) -> tuple[list[Piece], dict[str, str]]:
    """Files with `image` and `label` or `class_name`, and `split` perhaps."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    pieces: list[Piece] = []
    splits: dict[str, str] = {}
    pairs: dict[tuple[str, Any], Any] = {}  # a label's class name, and the other way round
    for file in files:
        with _open_parquet(file) as parquet:
            sizes = [
                parquet.metadata.row_group(number).total_byte_size
                for number in range(parquet.num_row_groups)
            ]
            columns = [
                c for c in ("class_name", "label", "split") if c in parquet.schema_arrow.names
            ]
            seen = set()
            for batch in parquet.iter_batches(1 << 16, columns=columns):
                rows = pa.table(batch).group_by(columns).aggregate([]).to_pylist()
                seen |= {
                    tuple(row.get(key) for key in ("class_name", "label", "split")) for row in rows
                }
        named = "class_name" in columns
        for name, label, split in sorted(seen, key=str):
            if (name if named else label) is None:
                continue  # its rows will be bad rows
            name = name if named else str(label)
            if label is not None:
                for key, value, meaning in ((label, name, "label"), (name, label, "class_name")):
                    if pairs.setdefault((meaning, key), value) != value:
                        raise ValueError(
                            f"{file}: {meaning} {key!r} goes with {pairs[meaning, key]!r} and"
                            f" {value!r}; each label should have one class_name"
                        )
            if given and splits.get(name, split) != split:
                merge_splits(str(file), [(name, str(splits[name])), (name, str(split))])
            splits[name] = split or ""
        begin = 0
        for end in range(1, len(sizes) + 1):
            if end == len(sizes) or sum(sizes[begin : end + 1]) > portion:
                stamp = file.stat()
                piece = Piece(
                    str(path),
                    str(file),
                    sum(sizes[begin:end]),
                    stamp.st_mtime_ns,
                    row_groups=(begin, end),
                )
                pieces.append(piece)
                begin = end
    return pieces, splits


def _open_parquet(file: Path) -> pq.ParquetFile:
    """The opened file, with the columns that images need."""
    try:
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: not a Parquet file ({error})") from error
    names = parquet.schema_arrow.names
    if "image" not in names or not {"label", "class_name"} & set(names):
        raise ValueError(
            f"{file}: has columns {', '.join(names)}; should have image, and class_name or label"
        )
    kind = parquet.schema_arrow.field("image").type
    encoded = kind.field("bytes").type if _is_struct(kind) else kind
    if not (pa.types.is_binary(encoded) or pa.types.is_large_binary(encoded)):
        raise ValueError(f"{file}: column image is {kind}; should be binary (PNG or JPEG bytes)")
    return parquet


def _is_struct(kind: pa.DataType) -> bool:
    """Whether a column of images is as the `datasets` library writes it: {bytes, path}."""
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _read_parquet(piece: Piece, begin: int, end: int) -> Iterator[FoundImage | BadRow]:
    with _open_parquet(Path(piece.path)) as parquet:
        row = sum(parquet.metadata.row_group(number).num_rows for number in range(begin))
        names = parquet.schema_arrow.names
        label = "class_name" if "class_name" in names else "label"
        columns = ["image", label, *(["source"] if "source" in names else [])]
        for batch in parquet.iter_batches(ROWS_AT_ONCE, range(begin, end), columns=columns):
            images = batch.column("image")
            if _is_struct(images.type):
                images = pc.struct_field(images, "bytes")
            for number, image in enumerate(images):
                values = {name: batch.column(name)[number].as_py() for name in columns[1:]}
                source = values.get("source") or f"{Path(piece.path).name}#{row}"
                if values[label] is None:
                    yield BadRow(piece.path, row, values.get("source"), f"{label} is null")
                else:
                    found = FoundImage(image.as_py(), str(values[label]), source)
                    yield _checked(found, piece, row)
                row += 1


def _read_tfrecords(piece: Piece) -> Iterator[FoundImage | BadRow]:
    path, row = Path(piece.path), 0
    try:
        for offset, data in read_records(path):
            try:
                image, label = parse_example(data)
            except ValueError as error:
                yield BadRow(piece.path, row, None, f"byte {offset}: {error}")
            else:
                if label != piece.class_id:
                    reason = f"byte {offset}: label {label}; by the specification the file holds"
                    reason += f" class {piece.class_id}, {piece.class_name!r}"
                    yield BadRow(piece.path, row, None, reason)
                else:
                    source = f"{path.name}@{offset}"
                    found = FoundImage(image, str(piece.class_name), source)
                    yield _checked(found, piece, row, f"byte {offset}: ")
            row += 1
    except ValueError as error:  # what follows cannot be read
        yield BadRow(piece.path, row, None, str(error).removeprefix(f"{path}: "))
        return
    if row != piece.images:
        reason = f"the file has {row} images; the specification says {piece.images}"
        yield BadRow(piece.path, None, None, reason)


def _read_file(piece: Piece) -> Iterator[FoundImage | BadRow]:
    path = Path(piece.path)
    try:
        image = path.read_bytes()
    except OSError as error:
        yield BadRow(piece.path, None, None, f"cannot be read: {error.strerror}")
        return
    source = str(path.relative_to(piece.root))
    yield _checked(FoundImage(image, str(piece.class_name), source), piece, None)


def _checked(
    found: FoundImage, piece: Piece, row: int | None, where: str = ""
) -> FoundImage | BadRow:
    """The image where it decodes, otherwise why it does not."""
    try:
        if found.image is None:
            reason = "image is null"
        else:
            decode_image(found.image)
            return found
    except UnidentifiedImageError:  # its text has a memory address
        reason = "broken image: no image format that Pillow knows"
    except BROKEN_IMAGE as error:
        reason = f"broken image: {error}"
    return BadRow(piece.path, row, None, where + reason)


def _stamp(file: Path) -> tuple[str, int, int]:
    try:
        found = file.stat()
    except OSError as error:  # such as a link to nothing
        raise ValueError(f"{file}: {error.strerror}") from error
    return str(file), found.st_size, found.st_mtime_ns

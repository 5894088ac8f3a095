"""Find image collections: their classes and splits, and the images of each piece.

Reads Meta-Dataset's TFRecord files with their specification, trees of class folders, and labelled
Parquet. `find_collection` lists classes and pieces without reading images; tasks read the pieces
with `read_piece`. A class belongs to one split: its images are never divided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fmray.config.fewshot import CollectionConfig
from fmray.data.class_splits import file_split, hash_split, merge_splits, split_of
from fmray.data.image_folders import ImageTree, describe_left_out, read_tree
from fmray.data.image_store import SPECIFICATION
from fmray.data.images import ImageError, decode_image
from fmray.data.records import BadRow
from fmray.data.tfrecord import parse_example, read_records
from fmray.fewshot.specification import SPLIT_NAMES, DatasetSpecification
from fmray.runtime.files import sha256

ROWS_AT_ONCE = 64  # rows of Parquet in memory
HASH_THREADS = 16


@dataclass(frozen=True)
class Piece:
    """A part of the source that is read in order: a file, or row groups of a Parquet file."""

    root: str  # the collection's path
    path: str
    bytes: int  # size of the images, about
    changed: int | str  # modification time, ns; or a hash, see `by_content`
    class_name: str | None = None  # of all its images; None if a column has it
    row_groups: tuple[int, int] | None = None  # of a Parquet file: begin, end
    class_id: int | None = None  # of a TFRecord file, by its specification
    images: int | None = None  # number in a TFRecord file, by its specification


@dataclass
class Collection:
    """A collection before its images are read."""

    name: str
    pieces: list[Piece]
    splits: dict[str, str]  # class name -> split, sorted by name
    split_source: str  # where the splits come from, as text
    specification: Path | None = None
    bad: list[BadRow] = field(default_factory=list)  # classes without images
    left_out: str = ""  # files and folders that are no images of a class, as text


@dataclass(frozen=True)
class SourceImage:
    """An image of a collection, as encoded bytes that decode."""

    image: bytes
    class_name: str
    source: str
    changes: tuple[str, ...] = ()  # of decoding: keys of `images.CHANGES`


def find_collection(name: str, config: CollectionConfig, seed: int, portion: int) -> Collection:
    """Find the classes, splits and pieces of a collection without reading its images.

    Args:
        seed: for splits by hash.
        portion: bytes of a piece of Parquet, about.

    Raises:
        ValueError: the path is missing, or the classes have no split or contradict their
            specification.
    """
    # the format and the pieces
    path = config.path.resolve()
    if not path.exists():
        raise ValueError(f"images.collections.{name}.path: {path}: no such file or folder")
    default = path / SPECIFICATION
    specification_path = config.specification or (default if default.is_file() else None)
    kind = config.format or _format(path)
    specification = DatasetSpecification.read(specification_path) if specification_path else None
    bad: list[BadRow] = []
    left_out = ""
    if kind == "meta_dataset":
        if specification is None:
            raise ValueError(
                f"{path}: no {SPECIFICATION}; set images.collections.{name}.specification"
            )
        pieces, given = _tfrecord_pieces(path, specification, bad), {}
    elif kind == "parquet":
        pieces, given = _parquet_pieces(path, portion, config.split == "given")
    else:
        tree = read_tree(path, config.layout, f"images.collections.{name}")
        pieces, given = _folder_pieces(tree, path, bad, config.split == "given")
        left_out = describe_left_out(tree.left_out)
    names = sorted(given) or sorted({piece.class_name for piece in pieces if piece.class_name})
    if not names:
        raise ValueError(f"{path}: no images found; is its format not {kind}?")

    # the split of each class
    source = str(config.split)
    if config.split == "given" and specification is not None:
        splits, source = _specified_split(path, names, given, specification), "its specification"
    elif config.split == "given" and any(given.values()):
        splits, source = merge_splits(str(path), given.items()), "the data"
    elif config.split in ("given", "hash"):
        splits, source = hash_split(names, seed), f"hash, seed {seed}"
    else:
        splits = file_split(Path(config.split), names)
    splits = {name: splits[name] for name in names}
    if config.split != "given":
        specification_path = None  # its groups of classes fit only its own splits
    return Collection(name, pieces, splits, source, specification_path, bad, left_out)


def _format(path: Path) -> str:
    """Guess the format of a collection."""
    if path.is_file():
        return "parquet"
    if (path / SPECIFICATION).is_file() or any(path.glob("*.tfrecords")):
        return "meta_dataset"
    return "parquet" if any(path.glob("*.parquet")) else "folders"


def _specified_split(
    path: Path, names: list[str], given: dict[str, str], specification: DatasetSpecification
) -> dict[str, str]:
    """Return the splits of a specification.

    Raises:
        ValueError: the data contradicts the specification.
    """
    specified = {
        specification.class_names[number]: split
        for split in SPLIT_NAMES
        for number in specification.classes(split)
    }
    for name in names:
        if name not in specified:
            raise ValueError(
                f"{path}: class {name!r} is not in the specification of {specification.name}"
            )
        if given.get(name) and split_of(given[name]) != specified[name]:
            raise ValueError(
                f"{path}: class {name!r} is {given[name]} here, and {specified[name]} in the"
                f" specification of {specification.name}"
            )
    return specified


def _tfrecord_pieces(
    path: Path, specification: DatasetSpecification, bad: list[BadRow]
) -> list[Piece]:
    """Return one piece per class, whose file is named after its id."""
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
            f"{path / min(files)}: not a class of the specification of {specification.name}, whose"
            f" ids are 0 to {len(specification.class_names) - 1}"
        )
    return pieces


def _folder_pieces(
    tree: ImageTree, path: Path, bad: list[BadRow], given: bool
) -> tuple[list[Piece], dict[str, str]]:
    """Return one piece per file, and the split of each class as given ("" if none is)."""
    if given and any(found.split for found in tree.classes):
        merge_splits(str(path), [(found.name, found.split) for found in tree.classes])
    pieces, splits = [], {}
    for found in tree.classes:
        if not found.files:
            reason = "the class has no images: no file in it is an image"
            bad.append(BadRow(str(found.path), None, None, reason))
            continue
        splits[found.name] = found.split
        for file in found.files:
            try:
                pieces.append(Piece(str(path), *_stamp(file), found.name))
            except ValueError as error:  # a dangling link
                reason = str(error).removeprefix(f"{file}: ")
                bad.append(BadRow(str(file), None, None, f"cannot be read: {reason}"))
    return pieces, splits


def _parquet_pieces(path: Path, portion: int, given: bool) -> tuple[list[Piece], dict[str, str]]:
    """Return pieces of about `portion` bytes, and the split of each class as given ("" if none is).

    The files have columns `image`, `label` or `class_name` or both, and optionally `split`.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    pieces: list[Piece] = []
    splits: dict[str, str] = {}
    pairs: dict[tuple[str, Any], Any] = {}  # ("label", label) -> class name, and the reverse
    for file in files:
        # the distinct values of class_name, label and split
        with _open_parquet(file) as parquet:
            sizes = [
                parquet.metadata.row_group(number).total_byte_size
                for number in range(parquet.num_row_groups)
            ]
            columns = [
                c for c in ("class_name", "label", "split") if c in parquet.schema_arrow.names
            ]
            classes = set()
            for batch in parquet.iter_batches(1 << 16, columns=columns):
                rows = pa.table(batch).group_by(columns).aggregate([]).to_pylist()
                classes |= {
                    tuple(row.get(key) for key in ("class_name", "label", "split")) for row in rows
                }

        # each label has one class name and each class one split
        named = "class_name" in columns
        for name, label, split in sorted(classes, key=str):
            if (name if named else label) is None:
                continue  # these rows become bad rows when they are read
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
        pieces += _row_group_pieces(path, file, sizes, portion)
    return pieces, splits


def _row_group_pieces(path: Path, file: Path, sizes: list[int], portion: int) -> Iterator[Piece]:
    """Cut a Parquet file into pieces of consecutive row groups, given their sizes in bytes."""
    changed, begin = file.stat().st_mtime_ns, 0
    for end in range(1, len(sizes) + 1):
        if end == len(sizes) or sum(sizes[begin : end + 1]) > portion:
            size = sum(sizes[begin:end])
            yield Piece(str(path), str(file), size, changed, row_groups=(begin, end))
            begin = end


def _stamp(file: Path) -> tuple[str, int, int]:
    """Return path, size and modification time.

    Raises:
        ValueError: there is no such file, as for a dangling link.
    """
    try:
        stat = file.stat()
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    return str(file), stat.st_size, stat.st_mtime_ns


def by_content(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces with hashes of their files instead of modification times; reads them."""
    files = sorted({piece.path for piece in pieces})
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        hashes = dict(zip(files, pool.map(lambda file: sha256(Path(file)), files), strict=True))
    return [replace(piece, changed=hashes[piece.path]) for piece in pieces]


# --- Reading images ---


def read_piece(piece: Piece) -> Iterator[SourceImage | BadRow]:
    """Yield the images of a piece in order, with a `BadRow` in place of each bad one."""
    if piece.row_groups is not None:
        return _read_parquet(piece, *piece.row_groups)
    if piece.class_id is not None:
        return _read_tfrecords(piece)
    return _read_file(piece)


def _open_parquet(file: Path) -> pq.ParquetFile:
    """Open a Parquet file and check its columns.

    Raises:
        ValueError: it is not a Parquet file, or not one of labelled images.
    """
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
    """Return whether images are {bytes, path}, as the `datasets` library writes them."""
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _read_parquet(piece: Piece, begin: int, end: int) -> Iterator[SourceImage | BadRow]:
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
                    item = SourceImage(image.as_py(), str(values[label]), source)
                    yield _check(item, piece, row)
                row += 1


def _read_tfrecords(piece: Piece) -> Iterator[SourceImage | BadRow]:
    path, row = Path(piece.path), 0
    try:
        for offset, data in read_records(path):
            try:
                image, label = parse_example(data)
            except ValueError as error:
                yield BadRow(piece.path, row, None, f"byte {offset}: {error}")
            else:
                if label != piece.class_id:
                    reason = f"byte {offset}: label {label}; by the specification the file is"
                    reason += f" class {piece.class_id}, {piece.class_name!r}"
                    yield BadRow(piece.path, row, None, reason)
                else:
                    source = f"{path.name}@{offset}"
                    item = SourceImage(image, str(piece.class_name), source)
                    yield _check(item, piece, row, f"byte {offset}: ")
            row += 1
    except ValueError as error:  # the rest of the file cannot be read
        yield BadRow(piece.path, row, None, str(error).removeprefix(f"{path}: "))
        return
    if row != piece.images:
        reason = f"the file has {row} images; the specification says {piece.images}"
        yield BadRow(piece.path, None, None, reason)


def _read_file(piece: Piece) -> Iterator[SourceImage | BadRow]:
    path = Path(piece.path)
    try:
        image = path.read_bytes()
    except OSError as error:
        yield BadRow(piece.path, None, None, f"cannot be read: {error.strerror}")
        return
    source = str(path.relative_to(piece.root))
    yield _check(SourceImage(image, str(piece.class_name), source), piece, None)


def _check(
    item: SourceImage, piece: Piece, row: int | None, where: str = ""
) -> SourceImage | BadRow:
    """Return the image if it decodes, otherwise why it does not."""
    try:
        if item.image is None:
            reason = "image is null"
        else:
            return replace(item, changes=decode_image(item.image).changes)
    except ImageError as error:
        reason = f"broken image: {error}"
    return BadRow(piece.path, row, None, where + reason)

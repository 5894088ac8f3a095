"""Episodes per second of the image store against its alternatives, on the same images.

    python benchmarks/episodes.py [--classes 100] [--images 60] [--side 84] [--runs 5]

Every side returns the encoded images of the same 15-way episodes, 10 images per class; the bytes
are checked to be equal. The peers are (a) a scan of the classes' TFRecords, without checksums;
(b) a folder of JPEG files behind a torch DataLoader, with 0 and with 2 workers; (c) random rows of
a plain Parquet file, by pyarrow's `take` and by reading row groups. The files are in the page
cache. The store returns views of its memory map, and copies for comparison. Decoding is measured
separately, of views and of copies. Prints the time of a run and the ratio of the store to each
peer: 0.2 is five times as fast.
"""

from __future__ import annotations

import argparse
import io
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import ray
from PIL import Image
from timing import compare, seconds
from torch.utils.data import DataLoader, Dataset

from fmray.config.fewshot import FewshotRecipe
from fmray.data.image_ingest import prepare_images
from fmray.data.image_store import ImageStore
from fmray.data.images import decode_image
from fmray.data.tfrecord import example, parse_example, write_records
from fmray.fewshot import EpisodeSampler

WAYS, SHOTS, QUERIES = 15, 1, 9
BAR = 0.2
Place = tuple[int, int]  # class, image in it


class ImageFolder(Dataset):
    """Peer (b): an item is an episode."""

    def __init__(self, folder: Path, episodes: list[list[Place]]) -> None:
        self.folder, self.episodes = folder, episodes

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, number: int) -> list[bytes]:
        images = []
        for label, image in self.episodes[number]:
            with open(f"{self.folder}/{label:04d}/{image:04d}.jpg", "rb") as file:
                images.append(file.read())
        return images


def scan_tfrecords(folder: Path, episode: list[Place]) -> list[bytes]:
    """Peer (a): read each class's file completely, scan its records, parse those of the episode."""
    found: dict[Place, bytes] = {}
    for wanted in {label for label, _ in episode}:
        data = (folder / f"{wanted}.tfrecords").read_bytes()
        places = {image for label, image in episode if label == wanted}
        at = number = 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            if number in places:
                found[wanted, number] = parse_example(data[at + 12 : at + 12 + length])[0]
            at += length + 16
            number += 1
    return [found[place] for place in episode]


class RowGroups:
    """Peer (c): an open Parquet file; row groups with requested rows are read completely."""

    def __init__(self, path: Path) -> None:
        self.file = pq.ParquetFile(path)
        metadata = self.file.metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self.starts = np.cumsum([0, *sizes])

    def images(self, rows: np.ndarray) -> list[bytes]:
        group = np.searchsorted(self.starts, rows, side="right") - 1
        wanted = np.unique(group)
        table = self.file.read_row_groups(wanted.tolist(), columns=["image"])
        first = np.cumsum([0, *np.diff(self.starts)[wanted][:-1]])
        places = first[np.searchsorted(wanted, group)] + rows - self.starts[group]
        return table["image"].take(pa.array(places)).to_pylist()


def write_sources(folder: Path, arguments: argparse.Namespace) -> list[list[bytes]]:
    """Write noise images in the form that each side reads; return the encoded images by class."""
    generator = np.random.default_rng(0)
    shape = (arguments.side, arguments.side, 3)
    classes = []
    for label in range(arguments.classes):
        (folder / "tree" / f"{label:04d}").mkdir(parents=True)
        images = []
        for number in range(arguments.images):
            file = io.BytesIO()
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(file, format="jpeg", quality=arguments.quality)
            images.append(file.getvalue())
            (folder / "tree" / f"{label:04d}" / f"{number:04d}.jpg").write_bytes(images[-1])
        classes.append(images)
        examples = (example(image, label) for image in images)
        write_records(folder / f"{label}.tfrecords", examples)
    flat = [image for images in classes for image in images]
    labels = np.repeat(np.arange(arguments.classes), arguments.images)
    table = pa.table({"image": flat, "label": labels})
    pq.write_table(table, folder / "plain.parquet", row_group_size=256)
    return classes


def main() -> None:
    """Parse the command line and run the comparison in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--images", type=int, default=60, help="per class")
    parser.add_argument("--side", type=int, default=84, help="pixels")
    parser.add_argument("--quality", type=int, default=93, help="of the JPEG files")
    parser.add_argument("--episodes", type=int, default=60, help="per run")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), arguments)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Write, check and time all sides."""
    classes = write_sources(folder, arguments)
    collections = {"c": {"path": folder / "tree", "split": "hash"}}
    images = {"store": folder / "store", "collections": collections}
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    prepare_images(FewshotRecipe.model_validate({"name": "episodes", "images": images}))
    ray.shutdown()
    store = ImageStore.open(folder / "store")
    chosen = store.select("c", "all")
    # where the peers find the images of the store
    place_of = {
        image: (label, number)
        for label, images in enumerate(classes)
        for number, image in enumerate(images)
    }
    places = [place_of[image] for image in store.images(chosen.rows)]
    sampler = EpisodeSampler(
        chosen.labels, WAYS, SHOTS, QUERIES, seed=0, split="train", rows=chosen.rows
    )
    episodes = []
    for number in range(arguments.episodes):
        episode = sampler[number]
        episodes.append(np.concatenate([episode.support.ravel(), episode.query.ravel()]))
    wanted = [[places[row] for row in rows] for rows in episodes]
    flat = [np.array([c * arguments.images + n for c, n in episode]) for episode in wanted]
    plain, groups = folder / "plain.parquet", RowGroups(folder / "plain.parquet")
    dataset = pyarrow.dataset.dataset(plain)
    tree = ImageFolder(folder / "tree", wanted)
    loaders = {
        0: DataLoader(tree, batch_size=None),
        2: DataLoader(tree, batch_size=None, num_workers=2, persistent_workers=True),
    }

    def taken(rows: np.ndarray) -> list[bytes]:
        return dataset.take(pa.array(rows), columns=["image"])["image"].to_pylist()

    sides: dict[str, Callable[[], list[list[bytes]]]] = {
        "(a) TFRecord scan": lambda: [scan_tfrecords(folder, e) for e in wanted],
        "(b) JPEG folder, DataLoader": lambda: list(loaders[0]),
        "(b) JPEG folder, DataLoader, 2 workers": lambda: list(loaders[2]),
        "(c) plain Parquet, take": lambda: [taken(rows) for rows in flat],
        "(c) plain Parquet, row groups": lambda: [groups.images(rows) for rows in flat],
    }

    def ours() -> list[list[memoryview]]:
        return [store.views(rows) for rows in episodes]

    def copied() -> list[list[bytes]]:
        return [store.images(rows) for rows in episodes]

    expected = copied()
    assert ours() == expected
    for name, side in sides.items():
        assert side() == expected, name
    size = np.mean([len(image) for images in classes for image in images])
    count = len(episodes[0])
    print(f"{len(episodes)} episodes of {count} images of {size / 1e3:.1f} kB, warm cache")
    ratios = {}
    for name, side in sides.items():
        ratios[name] = compare(f"store / {name}", ours, side, arguments.runs, BAR)
    best = max(ratios, key=ratios.__getitem__)
    compare(f"store, copied / {best}", copied, sides[best], arguments.runs, None)
    alone = min(seconds(ours) for _ in range(arguments.runs)) / len(episodes)
    print(f"store: {1 / alone:.0f} episodes/s, {1 / ratios[best]:.1f} times the best peer, {best}")
    for name, encoded in (("views", ours()[0]), ("copies", expected[0])):
        decoding = min(seconds(lambda e=encoded: list(map(decode_image, e))) for _ in range(5))
        print(f"decoding {name} alone: {1e3 * decoding:.1f} ms per episode of {count} images")


if __name__ == "__main__":
    main()

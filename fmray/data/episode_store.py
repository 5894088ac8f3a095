"""A fixed set of episodes with their images in one Parquet file, a row group for each.

In: episodes as row ids of an image store. Out: the same episodes with encoded images, streamed in
order: a worker reads its own ones only, each in one read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fmray.data.image_store import ImageStore

SCHEMA = pa.schema(
    [("row", pa.int64()), ("label", pa.int32()), ("query", pa.bool_()), ("image", pa.binary())]
)
"""`label`: the class's place in the episode, 0 to N - 1; `row`: id in the image store."""


class RowEpisode(Protocol):
    """Row ids by class, [N, shots] and [N, queries], or N arrays of different lengths."""

    @property
    def support(self) -> Iterable[np.ndarray]: ...

    @property
    def query(self) -> Iterable[np.ndarray]: ...


@dataclass(frozen=True)
class StoredEpisode:
    """`rows`, `labels` int64 [n], `query` bool [n]: first the support images, class by class,
    then the queries; `images`: encoded."""

    rows: np.ndarray
    labels: np.ndarray
    query: np.ndarray
    images: list[bytes]


def write_episodes(store: ImageStore, episodes: Iterable[RowEpisode], path: Path) -> None:
    """Gather the images of some episodes once; the file has the store's fingerprint with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    schema = SCHEMA.with_metadata({"fmray.store": store.fingerprint})
    with pq.ParquetWriter(temporary, schema, compression="NONE") as writer:
        for episode in episodes:
            parts = [
                (rows, label, query)
                for query, classes in ((False, episode.support), (True, episode.query))
                for label, rows in enumerate(classes)
            ]
            sizes = [len(rows) for rows, _, _ in parts]
            rows = np.concatenate([rows for rows, _, _ in parts])
            columns = {
                "row": rows,
                "label": np.repeat([label for _, label, _ in parts], sizes),
                "query": np.repeat([query for _, _, query in parts], sizes),
                "image": store.images(rows),
            }
            writer.write_table(pa.table(columns, schema=schema), row_group_size=len(rows))
    temporary.replace(path)


class EpisodeReader:
    """The episodes of a file.

    Raises ValueError where they were made of another content of the store.
    """

    def __init__(self, path: Path, store: ImageStore) -> None:
        self.path = path
        with pq.ParquetFile(path) as file:
            self._count = file.num_row_groups
            made_of = (file.schema_arrow.metadata or {}).get(b"fmray.store", b"").decode()
        if made_of != store.fingerprint:
            raise ValueError(
                f"{path}: made of store content {made_of!r}, not {store.fingerprint!r} as in"
                f" {store.path}; write the episodes again"
            )

    def __len__(self) -> int:
        return self._count

    def stream(self, rank: int = 0, world_size: int = 1) -> Iterator[StoredEpisode]:
        """Episodes rank, rank + world_size, ... in order; one is in memory at a time."""
        with pq.ParquetFile(self.path) as file:
            for number in range(rank, self._count, world_size):
                table = file.read_row_group(number)
                yield StoredEpisode(
                    table["row"].to_numpy(),
                    table["label"].to_numpy().astype(np.int64),
                    table["query"].to_numpy(),
                    table["image"].to_pylist(),
                )

"""The encoder of a recipe: load it, run it over images in this process or on Ray, export it.

`ImageReader` decodes images of the store for an encoder; `embed` returns their features.
`open_pool` shares the work between Ray actors and reduces each task to its moments and class
centroids. Memory grows with the number of tasks (d^2 numbers each, in an unnamed file that the
system may write to disk), not with the number of images: features are dropped chunk by chunk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fmray.config import ClusterConfig
from fmray.config.fewshot import EncoderConfig
from fmray.data.image_store import ImageStore
from fmray.data.images import ImageError, decode_image
from fmray.fewshot import Encoder, Preprocess, create_encoder
from fmray.runtime.console import say
from fmray.runtime.files import atomic_folder
from fmray.selection import TaskMoments
from fmray.selection.moments import CentralSums

MEMORY_BYTES = 2 * 2**30  # decoded images are held in memory up to this size
DECODE_CHUNK = 1024  # images decoded at a time
BATCH = 256  # images per call of the encoder
EMBED_CHUNK = 2048  # images of one task per call of an actor


def load_encoder(config: EncoderConfig) -> Encoder:
    """Load the encoder that a recipe names, with its weights."""
    return create_encoder(config.name, config.checkpoint, config.pretrained, config.image_size)


def export_encoder(encoder: Encoder, target: Path) -> None:
    """Save an encoder as a folder for `encoder.checkpoint`; replaces what is at `target`."""
    with atomic_folder(target) as folder:
        encoder.save_pretrained(folder)


# --- Images and features in this process ---


class ImageReader:
    """Images of a store as pixels for one encoder, by global row id. Safe to use in threads."""

    def __init__(
        self, store: ImageStore, preprocess: Preprocess, decoded: np.ndarray | None = None
    ) -> None:
        """Open a reader.

        Args:
            decoded: all images, from `decode_all`; shared by all trainings on one store. Without
                it every access decodes.
        """
        self.preprocess = preprocess
        self._store, self._decoded = store, decoded

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        """Return uint8 [*rows.shape, 3, size, size]; `rows` are int64 global row ids."""
        flat = rows.reshape(-1)
        if self._decoded is None:
            pixels = self.preprocess.pixels(_decoded(self._store, flat))
        else:
            pixels = torch.from_numpy(self._decoded[flat])
        return pixels.reshape(*rows.shape, *pixels.shape[1:])


def decode_all(store: ImageStore, preprocess: Preprocess) -> np.ndarray | None:
    """Return uint8 [store.num_rows, 3, size, size]; None if that exceeds `MEMORY_BYTES`."""
    shape = (store.num_rows, 3, preprocess.size, preprocess.size)
    if int(np.prod(shape, dtype=np.int64)) > MEMORY_BYTES:
        return None
    pixels = np.empty(shape, dtype=np.uint8)
    for start in range(0, store.num_rows, DECODE_CHUNK):
        rows = np.arange(start, min(start + DECODE_CHUNK, store.num_rows))
        pixels[rows] = preprocess.pixels(_decoded(store, rows)).numpy()
    return pixels


def _decoded(store: ImageStore, rows: np.ndarray) -> Iterator[Image.Image]:
    """Yield the images of rows [n] one by one.

    Raises:
        ValueError: an image cannot be decoded.
    """
    for row, encoded in zip(rows.tolist(), store.views(rows), strict=True):
        try:
            yield decode_image(encoded).image
        except ImageError as error:
            raise ValueError(f"{store.path}: image {row} is not readable: {error}") from error


@torch.no_grad()
def embed(encoder: Encoder, images: ImageReader, rows: np.ndarray, batch: int) -> Tensor:
    """Return float32 [n, d] features of rows [n], on the encoder's device.

    Leaves the encoder in eval mode.

    Args:
        batch: images per call of the encoder.
    """
    device = next(encoder.parameters()).device
    encoder.eval()
    parts = [
        encoder(images.preprocess.normalise(images[rows[start : start + batch]].to(device)))
        for start in range(0, len(rows), batch)
    ]
    return torch.cat(parts).float()


# --- Tasks reduced to moments and centroids, in this process or by Ray actors ---


@dataclass(frozen=True)
class TaskFeatures:
    """What selection needs of the features of a task."""

    moments: TaskMoments
    centroids: np.ndarray  #: [C, d], mean feature of each class, ascending by label


@dataclass(frozen=True)
class _Chunk:
    """What `TaskFeatures` is made of, for some of the images of a task."""

    moments: TaskMoments
    labels: np.ndarray  # [c], the classes in this chunk
    counts: np.ndarray  # [c], their images
    sums: np.ndarray  # [c, d], their summed features


class Embedder:
    """An encoder on the node that has the images: a Ray actor, or an object in this process."""

    def __init__(self, store: ImageStore | Path, cache: Path | None, encoder: Encoder) -> None:
        """Load the encoder onto the GPU, if there is one.

        Args:
            store: a path for an actor, which opens the store itself.
        """
        opened = ImageStore.open(store, cache) if isinstance(store, Path) else store
        self._images = ImageReader(opened, encoder.preprocess)
        self._encoder = encoder.to("cuda" if torch.cuda.is_available() else "cpu")

    def features(self, rows: np.ndarray) -> np.ndarray:
        """Return float32 [n, d] features of the images of rows [n], n > 0."""
        return embed(self._encoder, self._images, rows, BATCH).cpu().numpy()

    def chunk(self, name: str, rows: np.ndarray, labels: np.ndarray) -> _Chunk:
        """Embed and reduce the images of rows [n] with labels [n] of the task `name`."""
        features = self.features(rows)
        classes, position, counts = np.unique(labels, return_inverse=True, return_counts=True)
        sums = np.zeros((len(classes), features.shape[1]))
        np.add.at(sums, position, features)
        return _Chunk(TaskMoments.of(name, features), classes, counts, sums)


class EmbedderPool:
    """Embedders that share the work. Results have the order of the arguments."""

    def __init__(self, call: Callable[[str, Sequence[tuple[Any, ...]]], Iterator[Any]]) -> None:
        """Wrap the embedders.

        Args:
            call: calls a method of `Embedder` by name, once for each tuple of arguments.
        """
        self._call = call

    def embed(self, rows: np.ndarray) -> np.ndarray:
        """Return float32 [n, d] features of the images of rows [n], n > 0."""
        chunks = [
            (rows[start : start + EMBED_CHUNK],) for start in range(0, len(rows), EMBED_CHUNK)
        ]
        return np.concatenate(list(self._call("features", chunks)))

    def task_features(
        self, tasks: Sequence[tuple[str, np.ndarray, np.ndarray]]
    ) -> list[TaskFeatures]:
        """Return the features of each task (name, rows [n], labels [n]), in their order.

        Raises:
            ValueError: a task without images, or features that are not finite.
        """
        calls = []
        for name, rows, labels in tasks:
            if not len(rows):
                raise ValueError(f"task {name!r} has no images")
            calls += [
                (name, rows[start : start + EMBED_CHUNK], labels[start : start + EMBED_CHUNK])
                for start in range(0, len(rows), EMBED_CHUNK)
            ]
        chunks = self._call("chunk", calls)
        features: list[TaskFeatures] = []
        scatters: np.ndarray | None = None
        for name, rows, _ in tasks:
            of_task = [next(chunks) for _ in range(0, len(rows), EMBED_CHUNK)]
            dimension = len(of_task[0].moments.mean)
            if scatters is None:  # the first chunk tells d
                scatters = _unnamed_file((len(tasks), dimension, dimension))
            sums = CentralSums(dimension, scatters[len(features)])
            for chunk in of_task:
                sums.add(chunk.moments)
            features.append(TaskFeatures(sums.moments(name), _centroids(of_task)))
        return features


@contextmanager
def open_pool(
    store: ImageStore, encoder: Encoder, cluster: ClusterConfig, cache: Path | None = None
) -> Iterator[EmbedderPool]:
    """Yield a pool of `cluster.workers` actors, which end with the context.

    The actors use GPUs if the cluster has any. Without workers, or if Ray is not initialized, this
    process embeds.

    Raises:
        ValueError: no node has room for an actor.
    """
    import ray

    if cluster.workers == 0 or not ray.is_initialized():
        embedder = Embedder(store, cache, encoder)
        yield EmbedderPool(
            lambda method, calls: (getattr(embedder, method)(*call) for call in calls)
        )
        return
    from ray.util import ActorPool

    gpus = cluster.gpus_per_worker or float(ray.cluster_resources().get("GPU", 0) > 0)
    remote = ray.remote(Embedder).options(
        num_cpus=cluster.cpus_per_worker,
        num_gpus=gpus,
        max_restarts=cluster.max_failures,
        max_task_retries=cluster.max_failures,
        # not the placement group of a search's trial, which has room for the trial's driver only
        scheduling_strategy="SPREAD",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, int(cluster.cpus_per_worker)))}},
    )
    # pickle weights on the CPU, so that nodes without a GPU can load them
    shared = ray.put(encoder.cpu())
    count = _room(cluster.most_workers, {"CPU": cluster.cpus_per_worker, "GPU": gpus})
    actors = [remote.remote(store.path.absolute(), cache, shared) for _ in range(count)]

    def call(method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        pool = ActorPool(actors)
        yield from pool.map(lambda actor, args: getattr(actor, method).remote(*args), calls)

    try:
        yield EmbedderPool(call)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):  # an unreadable image, features that are not finite
            raise ValueError(str(error.cause)) from error
        raise
    finally:
        for actor in actors:
            ray.kill(actor)


def _room(wanted: int, needs: dict[str, float]) -> int:
    """Return how many actors fit into the cluster, at most `wanted`; more would wait forever."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    count = sum(
        int(min(node.get(name, 0.0) / need for name, need in needs.items() if need > 0))
        for node in nodes
    )
    if count == 0:
        required = ", ".join(f"{need:g} {name}" for name, need in needs.items() if need > 0)
        raise ValueError(
            f"cluster.workers: no node of this Ray cluster has {required} for an actor; lower"
            " cluster.cpus_per_worker or cluster.gpus_per_worker, or set cluster.workers: 0"
        )
    if count < wanted:
        say(f"embedding with {count} actors, not {wanted}: the cluster has no room for more")
    return min(wanted, count)


def _unnamed_file(shape: tuple[int, ...]) -> np.ndarray:
    """Return float64 zeros mapped from a file without a name, which is removed with the array."""
    with tempfile.TemporaryFile() as file:
        return np.asarray(np.memmap(file, dtype=np.float64, mode="w+", shape=shape))


def _centroids(chunks: Sequence[_Chunk]) -> np.ndarray:
    """Return the class centroids [C, d] of all chunks of a task, ascending by label."""
    labels, position = np.unique(np.concatenate([c.labels for c in chunks]), return_inverse=True)
    counts, sums = np.zeros(len(labels)), np.zeros((len(labels), chunks[0].sums.shape[1]))
    np.add.at(counts, position, np.concatenate([c.counts for c in chunks]))
    np.add.at(sums, position, np.concatenate([c.sums for c in chunks]))
    return sums / counts[:, None]

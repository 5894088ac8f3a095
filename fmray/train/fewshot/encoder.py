"""The encoder of a recipe: loaded, run over pictures, written.

In: the `encoder` section; an encoder and row ids. Out: an `Encoder`; features; a model directory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmray.config import ClusterConfig
from fmray.config.fewshot import EncoderConfig
from fmray.data.image_store import ImageStore
from fmray.fewshot import Encoder, Preprocess, create_encoder
from fmray.runtime.console import say
from fmray.selection import TaskMoments
from fmray.selection.moments import CentralSums

# ImageReader of the store as tensors: decoded once where they fit in memory, else when asked for.
#
# In: an `ImageStore` and an encoder's `Preprocess`. Out: uint8 tensors by global row id.

MEMORY_BYTES = 2 * 2**30  # decoded pictures that are kept
DECODE_CHUNK = 1024  # pictures decoded at a time


class ImageReader:
    """The pictures of a store at an encoder's size.

    `kept`: what `decode_all` made, shared by all who train on the same store; without it every
    call decodes.
    """

    def __init__(
        self, store: ImageStore, preprocess: Preprocess, kept: np.ndarray | None = None
    ) -> None:
        self.preprocess = preprocess
        self._store, self._kept = store, kept

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        """uint8 [*rows.shape, 3, size, size]; rows: int64, global ids. Safe in threads."""
        flat = rows.reshape(-1)
        if self._kept is None:
            pictures = self.preprocess.decode(self._store.views(flat))
        else:
            pictures = torch.from_numpy(self._kept[flat])
        return pictures.reshape(*rows.shape, *pictures.shape[1:])


def decode_all(store: ImageStore, preprocess: Preprocess) -> np.ndarray | None:
    """uint8 [store.num_rows, 3, size, size], or None where that is more than `MEMORY_BYTES`."""
    shape = (store.num_rows, 3, preprocess.size, preprocess.size)
    if int(np.prod(shape, dtype=np.int64)) > MEMORY_BYTES:
        return None
    pictures = np.empty(shape, dtype=np.uint8)
    for start in range(0, store.num_rows, DECODE_CHUNK):
        rows = np.arange(start, min(start + DECODE_CHUNK, store.num_rows))
        pictures[rows] = preprocess.decode(store.views(rows)).numpy()
    return pictures


def load_encoder(config: EncoderConfig) -> Encoder:
    """The encoder a recipe names, with its weights."""
    return create_encoder(config.name, config.checkpoint, config.pretrained, config.image_size)


@torch.no_grad()
def embed(encoder: Encoder, pictures: ImageReader, rows: np.ndarray, batch: int) -> Tensor:
    """float32 [n, d] features of rows [n], `batch` pictures a call, where the encoder is.

    Leaves the encoder in eval mode.
    """
    device = next(encoder.parameters()).device
    encoder.eval()
    parts = [
        encoder(pictures.preprocess.normalise(pictures[rows[start : start + batch]].to(device)))
        for start in range(0, len(rows), batch)
    ]
    return torch.cat(parts).float()


def export_encoder(encoder: Encoder, target: Path) -> None:
    """Save an encoder as a directory that `encoder.checkpoint` may name; moved when complete."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    encoder.save_pretrained(partial)
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)


# Features of images, and the moments of tasks, in one pass: in this process or by actors on Ray.
#
# In: an `ImageStore`, an encoder, rows. Out: features [n, d], or for each task its `TaskMoments`
# and class centroids. What is held grows with the tasks (d^2 numbers each, in a file without a name
# that the system may write out), not with the images: their features are dropped chunk by chunk.

BATCH = 256  # images an encoder call
EMBED_CHUNK = 2048  # images a call of an actor, of one task


@dataclass(frozen=True)
class TaskFeatures:
    """What is kept of a task. centroids: [C, d], the mean feature of each of its classes, ascending
    by label."""

    moments: TaskMoments
    centroids: np.ndarray


@dataclass(frozen=True)
class _Part:
    """Of a chunk of a task: moments, and for each class in it its label, images and their sum."""

    moments: TaskMoments
    labels: np.ndarray  # [c]
    counts: np.ndarray  # [c]
    sums: np.ndarray  # [c, d]


class Embedder:
    """The encoder beside the images: what an actor is, or this process."""

    def __init__(self, store: ImageStore | Path, cache: Path | None, encoder: Encoder) -> None:
        """store: as a path on another node."""
        opened = ImageStore.open(store, cache) if isinstance(store, Path) else store
        self._pictures = ImageReader(opened, encoder.preprocess)
        self._encoder = encoder.to("cuda" if torch.cuda.is_available() else "cpu")

    def features(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n, d] of the images of rows [n], n > 0."""
        return embed(self._encoder, self._pictures, rows, BATCH).cpu().numpy()

    def part(self, name: str, rows: np.ndarray, labels: np.ndarray) -> _Part:
        """The part of task `name` that rows [n] with labels [n] are."""
        features = self.features(rows)
        found, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
        sums = np.zeros((len(found), features.shape[1]))
        np.add.at(sums, place, features)
        return _Part(TaskMoments.of(name, features), found, counts, sums)


class Pool:
    """Embedders that share the work; the answers come in the order of the questions."""

    def __init__(self, call: Callable[[str, Sequence[tuple[Any, ...]]], Iterator[Any]]) -> None:
        """call: a method of `Embedder` and the arguments of each call of it."""
        self._call = call

    def embed(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n, d] of the images of rows [n], n > 0."""
        chunks = [
            (rows[start : start + EMBED_CHUNK],) for start in range(0, len(rows), EMBED_CHUNK)
        ]
        return np.concatenate(list(self._call("features", chunks)))

    def task_features(
        self, tasks: Sequence[tuple[str, np.ndarray, np.ndarray]]
    ) -> list[TaskFeatures]:
        """The features of each task (name, rows [n], labels [n]), in their order.

        Raises:
            ValueError: a task without images, or features that are not finite.
        """
        pieces = []
        for name, rows, labels in tasks:
            if not len(rows):
                raise ValueError(f"task {name!r} has no images")
            pieces += [
                (name, rows[start : start + EMBED_CHUNK], labels[start : start + EMBED_CHUNK])
                for start in range(0, len(rows), EMBED_CHUNK)
            ]
        parts = self._call("part", pieces)
        result: list[TaskFeatures] = []
        scatters: np.ndarray | None = None
        for name, rows, _ in tasks:
            own = [next(parts) for _ in range(0, len(rows), EMBED_CHUNK)]
            dimension = len(own[0].moments.mean)
            if scatters is None:
                scatters = _scratch((len(tasks), dimension, dimension))
            sums = CentralSums(dimension, scatters[len(result)])
            for part in own:
                sums.add(part.moments)
            result.append(TaskFeatures(sums.moments(name), _centroids(own)))
        return result


@contextmanager
def open_pool(
    store: ImageStore, encoder: Encoder, cluster: ClusterConfig, cache: Path | None = None
) -> Iterator[Pool]:
    """`cluster.workers` actors on the Ray that runs, on GPUs where it has any; without workers or
    without Ray, this process. The actors end with the context.

    Raises:
        ValueError: no node has room for one actor.
    """
    import ray

    if cluster.workers == 0 or not ray.is_initialized():
        here = Embedder(store, cache, encoder)
        yield Pool(lambda method, calls: (getattr(here, method)(*call) for call in calls))
        return
    from ray.util import ActorPool

    gpus = cluster.gpus_per_worker or float(ray.cluster_resources().get("GPU", 0) > 0)
    remote = ray.remote(Embedder).options(
        num_cpus=cluster.cpus_per_worker,
        num_gpus=gpus,
        max_restarts=cluster.max_failures,
        max_task_retries=cluster.max_failures,
        # not into the placement group of a trial of a search, which has room for its driver alone
        scheduling_strategy="SPREAD",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, int(cluster.cpus_per_worker)))}},
    )
    # Weights on the CPU: what they are pickled to must load where there is no GPU.
    shared = ray.put(encoder.cpu())
    count = _room(cluster.most_workers, {"CPU": cluster.cpus_per_worker, "GPU": gpus})
    actors = [remote.remote(store.path.absolute(), cache, shared) for _ in range(count)]

    def call(method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        pool = ActorPool(actors)
        yield from pool.map(lambda actor, one: getattr(actor, method).remote(*one), calls)

    try:
        yield Pool(call)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):  # a bad image, a feature that is not finite
            raise ValueError(str(error.cause)) from error
        raise
    finally:
        for actor in actors:
            ray.kill(actor)


def _room(wanted: int, needs: dict[str, float]) -> int:
    """How many actors the cluster has room for, `wanted` at most: more would wait for ever."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    count = sum(
        int(min(node.get(name, 0.0) / need for name, need in needs.items() if need > 0))
        for node in nodes
    )
    if count == 0:
        asked = ", ".join(f"{need:g} {name}" for name, need in needs.items() if need > 0)
        raise ValueError(
            f"cluster.workers: no node of this Ray cluster has {asked} for an actor; lower"
            " cluster.cpus_per_worker or cluster.gpus_per_worker, or set cluster.workers: 0"
        )
    if count < wanted:
        say(f"embedding with {count} actors, not {wanted}: the cluster has no room for more")
    return min(wanted, count)


def _scratch(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros in a file that has no name and goes with the array."""
    with tempfile.TemporaryFile() as file:
        return np.asarray(np.memmap(file, dtype=np.float64, mode="w+", shape=shape))


def _centroids(parts: Sequence[_Part]) -> np.ndarray:
    labels, place = np.unique(np.concatenate([p.labels for p in parts]), return_inverse=True)
    counts, sums = np.zeros(len(labels)), np.zeros((len(labels), parts[0].sums.shape[1]))
    np.add.at(counts, place, np.concatenate([p.counts for p in parts]))
    np.add.at(sums, place, np.concatenate([p.sums for p in parts]))
    return sums / counts[:, None]

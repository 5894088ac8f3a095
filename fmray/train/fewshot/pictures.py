"""Pictures of the store as tensors: decoded once where they fit in memory, else when asked for.

In: an `ImageStore` and an encoder's `Preprocess`. Out: uint8 tensors by global row id.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fmray.data.image_store import ImageStore
from fmray.fewshot import Preprocess

MEMORY_BYTES = 2 * 2**30  # decoded pictures that are kept
CHUNK = 1024  # pictures decoded at a time


class Pictures:
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
    for start in range(0, store.num_rows, CHUNK):
        rows = np.arange(start, min(start + CHUNK, store.num_rows))
        pictures[rows] = preprocess.decode(store.views(rows)).numpy()
    return pictures

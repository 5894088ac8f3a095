"""What one request computed and another can use: image features, and the lower half of a prompt.

In: tensors under content keys. Out: the same tensors, least recently used ones forgotten first,
bounded in bytes. The always-on layers do not know the budget and look only backwards, so what they
gave for the first tokens of a prompt holds for every prompt that begins with these tokens (and
these pictures), whatever its budget: keys and values, and the hidden states that enter the first
switchable layer. It is kept in blocks of tokens; a block's key covers all that comes before it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fmray.engine.requests import Request


class TensorCache:
    """Tuples of tensors by key, at most `bound` bytes, the least recently used forgotten first."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> tuple[Tensor, ...] | None:
        """What is kept under `key`; counts as use."""
        found = self._kept.get(key)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
            self._kept.move_to_end(key)
        return found

    def put(self, key: Hashable, tensors: tuple[Tensor, ...]) -> None:
        """Keep tensors that own their memory; larger than the bound: keep nothing."""
        self.forget(key)
        size = _bytes(tensors)
        if size > self.bound:
            return
        self._kept[key] = tensors
        self.bytes += size
        while self.bytes > self.bound:
            self.forget(next(iter(self._kept)))

    def touch(self, key: Hashable) -> bool:
        """Whether `key` is kept; counts as use, not as hit or miss."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return True
        return False

    def forget(self, key: Hashable) -> None:
        """Drop what is kept under `key`, if anything is."""
        if key in self._kept:
            self.bytes -= _bytes(self._kept.pop(key))


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Prefix:
    """What the always-on layers gave for the first p tokens of a prompt.

    keys_values: [layers, 2, H, p, head_dim]. hidden: [p, d], as they enter the first switchable
    layer.
    """

    keys_values: Tensor
    hidden: Tensor

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]


class PrefixCache:
    """Lower halves of prompts, in blocks of `block` tokens."""

    def __init__(self, bound: int, block: int, image_token: int) -> None:
        if block < 1:
            raise ValueError(f"a block of {block} tokens; at least one is needed")
        self.blocks = TensorCache(bound)
        self.block = block
        self.image_token = image_token

    def keys(self, request: Request) -> list[bytes]:
        """One key a full block of the prompt, each covering all before it too.

        Pictures count by the request's image key and the sizes the processor gave. Without a key,
        blocks from the first image token on have none.
        """
        ids = request.inputs["input_ids"][0].tolist()
        pictures = "pixel_values" in request.inputs
        digest, seen, result = b"", False, []
        for start in range(0, len(ids) - self.block + 1, self.block):
            block = ids[start : start + self.block]
            state = hashlib.sha256(digest)
            state.update(repr(block).encode())
            if not seen and pictures and self.image_token in block:
                if request.image_key is None:
                    break
                seen = True
                state.update(repr((request.image_key, _sizes(request))).encode())
            digest = state.digest()
            result.append(digest)
        return result

    def find(self, keys: Sequence[bytes]) -> Prefix | None:
        """The longest kept beginning."""
        found = []
        for key in keys:
            kept = self.blocks.get(key)
            if kept is None:
                break
            found.append(kept)
        self._use(keys[: len(found)])
        if not found:
            return None
        return Prefix(
            torch.cat([block[0] for block in found], dim=3),
            torch.cat([block[1] for block in found]),
        )

    def keep(self, keys: Sequence[bytes], rest: Prefix, known: int) -> None:
        """Keep the blocks of a prompt from token `known` on, which is where `rest` begins."""
        for number in range(known // self.block, len(keys)):
            if not self.blocks.touch(keys[number]):
                start = number * self.block - known
                part = slice(start, start + self.block)
                tensors = rest.keys_values[:, :, :, part].clone(), rest.hidden[part].clone()
                self.blocks.put(keys[number], tensors)
        self._use(keys)

    def _use(self, keys: Sequence[bytes]) -> None:
        # a block is of no use without those before it, so the last ones are forgotten first
        for key in reversed(keys):
            self.blocks.touch(key)


def _sizes(request: Request) -> list[tuple[str, list[int]]]:
    """What places pictures in the prompt: small tensors of whole numbers beside the ids."""
    return sorted(
        (name, value.flatten().tolist())
        for name, value in request.inputs.items()
        if name not in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values")
    )

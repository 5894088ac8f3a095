"""Caches shared between requests: image features, and the always-on layers' output for prompts.

The always-on layers do not depend on the budget and attend only backwards. So their keys, values
and hidden states for the first tokens of a prompt are valid for every prompt that begins with the
same tokens and images, at any budget. They are cached in blocks of tokens; the key of a block
covers all tokens before it. Both caches are bounded in bytes and evict the least recently used
entry.
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
    """Least-recently-used cache of tensor tuples, of at most `bound` bytes."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> tuple[Tensor, ...] | None:
        """Return the entry of `key`; counts as use."""
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
        else:
            self.hits += 1
            self._entries.move_to_end(key)
        return entry

    def put(self, key: Hashable, tensors: tuple[Tensor, ...]) -> None:
        """Store tensors, which must own their memory; ignored if larger than the bound."""
        self.forget(key)
        size = _bytes(tensors)
        if size > self.bound:
            return
        self._entries[key] = tensors
        self.bytes += size
        while self.bytes > self.bound:
            self.forget(next(iter(self._entries)))

    def touch(self, key: Hashable) -> bool:
        """Return whether `key` is cached; counts as use, not as hit or miss."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return True
        return False

    def forget(self, key: Hashable) -> None:
        """Remove the entry of `key`, if there is one."""
        if key in self._entries:
            self.bytes -= _bytes(self._entries.pop(key))


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Prefix:
    """Output of the always-on layers for the first p tokens of a prompt."""

    keys_values: Tensor  #: [layers, 2, H, p, head_dim]
    hidden: Tensor  #: [p, d], input of the first switchable layer

    @property
    def tokens(self) -> int:
        """p."""
        return self.hidden.shape[0]


class PrefixCache:
    """Cache of prompt prefixes in blocks of `block` tokens."""

    def __init__(self, bound: int, block: int, image_token: int | None) -> None:
        if block < 1:
            raise ValueError(f"a block must have at least one token, not {block}")
        self.blocks = TensorCache(bound)
        self.block = block
        self.image_token = image_token

    def keys(self, request: Request) -> list[bytes]:
        """Return one key per full block of the prompt; each covers all blocks before it.

        Images enter by the request's image key and the processor's sizes. Without an image key,
        the blocks from the first image token on have no keys.
        """
        ids = request.inputs["input_ids"][0].tolist()
        images = "pixel_values" in request.inputs
        digest, seen, keys = b"", False, []
        for start in range(0, len(ids) - self.block + 1, self.block):
            block = ids[start : start + self.block]
            state = hashlib.sha256(digest)
            state.update(repr(block).encode())
            if not seen and images and self.image_token in block:
                if request.image_key is None:
                    break
                seen = True
                state.update(repr((request.image_key, _sizes(request))).encode())
            digest = state.digest()
            keys.append(digest)
        return keys

    def find(self, keys: Sequence[bytes]) -> Prefix | None:
        """Return the longest cached prefix."""
        blocks = []
        for key in keys:
            block = self.blocks.get(key)
            if block is None:
                break
            blocks.append(block)
        self._use(keys[: len(blocks)])
        if not blocks:
            return None
        return Prefix(
            torch.cat([block[0] for block in blocks], dim=3),
            torch.cat([block[1] for block in blocks]),
        )

    def store(self, keys: Sequence[bytes], rest: Prefix, known: int) -> None:
        """Store the blocks of a prompt from token `known` on, where `rest` begins."""
        for number in range(known // self.block, len(keys)):
            if not self.blocks.touch(keys[number]):
                start = number * self.block - known
                part = slice(start, start + self.block)
                tensors = rest.keys_values[:, :, :, part].clone(), rest.hidden[part].clone()
                self.blocks.put(keys[number], tensors)
        self._use(keys)

    def _use(self, keys: Sequence[bytes]) -> None:
        # A block is useless without the blocks before it, so the last ones are evicted first.
        for key in reversed(keys):
            self.blocks.touch(key)


def _sizes(request: Request) -> list[tuple[str, list[int]]]:
    """The inputs that position images in the prompt: small integer tensors besides the ids."""
    return sorted(
        (name, value.flatten().tolist())
        for name, value in request.inputs.items()
        if name not in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values")
    )

"""Keys and values of the running requests: one arena per decoder layer, bounded in bytes.

An arena belongs to a decoder layer, or to one packed part of it (design H), and has a slot for each
row that runs it. Its rows are contiguous from slot 0 on (the last row fills a gap), so that stock
attention takes views and a decode step copies no keys or values. A row has no slot in a layer that
it does not run, and an arena without rows holds no memory.

Bytes are reserved before a request starts: rows x the longest row, in every arena that it may run,
plus space to move one arena. So an admitted request always finds a slot, and the allocated bytes,
including copies during a move, stay within the bound.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import accumulate

import torch
from torch import Tensor, nn

from fmray.adallava.layout import SwitchLayout


class TokenBytes:
    """Bytes of keys and values per token: in one layer, and in all layers of a request."""

    def __init__(self, layout: SwitchLayout, dtype: torch.dtype) -> None:
        self.layout = layout
        self._head = 2 * layout.head_dim * dtype.itemsize
        self.layer = layout.num_kv_heads * self._head
        parts = [layout.unit_slices(unit)[1] for unit in range(layout.units_per_layer)]
        self._unit_heads = [part.stop - part.start for part in parts]
        # The plan is not known before the prefill: assume the units that take the most bytes.
        most = sorted(self._unit_heads * (layout.num_layers - layout.first), reverse=True)
        self._upper = list(accumulate((heads * self._head for heads in most), initial=0))

    def of(self, units_on: int) -> int:
        """Return the largest number of bytes per token with `units_on` units on."""
        return self.layout.first * self.layer + self._upper[units_on]

    def heads(self, pattern: tuple[bool, ...]) -> int:
        """Return the key/value heads of a layer that runs this pattern of units."""
        return sum(h for h, on in zip(self._unit_heads, pattern, strict=True) if on)


class Arena:
    """Keys and values [slots, heads, capacity, head_dim] of one module for the rows that run it."""

    def __init__(
        self, layer: int, module: nn.Module, heads: int, share: float, head_dim: int
    ) -> None:
        """share: the module's part of the layer's weights."""
        parameter = next(module.parameters())
        self.layer = layer
        self.module = module
        self.heads = heads
        self.share = share
        #: rows in slots 0, 1, ...; other values are zero or left from earlier rows, and masked
        self.rows: list[Hashable] = []
        self._needs: list[int] = []
        self._used = 0  # slots that have been written to
        self._empty = parameter.new_zeros((0, heads, 0, head_dim))
        self.keys = self.values = self._empty

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return 2 * self.keys.numel() * self.keys.element_size()

    @property
    def tight(self) -> tuple[int, int]:
        """Slots and capacity that the current rows need."""
        return len(self.rows), max(self._needs, default=0)

    def bytes_of(self, slots: int, capacity: int) -> int:
        """Return the bytes of an arena of this size."""
        return 2 * slots * self.heads * capacity * self.keys.shape[3] * self.keys.element_size()

    def resize(self, slots: int, capacity: int) -> None:
        """Reallocate with a new size, and copy what fits."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros((slots, self.heads, capacity, old.shape[3]))
            rows, length = min(slots, old.shape[0]), min(capacity, old.shape[2])
            new[:rows, :, :length] = old[:rows, :, :length]
            setattr(self, name, new)
        self._used = min(self._used, slots)

    def add(self, row: Hashable, need: int) -> int:
        """Give a row the next slot, which must exist; clears what an earlier row left in it."""
        slot = len(self.rows)
        assert slot < self.keys.shape[0]
        assert need <= self.keys.shape[2]
        if slot < self._used:
            self.keys[slot].zero_()
            self.values[slot].zero_()
        self._used = max(self._used, slot + 1)
        self.rows.append(row)
        self._needs.append(need)
        return slot

    def remove(self, row: Hashable) -> None:
        """Remove a row; the last row moves into its slot."""
        slot = self.rows.index(row)
        last = len(self.rows) - 1
        if slot != last:
            self.keys[slot] = self.keys[last]
            self.values[slot] = self.values[last]
            self.rows[slot], self._needs[slot] = self.rows[last], self._needs[last]
        self.rows.pop()
        self._needs.pop()
        if not self.rows:
            self.keys = self.values = self._empty


class KVMemory:
    """The arenas of one engine, and the bytes reserved for each request."""

    def __init__(self, layout: SwitchLayout, dtype: torch.dtype, bound: int, max_rows: int) -> None:
        self.token = TokenBytes(layout, dtype)
        self.bound = bound
        self.max_rows = max_rows
        self._arenas: dict[Hashable, Arena] = {}
        self._reserved: dict[Hashable, tuple[int, int]] = {}  # tokens, bytes per token

    @property
    def bytes(self) -> int:
        """Bytes allocated now."""
        return sum(arena.bytes for arena in self._arenas.values())

    @property
    def reserved(self) -> int:
        """Bytes that the admitted requests may use, with the space to move one arena."""
        return self._total(self._reserved.values())

    def _total(self, requests: Iterable[tuple[int, int]]) -> int:
        requests = list(requests)
        # An arena is as long as its longest row, so each row may take that length.
        longest = max((tokens for tokens, _ in requests), default=0)
        moving = len(requests) * self.token.layer
        return longest * (sum(each for _, each in requests) + moving)

    def fits(self, tokens: int, units_on: int) -> bool:
        """Whether a request of `tokens`, answer included, would fit if it were alone."""
        return self._total([(tokens, self.token.of(units_on))]) <= self.bound

    def has_room(self, tokens: int, units_on: int) -> bool:
        """Whether a request fits next to the admitted ones."""
        new = (tokens, self.token.of(units_on))
        return self._total([*self._reserved.values(), new]) <= self.bound

    def reserve(self, row: Hashable, tokens: int, units_on: int) -> None:
        """Reserve the bytes of a request, or change them once its plan is known."""
        self._reserved[row] = (tokens, self.token.of(units_on))

    def place(
        self,
        row: Hashable,
        key: Hashable,
        layer: int,
        module: nn.Module,
        heads: int,
        share: float,
    ) -> tuple[Arena, int]:
        """Return the arena `key` and a new slot in it for an admitted row.

        Args:
            module: decoder layer `layer`, or a `share` of it.
        """
        arena = self._arenas.get(key)
        if arena is None:
            arena = self._arenas[key] = Arena(
                layer, module, heads, share, self.token.layout.head_dim
            )
        need = self._reserved[row][0]
        slots, capacity = arena.keys.shape[0], arena.keys.shape[2]
        if slots <= len(arena.rows) or capacity < need:
            self._grow(arena, need)
        return arena, arena.add(row, need)

    def _grow(self, arena: Arena, need: int) -> None:
        """Make space for one more row: generously where the bound allows, else exactly.

        Invariant: the allocated bytes plus the largest arena once more are within the bound, so
        that any one arena can be moved.
        """
        rows, longest = arena.tight
        slots, capacity = rows + 1, max(longest, need)
        roomy = min(self.max_rows, max(slots, 2 * rows)), -(-capacity // 64) * 64
        size, allocated = arena.bytes_of(*roomy), self.bytes
        largest = max(size, *(other.bytes for other in self._arenas.values()))
        if max(allocated, allocated - arena.bytes + largest) + size <= self.bound:
            arena.resize(*roomy)
            return
        for other in self._arenas.values():
            if other.bytes > other.bytes_of(*other.tight):
                other.resize(*other.tight)
        arena.resize(slots, capacity)

    def release(self, row: Hashable) -> None:
        """Free the slots and the reservation of a request, if it has any."""
        self._reserved.pop(row, None)
        for key, arena in list(self._arenas.items()):
            if row in arena.rows:
                arena.remove(row)
            if not arena.rows:
                del self._arenas[key]

    def arenas(self) -> list[Arena]:
        """Return the arenas in use, lowest layer first."""
        return sorted(self._arenas.values(), key=lambda arena: arena.layer)


class PrefillCache:
    """The cache argument of a stock layer during the prefill of one row."""

    def __init__(self, arena: Arena, slot: int, start: int = 0) -> None:
        self.arena, self.slot, self.start = arena, slot, start

    def update(
        self, keys: Tensor, values: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write [1, H, n, head_dim] from `start` on; returns all so far, [1, H, start + n, .]."""
        end = self.start + keys.shape[2]
        slots = slice(self.slot, self.slot + 1)
        self.arena.keys[slots, :, self.start : end] = keys
        self.arena.values[slots, :, self.start : end] = values
        return self.arena.keys[slots, :, :end], self.arena.values[slots, :, :end]


class DecodeCache:
    """The cache argument of a stock layer for one new token of each row of an arena."""

    def __init__(self, arena: Arena, lengths: list[int], positions: tuple[Tensor, Tensor]) -> None:
        self.arena = arena
        self.lengths = lengths
        self.positions = positions  # slots [r] and lengths [r], on the device

    def update(
        self, keys: Tensor, values: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write [r, H, 1, head_dim] at each row's length; returns [r, H, longest + 1, .]."""
        rows, end = len(self.lengths), max(self.lengths) + 1
        arena = self.arena
        if min(self.lengths) + 1 == end:
            arena.keys[:rows, :, end - 1 : end] = keys
            arena.values[:rows, :, end - 1 : end] = values
        else:
            slots, lengths = self.positions
            arena.keys[slots, :, lengths] = keys[:, :, 0]
            arena.values[slots, :, lengths] = values[:, :, 0]
        return arena.keys[:rows, :, :end], arena.values[:rows, :, :end]

"""Keys and values of the running requests: one arena a decoder layer, bounded in bytes.

In: rows that join and leave, and the decoder layers (or packed parts of them) that each runs. Out:
contiguous views a stock attention takes as they are. In an arena its rows lie side by side from 0
on (a hole is filled by the last one), so a decoding step copies no keys and no values. What a row
does not run has no place for it, and an arena without rows holds nothing.

Bytes are reserved before a request starts: rows x the longest row, in every arena it may run, plus
one arena's room to move in. So a request that was admitted always finds its place, and what is
allocated, copies on the way included, stays within the bound.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import accumulate

import torch
from torch import Tensor, nn

from fmray.adallava.layout import SwitchLayout


class TokenBytes:
    """Bytes of keys and values that one token takes: in a layer, and in all a request runs."""

    def __init__(self, layout: SwitchLayout, dtype: torch.dtype) -> None:
        self.layout = layout
        self._head = 2 * layout.head_dim * dtype.itemsize
        self.layer = layout.num_kv_heads * self._head
        parts = [layout.unit_slices(unit)[1] for unit in range(layout.units_per_layer)]
        self._unit_heads = [part.stop - part.start for part in parts]
        # the plan is not known before the prefill: the switches that take most
        most = sorted(self._unit_heads * (layout.num_layers - layout.first), reverse=True)
        self._upper = list(accumulate((heads * self._head for heads in most), initial=0))

    def of(self, units_on: int) -> int:
        """Bytes a token at most, with `units_on` switches on."""
        return self.layout.first * self.layer + self._upper[units_on]

    def heads(self, pattern: tuple[bool, ...]) -> int:
        """Key/value heads of a layer of which a pattern of switches is on."""
        return sum(h for h, on in zip(self._unit_heads, pattern, strict=True) if on)


class Arena:
    """Keys and values [slots, heads, capacity, head_dim] of one module for the rows that run it.

    share: of the layer's weights that the module has. rows: who lies in slots 0, 1, ...; the rest
    of `keys` and `values` is zero or an earlier row's (masked by whoever looks at more rows).
    """

    def __init__(
        self, layer: int, module: nn.Module, heads: int, share: float, head_dim: int
    ) -> None:
        parameter = next(module.parameters())
        self.layer = layer
        self.module = module
        self.heads = heads
        self.share = share
        self.rows: list[Hashable] = []
        self._needs: list[int] = []
        self._used = 0  # slots that hold something, or did
        self._empty = parameter.new_zeros((0, heads, 0, head_dim))
        self.keys = self.values = self._empty

    @property
    def bytes(self) -> int:
        """Allocated."""
        return 2 * self.keys.numel() * self.keys.element_size()

    @property
    def tight(self) -> tuple[int, int]:
        """Slots and capacity that the rows need."""
        return len(self.rows), max(self._needs, default=0)

    def bytes_of(self, slots: int, capacity: int) -> int:
        """Of an arena of that size."""
        return 2 * slots * self.heads * capacity * self.keys.shape[3] * self.keys.element_size()

    def resize(self, slots: int, capacity: int) -> None:
        """Move to an arena of that size, what fits of the old one included."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros((slots, self.heads, capacity, old.shape[3]))
            kept, length = min(slots, old.shape[0]), min(capacity, old.shape[2])
            new[:kept, :, :length] = old[:kept, :, :length]
            setattr(self, name, new)
        self._used = min(self._used, slots)

    def add(self, row: Hashable, need: int) -> int:
        """Give a row the next slot, which must be there, empty of what an earlier one left."""
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
        """Take a row out; the last one moves into its slot."""
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
    """The arenas of one engine, and who may use how much of them."""

    def __init__(self, layout: SwitchLayout, dtype: torch.dtype, bound: int, max_rows: int) -> None:
        self.token = TokenBytes(layout, dtype)
        self.bound = bound
        self.max_rows = max_rows
        self._arenas: dict[Hashable, Arena] = {}
        self._reserved: dict[Hashable, tuple[int, int]] = {}  # tokens, bytes a token

    @property
    def bytes(self) -> int:
        """Allocated now."""
        return sum(arena.bytes for arena in self._arenas.values())

    @property
    def reserved(self) -> int:
        """Bytes that the admitted requests may come to take, room to move included."""
        return self._total(self._reserved.values())

    def _total(self, requests: Iterable[tuple[int, int]]) -> int:
        requests = list(requests)
        # an arena is as long as its longest row, so each row may take that
        longest = max((tokens for tokens, _ in requests), default=0)
        moving = len(requests) * self.token.layer
        return longest * (sum(each for _, each in requests) + moving)

    def fits(self, tokens: int, units_on: int) -> bool:
        """Whether a request of so many tokens, answer included, would fit if it were alone."""
        return self._total([(tokens, self.token.of(units_on))]) <= self.bound

    def has_room(self, tokens: int, units_on: int) -> bool:
        """Whether it fits beside those that were admitted."""
        new = (tokens, self.token.of(units_on))
        return self._total([*self._reserved.values(), new]) <= self.bound

    def reserve(self, row: Hashable, tokens: int, units_on: int) -> None:
        """Admit a request, or change what it may take (fewer switches than it might have had)."""
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
        """A slot for an admitted row in the arena `key`, whose `module` is layer `layer` or a
        `share` of it.
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
        """Room for one row more: generously where the bound allows, else what is due.

        Kept at all times: what is allocated, and the largest arena once more, is within the bound;
        so any arena can be moved, one at a time.
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
        """Forget a request: its slots and what was reserved for it. One never admitted is no
        mistake.
        """
        self._reserved.pop(row, None)
        for key, arena in list(self._arenas.items()):
            if row in arena.rows:
                arena.remove(row)
            if not arena.rows:
                del self._arenas[key]

    def arenas(self) -> list[Arena]:
        """Those in use, lowest layer first."""
        return sorted(self._arenas.values(), key=lambda arena: arena.layer)


class PrefillCache:
    """What a stock layer takes as its cache while one row's prompt runs through it."""

    def __init__(self, arena: Arena, slot: int, start: int = 0) -> None:
        self.arena, self.slot, self.start = arena, slot, start

    def update(
        self, keys: Tensor, values: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write [1, H, n, head_dim] from `start` on; -> all up to there, [1, H, start + n, .]."""
        end = self.start + keys.shape[2]
        places = slice(self.slot, self.slot + 1)
        self.arena.keys[places, :, self.start : end] = keys
        self.arena.values[places, :, self.start : end] = values
        return self.arena.keys[places, :, :end], self.arena.values[places, :, :end]


class DecodeCache:
    """The same for one new token of each of an arena's rows."""

    def __init__(self, arena: Arena, lengths: list[int], places: tuple[Tensor, Tensor]) -> None:
        self.arena = arena
        self.lengths = lengths
        self.places = places  # slots [r] and lengths [r], on the device

    def update(
        self, keys: Tensor, values: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write [r, H, 1, head_dim], each row at its own length; -> [r, H, longest + 1, .]."""
        rows, end = len(self.lengths), max(self.lengths) + 1
        arena = self.arena
        if min(self.lengths) + 1 == end:
            arena.keys[:rows, :, end - 1 : end] = keys
            arena.values[:rows, :, end - 1 : end] = values
        else:
            slots, lengths = self.places
            arena.keys[slots, :, lengths] = keys[:, :, 0]
            arena.values[slots, :, lengths] = values[:, :, 0]
        return arena.keys[:rows, :, :end], arena.values[:rows, :, :end]

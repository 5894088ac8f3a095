"""The engine's two forward passes: the prefill of one row, and one decode step of all rows.

Both write keys and values to the arenas and return logits. The stock decoder layers compute
(`fmray.adallava.families.Backbone`); this module decides which rows run which layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fmray.adallava import AdaptiveVLM
from fmray.adallava.execution import LayerInputs
from fmray.adallava.passes import Draw, Prompt
from fmray.adallava.sampling import gumbel_noise
from fmray.engine.kv_memory import Arena, DecodeCache, KVMemory, PrefillCache
from fmray.engine.requests import Request
from fmray.engine.reuse import Prefix, PrefixCache, TensorCache
from fmray.engine.tokens import TextStream, generator_of


@dataclass(eq=False)
class Row:
    """State of a request in the engine."""

    request: Request
    stream: TextStream
    generator: torch.Generator
    started_at: float
    length: int = 0  #: keys in the always-on layers
    position: int = 0  #: of the next token
    token: int = 0  #: the newest token; its keys are computed in the next step
    tokens: int = 0  #: of the answer so far
    plan: tuple[bool, ...] = ()
    layers: int = 0  #: decoder layers that run
    computed: int = 0  #: prompt tokens that the prefill computed
    prefix_tokens: int = 0  #: prompt tokens from the prefix cache
    vision_hit: bool = False
    prefill_seconds: float = 0.0


class Prefill:
    """Prefill of one prompt, with cached prefixes and image features."""

    def __init__(
        self,
        model: AdaptiveVLM,
        memory: KVMemory,
        images: TensorCache,
        prefixes: PrefixCache | None,
    ) -> None:
        self.model = model
        self.memory = memory
        self.images = images
        self.prefixes = prefixes

    def __call__(self, row: Row) -> Tensor:
        """Run the prompt; returns the logits [1, V] of the first new token and fills in the row."""
        # The part of the prompt that is not in the prefix cache.
        model, request = self.model, row.request
        backbone, layout = model.backbone, model.layout
        inline = model.latency_token == "inline"
        device = backbone.device
        extras = {name: value.to(device) for name, value in request.inputs.items()}
        ids = extras.pop("input_ids")
        pixels = extras.pop("pixel_values", None)
        attended = torch.ones_like(ids)
        extras.pop("attention_mask", None)
        length = ids.shape[1]
        keys = self.prefixes.keys(request) if self.prefixes else []
        prefix = self.prefixes.find(keys) if self.prefixes else None
        known = prefix.tokens if prefix else 0

        positions = backbone.positions(ids, attended, extras, count=True)
        embeddings, added = self._embed(row, ids, pixels, extras, known)
        units_on = request.units_on if request.plan is None else int(request.plan.sum())
        prompt = Prompt(
            embeddings,
            None,
            positions,
            torch.tensor([length], device=device),
            torch.tensor([units_on], device=device),
            None if request.plan is None else request.plan[None].to(device),
        )
        token = model.latency_embedding(prompt.units_on, embeddings.dtype)[:, None]
        if inline:
            embeddings = torch.cat((embeddings, token), dim=1)
            added = None if added is None else functional.pad(added, (0, 0, 0, 1))
            positions = torch.cat((positions, positions[..., -1:] + 1), dim=-1)

        # The always-on layers, which also compute the latency token.
        slots = [
            self.memory.place(row, index, index, backbone.layers[index], layout.num_kv_heads, 1.0)
            for index in range(layout.first)
        ]
        hidden, token = self._lower(slots, embeddings, added, positions, token, prefix, inline)
        if self.prefixes:
            self._store_prefix(slots, keys, hidden, known)

        # The plan, and the layers or parts of layers that it switches on.
        noise = None
        if model.scheduler_kind == "random":
            noise = gumbel_noise((1, layout.num_units), generator_of(request.sampling))
        plan, _ = model.decide(token, prompt, Draw(noise=noise))
        row.plan = tuple(plan[0].bool().tolist())
        self.memory.reserve(row, max_keys(request, model.latency_token), sum(row.plan))
        hidden = self._upper(row, hidden, positions)

        row.length = length + inline
        row.position = int(prompt.next_position) + inline
        row.prefix_tokens = known
        row.computed = length - known
        return backbone.logits(hidden[:, -1])

    def _embed(
        self,
        row: Row,
        ids: Tensor,
        pixels: Tensor | None,
        extras: dict[str, Tensor],
        known: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings [1, n - known, d] of the prompt after its cached prefix, and what
        is added to them after the first layers [D, 1, n - known, d]."""
        backbone, key = self.model.backbone, row.request.image_key
        rest = ids[:, known:]
        if pixels is None:
            return backbone.embed(rest, None, extras), None
        is_image = rest == self.model.base.config.image_token_id
        if known and not bool(is_image.any()):
            row.vision_hit = True  # all images are in the cached prefix
            return backbone.embed(rest, None, extras), None
        cached = None if key is None else self.images.get(key)
        row.vision_hit = cached is not None
        features = cached[0] if cached else backbone.image_features(pixels, extras)
        if cached is None and key is not None:
            self.images.put(key, (features.clone(),))
        added = backbone.added(ids, features)
        added = None if added is None else added[:, :, known:]
        return backbone.embed(ids, None, extras, features)[:, known:], added

    def _lower(
        self,
        slots: list[tuple[Arena, int]],
        embeddings: Tensor,
        added: Tensor | None,
        positions: Tensor,
        token: Tensor,
        prefix: Prefix | None,
        inline: bool,
    ) -> tuple[Tensor, Tensor]:
        """Run the always-on layers.

        Returns the hidden states of all tokens [1, n (+ 1), d] and of the latency token [1, d].
        """
        backbone = self.model.backbone
        length = positions.shape[-1]
        known = prefix.tokens if prefix else 0
        if prefix is not None:
            for (arena, slot), (keys, values) in zip(slots, prefix.keys_values, strict=True):
                arena.keys[slot, :, :known] = keys
                arena.values[slot, :, :known] = values
        hidden = embeddings
        if length > known:
            inputs = self._inputs(hidden, positions, known)
            for index, (arena, slot) in enumerate(slots):
                cache = PrefillCache(arena, slot, known)
                hidden = inputs.run(backbone.layers[index], hidden, cache)
                if added is not None and index < len(added):
                    hidden = hidden + added[index]
        if prefix is not None:
            hidden = torch.cat((prefix.hidden[None], hidden), dim=1)
        if inline:
            return hidden, hidden[:, -1]
        # A probe token follows the prompt; the first new token overwrites its keys.
        position = positions[..., -1:] + 1
        inputs = LayerInputs(
            None, backbone.rotary(token, position), position if position.dim() == 2 else None
        )
        for index, (arena, slot) in enumerate(slots):
            cache = PrefillCache(arena, slot, length)
            token = inputs.run(backbone.layers[index], token, cache)
        return hidden, token[:, 0]

    def _upper(self, row: Row, hidden: Tensor, positions: Tensor) -> Tensor:
        """Run the layers, or parts of layers, that the plan switches on."""
        layout, units = self.model.layout, self.model.layout.units_per_layer
        row.layers = layout.first
        inputs = self._inputs(hidden, positions, 0)
        for index in range(layout.first, layout.num_layers):
            start = (index - layout.first) * units
            pattern = row.plan[start : start + units]
            module = self.model.execution.module_for(index, pattern)
            if module is None:
                continue
            heads, share = self.memory.token.heads(pattern), sum(pattern) / units
            arena, slot = self.memory.place(row, (index, pattern), index, module, heads, share)
            hidden = inputs.run(module, hidden, PrefillCache(arena, slot))
            row.layers += 1
        return hidden

    def _inputs(self, hidden: Tensor, positions: Tensor, known: int) -> LayerInputs:
        """Return the layer inputs of the tokens from `known` on, with causal attention."""
        backbone = self.model.backbone
        positions = positions[..., known:]
        flat = positions if positions.dim() == 2 else None
        if known == 0:
            mask = backbone.causal_mask(hidden, None, None)
        elif hidden.shape[1] == 1:
            mask = None
        else:
            index = torch.arange(known + hidden.shape[1], device=hidden.device)
            visible = (index <= index[known:, None])[None, None]
            mask = backbone.mask_of(visible, hidden.dtype)
        return LayerInputs(mask, backbone.rotary(hidden, positions), flat)

    def _store_prefix(
        self, slots: list[tuple[Arena, int]], keys: Sequence[bytes], hidden: Tensor, known: int
    ) -> None:
        """Store the full blocks of the prompt that were not cached."""
        end = len(keys) * self.prefixes.block
        if known < end:
            keys_values = torch.stack(
                [
                    torch.stack((arena.keys[slot, :, known:end], arena.values[slot, :, known:end]))
                    for arena, slot in slots
                ]
            )
            self.prefixes.store(keys, Prefix(keys_values, hidden[0, known:end]), known)


def max_keys(request: Request, latency_token: str) -> int:
    """Most keys that a request may have in each arena (a probe token shares one of them)."""
    inline = latency_token == "inline"
    return request.prompt_tokens + inline + request.sampling.max_new_tokens


@dataclass(frozen=True)
class Call:
    """One module and the rows that run it in a decode step."""

    arena: Arena
    order: tuple[int, ...]  #: index of the row in each slot
    index: Tensor | None  #: the same on the device; None: all rows, in order


class Decode:
    """One decode step of all rows; the calls are computed once per change of the rows."""

    def __init__(self, model: AdaptiveVLM, memory: KVMemory) -> None:
        self.model = model
        self.memory = memory
        self.packed_calls = self.packed_unshared = self.packed_unsaved = 0
        self.changed()

    def changed(self) -> None:
        """Drop the computed calls, because a row joined or left."""
        self._rows: list[Row] = []
        self._layers: list[list[Call]] = []

    @property
    def layers(self) -> int:
        """Decoder layers in which at least one row runs."""
        return len(self._layers)

    def _arrange(self, rows: list[Row]) -> None:
        """Compute the calls of each layer, and the counts for `EngineStats.packed_*`."""
        self._rows = list(rows)
        position = {row: number for number, row in enumerate(rows)}
        everyone = tuple(range(len(rows)))
        device = self.model.backbone.device
        by_layer: dict[int, list[Call]] = {}
        for arena in self.memory.arenas():
            order = tuple(position[row] for row in arena.rows)
            index = None if order == everyone else torch.tensor(order, device=device)
            by_layer.setdefault(arena.layer, []).append(Call(arena, order, index))
        self._layers = [by_layer[layer] for layer in sorted(by_layer)]
        heads = self.model.layout.design == "heads"
        upper = [c for c in self._layers if heads and c[0].arena.layer >= self.model.layout.first]
        mixed = [calls for calls in upper if len(calls) > 1]
        self._counts = (
            sum(len(calls) for calls in upper),
            sum(len(call.order) == 1 for calls in mixed for call in calls),
            sum(sum(call.arena.share for call in calls) >= 1 for calls in mixed),
        )

    def __call__(self, rows: list[Row]) -> Tensor:
        """Run one step; returns the logits [R, V] and adds each row's keys and values."""
        if not self._rows:
            self._arrange(rows)
        assert self._rows == rows
        # One transfer to the device for all numbers of the rows.
        backbone = self.model.backbone
        device = backbone.device
        lengths = [row.length for row in rows]
        numbers = torch.tensor(
            [[row.token for row in rows], [row.position for row in rows], lengths], device=device
        )
        hidden = backbone.embed(numbers[0, :, None], None, {})
        positions = numbers[1, :, None]
        mask = None
        if min(lengths) < max(lengths):
            visible = torch.arange(max(lengths) + 1, device=device) <= numbers[2, :, None]
            mask = backbone.mask_of(visible[:, None, None], hidden.dtype)
        inputs = LayerInputs(mask, backbone.rotary(hidden, positions), positions)

        # Layers from bottom to top; each call takes its rows and puts their outputs back.
        prepared: dict[tuple[int, ...], tuple[LayerInputs, list[int], tuple[Tensor, Tensor]]] = {}
        for calls in self._layers:
            before = hidden
            for call in calls:
                if call.order not in prepared:
                    prepared[call.order] = _for_rows(call, inputs, lengths, numbers[2])
                call_inputs, call_lengths, positions = prepared[call.order]
                cache = DecodeCache(call.arena, call_lengths, positions)
                states = before if call.index is None else before[call.index]
                states = call_inputs.run(call.arena.module, states, cache)
                if call.index is None:
                    hidden = states
                else:
                    hidden = hidden.index_copy(0, call.index, states)
        for row in rows:
            row.length += 1
            row.position += 1
        calls, unshared, unsaved = self._counts
        self.packed_calls += calls
        self.packed_unshared += unshared
        self.packed_unsaved += unsaved
        return backbone.logits(hidden[:, 0])


def _for_rows(
    call: Call, inputs: LayerInputs, lengths: list[int], on_device: Tensor
) -> tuple[LayerInputs, list[int], tuple[Tensor, Tensor]]:
    """Return layer inputs, lengths, and (slots, lengths) on the device, for a call's rows."""
    lengths = [lengths[row] for row in call.order]
    if call.index is not None:
        on_device = on_device[call.index]
        inputs = inputs.rows(call.index)
        if inputs.mask is not None:
            equal = min(lengths) == max(lengths)
            mask = None if equal else inputs.mask[..., : max(lengths) + 1]
            inputs = LayerInputs(mask, inputs.rotary, inputs.positions)
    return inputs, lengths, (torch.arange(len(lengths), device=on_device.device), on_device)

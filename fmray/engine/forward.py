"""The two passes of the engine: one row's prompt, and one new token for every row.

In: an adaptive model, the arenas, rows. Out: logits; keys and values are in the arenas. The stock
decoder layers do the work (`fmray.adallava.families.Backbone`); what is here is who runs which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    """A request on its way. length: keys it has in the always-on layers. position: of its next
    token. token: the newest, whose keys are still to come. tokens: of the answer so far.
    """

    request: Request
    stream: TextStream
    generator: torch.Generator
    started: float
    length: int = 0
    position: int = 0
    token: int = 0
    tokens: int = 0
    plan: tuple[bool, ...] = ()
    layers: int = 0
    computed: int = 0
    prefix_tokens: int = 0
    vision_hit: bool = False
    prefill_seconds: float = 0.0


class Prefill:
    """Runs one prompt, reusing what other requests left."""

    def __init__(
        self,
        model: AdaptiveVLM,
        memory: KVMemory,
        pictures: TensorCache,
        prefixes: PrefixCache | None,
    ) -> None:
        self.model = model
        self.memory = memory
        self.pictures = pictures
        self.prefixes = prefixes

    def __call__(self, row: Row) -> Tensor:
        """-> logits [1, V] for the first answer token; fills in the row."""
        model, request = self.model, row.request
        backbone, layout = model.backbone, model.layout
        inline = model.latency_token == "inline"
        device = backbone.norm.weight.device
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
        embeddings = self._embed(row, ids, pixels, extras, known)
        wanted = request.units_on if request.plan is None else int(request.plan.sum())
        prompt = Prompt(
            embeddings,
            None,
            positions,
            torch.tensor([length], device=device),
            torch.tensor([wanted], device=device),
            None if request.plan is None else request.plan[None].to(device),
        )
        token = model.latency_embedding(prompt.units_on, embeddings.dtype)[:, None]
        if inline:
            embeddings = torch.cat((embeddings, token), dim=1)
            positions = torch.cat((positions, positions[..., -1:] + 1), dim=-1)

        places = [
            self.memory.place(row, index, index, backbone.layers[index], layout.num_kv_heads, 1.0)
            for index in range(layout.first)
        ]
        hidden, token = self._lower(places, embeddings, positions, token, prefix, inline)
        if self.prefixes:
            self._keep(places, keys, hidden, known)
        noise = None
        if model.scheduler_kind == "random":
            noise = gumbel_noise((1, layout.num_units), generator_of(request.sampling))
        plan, _ = model.decide(token, prompt, Draw(noise=noise))
        row.plan = tuple(plan[0].bool().tolist())
        self.memory.reserve(row, places_of(request, model.latency_token), sum(row.plan))
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
    ) -> Tensor:
        """Embeddings [1, n - known, d] of what is not known of the prompt."""
        backbone, key = self.model.backbone, row.request.image_key
        rest = ids[:, known:]
        if pixels is None:
            return backbone.embed(rest, None, extras)
        places = rest == self.model.base.config.image_token_id
        if known and not bool(places.any()):
            row.vision_hit = True  # all pictures lie in what is known
            return backbone.embed(rest, None, extras)
        kept = None if key is None else self.pictures.get(key)
        row.vision_hit = kept is not None
        features = kept[0] if kept else backbone.image_features(pixels, extras)
        if kept is None and key is not None:
            self.pictures.put(key, (features.clone(),))
        return backbone.embed(ids, None, extras, features)[:, known:]

    def _lower(
        self,
        places: list[tuple[Arena, int]],
        embeddings: Tensor,
        positions: Tensor,
        token: Tensor,
        prefix: Prefix | None,
        inline: bool,
    ) -> tuple[Tensor, Tensor]:
        """The always-on layers: hidden states of all tokens [1, n (+ 1), d] and the latency token's
        [1, d].
        """
        backbone = self.model.backbone
        length = positions.shape[-1]
        known = prefix.tokens if prefix else 0
        if prefix is not None:
            for (arena, slot), (keys, values) in zip(places, prefix.keys_values, strict=True):
                arena.keys[slot, :, :known] = keys
                arena.values[slot, :, :known] = values
        hidden = embeddings
        if length > known:
            inputs = self._inputs(hidden, positions, known)
            for index, (arena, slot) in enumerate(places):
                cache = PrefillCache(arena, slot, known)
                hidden = inputs.run(backbone.layers[index], hidden, cache)
        if prefix is not None:
            hidden = torch.cat((prefix.hidden[None], hidden), dim=1)
        if inline:
            return hidden, hidden[:, -1]
        # A probe reads from behind the prompt; its keys are overwritten by the first answer token's
        place = positions[..., -1:] + 1
        inputs = LayerInputs(
            None, backbone.rotary(token, place), place if place.dim() == 2 else None
        )
        for index, (arena, slot) in enumerate(places):
            cache = PrefillCache(arena, slot, length)
            token = inputs.run(backbone.layers[index], token, cache)
        return hidden, token[:, 0]

    def _upper(self, row: Row, hidden: Tensor, positions: Tensor) -> Tensor:
        """The layers, or parts of them, that the plan has on."""
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
        """For tokens from `known` on, which see all before them and themselves."""
        backbone = self.model.backbone
        positions = positions[..., known:]
        flat = positions if positions.dim() == 2 else None
        if known == 0:
            mask = backbone.causal_mask(hidden, None, None)
        elif hidden.shape[1] == 1:
            mask = None
        else:
            places = torch.arange(known + hidden.shape[1], device=hidden.device)
            visible = (places <= places[known:, None])[None, None]
            mask = backbone.mask_of(visible, hidden.dtype)
        return LayerInputs(mask, backbone.rotary(hidden, positions), flat)

    def _keep(
        self, places: list[tuple[Arena, int]], keys: Sequence[bytes], hidden: Tensor, known: int
    ) -> None:
        """Keep the full blocks of the prompt that were not known."""
        end = len(keys) * self.prefixes.block
        if known < end:
            kept = [
                torch.stack((arena.keys[slot, :, known:end], arena.values[slot, :, known:end]))
                for arena, slot in places
            ]
            self.prefixes.keep(keys, Prefix(torch.stack(kept), hidden[0, known:end]), known)


def places_of(request: Request, latency_token: str) -> int:
    """Keys a request may come to have in each arena (a probe's, in passing, among them)."""
    inline = latency_token == "inline"
    return request.prompt_tokens + inline + request.sampling.max_new_tokens


@dataclass(frozen=True)
class Call:
    """One module and its rows in a decoding step; index None: all rows, in order."""

    arena: Arena
    order: tuple[int, ...]
    index: Tensor | None


class Decode:
    """One token for every row. Who runs what is worked out once a change of the rows."""

    def __init__(self, model: AdaptiveVLM, memory: KVMemory) -> None:
        self.model = model
        self.memory = memory
        self.packed_calls = self.packed_unshared = self.packed_unsaved = 0
        self.changed()

    def changed(self) -> None:
        """A row joined or left."""
        self._rows: list[Row] = []
        self._layers: list[list[Call]] = []

    @property
    def layers(self) -> int:
        """Decoder layers in which a row runs."""
        return len(self._layers)

    def _arrange(self, rows: list[Row]) -> None:
        self._rows = list(rows)
        place = {row: number for number, row in enumerate(rows)}
        everyone = tuple(range(len(rows)))
        device = self.model.backbone.norm.weight.device
        by_layer: dict[int, list[Call]] = {}
        for arena in self.memory.arenas():
            order = tuple(place[row] for row in arena.rows)
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
        """-> logits [R, V]; every row's keys and values of its newest token are in the arenas."""
        if not self._rows:
            self._arrange(rows)
        assert self._rows == rows
        backbone = self.model.backbone
        device = backbone.norm.weight.device
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
        prepared: dict[tuple[int, ...], tuple[LayerInputs, list[int], tuple[Tensor, Tensor]]] = {}
        for calls in self._layers:
            before = hidden
            for call in calls:
                if call.order not in prepared:
                    prepared[call.order] = _for_rows(call, inputs, lengths, numbers[2])
                some, own, places = prepared[call.order]
                cache = DecodeCache(call.arena, own, places)
                given = before if call.index is None else before[call.index]
                found = some.run(call.arena.module, given, cache)
                if call.index is None:
                    hidden = found
                else:
                    hidden = hidden.index_copy(0, call.index, found)
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
    """Layer inputs, key counts, and (slots, key counts) on the device, for a call's rows."""
    own = [lengths[place] for place in call.order]
    some = inputs
    if call.index is not None:
        on_device = on_device[call.index]
        some = inputs.rows(call.index)
        if some.mask is not None:
            mask = None if min(own) == max(own) else some.mask[..., : max(own) + 1]
            some = LayerInputs(mask, some.rotary, some.positions)
    return some, own, (torch.arange(len(own), device=on_device.device), on_device)

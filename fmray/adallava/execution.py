"""Execution of decoder layers under plans: masked (training) and skipped (inference).

Masked execution computes every layer and multiplies its effect by the plan, so that plans have
gradients and every rank runs the same modules. Skipped execution runs each layer only for the rows
that have its unit on, and stores no keys and values for units that are off. In design H it cuts a
layer's weights once per pattern of units and caches the cut layers (section 5.2.4).
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fmray.adallava.families import Backbone, block_of
from fmray.adallava.layout import SwitchLayout

MAX_PACKED_LAYERS = 256
CACHE_ROOM = 32  # tokens that fit after a prompt before its keys and values are copied


@dataclass(frozen=True)
class LayerInputs:
    """Arguments that all decoder layers of a forward pass share, apart from hidden states."""

    mask: Tensor | None  # [B, m] (flash attention) or [B or 1, 1, n, m]
    rotary: tuple[Tensor, Tensor]  # cos and sin, [B or 1, n, .] or [3, B, n, .]
    positions: Tensor | None  # [B or 1, n]

    def rows(self, index: Tensor) -> LayerInputs:
        """Return the inputs of some rows of the batch, index [R]."""
        return replace(
            self,
            mask=_rows(self.mask, 0, index),
            rotary=tuple(_rows(part, part.dim() - 3, index) for part in self.rotary),
            positions=_rows(self.positions, 0, index),
        )

    def run(self, layer: nn.Module, hidden: Tensor, cache: object | None = None) -> Tensor:
        """Run a stock decoder layer on hidden states [B, n, d].

        Args:
            cache: anything with the `update` of a `LayerCache`.
        """
        return layer(
            hidden,
            attention_mask=self.mask,
            position_embeddings=self.rotary,
            position_ids=self.positions,
            use_cache=cache is not None,
            **{cache_argument(type(layer)): cache},
        )


@functools.cache
def cache_argument(layer: type[nn.Module]) -> str:
    """Return the keyword under which a stock decoder layer takes its cache.

    `past_key_values` in transformers 5.20; later versions call it `cache`, deprecate the old name
    and remove it in 5.40.
    """
    names = inspect.signature(layer.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def _rows(value: Tensor | None, dim: int, index: Tensor) -> Tensor | None:
    """Select rows of the batch dimension; a batch dimension of 1 is shared by all rows."""
    if value is None or value.shape[dim] == 1:
        return value
    return value.index_select(dim, index)


class LayerCache:
    """Keys and values [R, H, m, head_dim] of a layer (or part of one) for the rows that run it.

    Buffers have room to grow, so that appending a token seldom copies.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []  # keys, values: [R, H, capacity, head_dim]
        self._length = 0

    @property
    def keys(self) -> Tensor | None:
        """[R, H, m, head_dim], a view; None before the first update."""
        return self._buffers[0][:, :, : self._length] if self._buffers else None

    @property
    def values(self) -> Tensor | None:
        """[R, H, m, head_dim], a view; None before the first update."""
        return self._buffers[1][:, :, : self._length] if self._buffers else None

    def update(
        self, keys: Tensor, values: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values and return all: the one call that a stock attention makes."""
        start, self._length = self._length, self._length + keys.shape[2]
        if not self._buffers or self._length > self._buffers[0].shape[2]:
            capacity = self._length + max(CACHE_ROOM, self._length // 8)
            old = self._buffers
            self._buffers = [
                new.new_empty((*new.shape[:2], capacity, new.shape[3])) for new in (keys, values)
            ]
            for buffer, previous in zip(self._buffers, old, strict=False):
                buffer[:, :, :start] = previous[:, :, :start]
        for buffer, new in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, start : self._length] = new
        return self.keys, self.values

    def drop_last(self) -> None:
        """Drop the newest token (a probe)."""
        self._length -= 1


@dataclass(frozen=True)
class Group:
    """Rows of a batch that run the same part of a layer, and the module that runs it."""

    rows: Tensor | None  # None: all rows, in order
    layer: nn.Module


class Execution:
    """Runs the switchable layers of one model, masked or skipped."""

    def __init__(self, backbone: Backbone, layout: SwitchLayout) -> None:
        self.backbone = backbone
        self.layout = layout
        self._packed: OrderedDict[tuple[object, ...], tuple[object, nn.Module]] = OrderedDict()
        if layout.design == "heads":
            block_of(backbone.layers[layout.first])  # raises for an unknown block
            slices = [layout.unit_slices(unit) for unit in range(layout.units_per_layer)]
            sizes = [(s[0].stop - s[0].start) * layout.head_dim for s in slices]
            units = torch.arange(layout.units_per_layer)
            self._unit_of_feature = units.repeat_interleave(torch.tensor(sizes))
            sizes = [s[2].stop - s[2].start for s in slices]
            self._unit_of_channel = units.repeat_interleave(torch.tensor(sizes))

    # --- Masked: every layer, multiplied by the plan ---

    def masked_layer(self, index: int, hidden: Tensor, inputs: LayerInputs, plan: Tensor) -> Tensor:
        """Run decoder layer `index` for all rows and multiply its effect by the plan.

        Args:
            plan: float [B, K] of zeros and ones.
        """
        layer = self.backbone.layers[index]
        units = self.layout.units_per_layer
        start = (index - self.layout.first) * units
        states = plan[:, start : start + units].to(hidden.dtype)
        if self.layout.design == "layers":
            gate = states[:, :, None]
            # with gate 1 exactly y, which h + gate * (y - h) is not
            return inputs.run(layer, hidden) * gate + hidden * (1 - gate)
        heads = states[:, self._unit_of_feature.to(hidden.device)][:, None, :]
        channels = states[:, self._unit_of_channel.to(hidden.device)][:, None, :]
        block = block_of(layer)
        hooks = [
            getattr(layer.self_attn, block.attention_out).register_forward_pre_hook(
                lambda _, inputs: (inputs[0] * heads,)
            ),
            getattr(layer.mlp, block.down).register_forward_pre_hook(
                lambda _, inputs: (inputs[0] * channels,)
            ),
        ]
        try:
            return inputs.run(layer, hidden)
        finally:
            for hook in hooks:
                hook.remove()

    # --- Skipped: only units that are on ---

    def groups(self, plan: Tensor) -> list[list[Group]]:
        """Return the groups of rows of each switchable layer; rows in no group skip the layer.

        This is the only place where the plan is copied from the device; the groups serve the
        prefill and every decoding step.

        Args:
            plan: bool [B, K].
        """
        states = plan.view(plan.shape[0], -1, self.layout.units_per_layer)
        table = states.tolist()
        result = []
        for place in range(states.shape[1]):
            patterns: OrderedDict[tuple[bool, ...], list[int]] = OrderedDict()
            for row, units in enumerate(table):
                patterns.setdefault(tuple(units[place]), []).append(row)
            groups = []
            for pattern, rows in patterns.items():
                layer = self.module_for(self.layout.first + place, pattern)
                if layer is not None:
                    all_rows = len(rows) == plan.shape[0]
                    index = None if all_rows else torch.tensor(rows, device=plan.device)
                    groups.append(Group(index, layer))
            result.append(groups)
        return result

    def run_groups(
        self,
        hidden: Tensor,
        inputs: LayerInputs,
        groups: list[Group],
        caches: list[LayerCache | None],
    ) -> Tensor:
        """Run one layer: each group's rows through its module.

        Args:
            caches: one per group, in the same order at every step.
        """
        before = hidden
        for place, group in enumerate(groups):
            cache = caches[place]
            if group.rows is None:
                return inputs.run(group.layer, hidden, cache)
            rows = inputs.rows(group.rows).run(group.layer, before[group.rows], cache)
            hidden = hidden.index_copy(0, group.rows, rows)
        return hidden

    def module_for(self, index: int, pattern: tuple[bool, ...]) -> nn.Module | None:
        """Return the module that runs decoder layer `index` under a pattern of its units.

        None where nothing of the layer runs.
        """
        layer = self.backbone.layers[index]
        if all(pattern):
            return layer
        if self.layout.design == "layers":
            return None
        if not any(pattern) and not _output_biases(layer):
            return None
        # a cut layer is valid as long as the weights it was cut from have not changed
        state = tuple((p.data_ptr(), p._version) for p in layer.parameters())
        key = (index, pattern)
        packed = self._packed.pop(key, None)
        if packed is None or packed[0] != state:
            packed = (state, pack_layer(layer, self.layout, pattern))
        self._packed[key] = packed
        while len(self._packed) > MAX_PACKED_LAYERS:
            self._packed.popitem(last=False)
        return packed[1]


def pack_layer(layer: nn.Module, layout: SwitchLayout, pattern: tuple[bool, ...]) -> nn.Module:
    """Return a copy of a stock decoder layer with only the heads and channels of units that are on.

    Norms and output biases are shared with the original; the other weights are cut (copied). With
    no unit on, the residual and the output biases remain.

    Raises:
        ValueError: a projection is not a plain linear layer (merge adapters first).
    """
    block = block_of(layer)
    slices = [layout.unit_slices(unit) for unit, on in enumerate(pattern) if on]
    packed = _shallow_copy(layer)
    if not slices:
        packed.self_attn = _Constant(
            getattr(layer.self_attn, block.attention_out).bias, attention=True
        )
        packed.mlp = _Constant(getattr(layer.mlp, block.down).bias, attention=False)
        return packed
    dim = layout.head_dim
    device = next(layer.parameters()).device

    def index(part: int, width: int) -> Tensor:
        return torch.cat(
            [
                torch.arange(s[part].start * width, s[part].stop * width, device=device)
                for s in slices
            ]
        )

    queries, keys, channels = index(0, dim), index(1, dim), index(2, 1)
    packed.self_attn = attention = _shallow_copy(layer.self_attn)
    attention.q_proj = _cut(attention.q_proj, outputs=queries)
    attention.k_proj = _cut(attention.k_proj, outputs=keys)
    attention.v_proj = _cut(attention.v_proj, outputs=keys)
    out = getattr(attention, block.attention_out)
    setattr(attention, block.attention_out, _cut(out, inputs=queries))
    packed.mlp = mlp = _shallow_copy(layer.mlp)
    for name in block.up:
        setattr(mlp, name, _cut(getattr(mlp, name), outputs=channels))
    setattr(mlp, block.down, _cut(getattr(mlp, block.down), inputs=channels))
    return packed


class _Constant(nn.Module):
    """An attention or MLP with no unit on: its output bias, or zero."""

    def __init__(self, bias: Tensor | None, attention: bool) -> None:
        super().__init__()
        self.bias = bias
        self.attention = attention

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor | tuple[Tensor, None]:
        value = torch.zeros_like(hidden_states)
        if self.bias is not None:
            value = value + self.bias
        return (value, None) if self.attention else value


def _output_biases(layer: nn.Module) -> bool:
    block = block_of(layer)
    outputs = (getattr(layer.self_attn, block.attention_out), getattr(layer.mlp, block.down))
    return any(getattr(module, "bias", None) is not None for module in outputs)


def _shallow_copy(module: nn.Module) -> nn.Module:
    """Copy a module so that replacing children of the copy leaves the original unchanged."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _cut(
    linear: nn.Module, outputs: Tensor | None = None, inputs: Tensor | None = None
) -> nn.Linear:
    if type(linear) is not nn.Linear:
        raise ValueError(
            "design 'heads' can only skip inside plain linear layers, not "
            f"{type(linear).__name__}; merge the adapters first, or run with execution='masked'"
        )
    weight, bias = linear.weight, linear.bias
    if outputs is not None:
        weight = weight[outputs]
        bias = None if bias is None else bias[outputs]
    if inputs is not None:
        weight = weight[:, inputs]
    packed = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    packed.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    packed.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return packed

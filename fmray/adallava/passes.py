"""One pass of the decoder under plans: masked (training), prefill and decoding step (inference).

Each pass inserts the latency token after the prompt, runs the always-on layers, reads the token's
state, asks the model for a plan, and runs the switchable layers under it. An `inline` latency token
stays in the sequence; a `probe` leaves after the always-on layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fmray.adallava.execution import Execution, Group, LayerCache, LayerInputs
from fmray.adallava.families import Backbone
from fmray.adallava.layout import SwitchLayout

# --- Position of the latency token ---

IGNORED = -100  # label of a token that is not supervised


def prompt_ends(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """Return one past the last prompt token of each row, int64 [B].

    A prompt ends before the row's first supervised token, or at the last attended one.

    Raises:
        ValueError: a row is empty, or its answer has no prompt.
    """
    length = input_ids.shape[1]
    places = torch.arange(length, device=input_ids.device)
    attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    end = ((places + 1) * attended.bool()).amax(1)
    if labels is not None:
        supervised = labels != IGNORED
        answer_start = torch.where(supervised, places, length).amin(1)
        end = torch.minimum(end, answer_start)
    if end.device.type == "cpu" and bool((end < 1).any()):
        raise ValueError(f"row {int((end < 1).nonzero()[0])} has no prompt before its answer")
    return end


def insert_token(
    hidden: Tensor,
    token: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor | None,
    end: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Insert token [B, d] at index `end` [B] of each row of hidden [B, n, d].

    Later tokens move by one. The attention mask [B, n] and positions [B, n] or [3, B, n] grow in
    the same way; None stays None.
    """
    places = torch.arange(hidden.shape[1] + 1, device=hidden.device)
    source = torch.where(places <= end[:, None], places, places - 1).clamp(max=hidden.shape[1] - 1)
    is_token = places == end[:, None]
    grown = hidden.gather(1, source[..., None].expand(-1, -1, hidden.shape[2]))
    grown = torch.where(is_token[..., None], token[:, None], grown)
    if attention_mask is not None:
        attention_mask = torch.where(is_token, 1, attention_mask.gather(1, source))
    if positions is not None:
        after = (places > end[:, None]).long()
        token_position = positions.gather(-1, index_like(end - 1, positions)) + 1
        positions = positions.gather(-1, source.expand(*positions.shape[:-2], -1, -1)) + after
        positions = torch.where(is_token, token_position, positions)
    return grown, attention_mask, positions


def without_last_prompt_token(hidden: Tensor, end: Tensor) -> Tensor:
    """Drop each row's last prompt token: [B, n + 1, d] -> [B, n, d].

    The latency token takes its place, because the first answer token is predicted from it.
    """
    places = torch.arange(hidden.shape[1] - 1, device=hidden.device)
    source = torch.where(places < end[:, None] - 1, places, places + 1)
    return hidden.gather(1, source[..., None].expand(-1, -1, hidden.shape[2]))


def index_like(index: Tensor, positions: Tensor) -> Tensor:
    """Return index [B] as a gather index for the last dimension of positions."""
    return index[:, None].expand(*positions.shape[:-2], -1, -1)


# --- Inputs and state of a pass ---


@dataclass(frozen=True)
class Prompt:
    """Embedded rows, ready for the decoder. In training the answers follow the prompts."""

    embeddings: Tensor  # [B, n, d]
    attention_mask: Tensor | None  # [B, n]
    positions: Tensor | None  # [B, n] or [3, B, n]; None: counted from 0
    end: Tensor  # [B], one past each prompt's last token
    units_on: Tensor  # [B]
    plan: Tensor | None  # [B, K]; None: the scheduler decides
    added: Tensor | None = None  # [D, B, n, d], added after the first D layers

    @property
    def next_position(self) -> Tensor:
        """The text position after each prompt's last token: [B]."""
        if self.positions is None:
            return self.end
        flat = self.positions if self.positions.dim() == 2 else self.positions[0]
        return flat.gather(1, self.end[:, None] - 1)[:, 0] + 1

    @property
    def seen(self) -> Tensor:
        """What a probe attends to, bool [B, n + 1]; its own column is the last."""
        length = self.embeddings.shape[1]
        seen = torch.arange(length + 1, device=self.end.device) < self.end[:, None]
        if self.attention_mask is not None:
            seen[:, :length] &= self.attention_mask.bool()
        seen[:, length] = True
        return seen


@dataclass(frozen=True)
class Draw:
    """The randomness of a drawn plan: a generator, or Gumbel noise [B, K]."""

    generator: torch.Generator | None = None
    noise: Tensor | None = None


@dataclass
class DecodingState:
    """What decoding needs of a prefill. Layers that are off have no cache."""

    groups: list[list[Group]]  # one list per switchable layer
    lower: list[LayerCache]  # one per always-on layer
    upper: list[list[LayerCache]]  # one per group, with the keys of the group's rows only
    attention_mask: Tensor | None  # [B, tokens so far]


class Adaptive(Protocol):
    """What a pass needs of an adaptive model."""

    layout: SwitchLayout
    latency_token: str
    execution: Execution
    training: bool
    gradient_checkpointing: bool

    @property
    def backbone(self) -> Backbone:
        """The stock model's pieces."""

    def latency_embedding(self, units_on: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the latency token [B, d] for units_on [B]."""

    def decide(self, hidden: Tensor, prompt: Prompt, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return plan and plan logits [B, K] from the latency token's state [B, d]."""


# --- Passes ---


def _call(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return function(*tensors)


def _recompute(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return checkpoint(function, *tensors, use_reentrant=False)


def run_lower(
    model: Adaptive,
    hidden: Tensor,
    inputs: LayerInputs,
    caches: Sequence[object | None] | None = None,
    call: Callable[..., Tensor] = _call,
    added: Tensor | None = None,
) -> Tensor:
    """Run the always-on layers on hidden states [B, n, d].

    Args:
        caches: one per always-on layer.
        call: calls each layer (gradient checkpointing).
        added: [D, B, n, d], added after the first D layers.
    """
    caches = caches or [None] * model.layout.first
    for index, (layer, cache) in enumerate(zip(model.backbone.layers, caches, strict=False)):
        hidden = call(partial(inputs.run, layer, cache=cache), hidden)
        if added is not None and index < len(added):
            hidden = hidden + added[index]
    return hidden


def run_upper(
    model: Adaptive,
    hidden: Tensor,
    inputs: LayerInputs,
    groups: Sequence[list[Group]],
    caches: Sequence[list[LayerCache | None]],
) -> Tensor:
    """Run the switchable layers on hidden states [B, n, d], each for the rows that have it on."""
    for layer_groups, layer_caches in zip(groups, caches, strict=True):
        hidden = model.execution.run_groups(hidden, inputs, layer_groups, layer_caches)
    return hidden


def masked_pass(model: Adaptive, prompt: Prompt, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Run every layer for all rows and multiply its effect by the plan.

    Every rank runs the same modules, whatever the plans.

    Returns:
        Hidden states ([B, n + 1, d] with an inline latency token at `end`, else [B, n, d]), the
        plan [B, K] and the plan logits [B, K].
    """
    layout = model.layout
    call = _recompute if model.gradient_checkpointing and model.training else _call
    hidden, token, _, inputs, added = _enter(model, prompt)
    if model.latency_token == "inline":
        hidden = run_lower(model, hidden, inputs, call=call, added=added)
        token = _at(hidden, prompt.end)
    else:
        hidden, lower_inputs = _append_probe(model.backbone, token, prompt)
        if added is not None:
            added = functional.pad(added, (0, 0, 0, 1))
        hidden = run_lower(model, hidden, lower_inputs, call=call, added=added)
        hidden, token = hidden[:, :-1], hidden[:, -1]
    plan, plan_logits = model.decide(token, prompt, draw)
    for index in range(layout.first, layout.num_layers):
        hidden = call(
            lambda h, p, index=index: model.execution.masked_layer(index, h, inputs, p),
            hidden,
            plan,
        )
    return hidden, plan, plan_logits


def prefill(
    model: Adaptive, prompt: Prompt, draw: Draw, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor, DecodingState]:
    """Run each layer only for the rows that have it on.

    Args:
        keep: keep keys and values for decoding.

    Returns:
        Hidden states, plan and plan logits as `masked_pass`, and the state to decode from.
    """
    hidden, token, mask, inputs, added = _enter(model, prompt)
    probe = model.latency_token == "probe"
    # a probe attends to the prompt's keys, so they are kept until it has run
    lower = [LayerCache() if keep or probe else None for _ in range(model.layout.first)]
    hidden = run_lower(model, hidden, inputs, lower, added=added)
    token = _run_probe(model, token, prompt, lower) if probe else _at(hidden, prompt.end)
    plan, plan_logits = model.decide(token, prompt, draw)
    plan = plan.detach().bool()
    groups = model.execution.groups(plan)
    upper = [[LayerCache() if keep else None for _ in layer_groups] for layer_groups in groups]
    hidden = run_upper(model, hidden, inputs, groups, upper)
    return hidden, plan, plan_logits, DecodingState(groups, lower, upper, mask)


def hidden_under(model: Adaptive, prompt: Prompt, plans: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Run the same rows under each of several plans, bool [P, K] with `prompt.units_on` units on.

    Plans are visited in sorted order, and layers on which consecutive plans agree from the start
    run once. Memory: one state [B, n, d] per layer.

    Yields:
        The index of a plan, and hidden states as those of `prefill`.
    """
    layout = model.layout
    hidden, _, _, inputs, added = _enter(model, prompt)
    hidden = run_lower(model, hidden, inputs, added=added)
    patterns = plans.view(len(plans), -1, layout.units_per_layer).tolist()
    # states[i]: hidden states before switchable layer i under the previous plan
    states, previous = [hidden], []
    for index in sorted(range(len(plans)), key=patterns.__getitem__):
        pattern = patterns[index]
        pairs = enumerate(zip(previous, pattern, strict=False))
        shared = next((place for place, (old, new) in pairs if old != new), len(previous))
        del states[shared + 1 :]
        for place in range(shared, len(pattern)):
            layer = model.execution.module_for(layout.first + place, tuple(pattern[place]))
            hidden = states[-1]
            states.append(hidden if layer is None else inputs.run(layer, hidden))
        previous = pattern
        yield index, states[-1]


def decode(model: Adaptive, tokens: Tensor, positions: Tensor, state: DecodingState) -> Tensor:
    """Run one decoding step: tokens [B] at text positions [B] -> logits [B, V].

    Appends to the caches and the attention mask of `state`.
    """
    backbone = model.backbone
    hidden = backbone.embed(tokens[:, None], None, {})
    state.attention_mask = functional.pad(state.attention_mask, (0, 1), value=1)
    inputs = LayerInputs(
        backbone.row_mask(state.attention_mask.bool(), hidden.dtype),
        backbone.rotary(hidden, positions[:, None]),
        positions[:, None],
    )
    hidden = run_lower(model, hidden, inputs, state.lower)
    hidden = run_upper(model, hidden, inputs, state.groups, state.upper)
    return backbone.logits(hidden[:, 0])


# --- The latency token in a pass ---


def _enter(
    model: Adaptive, prompt: Prompt
) -> tuple[Tensor, Tensor, Tensor | None, LayerInputs, Tensor | None]:
    """Return the start of a pass: hidden states, latency token [B, d], attention mask, layer inputs
    and what is added after the first layers.

    An inline latency token is in the sequence [B, n + 1, d]; a probe is not ([B, n, d]).
    """
    hidden, mask, positions = prompt.embeddings, prompt.attention_mask, prompt.positions
    added = prompt.added
    token = model.latency_embedding(prompt.units_on, hidden.dtype)
    if model.latency_token == "inline":
        if added is not None:
            nothing = torch.zeros_like(token)
            grown = [insert_token(layer, nothing, None, None, prompt.end)[0] for layer in added]
            added = torch.stack(grown)
        hidden, mask, positions = insert_token(hidden, token, mask, positions, prompt.end)
    return hidden, token, mask, _inputs(model.backbone, hidden, mask, positions), added


def _at(hidden: Tensor, index: Tensor) -> Tensor:
    """Return one token per row: hidden [B, n, d], index [B] -> [B, d]."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), index]


def _inputs(
    backbone: Backbone, hidden: Tensor, attention_mask: Tensor | None, positions: Tensor | None
) -> LayerInputs:
    if positions is None:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    return LayerInputs(
        backbone.causal_mask(hidden, attention_mask, positions),
        backbone.rotary(hidden, positions),
        positions if positions.dim() == 2 else None,
    )


def _probe_positions(prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Return positions of the rows, [B or 3 x B, n], and of their probes, [B or 3 x B, 1]."""
    rows, length, _ = prompt.embeddings.shape
    positions = prompt.positions
    if positions is None:
        positions = torch.arange(length, device=prompt.end.device).expand(rows, -1)
    return positions, positions.gather(-1, index_like(prompt.end - 1, positions)) + 1


def _append_probe(backbone: Backbone, token: Tensor, prompt: Prompt) -> tuple[Tensor, LayerInputs]:
    """Append the probe as a last token that sees its prompt and itself and that no token sees."""
    if backbone.attention not in ("sdpa", "eager"):
        raise ValueError(
            "latency_token 'probe' in masked execution needs attention 'sdpa' or 'eager', not "
            f"{backbone.attention!r}"
        )
    rows, length, _ = prompt.embeddings.shape
    positions, place = _probe_positions(prompt)
    mask = backbone.causal_mask(prompt.embeddings, prompt.attention_mask, positions, explicit=True)
    boolean = mask.dtype == torch.bool
    hide, show = (False, True) if boolean else (torch.finfo(mask.dtype).min, 0.0)
    grown = mask.new_full((rows, 1, length + 1, length + 1), hide)
    grown[:, :, :length, :length] = mask
    grown[:, 0, length] = torch.where(prompt.seen, mask.new_tensor(show), mask.new_tensor(hide))
    positions = torch.cat((positions, place), dim=-1)
    hidden = torch.cat((prompt.embeddings, token[:, None]), dim=1)
    rotary = backbone.rotary(hidden, positions)
    return hidden, LayerInputs(grown, rotary, positions if positions.dim() == 2 else None)


def _run_probe(
    model: Adaptive, token: Tensor, prompt: Prompt, caches: Sequence[LayerCache]
) -> Tensor:
    """Run one query per row through the always-on layers, over the prompt's keys: [B, d].

    The probe's own keys are dropped from the caches afterwards.
    """
    backbone = model.backbone
    _, place = _probe_positions(prompt)
    hidden = token[:, None]
    inputs = LayerInputs(
        backbone.row_mask(prompt.seen, hidden.dtype),
        backbone.rotary(hidden, place),
        place if place.dim() == 2 else None,
    )
    hidden = run_lower(model, hidden, inputs, caches)
    for cache in caches:
        cache.drop_last()
    return hidden[:, 0]

"""One pass of the decoder under plans: masked (training), prefill and decoding step (inference).

In: an `AdaptiveVLM` and embedded prompts. Out: hidden states, the plan, and for decoding the keys
and values of what ran. The latency token enters after the prompt, is read at the first switchable
layer, and then stays or leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fmray.adallava.execution import Group, LayerCache, LayerInputs
from fmray.adallava.families import Backbone

if TYPE_CHECKING:
    from fmray.adallava.model import AdaptiveVLM


# Where the latency token goes: right after the prompt, whatever the padding.
#
# In: padded batches [B, n]. Out: the end of each row's prompt, and sequences with one token more
# (or its place taken).

IGNORED = -100  # label of a token that is not supervised


def prompt_ends(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """One past the last prompt token of each row, int64 [B]: before the first supervised token, or
    the row's end.

    Raises ValueError for a row whose answer has no prompt, or that is empty.
    """
    length = input_ids.shape[1]
    places = torch.arange(length, device=input_ids.device)
    attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    end = ((places + 1) * attended.bool()).amax(1)
    if labels is not None:
        supervised = labels != IGNORED
        first = torch.where(supervised, places, length).amin(1)
        end = torch.minimum(end, first)
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
    """Put token [B, d] at place `end` [B] of each row of hidden [B, n, d]; what follows moves one
    place on.

    Attention mask [B, n] and positions [B, n] or [3, B, n] (None stays None: counted from 0) grow
    with it.
    """
    places = torch.arange(hidden.shape[1] + 1, device=hidden.device)
    source = torch.where(places <= end[:, None], places, places - 1).clamp(max=hidden.shape[1] - 1)
    here = places == end[:, None]
    grown = hidden.gather(1, source[..., None].expand(-1, -1, hidden.shape[2]))
    grown = torch.where(here[..., None], token[:, None], grown)
    if attention_mask is not None:
        attention_mask = torch.where(here, 1, attention_mask.gather(1, source))
    if positions is not None:
        after = (places > end[:, None]).long()
        last = positions.gather(-1, index_like(end - 1, positions)) + 1
        positions = positions.gather(-1, source.expand(*positions.shape[:-2], -1, -1)) + after
        positions = torch.where(here, last, positions)
    return grown, attention_mask, positions


def without_last_prompt_token(hidden: Tensor, end: Tensor) -> Tensor:
    """[B, n + 1, d] -> [B, n, d]: the latency token takes the last prompt token's place, whose work
    it does.
    """
    places = torch.arange(hidden.shape[1] - 1, device=hidden.device)
    source = torch.where(places < end[:, None] - 1, places, places + 1)
    return hidden.gather(1, source[..., None].expand(-1, -1, hidden.shape[2]))


def index_like(index: Tensor, positions: Tensor) -> Tensor:
    """index [B] as a gather index over the last dimension of positions [B, n] or [3, B, n]."""
    return index[:, None].expand(*positions.shape[:-2], -1, -1)


@dataclass(frozen=True)
class Prompt:
    """Embedded rows, ready for the decoder (with their answers behind the prompts, in training).

    embeddings: [B, n, d]. attention_mask: [B, n] or None. positions: [B, n], [3, B, n], or None to
    count from 0. end: [B], one past each prompt's last token. units_on: [B]. plan: [B, K], or None
    to ask the scheduler.
    """

    embeddings: Tensor
    attention_mask: Tensor | None
    positions: Tensor | None
    end: Tensor
    units_on: Tensor
    plan: Tensor | None

    @property
    def next_position(self) -> Tensor:
        """The text position after each prompt's last token: [B]."""
        if self.positions is None:
            return self.end
        flat = self.positions if self.positions.dim() == 2 else self.positions[0]
        return flat.gather(1, self.end[:, None] - 1)[:, 0] + 1

    @property
    def seen(self) -> Tensor:
        """What a probe may attend to, itself in the last column: bool [B, n + 1]."""
        length = self.embeddings.shape[1]
        seen = torch.arange(length + 1, device=self.end.device) < self.end[:, None]
        if self.attention_mask is not None:
            seen[:, :length] &= self.attention_mask.bool()
        seen[:, length] = True
        return seen


@dataclass(frozen=True)
class Draw:
    """Where the randomness of a drawn plan comes from: a generator, or Gumbel noise [B, K] given
    whole.
    """

    generator: torch.Generator | None = None
    noise: Tensor | None = None


@dataclass
class DecodingState:
    """What decoding needs of a prefill. Off layers have no cache; a group's cache holds its own
    rows only.

    lower: one cache an always-on layer; upper: per switchable layer, one a group. attention_mask:
    [B, tokens so far].
    """

    groups: list[list[Group]]
    lower: list[LayerCache]
    upper: list[list[LayerCache]]
    attention_mask: Tensor | None


def masked_pass(model: AdaptiveVLM, prompt: Prompt, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Every layer for all rows, multiplied by the plan; the same modules on every rank, whatever
    the plans.

    Returns hidden states ([B, n + 1, d] with the latency token at `end` where it is inline, else
    [B, n, d]), the plan and the plan logits [B, K].
    """
    backbone, layout = model.backbone, model.layout
    token = model.latency_embedding(prompt.units_on, prompt.embeddings.dtype)
    if model.latency_token == "inline":
        hidden, mask, positions = insert_token(
            prompt.embeddings, token, prompt.attention_mask, prompt.positions, prompt.end
        )
        lower = upper = _inputs(backbone, hidden, mask, positions)
    else:
        upper = _inputs(backbone, prompt.embeddings, prompt.attention_mask, prompt.positions)
        hidden, lower = _append_probe(backbone, token, prompt)

    def run(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        if model.gradient_checkpointing and model.training:
            return checkpoint(function, *tensors, use_reentrant=False)
        return function(*tensors)

    for layer in backbone.layers[: layout.first]:
        hidden = run(lambda h, layer=layer: lower.run(layer, h), hidden)
    if model.latency_token == "inline":
        token = hidden[torch.arange(hidden.shape[0], device=hidden.device), prompt.end]
    else:
        hidden, token = hidden[:, :-1], hidden[:, -1]
    plan, plan_logits = model.decide(token, prompt, draw)
    for index in range(layout.first, layout.num_layers):
        hidden = run(
            lambda h, p, index=index: model.execution.masked_layer(index, h, upper, p), hidden, plan
        )
    return hidden, plan, plan_logits


def prefill(
    model: AdaptiveVLM, prompt: Prompt, draw: Draw, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor, DecodingState]:
    """Only what is on, for the rows it is on for. Returns what `masked_pass` does, and the state to
    decode from.

    keep: hold keys and values for decoding.
    """
    backbone = model.backbone
    probe = model.latency_token == "probe"
    token = model.latency_embedding(prompt.units_on, prompt.embeddings.dtype)
    hidden, mask, positions = prompt.embeddings, prompt.attention_mask, prompt.positions
    if not probe:
        hidden, mask, positions = insert_token(hidden, token, mask, positions, prompt.end)
    inputs = _inputs(backbone, hidden, mask, positions)
    # a probe reads the prompt's keys, so they are held while it does
    lower = [LayerCache() if keep or probe else None for _ in range(model.layout.first)]
    for layer, cache in zip(backbone.layers, lower, strict=False):
        hidden = inputs.run(layer, hidden, cache)
    if probe:
        token = _run_probe(backbone, token, prompt, lower)
    else:
        token = hidden[torch.arange(hidden.shape[0], device=hidden.device), prompt.end]
    plan, plan_logits = model.decide(token, prompt, draw)
    plan = plan.detach().bool()
    groups = model.execution.groups(plan)
    upper = [[LayerCache() if keep else None for _ in layer_groups] for layer_groups in groups]
    for layer_groups, caches in zip(groups, upper, strict=True):
        hidden = model.execution.run_groups(hidden, inputs, layer_groups, caches)
    return hidden, plan, plan_logits, DecodingState(groups, lower, upper, mask)


def hidden_under(model: AdaptiveVLM, prompt: Prompt, plans: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The same rows under each of several plans: plans bool [P, K], each with `prompt.units_on`
    switches on -> (index of the plan, hidden states as of `prefill`), in an order of its own.

    What two plans have in common is computed once: the always-on layers for all of them, and from
    there on whatever plans begin with alike. One state [B, n, d] a layer is held.
    """
    backbone, layout = model.backbone, model.layout
    hidden, mask, positions = prompt.embeddings, prompt.attention_mask, prompt.positions
    if model.latency_token == "inline":
        token = model.latency_embedding(prompt.units_on, hidden.dtype)
        hidden, mask, positions = insert_token(hidden, token, mask, positions, prompt.end)
    inputs = _inputs(backbone, hidden, mask, positions)
    for layer in backbone.layers[: layout.first]:
        hidden = inputs.run(layer, hidden)
    patterns = plans.view(len(plans), -1, layout.units_per_layer).tolist()
    states, before = [hidden], []  # after each layer of the plan before
    for index in sorted(range(len(plans)), key=patterns.__getitem__):
        pattern = patterns[index]
        pairs = enumerate(zip(before, pattern, strict=False))
        shared = next((place for place, (old, new) in pairs if old != new), len(before))
        del states[shared + 1 :]
        for place in range(shared, len(pattern)):
            layer = model.execution.module_for(layout.first + place, tuple(pattern[place]))
            hidden = states[-1]
            states.append(hidden if layer is None else inputs.run(layer, hidden))
        before = pattern
        yield index, states[-1]


def decode(model: AdaptiveVLM, tokens: Tensor, positions: Tensor, state: DecodingState) -> Tensor:
    """One decoding step: tokens [B] at text positions [B] -> logits [B, V]. Grows the caches of
    `state`.
    """
    backbone = model.backbone
    hidden = backbone.embed(tokens[:, None], None, {})
    state.attention_mask = functional.pad(state.attention_mask, (0, 1), value=1)
    inputs = LayerInputs(
        backbone.row_mask(state.attention_mask.bool(), hidden.dtype),
        backbone.rotary(hidden, positions[:, None]),
        positions[:, None],
    )
    for layer, cache in zip(backbone.layers, state.lower, strict=False):
        hidden = inputs.run(layer, hidden, cache)
    for layer_groups, caches in zip(state.groups, state.upper, strict=True):
        hidden = model.execution.run_groups(hidden, inputs, layer_groups, caches)
    return backbone.logits(hidden[:, 0])


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
    """Positions of the rows [B, n] or [3, B, n], and of a probe right after each prompt [B, 1] or
    [3, B, 1].
    """
    rows, length, _ = prompt.embeddings.shape
    positions = prompt.positions
    if positions is None:
        positions = torch.arange(length, device=prompt.end.device).expand(rows, -1)
    return positions, positions.gather(-1, index_like(prompt.end - 1, positions)) + 1


def _append_probe(backbone: Backbone, token: Tensor, prompt: Prompt) -> tuple[Tensor, LayerInputs]:
    """The probe as an extra last token that sees its prompt and itself, and that nobody sees."""
    if backbone.attention not in ("sdpa", "eager"):
        raise ValueError(
            "latency_token 'probe' needs attention 'sdpa' or 'eager' here, not "
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
    backbone: Backbone, token: Tensor, prompt: Prompt, caches: list[LayerCache]
) -> Tensor:
    """One query a row through the always-on layers, over the prompt's keys; leaves no trace. -> [B,
    d]
    """
    _, place = _probe_positions(prompt)
    hidden = token[:, None]
    inputs = LayerInputs(
        backbone.row_mask(prompt.seen, hidden.dtype),
        backbone.rotary(hidden, place),
        place if place.dim() == 2 else None,
    )
    for layer, cache in zip(backbone.layers, caches, strict=False):
        hidden = inputs.run(layer, hidden, cache)
        cache.drop_last()
    return hidden[:, 0]

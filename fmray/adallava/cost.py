"""The cost of a decoder under a number of units or a plan, and the units that a budget allows.

Everything is integer or `Fraction` arithmetic: a budget such as 0.6 means the decimal as written,
and rounding never exceeds it.

Two conventions (dissertation section 5.2, "Implementation details", and table 5.1):

* "exact": 2 operations per multiply-accumulate of every matrix product that runs. Attention counts
  as the full n x n products (kernels that skip the causal half do less), the lm_head once (last
  position) at 2dV. `torch.utils.flop_counter` counts the same in the decoder layers and the lm_head
  of a stock model. Rotary tables, norms, activations, biases, the embedding, the latency encoder
  and the scheduler are not counted.
* "llm-viewer": the published numbers (Yuan et al. 2024). One layer at n tokens is
  2n(4d^2 + 3df) + 4n^2 d + 5Hn^2 + 14dn + 2dn + 2dn (fewer key/value columns under grouped-query
  attention, 2df for an MLP of two matrices), the lm_head dV once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from numbers import Integral, Real
from typing import Any, Literal

from fmray.adallava.layout import SwitchLayout, text_config_of

Convention = Literal["exact", "llm-viewer"]
Number = int | float | Fraction
Exact = int | Fraction
Tokens = Number | Sequence[Number]

# Decoders whose MLP has an up and a down matrix only. All others are taken as gated (three).
_TWO_MATRIX_MLP = ("apertus", "gpt_neox", "nemotron", "persimmon", "phi", "starcoder2")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


class CostModel:
    """Operations of one adaptive decoder (batch of one).

    The arguments of its methods:

    * `tokens`: the prompt length n, or one length per decoder layer where token selection drops
      tokens. A float or Fraction stands for a mean: the cost *at* the mean length.
    * `units_on`: a number of units, 0..K, or a plan: K truth values.

    **Attribution.** A *number* k charges a unit of h query heads h/H of its layer: norms, residual
    adds and the rounding of MLP groups to whole channels (at most one channel) are shared pro rata.
    Where units differ in cost (uneven head groups, layers with fewer tokens), k charges the k most
    expensive ones, so that no choice of k units costs more than the charge. A *plan* is counted at
    its true sizes; the element-wise terms of a layer that runs in part (llm-viewer only) count in
    full. In design H a plan may therefore cost more than the charge of its number, by at most
    0.002 % of the decoder at LLaVA-1.5-13B (MLP groups of 2764 and 2765 channels; nothing at 7B)
    and 0.007 % where element-wise terms count.

    Raises:
        ValueError: a layout of another decoder, a mixture of experts, or an unknown convention.
    """

    def __init__(
        self, text_config: Any, layout: SwitchLayout, convention: Convention = "exact"
    ) -> None:
        if convention not in ("exact", "llm-viewer"):
            raise ValueError(f"convention is {convention!r}; it must be 'exact' or 'llm-viewer'")
        text_config = text_config_of(text_config)
        expected = SwitchLayout.layers(text_config, first=layout.first)
        for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size",
                     "intermediate_size"):  # fmt: skip
            if getattr(layout, name) != getattr(expected, name):
                raise ValueError(
                    f"the layout has {name} {getattr(layout, name)} but the config has "
                    f"{getattr(expected, name)}; make the layout from the same config"
                )
        for name in _EXPERT_COUNTS:
            if (getattr(text_config, name, None) or 1) > 1:
                raise ValueError(
                    f"{type(text_config).__name__} is a mixture of experts ({name} "
                    f"{getattr(text_config, name)}); only dense decoders have a cost model"
                )
        vocabulary = getattr(text_config, "vocab_size", None)
        if not isinstance(vocabulary, int) or vocabulary < 1:
            raise ValueError(f"{type(text_config).__name__}.vocab_size is {vocabulary!r}")
        self.layout = layout
        self.convention: Convention = convention
        self.vocab_size = vocabulary
        #: matrices of one MLP: 3 (gated) or 2
        self.mlp_matrices = 2 if getattr(text_config, "model_type", None) in _TWO_MATRIX_MLP else 3

    # --- Operations ---

    def prefill(self, tokens: Tokens, units_on: int | Sequence[bool]) -> int | float:
        """Return the operations of one prompt: decoder layers, and the lm_head at one position."""
        return _plain(self._layers(self.lengths(tokens), None, units_on) + self.lm_head)

    def layers_cost(self, tokens: Tokens, units_on: int | Sequence[bool]) -> int | float:
        """Return the operations of the decoder layers alone. Budgets are fractions of these."""
        return _plain(self._layers(self.lengths(tokens), None, units_on))

    def decode(self, context: Tokens, units_on: int | Sequence[bool]) -> int | float:
        """Return the operations of one generated token.

        Args:
            context: keys that it attends to, its own included.
        """
        lengths = self.lengths(context)
        one = (1,) * self.layout.num_layers
        return _plain(self._layers(one, lengths, units_on) + self.lm_head)

    @property
    def lm_head(self) -> int:
        """Operations of the lm_head at one position."""
        per_weight = 2 if self.convention == "exact" else 1
        return per_weight * self.layout.hidden_size * self.vocab_size

    # --- Budgets ---

    def share(self, tokens: Tokens, units_on: int | Sequence[bool]) -> float:
        """Return layers_cost / its value with every unit on, in (0, 1].

        Rounded up in the last digit, so that `max_units(share(n, k), n) == k` for a number k.
        """
        lengths = self.lengths(tokens)
        full = self._layers(lengths, None, self.layout.num_units)
        return _at_least(Fraction(self._layers(lengths, None, units_on)) / full)

    def max_units(self, budget: float | str | Fraction, tokens: Tokens) -> int:
        """Return the largest k whose cost is within `budget` of the full decoder.

        Args:
            budget: a decimal as written: 0.6, "0.6" and Fraction(3, 5) are the same. A bfloat16 or
                float32 0.6 is another number.

        Raises:
            ValueError: budget is no number, above 1, or below `min_budget(tokens)`.
        """
        steps, full = _steps(self, self.lengths(tokens))
        try:
            exact = exact_number(budget, "budget")
            if exact > 1:
                raise ValueError(f"budget is {budget}, more than the full decoder")
            # steps are integers, so comparing with the floor of the allowance is exact.
            units = bisect_right(steps, exact.numerator * full // exact.denominator) - 1
            if units < 0:
                raise ValueError(f"budget is {budget}, less than the layers that always run")
        except ValueError as error:
            raise ValueError(
                f"{error}; the smallest budget here is {self.min_budget(tokens)}, the largest 1"
            ) from None
        return units

    def min_budget(self, tokens: Tokens) -> float:
        """Return the share of the layers that always run, for which `max_units` returns 0."""
        return self.share(tokens, 0)

    def layers_run(self, tokens: Tokens, units_on: int) -> Fraction:
        """Return the number of decoder layers that run, a unit of h heads as h/H of a layer."""
        heads = sum(heads for _, heads in self.charged_units(tokens, units_on))
        return self.layout.first + Fraction(heads, self.layout.num_heads)

    def charged_units(self, tokens: Tokens, units_on: int) -> list[tuple[int, int]]:
        """Return (decoder layer, query heads) of the units that a number `units_on` charges."""
        count, plan = _units(units_on, self.layout.num_units)
        if plan is not None:
            raise ValueError("units_on is a plan; it must be a number of units")
        return [unit[1:] for unit in self._charged(self.lengths(tokens), None)[:count]]

    # --- Arithmetic ---

    def _part(self, queries: Exact, keys: Exact, heads: int, kv_heads: int, channels: int) -> Exact:
        """Return the matrix products of part of a layer."""
        layout = self.layout
        weights = layout.hidden_size * (
            2 * layout.head_dim * (heads + kv_heads) + self.mlp_matrices * channels
        )
        attention = 4 * layout.head_dim * heads
        if self.convention == "llm-viewer":
            attention += 5 * heads  # softmax
        return 2 * queries * weights + queries * keys * attention

    def _elementwise(self, queries: Exact) -> Exact:
        """Return two norms (7 each), two residual adds and the activation (2), per channel."""
        return 18 * self.layout.hidden_size * queries if self.convention == "llm-viewer" else 0

    def _layer(self, queries: Exact, keys: Exact) -> Exact:
        layout = self.layout
        products = self._part(
            queries, keys, layout.num_heads, layout.num_kv_heads, layout.intermediate_size
        )
        return products + self._elementwise(queries)

    def _charged(
        self, queries: Sequence[Exact], keys: Sequence[Exact] | None
    ) -> list[tuple[Exact, int, int]]:
        """Return (charge, layer, heads) of every unit, most expensive first."""
        layout = self.layout
        keys = queries if keys is None else keys
        sizes = [layout.unit_slices(unit)[0] for unit in range(layout.units_per_layer)]
        heads = [part.stop - part.start for part in sizes]
        layers = {pair: self._layer(*pair) for pair in set(zip(queries, keys, strict=True))}
        return sorted(
            (
                (
                    layers[queries[index], keys[index]] * Fraction(count, layout.num_heads),
                    index,
                    count,
                )
                for index in range(layout.first, layout.num_layers)
                for count in heads
            ),
            reverse=True,
        )

    def _layers(
        self,
        queries: Sequence[Exact],
        keys: Sequence[Exact] | None,
        units_on: int | Sequence[bool],
    ) -> Exact:
        layout = self.layout
        count, plan = _units(units_on, layout.num_units)
        pairs = list(zip(queries, queries if keys is None else keys, strict=True))
        always = sum(self._layer(*pair) for pair in pairs[: layout.first])
        if plan is None:
            charges = self._charged(queries, keys)[:count]
            return always + sum(charge for charge, _, _ in charges)
        parts = [layout.unit_slices(unit) for unit in range(layout.units_per_layer)]
        for index, pair in enumerate(pairs[layout.first :]):
            on = plan[index * len(parts) : (index + 1) * len(parts)]
            sizes = [
                [part[kind].stop - part[kind].start for kind in range(3)]
                for part, chosen in zip(parts, on, strict=True)
                if chosen
            ]
            if sizes:
                always += self._part(*pair, *(sum(size) for size in zip(*sizes, strict=True)))
                always += self._elementwise(pair[0])
        return always

    def lengths(self, tokens: Tokens) -> tuple[Exact, ...]:
        """Return one exact length per decoder layer."""
        if hasattr(tokens, "tolist"):  # numpy and torch
            tokens = tokens.tolist()
        layers = self.layout.num_layers
        if not isinstance(tokens, Sequence) or isinstance(tokens, str):
            return (_length(tokens),) * layers
        if len(tokens) != layers:
            raise ValueError(
                f"tokens has {len(tokens)} entries; it must be one length, "
                f"or one per layer ({layers})"
            )
        return tuple(_length(value) for value in tokens)

    # --- Vision ---

    def vision(
        self,
        vision_config: Any,
        image_size: int | None = None,
        *,
        feature_layer: int = -2,
        projector_matrices: int = 2,
    ) -> VisionCost:
        """Return the operations of one image in a CLIP or SigLIP tower and the MLP projector.

        They follow the "exact" convention and are never part of a budget.

        Args:
            image_size: in pixels; default: the config's.
            feature_layer: as LLaVA's `vision_feature_layer`. Stock transformers also runs the
                layers above it, which are reported as `unread`.
            projector_matrices: 1 or 2 matrices map patches to the decoder's hidden size.

        Raises:
            ValueError: another kind of tower.
        """
        kind = getattr(vision_config, "model_type", None)
        if kind not in ("clip_vision_model", "siglip_vision_model"):
            raise ValueError(
                f"the cost of a {kind!r} vision tower is unknown; CLIP and SigLIP are supported"
            )
        size = vision_config.image_size if image_size is None else image_size
        layers = vision_config.num_hidden_layers
        used = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
        if not 0 <= used <= layers:
            raise ValueError(f"feature_layer {feature_layer} is not in a tower of {layers} layers")
        patches = (size // vision_config.patch_size) ** 2
        positions = patches + (kind == "clip_vision_model")  # CLIP's class token
        width = vision_config.hidden_size
        layer = 2 * positions * (4 * width**2 + 2 * width * vision_config.intermediate_size)
        layer += 4 * positions**2 * width
        hidden = self.layout.hidden_size
        weights = width * hidden + (projector_matrices - 1) * hidden**2
        pixels = vision_config.num_channels * vision_config.patch_size**2
        return VisionCost(
            tokens=patches,
            patch_embedding=2 * patches * pixels * width,
            tower=used * layer,
            unread=(layers - used) * layer,
            projector=2 * patches * weights,
        )


@dataclass(frozen=True)
class VisionCost:
    """Operations (2 per multiply-accumulate) of one image outside the decoder."""

    tokens: int  # visual tokens passed to the decoder
    patch_embedding: int
    tower: int  # encoder layers up to the one whose output is used; LLaVA-1.5: 0.365e12
    unread: int  # encoder layers above it
    projector: int  # LLaVA-1.5: 0.024e12


@lru_cache(maxsize=8192)
def _steps(model: CostModel, lengths: tuple[Exact, ...]) -> tuple[list[int], int]:
    """Return (cost with 0, 1, ... K units, cost of all), scaled by one factor to integers."""
    always = model._layers(lengths, None, 0)
    charges = [charge for charge, _, _ in model._charged(lengths, None)]
    scale = math.lcm(always.denominator, *(charge.denominator for charge in charges))
    steps = list(
        accumulate((int(charge * scale) for charge in charges), initial=int(always * scale))
    )
    return steps, steps[-1]


def _plain(value: Exact) -> int | float:
    """Return an int where the count is one (nearly always for int tokens), else a float."""
    return value.numerator if value.denominator == 1 else float(value)


def _at_least(value: Fraction) -> float:
    """Return the smallest float whose decimal is not below `value`."""
    result = float(value)
    while Fraction(str(result)) < value:
        result = math.nextafter(result, math.inf)
    return result


def exact_number(value: Any, what: str) -> Fraction:
    """Return `value` (number or text) as the decimal it is written as.

    Raises:
        ValueError: not a finite number; the message names it `what`.
    """
    if isinstance(value, bool) or not isinstance(value, Real | Decimal | str):
        raise ValueError(f"{what} is {value!r} ({type(value).__name__}); a number is needed")
    if isinstance(value, Integral):
        return Fraction(int(value))
    if isinstance(value, Fraction):
        return value
    text = str(value)
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if len(text) > 64 or not math.isfinite(size):
        raise ValueError(f"{what} is {text[:64]!r}; a finite decimal number is needed")
    # size comes first: Fraction("1e-999999999") would not return
    return Fraction(text) if size else Fraction()


def _length(value: Any) -> Exact:
    exact = exact_number(value, "tokens")
    if exact <= 0:
        raise ValueError(f"tokens is {value}; a positive length is needed")
    # integers hash and multiply far faster, and max_units runs once per row
    return exact.numerator if exact.denominator == 1 else exact


def _units(units_on: Any, num_units: int) -> tuple[int, list[bool] | None]:
    """Return (number, None) or (number, plan) of a valid `units_on`."""
    if hasattr(units_on, "tolist"):
        units_on = units_on.tolist()
    if isinstance(units_on, Integral) and not isinstance(units_on, bool):
        if not 0 <= units_on <= num_units:
            raise ValueError(f"units_on is {units_on}; it must be in 0..{num_units}")
        return int(units_on), None
    if isinstance(units_on, Sequence) and not isinstance(units_on, str):
        if len(units_on) != num_units or any(value not in (0, 1) for value in units_on):
            raise ValueError(
                f"a plan is {num_units} truth values, one per unit; got {len(units_on)} values"
            )
        plan = [bool(value) for value in units_on]
        return sum(plan), plan
    raise ValueError(f"units_on is {units_on!r}; it must be a number of units or a plan")

"""What differs between the model families that can be made adaptive, and nothing else.

In: a stock transformers model of the shape vision tower + projector + `language_model.layers`. Out:
a `Backbone` with the pieces the adaptive model drives itself: embedding of text and pictures,
positions, causal mask, decoder layers, head. A new family of that shape is one entry in `FAMILIES`;
a new decoder block is one in `BLOCKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask


@dataclass(frozen=True)
class Family:
    """image_inputs: what `get_image_features` takes beside pixel_values. positions: None where the
    model counts.
    """

    image_inputs: tuple[str, ...] = ()
    positions: (
        Callable[[nn.Module, Tensor, Tensor | None, dict[str, Tensor]], Tensor | None] | None
    ) = None


def _multimodal_rope(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, extras: dict[str, Tensor]
) -> Tensor | None:
    """Qwen2-VL's positions [3, B, n] (time, height, width); None for text alone."""
    if extras.get("image_grid_thw") is None:
        return None
    token_types = extras.get("mm_token_type_ids")
    if token_types is None:
        token_types = (input_ids == model.config.image_token_id).int()
    positions, _ = model.get_rope_index(
        input_ids,
        mm_token_type_ids=token_types,
        image_grid_thw=extras["image_grid_thw"],
        attention_mask=attention_mask,
    )
    return positions


FAMILIES: dict[str, Family] = {
    "llava": Family(),
    "llava_next": Family(image_inputs=("image_sizes",)),
    "llava_onevision": Family(image_inputs=("image_sizes",)),
    "qwen2_vl": Family(image_inputs=("image_grid_thw",), positions=_multimodal_rope),
    "qwen2_5_vl": Family(image_inputs=("image_grid_thw",), positions=_multimodal_rope),
}


@dataclass(frozen=True)
class Block:
    """Names inside a decoder layer: projections into the MLP, out of the MLP, out of attention."""

    up: tuple[str, ...]
    down: str
    attention_out: str


BLOCKS = (
    Block(
        up=("gate_proj", "up_proj"), down="down_proj", attention_out="o_proj"
    ),  # llama, mistral, qwen2
    Block(up=("fc1",), down="fc2", attention_out="dense"),  # phi
)


def block_of(layer: nn.Module) -> Block:
    """The names of a decoder layer's parts. Raises ValueError when heads and channels cannot be
    told apart.
    """
    for block in BLOCKS:
        if all(hasattr(layer.mlp, name) for name in (*block.up, block.down)) and all(
            hasattr(layer.self_attn, name)
            for name in ("q_proj", "k_proj", "v_proj", block.attention_out)
        ):
            return block
    raise ValueError(
        f"design 'heads' does not know the parts of a {type(layer).__name__}; it knows layers with "
        "q_proj, k_proj, v_proj, o_proj or dense, and gate_proj/up_proj/down_proj or fc1/fc2; "
        "use design 'layers'"
    )


class Backbone:
    """The pieces of a stock model, found once. Holds no parameters of its own.

    Raises ValueError for a model of an unknown family, or with sliding-window layers (whose mask
    differs by layer).
    """

    def __init__(self, base: nn.Module) -> None:
        kind = base.config.model_type
        if kind not in FAMILIES:
            raise ValueError(
                f"no adapter for model type {kind!r}; "
                f"there is one for {', '.join(sorted(FAMILIES))}"
            )
        self.family = FAMILIES[kind]
        self.base = base
        self.model = base.model
        self.language = base.model.language_model
        self.config = self.language.config
        self.layers = self.language.layers
        self.norm = (
            self.language.norm if hasattr(self.language, "norm") else self.language.final_layernorm
        )
        kinds = set(getattr(self.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(f"layers must all use full attention, not {', '.join(sorted(kinds))}")

    @property
    def attention(self) -> str:
        """The attention implementation in use: sdpa, eager, flash_attention_2, ..."""
        return self.config._attn_implementation

    def image_features(self, pixel_values: Tensor, extras: dict[str, Tensor]) -> Tensor:
        """Projected features of all pictures, one after the other: [image tokens, d]."""
        inputs = {k: extras[k] for k in self.family.image_inputs if extras.get(k) is not None}
        features = self.model.get_image_features(pixel_values, **inputs).pooler_output
        return torch.cat(tuple(features))

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        extras: dict[str, Tensor],
        features: Tensor | None = None,
    ) -> Tensor:
        """Token embeddings [B, n, d] with the projected image features in their places.

        features: those of `image_features`, where they are at hand.
        """
        embeddings = self.base.get_input_embeddings()(input_ids)
        if features is None and pixel_values is not None:
            features = self.image_features(pixel_values, extras)
        if features is not None:
            features = features.to(embeddings.device, embeddings.dtype)
            places = self.model.get_placeholder_mask(
                input_ids, inputs_embeds=embeddings, image_features=features
            )
            places = places[0] if isinstance(places, tuple) else places
            embeddings = embeddings.masked_scatter(places, features)
        if hasattr(self.language, "embed_dropout"):  # phi
            embeddings = self.language.embed_dropout(embeddings)
        return embeddings

    def positions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        extras: dict[str, Tensor],
        count: bool,
    ) -> Tensor | None:
        """Position ids [B, n] or [3, B, n]; None where the stock forward counts from 0, padding
        included.

        count: count attended tokens only, as the stock `generate` does.
        """
        if self.family.positions is not None:
            found = self.family.positions(self.model, input_ids, attention_mask, extras)
            if found is not None:
                return found
        if not count or attention_mask is None:
            return None
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)

    def causal_mask(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor | None,
        explicit: bool = False,
    ) -> Tensor | None:
        """The stock causal mask for a prefill of `hidden` [B, n, d]; `explicit` never leaves it to
        the kernel.
        """
        return create_causal_mask(
            self.config,
            hidden,
            attention_mask,
            None,  # no cache; by position, for its name depends on the version of transformers
            position_ids=positions if positions is None or positions.dim() == 2 else None,
            allow_is_causal_skip=not explicit,
        )

    def row_mask(self, visible: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Mask for one query a row: visible [B, m] -> [B, 1, 1, m] in the form the attention in use
        takes.
        """
        if bool(visible.all()):
            return None
        if self.attention.startswith("flash_attention"):
            return visible.long()
        return self.mask_of(visible.bool()[:, None, None, :], dtype)

    def mask_of(self, visible: Tensor, dtype: torch.dtype) -> Tensor:
        """bool [B or 1, 1, n, m] in the form that sdpa or eager attention takes."""
        if self.attention != "eager":
            return visible
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary cos and sin for positions [B or 1, n] (or [3, B, n])."""
        if self.family.positions is not None and positions.dim() == 2:
            positions = positions[None].expand(3, -1, -1)
        return self.language.rotary_emb(hidden, position_ids=positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: [..., d] -> [..., V]."""
        return self.base.lm_head(self.norm(hidden))

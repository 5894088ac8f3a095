"""Differences between the model families that can be made adaptive.

A `Backbone` wraps a stock transformers model (vision tower, projector, `language_model.layers`) and
offers the pieces that the adaptive model calls itself: embedding of text and images, positions,
causal mask, decoder layers, head. A new family of that shape is one entry in `FAMILIES`; a new
decoder block is one entry in `BLOCKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

Positions = Callable[[nn.Module, Tensor, Tensor | None, dict[str, Tensor]], Tensor | None]


@dataclass(frozen=True)
class Family:
    """How one family takes images and positions."""

    #: arguments of `get_image_features` apart from pixel_values
    image_inputs: tuple[str, ...] = ()
    #: makes position ids; None where the model counts them itself
    positions: Positions | None = None


def _multimodal_rope(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, extras: dict[str, Tensor]
) -> Tensor | None:
    """Return Qwen2-VL's positions [3, B, n] (time, height, width); None for text alone."""
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

# inputs of every family; the last three describe tokens and images, and add nothing
_COMMON_INPUTS = {
    "input_ids",
    "attention_mask",
    "pixel_values",
    "mm_token_type_ids",
    "token_type_ids",
    "batch_num_images",
}


@dataclass(frozen=True)
class Block:
    """Names of the projections inside a decoder layer."""

    up: tuple[str, ...]  # into the MLP
    down: str  # out of the MLP
    attention_out: str


BLOCKS = (
    # llama, mistral, qwen2
    Block(up=("gate_proj", "up_proj"), down="down_proj", attention_out="o_proj"),
    # phi
    Block(up=("fc1",), down="fc2", attention_out="dense"),
)


def block_of(layer: nn.Module) -> Block:
    """Return the names of a decoder layer's projections.

    Raises:
        ValueError: the layer has other projections.
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
    """The pieces of a stock model. Holds no parameters of its own.

    Raises:
        ValueError: a model of an unknown family, or with sliding-window layers (whose mask differs
            by layer).
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
        """The attention implementation: sdpa, eager, flash_attention_2, ..."""
        return self.config._attn_implementation

    def check_inputs(self, inputs: Mapping[str, object]) -> None:
        """Check that the adaptive model uses each of the inputs.

        Raises:
            ValueError: there is a video, a sound or another tensor that it would ignore.
        """
        used = {*self.family.image_inputs, *_COMMON_INPUTS}
        for name, value in inputs.items():
            if name not in used and not isinstance(value, (bool, int, float, str, type(None))):
                kind = self.base.config.model_type
                raise ValueError(
                    f"{name}: a {kind} model under a budget takes text and images, no videos, "
                    "sound or other inputs; leave it out, or run the base model (budget=None)"
                )

    def image_features(self, pixel_values: Tensor, extras: dict[str, Tensor]) -> Tensor:
        """Return the projected features of all images, concatenated: [image tokens, d]."""
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
        """Return token embeddings [B, n, d] with image features at the image tokens.

        Args:
            features: result of `image_features`, if it is known already.
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
        """Return position ids [B, n] or [3, B, n], or None.

        None where the stock forward counts from 0, padding included.

        Args:
            count: count attended tokens only, as the stock `generate` does.
        """
        if self.family.positions is not None:
            positions = self.family.positions(self.model, input_ids, attention_mask, extras)
            if positions is not None:
                return positions
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
        """Return the stock causal mask for a prefill of `hidden` [B, n, d].

        Args:
            explicit: always return a mask, also where the kernel could apply causality itself.
        """
        return create_causal_mask(
            self.config,
            hidden,
            attention_mask,
            None,  # the cache, by position: its name depends on the version of transformers
            position_ids=positions if positions is None or positions.dim() == 2 else None,
            allow_is_causal_skip=not explicit,
        )

    def row_mask(self, visible: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the mask of one query per row, in the form that the attention takes.

        Args:
            visible: bool [B, m], the keys that each row's query attends to.
        """
        if bool(visible.all()):
            return None
        if self.attention.startswith("flash_attention"):
            return visible.long()
        return self.mask_of(visible.bool()[:, None, None, :], dtype)

    def mask_of(self, visible: Tensor, dtype: torch.dtype) -> Tensor:
        """Convert a bool mask [B or 1, 1, n, m] to the form that sdpa or eager attention takes."""
        if self.attention != "eager":
            return visible
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return rotary cos and sin for positions [B or 1, n] or [3, B, n]."""
        if self.family.positions is not None and positions.dim() == 2:
            positions = positions[None].expand(3, -1, -1)
        return self.language.rotary_emb(hidden, position_ids=positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the final norm and the head: [..., d] -> [..., V]."""
        return self.base.lm_head(self.norm(hidden))

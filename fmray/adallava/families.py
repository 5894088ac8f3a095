"""Differences between the model families that can be made adaptive.

A `Backbone` wraps a stock transformers model and offers the pieces that the adaptive model calls
itself: embedding of text and images, positions, causal mask, decoder layers, head. It finds the
decoder by its shape, so that a text model needs no entry here. A family that takes images is one
entry in `FAMILIES`, a decoder block that design H can cut one entry in `BLOCKS`.

Shape proves nothing: `fmray.adallava.proof` compares the pieces with the stock forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)
from transformers.masking_utils import create_causal_mask

Positions = Callable[[nn.Module, Tensor, Tensor | None, dict[str, Tensor]], Tensor | None]


@dataclass(frozen=True)
class Family:
    """How one family takes images and positions."""

    #: arguments of `get_image_features` apart from pixel_values
    image_inputs: tuple[str, ...] = ()
    #: makes position ids; None where the model counts them itself
    positions: Positions | None = None
    #: token ids around an image whose embeddings the vision tower gives (Ovis)
    indicators: bool = False
    #: features of lower vision layers enter after the first decoder layers (DeepStack)
    deepstack: bool = False


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


TEXT = Family()
FAMILIES: dict[str, Family] = {
    "glm4v": Family(image_inputs=("image_grid_thw",), positions=_multimodal_rope),
    "idefics3": Family(image_inputs=("pixel_attention_mask",)),
    "internvl": Family(),
    "llava": Family(image_inputs=("image_sizes",)),
    "llava_next": Family(image_inputs=("image_sizes",)),
    "llava_onevision": Family(image_inputs=("image_sizes",)),
    "mistral3": Family(image_inputs=("image_sizes",)),
    "ovis2": Family(indicators=True),
    "qwen2_vl": Family(image_inputs=("image_grid_thw",), positions=_multimodal_rope),
    "qwen2_5_vl": Family(image_inputs=("image_grid_thw",), positions=_multimodal_rope),
    "qwen3_vl": Family(
        image_inputs=("image_grid_thw",), positions=_multimodal_rope, deepstack=True
    ),
    "smolvlm": Family(image_inputs=("pixel_attention_mask",)),
    "vipllava": Family(),
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
        ValueError: a decoder of another shape, a model that takes images and has no entry in
            `FAMILIES`, or layers with a sliding window or another limit on what they attend to.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.kind = kind = base.config.model_type
        self.model = getattr(base, "model", None)
        self.language = _decoder_of(self.model)
        self.head = base.get_output_embeddings()
        norms = [getattr(self.language, name, None) for name in ("norm", "final_layernorm")]
        self.norm = next((norm for norm in norms if norm is not None), None)
        if self.language is None or self.norm is None or self.head is None:
            raise ValueError(
                f"a {kind} model has no decoder of the usual shape (embed_tokens, layers, norm,"
                " rotary_emb and a head) and cannot be made adaptive"
            )
        self.takes_images = self.language is not self.model or takes_images(base.config)
        if self.takes_images and kind not in FAMILIES:
            raise ValueError(
                f"no adapter for images in model type {kind!r}; there is one for"
                f" {', '.join(sorted(FAMILIES))}, and text models need none"
            )
        self.family = FAMILIES[kind] if self.takes_images else TEXT
        self.config = self.language.config
        self.layers = self.language.layers
        self._check_attention()
        if any(hasattr(layer.mlp, "experts") for layer in self.layers if hasattr(layer, "mlp")):
            raise ValueError(f"a {kind} model has experts; only dense decoders have a cost model")

    @property
    def device(self) -> torch.device:
        """The device of the first decoder layer."""
        return next(self.layers[0].parameters()).device

    def _check_attention(self) -> None:
        """Refuse layers whose mask differs from the causal one.

        Short prompts do not show a window, so no proof on one row can find it.
        """
        types = set(getattr(self.config, "layer_types", None) or ["full_attention"])
        if types != {"full_attention"}:
            raise ValueError(
                f"layers of a {self.kind} model must all use full attention, not"
                f" {', '.join(sorted(types))}"
            )
        window = getattr(self.config, "sliding_window", None)
        listed = getattr(self.config, "layer_types", None) is not None
        if isinstance(window, int) and not listed and window < self.config.max_position_embeddings:
            raise ValueError(
                f"a {self.kind} model attends to the last {window} tokens only (sliding_window);"
                " a model with full attention is needed"
            )

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
        """Return the projected features of all images, concatenated: [image tokens, d].

        Where the tower gives embeddings of indicator tokens too, they follow; where it gives D
        features of lower layers, they stand next to the others: [image tokens, (1 + D) d].
        """
        inputs = {k: extras[k] for k in self.family.image_inputs if extras.get(k) is not None}
        output = self.model.get_image_features(pixel_values, **inputs)
        features = torch.cat(tuple(output.pooler_output))
        if self.family.indicators:
            features = torch.cat((features, output.visual_indicator_features))
        if self.family.deepstack:
            deeper = [torch.cat(tuple(layer)) for layer in output.deepstack_features]
            features = torch.cat((features, *deeper), dim=1)
        return features

    @property
    def deepstack_layers(self) -> int:
        """D, the number of decoder layers after which features of the image are added."""
        if not self.family.deepstack:
            return 0
        return len(self.base.config.vision_config.deepstack_visual_indexes)

    def added(self, input_ids: Tensor, features: Tensor | None) -> Tensor | None:
        """Return what is added to the states after the first D layers, [D, B, n, d], or None."""
        if features is None or not self.family.deepstack:
            return None
        width = self.config.hidden_size
        dense = features.new_zeros((*input_ids.shape, features.shape[1] - width))
        dense[input_ids == self.base.config.image_token_id] = features[:, width:]
        return torch.stack(dense.split(width, dim=-1))

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
            indicators = self.model.visual_indicator_token_ids if self.family.indicators else ()
            around = features[len(features) - len(indicators) :]
            features = features[: len(features) - len(indicators), : embeddings.shape[-1]]
            places = (input_ids == self.base.config.image_token_id)[..., None]
            if int(places.sum()) != len(features):
                raise ValueError(
                    f"image tokens and image features do not match: {int(places.sum())} tokens,"
                    f" {len(features)} features"
                )
            embeddings = embeddings.masked_scatter(places, features)
            for token, feature in zip(indicators, around, strict=True):
                embeddings = torch.where((input_ids == token)[..., None], feature, embeddings)
        if hasattr(self.language, "embed_dropout"):  # phi
            embeddings = self.language.embed_dropout(embeddings)
        return embeddings * getattr(self.config, "embedding_multiplier", 1)  # granite

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
        logits = self.head(self.norm(hidden))
        logits = logits * getattr(self.base, "logit_scale", 1)  # cohere
        return logits / getattr(self.config, "logits_scaling", 1)  # granite


def takes_images(config: PreTrainedConfig) -> bool:
    """Return whether transformers lists the class of a config among its image-text models."""
    return type(config) in AutoModelForImageTextToText._model_mapping


def load_base(path: str | Path, **options: Any) -> nn.Module:
    """Load a stock model: one that takes images, or a causal language model.

    Args:
        options: passed to `from_pretrained` (revision, dtype, attn_implementation, ...).
    """
    names = ("revision", "gguf_file", "token", "cache_dir", "local_files_only")
    config = AutoConfig.from_pretrained(path, **{k: options[k] for k in names if k in options})
    loader = AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM
    return loader.from_pretrained(path, **options)


def _decoder_of(model: nn.Module | None) -> nn.Module | None:
    """Return the part of a stock model (`base.model`) that has the decoder layers, or None."""
    parts = [getattr(model, name, None) for name in ("language_model", "text_model")] + [model]
    for part in parts:
        if all(hasattr(part, name) for name in ("embed_tokens", "layers", "rotary_emb")):
            return part
    return None

"""The model a recipe asks for: made from sizes or loaded, adaptive or not.

In: an `AdaLlavaRecipe` and the processor of its data store. Out: an `nn.Module` on the CPU, equal
on every worker (seeded), with `requires_grad` set as the recipe says. Also: folding LoRA weights
back into the layers they adapt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from fmray.adallava import AdaptiveVLM, SwitchLayout
from fmray.adallava.store import is_adaptive
from fmray.config import AdaLlavaRecipe, AdaptiveConfig, ModelConfig, ScratchConfig

if TYPE_CHECKING:
    from transformers import ProcessorMixin

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEXT_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "phi": PhiConfig,
}


def build_model(recipe: AdaLlavaRecipe, processor: ProcessorMixin, lora: bool = True) -> nn.Module:
    """The module to train: a stock model, or an `AdaptiveVLM` for a recipe that is `adaptive`.

    `lora=False` leaves the LoRA layers out (to load merged weights into). Raises ValueError when
    the source does not fit the recipe.
    """
    source = recipe.model.source
    torch.manual_seed(recipe.seed)
    if is_adaptive(source):
        if recipe.adaptive is None:
            raise ValueError(
                f"model.source {source} is an adaptive model, and the recipe has no `adaptive` "
                "section; add one, or name a stock model"
            )
        model = _load_adaptive(recipe.model, recipe.adaptive)
        base = model.base
    else:
        base = _load_base(recipe.model, processor)
        model = base
    parts = _parts(base)
    for name in recipe.model.freeze:
        for module in parts[name]:
            module.requires_grad_(False)
    if lora and recipe.model.lora is not None:
        _inject_lora(base, parts, recipe.model)
    if recipe.adaptive is not None and model is base:
        torch.manual_seed(recipe.seed + 1)  # the new parts are the same whatever was drawn before
        model = _wrap(base, recipe.adaptive)
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        base.config.use_cache = False
    return model


def scratch_model(
    config: ScratchConfig, processor: ProcessorMixin, dtype: torch.dtype, attention: str
) -> LlavaForConditionalGeneration:
    """A small LLaVA with random weights for `processor`'s vocabulary; seed torch before."""
    tokenizer = processor.tokenizer
    text = TEXT_CONFIGS[config.text_family](
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads or config.heads,
        max_position_embeddings=2048,
        initializer_range=0.6 * config.hidden**-0.5,  # the usual 0.02 is made for wide models
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=config.vision_hidden,
        intermediate_size=4 * config.vision_hidden,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    whole = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(processor.image_token),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=(config.image_size // config.patch_size) ** 2,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    whole._attn_implementation = attention
    return LlavaForConditionalGeneration(whole).to(dtype)


def merge_lora(state: dict[str, Tensor], alpha: float, rank: int) -> dict[str, Tensor]:
    """Weights with the LoRA factors folded in: W + alpha/rank * B A, under the plain names.

    state: the full state dict of a model with LoRA layers (peft's names). The sum is taken in
    float32.
    """
    merged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if name.endswith(".base_layer.weight"):
            stem = name.removesuffix("base_layer.weight")
            a, b = state[f"{stem}lora_A.default.weight"], state[f"{stem}lora_B.default.weight"]
            delta = (b.float() @ a.float()) * (alpha / rank)
            tensor = (tensor.float() + delta).to(tensor.dtype)
        merged[plain] = tensor
    return merged


def _load_base(config: ModelConfig, processor: ProcessorMixin) -> nn.Module:
    dtype = DTYPES[config.dtype]
    if config.source == "scratch":
        return scratch_model(config.scratch, processor, dtype, config.attention)
    try:
        return AutoModelForImageTextToText.from_pretrained(
            config.source,
            revision=config.revision,
            dtype=dtype,
            attn_implementation=config.attention,
        )
    except (OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.source {config.source} (attention {config.attention}) does not load: {reason}"
        ) from error


def _layout(config: AdaptiveConfig, base: nn.Module) -> SwitchLayout:
    text = base.config.get_text_config()
    if config.design == "layers":
        return SwitchLayout.layers(text, first=config.first)
    return SwitchLayout.heads(text, first=config.first, unit=config.unit)


def _wrap(base: nn.Module, config: AdaptiveConfig) -> nn.Module:
    return AdaptiveVLM.from_base(
        base,
        _layout(config, base),
        latency_token=config.latency_token,
        scheduler=config.scheduler,
        tau=config.tau,
        penalty=config.penalty,
    )


def _load_adaptive(config: ModelConfig, adaptive: AdaptiveConfig) -> nn.Module:
    dtype = DTYPES[config.dtype]
    model = AdaptiveVLM.from_pretrained(
        config.source, dtype=dtype, attn_implementation=config.attention
    ).to(dtype)
    wanted = _layout(adaptive, model.base)
    if model.layout != wanted:
        raise ValueError(
            f"model.source {config.source} has the switches {model.layout}, the recipe's "
            f"`adaptive` section asks for {wanted}; make them equal, or start from the base model"
        )
    return model


def _parts(base: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules behind the names of `model.freeze`, by the names transformers gives them."""
    names = {
        "vision": ("vision_tower", "visual", "vision_model"),
        "projector": ("multi_modal_projector", "connector"),
        "language": ("language_model", "text_model"),
    }
    parts = {
        part: [getattr(base.model, name) for name in options if hasattr(base.model, name)]
        for part, options in names.items()
    }
    parts["language"].append(base.lm_head)
    return parts


def _inject_lora(base: nn.Module, parts: dict[str, list[nn.Module]], config: ModelConfig) -> None:
    """LoRA on every linear layer of the decoder.

    Its own weights rest, the projector learns unless frozen.
    """
    # slow to import, and few runs need it
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    decoder = parts["language"][0]
    targets = sorted(
        {
            name.rpartition(".")[2]
            for name, module in decoder.named_modules()
            if isinstance(module, nn.Linear)
        }
    )
    inject_adapter_in_model(
        PeftLoraConfig(
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=targets,
        ),
        decoder,
    )
    for name in ("vision", "projector"):
        if name not in config.freeze:
            for module in parts[name]:
                module.requires_grad_(True)
    base.lm_head.requires_grad_(False)

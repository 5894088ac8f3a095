"""Build the model that a recipe asks for: from sizes or pretrained, adaptive or not.

`build_model` returns an `nn.Module` on the CPU, equal on every worker (seeded), with
`requires_grad` set by the recipe. `sizes_of` builds the same module on the `meta` device and counts
its parameters. `merge_lora` folds LoRA weights back into the layers that they adapt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
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
from fmray.adallava.presets import preset
from fmray.adallava.store import DESCRIPTION, is_adaptive
from fmray.config import AdaLlavaRecipe, AdaptiveConfig, ModelConfig, ScratchConfig
from fmray.errors import first_line
from fmray.runtime.gpu_memory import Sizes

if TYPE_CHECKING:
    from transformers import ProcessorMixin

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEXT_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "phi": PhiConfig,
}
#: Hub names whose config is known without a download.
PRESETS = {
    "llava-hf/llava-1.5-7b-hf": "llava-1.5-7b",
    "llava-hf/llava-1.5-13b-hf": "llava-1.5-13b",
}
LLAVA_VOCABULARY = 32_064  # 32000 of Llama, the image and padding tokens, rounded up


def build_model(recipe: AdaLlavaRecipe, processor: ProcessorMixin, lora: bool = True) -> nn.Module:
    """Return the module to train: a stock model, or an `AdaptiveVLM` for an `adaptive` recipe.

    Args:
        processor: of the data store; a scratch model takes its vocabulary from it.
        lora: False leaves the LoRA layers out (to load merged weights into).

    Raises:
        ValueError: the source does not load, or does not fit the recipe.
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
    else:
        model = _load_base(recipe.model, processor)
    return _prepare(model, recipe, lora)


def sizes_of(recipe: AdaLlavaRecipe) -> Sizes:
    """Count the parameters of the module that `build_model` trains, without its weights.

    A scratch model has the largest vocabulary that its recipe allows: the true one is known after
    data preparation.

    Raises:
        ValueError: the model's config cannot be read here.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(model_config(recipe.model))
        model = _prepare(base, recipe, lora=True)
    text = base.config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        largest_layer=max(
            sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()
        ),
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_width=kv_heads * head_width,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
    )


def model_config(model: ModelConfig) -> PreTrainedConfig:
    """Return the Hugging Face config of a recipe's base model, from a preset where there is one.

    Raises:
        ValueError: neither a preset nor a directory or hub name whose config can be read here.
    """
    source = model.source
    if source == "scratch":
        return scratch_config(model.scratch)
    if source in PRESETS:
        known = preset(PRESETS[source])
        known.text_config.vocab_size = LLAVA_VOCABULARY
        return LlavaConfig(vision_config=known.vision_config, text_config=known.text_config)
    if is_adaptive(source):
        description = json.loads((Path(source) / DESCRIPTION).read_text(encoding="utf-8"))
        source = description.get("base") or source
    try:
        return AutoConfig.from_pretrained(source, revision=model.revision)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model.source: no config of {source} can be read here: no such folder, and the"
            " hub does not know it or cannot be reached"
        ) from error


def scratch_config(config: ScratchConfig, processor: ProcessorMixin | None = None) -> LlavaConfig:
    """Return the config of a small LLaVA; without a processor, with the largest vocabulary."""
    vocabulary, image_token, special = config.max_vocabulary, None, {}
    if processor is not None:
        tokenizer = processor.tokenizer
        vocabulary = len(tokenizer)
        image_token = tokenizer.convert_tokens_to_ids(processor.image_token)
        special = {
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
    text = TEXT_CONFIGS[config.text_family](
        vocab_size=vocabulary,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads or config.heads,
        max_position_embeddings=2048,
        initializer_range=0.6 * config.hidden**-0.5,  # the usual 0.02 is made for wide models
        tie_word_embeddings=False,
        **special,
    )
    vision = CLIPVisionConfig(
        hidden_size=config.vision_hidden,
        intermediate_size=4 * config.vision_hidden,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    image: dict[str, Any] = {} if image_token is None else {"image_token_id": image_token}
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=(config.image_size // config.patch_size) ** 2,
        tie_word_embeddings=False,
        **image,
        **special,
    )


def scratch_model(
    config: ScratchConfig, processor: ProcessorMixin, dtype: torch.dtype, attention: str
) -> LlavaForConditionalGeneration:
    """Return a small LLaVA with random weights for `processor`'s vocabulary; seed torch before."""
    llava = scratch_config(config, processor)
    llava._attn_implementation = attention
    return LlavaForConditionalGeneration(llava).to(dtype)


def merge_lora(state: dict[str, Tensor], alpha: float, rank: int) -> dict[str, Tensor]:
    """Fold the LoRA factors into the weights: W + alpha/rank * B A, under the plain names.

    Args:
        state: full state dict of a model with LoRA layers (peft's names). The sum is in float32.
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


def _prepare(model: nn.Module, recipe: AdaLlavaRecipe, lora: bool) -> nn.Module:
    """Freeze what the recipe freezes, and add LoRA, adaptive parts and gradient checkpointing."""
    base = model.base if isinstance(model, AdaptiveVLM) else model
    parts = _parts(base)
    for name in recipe.model.freeze:
        for module in parts[name]:
            module.requires_grad_(False)
    if lora and recipe.model.lora is not None:
        _inject_lora(base, parts, recipe.model)
    if recipe.adaptive is not None and model is base:
        torch.manual_seed(recipe.seed + 1)  # equal adaptive parts, whatever was drawn before
        with torch.device("cpu"):  # unit indices need values; parameters move to the base's device
            model = _wrap(base, recipe.adaptive)
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        base.config.use_cache = False
    return model


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
    except (OSError, ImportError, SafetensorError) as error:
        raise ValueError(
            f"model.source {config.source} (attention {config.attention}) does not load:"
            f" {first_line(error)}"
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
            f"model.source {config.source} has the units {model.layout}, the recipe's "
            f"`adaptive` section asks for {wanted}; make them equal, or start from the base model"
        )
    return model


def _parts(base: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the modules that each name of `model.freeze` stands for, by transformers' names."""
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
    """Add LoRA to every linear layer of the decoder.

    The base weights are frozen; the projector trains unless it is listed in `freeze`.
    """
    # Slow to import, and few runs need it.
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

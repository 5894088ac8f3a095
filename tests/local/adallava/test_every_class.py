"""Every causal LM and image-text class of the installed transformers: proven, or refused in a line.

Models are shrunk by the usual names of sizes; a class whose config has no such names is built as it
is, if it is small, or else without weights. What is refused must say so before it computes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from fmray.adallava import AdaptiveVLM, SwitchLayout
from fmray.adallava.families import FAMILIES, Backbone
from fmray.adallava.proof import prove

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LARGEST = 20_000_000  # parameters
PROVEN = {  # text models that people ask for
    *("cohere", "ernie4_5", "gemma", "glm", "glm4", "granite", "helium", "hunyuan_v1_dense"),
    *("llama", "ministral3", "mistral", "nemotron", "olmo2", "phi", "phi3", "qwen2", "qwen3"),
    *("seed_oss", "smollm3", "starcoder2"),
}


def classes(mapping: Any) -> list[type[PreTrainedConfig]]:
    """Return the configs of a mapping, by name."""
    listed = list(mapping.keys())  # more than `in` and `[]` know
    return sorted((c for c in listed if c in mapping), key=lambda c: c.model_type)


TEXT = classes(AutoModelForCausalLM._model_mapping)
IMAGES = classes(AutoModelForImageTextToText._model_mapping)


def small(config: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Return a config with the sizes above, wherever it has such names."""
    names = config().to_dict().keys()
    return config(**{name: size for name, size in SIZES.items() if name in names})


def made(mapping: Any, config: type[PreTrainedConfig]) -> nn.Module:
    """Return a model of a class with random weights; on the meta device if it is large."""
    kind = mapping[config]
    kind = kind[0] if isinstance(kind, (tuple, list)) else kind
    values = small(config)
    with torch.device("meta"):
        model = kind(values)
    if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
        return model.eval()
    torch.manual_seed(0)
    model = kind(values).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("config", TEXT, ids=lambda config: config.model_type)
def test_a_text_class_is_proven_or_refused(config: type[PreTrainedConfig]) -> None:
    kind = config.model_type
    try:
        model = made(AutoModelForCausalLM._model_mapping, config)
    except Exception as error:  # noqa: BLE001 - transformers' own
        assert kind not in PROVEN
        pytest.skip(f"transformers does not build it small: {type(error).__name__}")
    differences, refusal = {"not run": 1.0}, ""
    try:
        layout = SwitchLayout.layers(model.config.get_text_config())
        differences = prove(AdaptiveVLM.from_base(model, layout, latency_token="probe"))
    except ValueError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert max(differences.values()) < 2e-5 or (refusal and kind not in PROVEN)


@pytest.mark.parametrize("config", IMAGES, ids=lambda config: config.model_type)
def test_an_image_class_has_an_adapter_or_is_refused(config: type[PreTrainedConfig]) -> None:
    if config.model_type in FAMILIES:
        return  # tests/unit/adallava/test_families.py
    try:
        model = made(AutoModelForImageTextToText._model_mapping, config)
    except Exception as error:  # noqa: BLE001 - transformers' own
        pytest.skip(f"transformers does not build it small: {type(error).__name__}")
    with pytest.raises(ValueError) as refusal:
        Backbone(model)
    assert "\n" not in str(refusal.value)

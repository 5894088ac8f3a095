"""The "exact" convention against the operations that torch counts in stock models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SiglipVisionModel,
    Starcoder2Config,
)

from fmray.adallava.cost import CostModel
from fmray.adallava.execution import cache_argument
from fmray.adallava.layout import SwitchLayout

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 100,
    "vocab_size": 90,
    "attn_implementation": "eager",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
DECODERS = [
    LlamaConfig(**SMALL),
    MistralConfig(**GROUPED, head_dim=16),
    Qwen2Config(**GROUPED),
    Qwen3Config(**GROUPED, head_dim=16),
    GemmaConfig(**GROUPED, head_dim=8),
    Phi3Config(**GROUPED),
    PhiConfig(**SMALL),
    Starcoder2Config(**GROUPED),
]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_vision_cost_is_what_torch_counts_in_the_tower(kind):
    size = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "attn_implementation": "eager",
    }
    if kind == "clip":
        tower = CLIPVisionModel(CLIPVisionConfig(**size))
    else:
        tower = SiglipVisionModel(SiglipVisionConfig(**size, vision_use_head=False))
    with FlopCounterMode(display=False) as counter:
        tower(torch.zeros(1, 3, 32, 32))
    text = LlamaConfig(**SMALL)
    cost = CostModel(text, SwitchLayout.layers(text)).vision(tower.config)
    assert cost.patch_embedding + cost.tower + cost.unread == counter.get_total_flops()
    assert cost.unread * 2 == cost.tower


def counted(model, prefix, *args, **kwargs):
    """Operations that torch counts in the decoder layers and in the lm_head."""
    with torch.no_grad(), FlopCounterMode(depth=4, display=False) as counter:
        output = model(*args, **kwargs)
    counts = {
        name.removeprefix(f"{type(model).__name__}."): sum(operations.values())
        for name, operations in counter.get_flop_counts().items()
    }
    layers = sum(
        counts.get(f"{prefix}.{index}", 0) for index in range(model.config.num_hidden_layers)
    )
    return layers, counts["lm_head"], output


@pytest.mark.parametrize("config", DECODERS, ids=lambda config: config.model_type)
def test_exact_cost_is_what_torch_counts_in_the_stock_model(config):
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    cost = CostModel(config, SwitchLayout.layers(config))
    full = cost.layout.num_units
    ids = torch.randint(3, 90, (1, 23), generator=torch.Generator().manual_seed(0))
    layers, head, output = counted(model, "model.layers", ids, logits_to_keep=1, use_cache=True)
    assert layers == cost.layers_cost(23, full)
    assert head == cost.lm_head
    assert layers + head == cost.prefill(23, full)
    name = cache_argument(type(model))
    cache = {name: getattr(output, name)}
    layers, head, _ = counted(model, "model.layers", ids[:, :1], **cache)
    assert layers + head == cost.decode(24, full)
    # one layer less in the model is as much work as one unit less on
    del model.model.layers[3]
    layers, head, _ = counted(model, "model.layers", ids, logits_to_keep=1, use_cache=False)
    assert layers + head == cost.prefill(23, full - 1)

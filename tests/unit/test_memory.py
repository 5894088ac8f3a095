"""The memory estimate against DeepSpeed's estimators and against what PyTorch keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fmray.adallava import AdaptiveVLM, SwitchLayout
from fmray.config import AdaLlavaRecipe
from fmray.runtime.gpu_memory import Sizes, estimate, layer_activations, measure

PARAMETERS, LARGEST = 7_000_000_000, 130_000_000
SIZES = Sizes(PARAMETERS, PARAMETERS, LARGEST, 4096, 32, 32, 4096, 11008, 32064)


def recipe(workers: int = 8, **sections: Any) -> AdaLlavaRecipe:
    values = {
        "name": "a",
        "model": {"source": "llava-hf/llava-1.5-7b-hf", "dtype": "bfloat16"},
        "cluster": {"workers": workers, "gpus_per_worker": 1},
        "train": {"global_batch": workers * 16},
    }
    return AdaLlavaRecipe.model_validate({**values, **sections})


@pytest.mark.parametrize("workers", [1, 3, 8])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_stage_2_is_deepspeeds_estimate(workers: int, offload: str) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    _, theirs = estimate_zero2_model_states_mem_needs(PARAMETERS, workers, 1, offload == "cpu")
    ours = estimate(SIZES, recipe(workers, zero={"stage": 2, "offload_optimizer": offload})).states
    assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("workers", [1, 3, 8])
@pytest.mark.parametrize(
    ("optimizer", "parameters"), [("none", "none"), ("cpu", "none"), ("cpu", "cpu")]
)
def test_stage_3_is_deepspeeds_estimate(workers: int, optimizer: str, parameters: str) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    _, theirs, _ = estimate_zero3_model_states_mem_needs(
        PARAMETERS, LARGEST, workers, 1, optimizer == "cpu", parameters == "cpu"
    )
    zero = {"stage": 3, "offload_optimizer": optimizer, "offload_parameters": parameters}
    # Their stage 3 leaves out the 16-bit gradients, which their stage 2 counts; ours has them.
    gradients = 0 if optimizer == "cpu" else 2 * PARAMETERS / workers
    ours = estimate(SIZES, recipe(workers, zero=zero)).states
    assert ours == pytest.approx(theirs + gradients, rel=1e-9)


def test_each_stage_takes_less_and_offloaded_states_go_to_the_host() -> None:
    states = [estimate(SIZES, recipe(zero={"stage": stage})).states for stage in range(4)]
    assert states == sorted(states, reverse=True)
    assert len(set(states)) == 4
    inside = estimate(SIZES, recipe(zero={"stage": 2}))
    outside = estimate(SIZES, recipe(zero={"stage": 2, "offload_optimizer": "cpu"}))
    assert outside.host == pytest.approx(8 * (inside.optimizer + inside.gradients))


def kept_by_pytorch(config: LlamaConfig, dtype: torch.dtype, length: int) -> float:
    """Bytes per token that a decoder keeps for its backward pass, parameters left out."""
    model = LlamaForCausalLM(config).to(dtype).train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = tensor  # holding it keeps the address from being used again
        return tensor

    inputs = torch.randint(0, config.vocab_size, (2, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model(input_ids=inputs, attention_mask=torch.ones_like(inputs))
    assert output[0].requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / inputs.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("intermediate", [256, 1024])
def test_activations_of_a_layer_are_what_pytorch_keeps(
    dtype: torch.dtype, kv_heads: int, intermediate: int
) -> None:
    def kept(layers: int) -> float:
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=256,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=kv_heads,
            use_cache=False,
        )
        config._attn_implementation = "sdpa"
        return kept_by_pytorch(config, dtype, length=128)

    sizes = Sizes(0, 0, 0, 256, 1, 8, kv_heads * 32, intermediate, 64)
    assert layer_activations(sizes, dtype.itemsize, 128, eager=False) == pytest.approx(
        kept(3) - kept(2), rel=0.02
    )


def test_checkpointing_keeps_one_vector_a_layer() -> None:
    with_it = {"global_batch": 128, "gradient_checkpointing": True}
    saved = estimate(SIZES, recipe(train=with_it)).activations
    tokens, layer = 16 * 2048, layer_activations(SIZES, 2, 2048, eager=False)
    assert saved == tokens * (32 * 2 * 4096 + layer)
    assert estimate(SIZES, recipe()).activations == tokens * 32 * layer


@pytest.mark.parametrize(
    ("size", "hidden", "layers", "intermediate"),
    [("7b", 4096, 32, 11008), ("13b", 5120, 40, 13824)],
)
def test_known_models_need_no_network(
    size: str, hidden: int, layers: int, intermediate: int
) -> None:
    """Counted by hand: embedding and head, layers with two norms, last norm, projector, CLIP."""
    decoder = 2 * 32064 * hidden + hidden
    decoder += layers * (4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden)
    projector = 1025 * hidden + (hidden + 1) * hidden
    tower = 24 * (4 * 1024 * 1025 + 1025 * 4096 + 4097 * 1024 + 4 * 1024)
    tower += 3 * 14 * 14 * 1024 + 1024 + 577 * 1024 + 2 * 2 * 1024
    job = recipe(model={"source": f"llava-hf/llava-1.5-{size}-hf", "dtype": "bfloat16"})
    sizes = measure(job)
    assert sizes.trainable == decoder + projector
    assert sizes.parameters == decoder + projector + tower


@pytest.mark.parametrize("design", ["layers", "heads"])
def test_adaptive_parts_are_counted_as_they_are_built(design: str) -> None:
    from transformers import AutoModelForImageTextToText

    from fmray.runtime.gpu_memory import model_config

    values = {
        "model": {"scratch": {"layers": 4}},
        "adaptive": {"design": design, "first": 1, "unit": 1},
    }
    job = recipe(1, **values)
    base = AutoModelForImageTextToText.from_config(model_config(job.model))
    text = base.config.get_text_config()
    layout = (
        SwitchLayout.layers(text, first=1)
        if design == "layers"
        else SwitchLayout.heads(text, first=1, unit=1)
    )
    whole = AdaptiveVLM.from_base(base, layout)
    assert measure(job).parameters == sum(p.numel() for p in whole.parameters())


def test_lora_learns_its_factors_and_the_projector() -> None:
    lora = recipe(model={"scratch": {"layers": 2}, "lora": {"rank": 3}})
    # q, k, v, o: 128 -> 128; gate, up: 128 -> 352; down: 352 -> 128; two layers
    factors = 2 * 3 * (4 * (128 + 128) + 3 * (128 + 352))
    projector = (64 * 128 + 128) + (128 * 128 + 128)
    assert measure(lora).trainable == factors + projector


def test_an_unknown_model_is_said() -> None:
    with pytest.raises(ValueError, match=r"model.source: no config of runs/none/model can be read"):
        measure(recipe(model={"source": "runs/none/model"}))

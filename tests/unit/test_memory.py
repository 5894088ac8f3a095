"""The memory estimate against DeepSpeed's estimators, PyTorch's saved tensors and real modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fmray.config import AdaLlavaRecipe, ScratchConfig
from fmray.data.processor import scratch_processor
from fmray.fewshot import create_encoder
from fmray.runtime.gpu_memory import Sizes, estimate, layer_activations, saved_bytes
from fmray.train.adallava.model import build_model, sizes_of

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
def test_stage_2_matches_deepspeeds_estimate(workers: int, offload: str) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    _, theirs = estimate_zero2_model_states_mem_needs(PARAMETERS, workers, 1, offload == "cpu")
    ours = estimate(SIZES, recipe(workers, zero={"stage": 2, "offload_optimizer": offload})).states
    assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("workers", [1, 3, 8])
@pytest.mark.parametrize(
    ("optimizer", "parameters"), [("none", "none"), ("cpu", "none"), ("cpu", "cpu")]
)
def test_stage_3_matches_deepspeeds_estimate(workers: int, optimizer: str, parameters: str) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    _, theirs, _ = estimate_zero3_model_states_mem_needs(
        PARAMETERS, LARGEST, workers, 1, optimizer == "cpu", parameters == "cpu"
    )
    zero = {"stage": 3, "offload_optimizer": optimizer, "offload_parameters": parameters}
    # Their stage 3 omits the 16-bit gradients, which their stage 2 counts; ours has them.
    gradients = 0 if optimizer == "cpu" else 2 * PARAMETERS / workers
    ours = estimate(SIZES, recipe(workers, zero=zero)).states
    assert ours == pytest.approx(theirs + gradients, rel=1e-9)


def test_each_stage_needs_less_and_offloaded_states_move_to_the_host() -> None:
    states = [estimate(SIZES, recipe(zero={"stage": stage})).states for stage in range(4)]
    assert states == sorted(states, reverse=True)
    assert len(set(states)) == 4
    inside = estimate(SIZES, recipe(zero={"stage": 2}))
    outside = estimate(SIZES, recipe(zero={"stage": 2, "offload_optimizer": "cpu"}))
    assert outside.host == pytest.approx(8 * (inside.optimizer + inside.gradients))


def saved_by_pytorch(config: LlamaConfig, dtype: torch.dtype, length: int) -> float:
    """Return the bytes per token that a decoder saves for its backward pass, without parameters."""
    model = LlamaForCausalLM(config).to(dtype).train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            saved[address] = tensor  # holding it keeps the address from being used again
        return tensor

    inputs = torch.randint(0, config.vocab_size, (2, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model(input_ids=inputs, attention_mask=torch.ones_like(inputs))
    assert output[0].requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) / inputs.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("intermediate", [256, 1024])
def test_activations_of_a_layer_are_what_pytorch_saves(
    dtype: torch.dtype, kv_heads: int, intermediate: int
) -> None:
    def saved(layers: int) -> float:
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
        return saved_by_pytorch(config, dtype, length=128)

    sizes = Sizes(0, 0, 0, 256, 1, 8, kv_heads * 32, intermediate, 64)
    assert layer_activations(sizes, dtype.itemsize, 128, eager=False) == pytest.approx(
        saved(3) - saved(2), rel=0.02
    )


@pytest.mark.parametrize("name", ["small/conv", "small/vit", "timm/resnet10t.c3_in1k"])
def test_the_bytes_saved_on_meta_are_those_of_a_real_pass(name: str) -> None:
    encoder = create_encoder(name, pretrained=False, image_size=32).train()
    parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoder(torch.rand(4, 3, 32, 32))
    expected = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    images = torch.empty(4, 3, 32, 32, device="meta")
    assert saved_bytes(encoder.to("meta"), images) == pytest.approx(expected, rel=0.05)


def test_checkpointing_saves_one_vector_per_layer() -> None:
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
    sizes = sizes_of(job)
    assert sizes.trainable == decoder + projector
    assert sizes.parameters == decoder + projector + tower


LORA = {"lora": {"rank": 3}}


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
@pytest.mark.parametrize(
    ("model", "adaptive"),
    [
        ({}, None),
        ({"freeze": ["vision", "language"]}, None),
        (LORA, None),
        ({}, {"design": "layers", "first": 1}),
        ({}, {"design": "heads", "first": 1, "unit": 1, "scheduler": "static"}),
        ({"kv_heads": 2}, {"design": "heads", "unit": 2, "scheduler": "random"}),
        (LORA, {"design": "layers", "latency_token": "probe"}),
    ],
)
def test_sizes_are_those_of_the_module_that_is_trained(
    family: str, model: dict[str, Any], adaptive: dict[str, Any] | None
) -> None:
    processor = scratch_processor([" ".join("abcdefghijklmnopqrstuvwxyz")], ScratchConfig())
    scratch = {"text_family": family, "layers": 4, "max_vocabulary": len(processor.tokenizer)}
    options = dict(model)
    if "kv_heads" in options:
        scratch["kv_heads"] = options.pop("kv_heads")
    job = recipe(1, model={"scratch": scratch, **options}, adaptive=adaptive)
    module, sizes = build_model(job, processor), sizes_of(job)
    assert sizes.parameters == sum(p.numel() for p in module.parameters())
    assert sizes.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert sizes.vocabulary == len(processor.tokenizer)


def test_sizes_leave_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sizes_of(recipe(1, model={"scratch": {"layers": 2}}, adaptive={"first": 1}))
    assert torch.equal(torch.rand(3), expected)


def test_the_sizes_of_an_adaptive_directory_are_those_of_its_model(tmp_path: Path) -> None:
    processor = scratch_processor(["red green blue"], ScratchConfig())
    scratch = {"scratch": {"layers": 2, "max_vocabulary": 64}}
    model = build_model(recipe(1, model=scratch, adaptive={"first": 1}), processor)
    model.save_pretrained(tmp_path / "m")
    again = recipe(1, model={"source": str(tmp_path / "m")}, adaptive={"first": 1})
    assert sizes_of(again).parameters == sum(p.numel() for p in model.parameters())


def test_lora_trains_its_factors_and_the_projector() -> None:
    lora = recipe(model={"scratch": {"layers": 2}, "lora": {"rank": 3}})
    # q, k, v, o: 128 -> 128; gate, up: 128 -> 352; down: 352 -> 128; two layers
    factors = 2 * 3 * (4 * (128 + 128) + 3 * (128 + 352))
    projector = (64 * 128 + 128) + (128 * 128 + 128)
    assert sizes_of(lora).trainable == factors + projector


def test_an_unknown_model_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"model.source: no config of runs/none/model can be read"):
        sizes_of(recipe(model={"source": "runs/none/model"}))

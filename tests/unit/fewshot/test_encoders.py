"""Encoders match their own library, survive saving and loading, and reject weights that do not fit.

The models are tiny and random, in each library's own format; nothing is downloaded.
"""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from fmray.fewshot import create_encoder

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def clip_directory(path):
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    text |= {"intermediate_size": 16, "projection_dim": 20}
    vision = TINY | {"projection_dim": 20}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    model = CLIPModel(config).eval()
    model.save_pretrained(path)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(path)
    return lambda images: model.get_image_features(images).pooler_output


def vit_directory(path):
    model = ViTModel(ViTConfig(**TINY)).eval()
    model.save_pretrained(path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    return lambda images: model(images).last_hidden_state[:, 0]


def dinov2_directory(path):
    model = Dinov2Model(Dinov2Config(**TINY)).eval()
    model.save_pretrained(path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    return lambda images: model(images).pooler_output


def resnet_directory(path):
    model = ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ).eval()
    model.save_pretrained(path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    return lambda images: model(images).pooler_output.flatten(1)


def timm_directory(path):
    model = timm.create_model("test_vit", pretrained=False, img_size=32).eval()
    save_for_hf(model, path, model_args={"img_size": 32}, safe_serialization=True)
    return lambda images: model.forward_head(model.forward_features(images), pre_logits=True)


DIRECTORIES = {
    "clip": clip_directory,
    "hf-vit": vit_directory,
    "hf-dinov2": dinov2_directory,
    "hf-resnet": resnet_directory,
    "timm": timm_directory,
}


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_features_match_the_library_and_survive_saving(kind, tmp_path):
    theirs = DIRECTORIES[kind](tmp_path / "library")
    name = f"{kind.split('-')[0]}/{tmp_path / 'library'}"
    encoder = create_encoder(name)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = encoder(images)
        torch.testing.assert_close(features, theirs(images))
        assert features.shape == (3, encoder.features)
    encoder.save_pretrained(tmp_path / "ours")
    again = create_encoder(name, checkpoint=tmp_path / "ours")
    assert again.preprocess == encoder.preprocess
    with torch.no_grad():
        assert torch.equal(again(images), features)
    # DistributedDataParallel needs a gradient for every parameter
    encoder(images).square().sum().backward()
    unused = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused


def test_preprocessing_of_clip_is_read_from_its_folder(tmp_path):
    clip_directory(tmp_path)
    preprocess = create_encoder(f"clip/{tmp_path}").preprocess
    assert preprocess.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert (preprocess.size, preprocess.squash, preprocess.interpolation) == (32, False, "bicubic")


def test_missing_weights_in_a_library_folder_are_an_error(tmp_path):
    vit_directory(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("layernorm.weight")
    weights.pop("pooler.dense.weight")  # unused, and often missing
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights do not fit \(layernorm.weight\)"):
        create_encoder(f"hf/{tmp_path}")


@pytest.mark.parametrize("kind", ["clip", "hf-vit", "hf-dinov2"])
def test_pretrained_false_gives_random_weights(kind, tmp_path):
    DIRECTORIES[kind](tmp_path)
    name = f"{kind.split('-')[0]}/{tmp_path}"
    images = torch.randn(2, 3, 32, 32)
    first, second = create_encoder(name, pretrained=False), create_encoder(name, pretrained=True)
    assert first.features == second.features
    assert not torch.allclose(first(images), second(images))


@pytest.mark.parametrize("name", ["small/vit", "small/conv", "timm/test_vit", "test_resnet"])
def test_encoder_of_another_size_survives_saving(name, tmp_path):
    encoder = create_encoder(name, pretrained=False, image_size=64)
    images = torch.randn(2, 3, 64, 64)
    encoder.save_pretrained(tmp_path)
    again = create_encoder(name, checkpoint=tmp_path)
    assert again.preprocess.size == 64 and not again.training
    assert torch.equal(encoder(images), again(images))
    # saving again replaces the weights
    with torch.no_grad():
        next(encoder.parameters()).add_(1)
    encoder.save_pretrained(tmp_path)
    assert torch.equal(encoder(images), create_encoder(name, checkpoint=tmp_path)(images))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder.json", "model.safetensors"]


@pytest.mark.parametrize("kind", ["clip", "hf-vit", "hf-dinov2", "hf-resnet"])
def test_library_models_accept_another_image_size(kind, tmp_path):
    DIRECTORIES[kind](tmp_path)
    encoder = create_encoder(f"{kind.split('-')[0]}/{tmp_path}", image_size=48)
    assert encoder(torch.randn(1, 3, 48, 48)).shape == (1, encoder.features)


@pytest.mark.parametrize("name", ["small/vit", "small/conv"])
def test_small_encoders_depend_on_positions_and_not_on_the_batch(name):
    torch.manual_seed(0)
    encoder = create_encoder(name, pretrained=False)
    assert 0.3e6 < sum(p.numel() for p in encoder.parameters()) < 1e6
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        # no batch statistics: a single image has the same features, in training mode too
        torch.testing.assert_close(encoder.train()(images)[:1], encoder.eval()(images[:1]))
        # positions matter
        assert not torch.allclose(encoder(images), encoder(images.roll(9, dims=-1)), atol=1e-3)


@pytest.mark.parametrize("prefix", ["module.base_encoder.", "module.encoder_q.", ""])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_state_dict_of_moco_loads_the_query_encoder(prefix, suffix, tmp_path):
    source = timm.create_model("test_vit", num_classes=0).eval()
    tensors = {prefix + name: value for name, value in source.state_dict().items()}
    tensors[f"{prefix}head.0.weight"] = torch.zeros(4, 4)
    if prefix:
        tensors |= {
            f"module.momentum_encoder.{name}": torch.zeros_like(value)
            for name, value in source.state_dict().items()
        }
    file = tmp_path / f"moco{suffix}"
    if suffix == ".pth":
        torch.save({"epoch": 300, "state_dict": tensors}, file)
    else:
        save_file(tensors, file)
    encoder = create_encoder("timm/test_vit", checkpoint=file)
    size = encoder.preprocess.size
    images = torch.randn(2, 3, size, size)
    assert torch.equal(encoder(images), source(images))


def test_mismatched_checkpoints_are_errors(tmp_path):
    weights = timm.create_model("test_vit", num_classes=0).state_dict()
    weights = {f"module.{name}": value for name, value in weights.items()}
    file = tmp_path / "weights.safetensors"
    save_file({k: v for k, v in weights.items() if k != "module.cls_token"}, file)
    with pytest.raises(ValueError, match=r"prefix 'module.'\): 1 missing \(cls_token\); 0 not in"):
        create_encoder("timm/test_vit", checkpoint=file)
    save_file({**weights, "module.odd": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"0 missing; 1 not in the model \(odd\)"):
        create_encoder("timm/test_vit", checkpoint=file)
    save_file({**weights, "module.cls_token": torch.ones(1, 1, 9)}, file)
    with pytest.raises(ValueError, match=r"cls_token is \[1, 1, 9\]; the model needs"):
        create_encoder("timm/test_vit", checkpoint=file)
    file.write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        create_encoder("timm/test_vit", checkpoint=file)


def test_unusable_names_and_checkpoints_are_errors(tmp_path):
    create_encoder("small/vit", pretrained=False).save_pretrained(tmp_path / "vit")
    for call, message in (
        (lambda: create_encoder("openai/clip"), "write timm/NAME"),
        (lambda: create_encoder("timm/vit_smal_patch16_224"), "did you mean vit_small_patch16_224"),
        (lambda: create_encoder("small/resnet"), "small/vit and small/conv"),
        (lambda: create_encoder(f"hf/{tmp_path}"), "cannot load its files"),
        (lambda: create_encoder("small/vit", image_size=36), "multiple of 8: 36"),
        (lambda: create_encoder("small/vit", checkpoint=tmp_path / "none"), "no such file"),
        (lambda: create_encoder("hf/x", checkpoint=tmp_path), "no encoder.json; a folder in"),
        (lambda: create_encoder("small/conv", checkpoint=tmp_path / "vit"), "it is a 'small/vit'"),
        (
            lambda: create_encoder("hf/x", checkpoint=tmp_path / "vit" / "model.safetensors"),
            "a folder that fmray saved",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    weights.pop("norm.weight")
    save_file(weights, tmp_path / "vit" / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit encoder.json: 1 differ \(norm.weight\)"):
        create_encoder("small/vit", checkpoint=tmp_path / "vit")
    description = json.loads((tmp_path / "vit" / "encoder.json").read_text())
    (tmp_path / "vit" / "encoder.json").write_text(json.dumps(description | {"format": 9}))
    with pytest.raises(ValueError, match="format 9"):
        create_encoder("small/vit", checkpoint=tmp_path / "vit")

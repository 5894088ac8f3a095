"""Base models whose parts disagree: one line that says what is wrong, without reading weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import SCRATCH, tiny_qwen2_vl
from support.training import load_recipe, make_store
from transformers import (
    AutoModelForImageTextToText,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from fmray.cli import main
from fmray.config import ScratchConfig
from fmray.data.base_model import check_base
from fmray.data.processor import load_processor, scratch_processor
from fmray.fewshot import create_encoder
from fmray.runtime.files import check_weights
from fmray.train.adallava.model import scratch_model
from fmray.train.launch import check_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 14\n"
PAGE = "<!DOCTYPE html><html><body>Please sign in</body></html>"
WORDS = ["what color topleft ?", "red", "What is this A test."]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llava-v1.5-7b"
    config = ScratchConfig(**SCRATCH)
    processor = scratch_processor(WORDS, config)
    scratch_model(config, processor, torch.float32, "sdpa").save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def base(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / good.name)


def change(file: Path, *keys: str, **values: Any) -> None:
    """Set values of a JSON file, below `keys`."""
    content = json.loads(file.read_text())
    section = content
    for key in keys:
        section = section[key]
    section.update(values)
    file.write_text(json.dumps(content))


def shards(base: Path) -> None:
    """Save the weights again, as several files with an index."""
    model = AutoModelForImageTextToText.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="20KB")


def without_a_shard(base: Path) -> None:
    shards(base)
    min(base.glob("model-*.safetensors")).unlink()


def swap_shards(base: Path) -> None:
    shards(base)
    first, second, *_ = sorted(base.glob("model-*.safetensors"))
    shutil.copy(first, second)


def add_tokens(base: Path) -> None:
    processor = load_processor(base)
    processor.tokenizer.add_tokens(["<answer>", "<think>"])
    processor.save_pretrained(base)


def other_image_token(base: Path) -> None:
    file = base / "tokenizer_config.json"
    content = json.loads(file.read_text())
    del content["image_token"]
    file.write_text(json.dumps(content))
    change(base / "processor_config.json", image_token="<picture>")


def cut(name: str, count: int = 1000) -> Callable[[Path], None]:
    return lambda base: (base / name).write_bytes((base / name).read_bytes()[:-count])


def write(name: str, content: str) -> Callable[[Path], None]:
    def mutate(base: Path) -> None:
        (base / name).write_text(content)

    return mutate


def edit(name: str, *keys: str, **values: Any) -> Callable[[Path], None]:
    return lambda base: change(base / name, *keys, **values)


def torch_weights(base: Path) -> None:
    """Save the weights by `torch.save`, and cut the file."""
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    cut("pytorch_model.bin")(base)


def processor_of_another_model(base: Path) -> None:
    own = load_processor(base)
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=[[32, 64], [64, 32]],
    )
    LlavaNextProcessor(
        images,
        own.tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=own.chat_template,
    ).save_pretrained(base)


def adapter_only(base: Path) -> None:
    for file in base.iterdir():
        file.unlink()
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


DEFECTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "LFS pointer as weights": (write("model.safetensors", POINTER), "a git-LFS pointer instead"),
    "LFS pointer as tokenizer": (
        write("tokenizer.json", POINTER),
        r"tokenizer\.json: a git-LFS pointer instead",
    ),
    "web page as tokenizer": (
        write("tokenizer.json", PAGE),
        r"tokenizer\.json: a web page instead",
    ),
    "web page as config": (write("config.json", PAGE), r"config\.json: a web page instead"),
    "empty weights": (write("model.safetensors", ""), r"model\.safetensors: empty"),
    "half a tokenizer": (cut("tokenizer.json"), r"tokenizer\.json: not readable as JSON"),
    "cut weights": (cut("model.safetensors"), "cut: it has [0-9]+ bytes, its header describes"),
    "cut torch weights": (torch_weights, "cut: it has no zip directory"),
    "missing shard": (without_a_shard, "1 of the [0-9]+ files that model.safetensors.index.json"),
    "shard of another model": (swap_shards, "does not contain .*, which the index lists"),
    "no weights": (lambda base: (base / "model.safetensors").unlink(), "no weights"),
    "no config": (lambda base: (base / "config.json").unlink(), r"no config\.json"),
    "adapter only": (adapter_only, "only a LoRA adapter of org/base; merge the two"),
    "tokens added": (
        add_tokens,
        r"2 tokens \(such as '<answer>'\) beyond .*resize_token_embeddings\(",
    ),
    "other image token id": (
        edit("config.json", image_token_index=5),
        "is 4 in the tokenizer and 5",
    ),
    "unknown image token": (other_image_token, "'<picture>' is not in the tokenizer"),
    "patch size": (
        edit("processor_config.json", patch_size=8),
        "16 tokens in the prompt and 4 features of the model; patch_size is 8 in the pro",
    ),
    "no patch size": (edit("processor_config.json", patch_size=None), 'add "patch_size": 16 to'),
    "feature strategy": (
        edit("processor_config.json", vision_feature_select_strategy="full"),
        "vision_feature_select_strategy is full in the processor's files and default",
    ),
    "class token": (
        edit("processor_config.json", num_additional_image_tokens=0),
        "3 tokens in the prompt and 4 features of the model; num_additional_image_tokens is 0",
    ),
    "image size": (
        edit("config.json", "vision_config", image_size=64),
        "does not fit the vision tower",
    ),
    "vocabulary of the config": (
        edit("config.json", "text_config", vocab_size=99),
        "in the weights and .99, 32. by config.json",
    ),
    "more layers than weights": (
        edit("config.json", "text_config", num_hidden_layers=6),
        "weights that config.json asks for are missing",
    ),
    "text model": (write("config.json", '{"model_type": "llama"}'), "a llama takes no images"),
    "unknown type": (write("config.json", '{"model_type": "nix"}'), "no config that transformers"),
    "processor of another model": (
        processor_of_another_model,
        "it has a LlavaNextProcessor; models of type llava have a LlavaProcessor",
    ),
    "broken template": (
        write("chat_template.jinja", "{{ nothing.at.all }}"),
        "the processor fails on an image and a question",
    ),
    "LLaVA's own code": (
        edit("config.json", model_type="llava_llama"),
        "LLaVA's own code .* such as llava-hf/llava-1.5-7b-hf$",
    ),
    "LLaVA's own code, older": (
        edit("config.json", mm_vision_tower="openai/clip-vit-large-patch14-336"),
        "LLaVA's own code .model_type llava.",
    ),
}


@pytest.mark.parametrize(("mutate", "words"), DEFECTS.values(), ids=DEFECTS.keys())
def test_a_defect_is_one_line(base: Path, mutate: Callable[[Path], Any], words: str) -> None:
    mutate(base)
    with pytest.raises(ValueError, match=words) as caught:
        check_base(str(base))
    assert "\n" not in str(caught.value)


def test_good_models_pass(base: Path) -> None:
    check_base(str(base))
    shards(base)
    check_base(str(base))


def test_weights_that_the_cache_of_the_hub_lacks_come_later(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmray.data.base_model.local_folder", lambda *_: base)
    without_a_shard(base)
    check_base("someone/a-model")
    for file in base.glob("*.safetensors"):
        file.unlink()
    check_base("someone/a-model")


def test_a_tokenizer_without_pad_token_pads_with_its_end_token(base: Path) -> None:
    processor = load_processor(base)
    processor.tokenizer.pad_token = None
    processor.save_pretrained(base)
    assert json.loads((base / "tokenizer_config.json").read_text()).get("pad_token") is None
    tokenizer = check_base(str(base)).tokenizer
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


def test_tied_embeddings_and_other_models_pass(tmp_path: Path, base: Path) -> None:
    qwen = tiny_qwen2_vl()
    tokenizer = load_processor(base).tokenizer
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)})
    tokenizer.image_token = names[0]
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids(names[0])
    template = (
        "{% for m in messages %}{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<|image_pad|>{% else %}{{ p['text'] }}{% endif %}"
        "{% endfor %}</s>{% endfor %}"
    )
    images = Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    videos = Qwen2VLVideoProcessor(patch_size=4, merge_size=2)
    processor = Qwen2VLProcessor(images, tokenizer, videos, chat_template=template)
    qwen.config.image_token_id = tokenizer.image_token_id
    folder = tmp_path / "qwen"
    qwen.save_pretrained(folder)
    processor.save_pretrained(folder)
    check_base(str(folder))
    processor.image_processor.merge_size = 4
    processor.save_pretrained(folder)
    with pytest.raises(ValueError, match="merge_size is 4 in the processor's files and 2 in conf"):
        check_base(str(folder))


def test_jobs_and_doctor_find_a_defect(
    good: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    model = {"source": str(base)}
    make_store(tmp_path, load_recipe(store, tmp_path, model=model).recipe)
    loaded = load_recipe(store, tmp_path, model=model)
    check_model(loaded.recipe)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(loaded.dump())
    doctor = ["doctor", "--config", str(recipe), "--set", "cluster.address=local"]
    main(doctor)
    assert "ok   model.source: config, processor and weights of" in capsys.readouterr().out

    # a store whose processor belongs to another model
    add_tokens(store / "processor")
    with pytest.raises(ValueError, match=r"model\.source: .* has 2 tokens"):
        check_model(loaded.recipe)
    shutil.rmtree(store)

    cut("model.safetensors")(base)
    with pytest.raises(ValueError, match=r"^model.source: .*model.safetensors: cut"):
        make_store(tmp_path, loaded.recipe)
    assert not (store / "manifest.json").exists()
    assert main(doctor) == 2
    assert "FAIL model.source:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.safetensors", POINTER, "a git-LFS pointer"),
        ("a.pth", POINTER, "a git-LFS pointer"),
        ("a.pth", PAGE, "a web page"),
        ("a.pth", "weights", "not a file of torch.save"),
        ("a.safetensors", "short", "not a safetensors file"),
        ("a.safetensors", "9" * 64, "not a safetensors file"),
    ],
)
def test_other_files_are_no_weights(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        check_weights(tmp_path / name)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_cut_checkpoint_of_an_encoder_is_one_line(tmp_path: Path, suffix: str) -> None:
    weights = {"fc.weight": torch.zeros(100, 10)}
    file = tmp_path / f"encoder{suffix}"
    save_file(weights, file) if suffix == ".safetensors" else torch.save(weights, file)
    cut(file.name)(tmp_path)
    with pytest.raises(ValueError, match="cut: it"):
        create_encoder("timm/resnet18", checkpoint=file)


def test_json_of_others_in_the_folder_is_ignored(base: Path) -> None:
    (base / "notes.json").write_text('{"a": 1}\n{"a": 2}\n')
    (base / "empty.json").write_text("")
    check_base(str(base))


def test_weights_that_are_no_plain_state_dict_are_one_line(base: Path) -> None:
    (base / "model.safetensors").unlink()
    torch.save({"weight": Path("x")}, base / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a plain state dict") as refusal:
        check_base(str(base))
    assert "\n" not in str(refusal.value)

"""Check a base model before it is used: its files, and whether config, processor and weights agree.

`check_base` takes seconds, also for a large model: it reads the headers of the weights, and runs
one image through the processor and through the vision tower on the `meta` device, which computes
shapes only. Preparation, `fmray doctor` and the start of a training call it, so that a mistake is
one line there and not a traceback in every worker.
"""

from __future__ import annotations

import inspect
import pickle
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from fmray.adallava.store import DESCRIPTION, is_adaptive
from fmray.data.processor import load_processor
from fmray.data.records import encode
from fmray.errors import first_line
from fmray.runtime.files import check_content, check_weights, read_json, tensor_shapes, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, ProcessorMixin

IMAGE_SIZE = (400, 300)  # of the image that is tried: what most photographs are, wider than high
#: Files of a model that are not JSON or weights, by the content that a failed download leaves.
JSON_FILES = (
    "*config.json",
    "*index.json",
    "tokenizer.json",
    "vocab.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
)
OTHER_FILES = ("tokenizer.model", "vocab.txt", "merges.txt", "chat_template.jinja")


def local_folder(source: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model on this machine, given its folder or hub name; None without."""
    if Path(source).is_dir():
        return Path(source)
    try:
        config = try_to_load_from_cache(source, "config.json", revision=revision)
    except HFValidationError:  # a path of a folder that does not exist
        return None
    return Path(config).parent if isinstance(config, str) else None


def check_base(
    source: str, revision: str | None = None, processor: ProcessorMixin | None = None
) -> ProcessorMixin:
    """Check a base model, and return its processor.

    Args:
        source: folder (stock or adaptive) or hub name; what the hub's cache lacks is not checked.
        processor: of the data store, to check in place of the model's own.

    Raises:
        ValueError: one line with what is wrong, and what would be right.
    """
    if is_adaptive(source):
        own = processor or load_processor(source)
        base = read_json(Path(source) / DESCRIPTION).get("base") or source
        return _check(base, None, own)
    return _check(source, revision, processor)


def _check(source: str, revision: str | None, processor: ProcessorMixin | None) -> ProcessorMixin:
    folder = local_folder(source, revision)
    weights = {} if folder is None else _check_files(folder, source)
    name = str(folder or source)
    if processor is None:
        processor = load_processor(name, revision)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{source}: no config that transformers reads ({_line(error)})") from error
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"{source}: a {config.model_type} takes no images; name a vision-language model"
        )
    _check_tokens(source, config, processor)
    _check_image(source, config, processor)
    if not getattr(config, "quantization_config", None):
        _check_tensors(source, config, weights)
    return processor


# --- Files ---


def _check_files(folder: Path, source: str) -> dict[Path, set[str]]:
    """Check that the files of a model are what their names say, and that none is missing.

    Returns:
        `weight_files`; {} if the hub's cache lacks some.
    """
    if not (folder / "config.json").is_file():
        adapter = folder / "adapter_config.json"
        if adapter.is_file():
            base = read_json(adapter).get("base_model_name_or_path")
            raise ValueError(
                f"{source}: only a LoRA adapter of {base}; merge the two (peft's merge_and_unload)"
                " and save the result with its processor, or name the base model"
            )
        raise ValueError(f"{source}: no config.json; name the folder of a model")
    for pattern in JSON_FILES:
        for file in sorted(folder.glob(pattern)):
            read_json(file)
    for other in OTHER_FILES:
        if (folder / other).is_file():
            check_content(folder / other)
    _check_original(source, read_json(folder / "config.json"))
    is_cache = not Path(source).is_dir()  # of the hub: weights may come later
    weights = weight_files(folder, partial=is_cache)
    if weights:
        check_weights(folder)
    elif not is_cache:
        raise ValueError(f"{source}: no weights (model.safetensors); copy or download them")
    return weights


def _check_original(source: str, config: dict[str, Any]) -> None:
    """Raise ValueError for a checkpoint of LLaVA's own code, which transformers cannot load."""
    kind = str(config.get("model_type"))
    if "mm_vision_tower" not in config and not re.fullmatch("llava_(llama|mistral|mpt|qwen)", kind):
        return
    name = Path(source).name.lower()
    twin = "llava-hf/llava-1.5-7b-hf"
    if re.fullmatch(r"llava-v1\.[56]-((vicuna|mistral)-)?[0-9]+b", name):
        twin = f"llava-hf/{name.replace('llava-v1.5', 'llava-1.5')}-hf"
    raise ValueError(
        f"{source}: a checkpoint of LLaVA's own code (model_type {kind}), which transformers cannot"
        f" load; name its converted twin, such as {twin}"
    )


# --- Tokens, image features and tensors ---


def _check_tokens(source: str, config: PreTrainedConfig, processor: ProcessorMixin) -> None:
    """Check the tokenizer against the embeddings, and the image token of both sides."""
    vocabulary = processor.tokenizer.get_vocab()
    rows = config.get_text_config().vocab_size
    beyond = sorted((index, token) for token, index in vocabulary.items() if index >= rows)
    if beyond:
        raise ValueError(
            f"{source}: the tokenizer has {len(beyond)} tokens (such as {beyond[0][1]!r}) beyond"
            f" the {rows} rows of the embeddings; call"
            f" model.resize_token_embeddings({beyond[-1][0] + 1}) and save the model again"
        )
    token, key = processor.image_token, config.attribute_map.get("image_token_id", "image_token_id")
    if token not in vocabulary:
        raise ValueError(
            f"{source}: the processor's image token {token!r} is not in the tokenizer; use the"
            " tokenizer of this model, or set image_token in processor_config.json"
        )
    wanted = getattr(config, "image_token_id", None)
    if wanted is not None and wanted != vocabulary[token]:
        raise ValueError(
            f"{source}: the image token {token!r} is {vocabulary[token]} in the tokenizer and"
            f" {wanted} in config.json ({key}); use the processor of this model, or correct {key}"
        )


def _check_image(source: str, config: PreTrainedConfig, processor: ProcessorMixin) -> None:
    """Compare the tokens that stand for an image with the features that the model makes of it."""
    remedy = f"use the processor of this model{_other_class(config, processor)}"
    vision = getattr(config, "vision_config", None)
    patch = getattr(vision, "patch_size", None)
    if getattr(processor, "patch_size", patch) is None:
        raise ValueError(
            f"{source}: the processor has no patch_size, so an image's tokens cannot be counted;"
            f' add "patch_size": {patch} to processor_config.json'
        )
    try:
        encode(
            processor,
            [
                {"from": "human", "value": "<image>\nWhat is this?"},
                {"from": "gpt", "value": "A test."},
            ],
        )
        inputs = processor(
            images=[Image.linear_gradient("L").resize(IMAGE_SIZE).convert("RGB")],
            text=[processor.image_token],
            add_special_tokens=False,
            return_tensors="pt",
        )
    except Exception as error:  # templates raise whatever they like
        raise ValueError(
            f"{source}: the processor fails on an image and a question ({_line(error)}); {remedy}"
        ) from error
    tokens = int((inputs.pop("input_ids") == processor.image_token_id).sum())
    differences = "; ".join(_differences(config, processor))
    try:
        features = _count_features(config, inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        # Some towers, Qwen-VL's among them, need values and cannot run on the meta device: their
        # features are not counted, and only the settings are compared.
        if not isinstance(error, NotImplementedError) and "meta" not in str(error):
            raise ValueError(
                f"{source}: an image as the processor makes it"
                f" ({list(inputs['pixel_values'].shape)}) does not fit the vision tower"
                f" ({_line(error)}); {remedy}"
            ) from error
        if differences:
            raise ValueError(f"{source}: {differences}; {remedy}") from error
        return
    if tokens != features:
        raise ValueError(
            f"{source}: an image is {tokens} tokens in the prompt and {features} features of the"
            f" model; {differences or _class_token(processor) or remedy}"
        )


def _differences(config: PreTrainedConfig, processor: ProcessorMixin) -> list[str]:
    """Return the settings that decide how many tokens an image takes, and that differ."""
    vision, images = getattr(config, "vision_config", None), processor.image_processor
    sides = [
        (processor, "patch_size", vision, "patch_size"),
        (images, "patch_size", vision, "patch_size"),
        (images, "merge_size", vision, "spatial_merge_size"),
        (images, "temporal_patch_size", vision, "temporal_patch_size"),
        (processor, "vision_feature_select_strategy", config, "vision_feature_select_strategy"),
    ]
    found = []
    for ours, name, theirs, key in sides:
        value, wanted = getattr(ours, name, None), getattr(theirs, key, None)
        if None not in (value, wanted) and value != wanted:
            found.append(f"{name} is {value} in the processor's files and {wanted} in config.json")
    return found


def _class_token(processor: ProcessorMixin) -> str:
    """Return a hint at the one setting that the model's config does not have."""
    count = getattr(processor, "num_additional_image_tokens", None)
    if count is None:
        return ""
    return (
        f"num_additional_image_tokens is {count} in processor_config.json (1 for a vision tower"
        " with a class token)"
    )


def _other_class(config: PreTrainedConfig, processor: ProcessorMixin) -> str:
    usual, name = PROCESSOR_MAPPING_NAMES.get(config.model_type), type(processor).__name__
    if usual in (None, name):
        return ""
    return f" (it has a {name}; models of type {config.model_type} have a {usual})"


def _count_features(config: PreTrainedConfig, inputs: dict[str, Any]) -> int:
    """Return the number of features that the model makes of a processor's output."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config).model
        taken = inspect.signature(model.get_image_features).parameters
        arguments = {key: value for key, value in inputs.items() if key in taken}
        arguments["pixel_values"] = inputs["pixel_values"].to("meta", model.dtype)
        with torch.no_grad():
            features = model.get_image_features(**arguments).pooler_output
    return sum(len(part) for part in features)


def _check_tensors(source: str, config: PreTrainedConfig, files: dict[Path, set[str]]) -> None:
    """Compare names and shapes of the weights with the model that the config describes.

    transformers would start missing tensors at random, with a warning.
    """
    state: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            empty = partial(torch.empty, device="meta")
            state |= {name: empty(shape) for name, shape in tensor_shapes(file).items()}
        else:
            try:
                state |= torch.load(file, map_location="meta", weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError) as error:
                raise ValueError(
                    f"{file}: not a plain state dict ({first_line(error)[:200]}); save the weights"
                    " as safetensors"
                ) from error
    if not state:
        return
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would print a table of the differences
    try:
        _, loading = AutoModelForImageTextToText._model_mapping[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=state,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if loading["mismatched_keys"]:
        name, stored, needed = min(loading["mismatched_keys"])
        raise ValueError(
            f"{source}: {name} is {list(stored)} in the weights and {list(needed)} by config.json;"
            " they belong to different models: copy or download both again"
        )
    if loading["missing_keys"]:
        raise ValueError(
            f"{source}: {len(loading['missing_keys'])} weights that config.json asks for are"
            f" missing (such as {min(loading['missing_keys'])}); copy or download both again"
        )


def _line(error: Exception) -> str:
    """Return the first line of an error's text."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__

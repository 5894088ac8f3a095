"""Image encoders by name: timm, CLIP's image tower, Hugging Face vision models, and small ones of
our own; one directory format for all of them.

In: a name, and weights from the hub, a directory or a file. Out: an `Encoder`: normalised pixels
in, features out, with the preprocessing it was trained with. A saved encoder is

    encoder.json        name, what rebuilds the architecture without a hub, preprocessing
    model.safetensors   the weights
"""

from __future__ import annotations

import difflib
import inspect
import io
import json
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

# Encoded images to pixels: one preprocessing for support, query and every job.
#
# In: JPEG or PNG bytes. Out: uint8 [n, 3, size, size], and float32 normalised as the encoder was
# trained. Decoding and normalising are apart, so that pixels can be kept as bytes, augmented, and
# moved to a device at a quarter of the size.

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """How one encoder sees an image.

    size: pixels, of the square that comes out. mean, std: per RGB channel, of values in 0..1.
    shorter: pixels the shorter side is resized to before the centre crop; default `size`. squash:
    resize to the square without a crop, whatever the aspect.
    """

    size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    shorter: int | None = None
    squash: bool = False
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def decode(self, images: Sequence[bytes]) -> Tensor:
        """uint8 [n, 3, size, size] of n encoded images, any mode and aspect, greyscale included.

        Raises ValueError naming the image's place for bytes that are no readable image.
        """
        pixels = np.empty((len(images), self.size, self.size, 3), dtype=np.uint8)
        for place, encoded in enumerate(images):
            try:
                with Image.open(io.BytesIO(encoded)) as image:
                    pixels[place] = self._square(image.convert("RGB"))
            except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
                raise ValueError(f"image {place} of {len(images)} is not readable: {error}") from (
                    error
                )
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def normalise(self, pixels: Tensor) -> Tensor:
        """float32 of the same shape [..., 3, H, W]: (value - mean) / std.

        pixels: uint8, or floats in 0..1 (augmented views).
        """
        if not pixels.is_floating_point():
            pixels = pixels.float() / 255
        mean, std = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        return (pixels - mean) / std

    def resized(self, size: int) -> Preprocess:
        """The same for squares of another size, the crop's share of the image kept."""
        shorter = None if self.shorter is None else round(self.shorter * size / self.size)
        return Preprocess(size, self.mean, self.std, shorter, self.squash, self.interpolation)

    def _square(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        box = (0.0, 0.0, float(width), float(height))
        if not self.squash:
            # the crop's box in the source: cropped and resized in one pass
            side = min(width, height) * self.size / max(self.shorter or 0, self.size)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
        resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
        return image.resize((self.size, self.size), resample[self.interpolation], box=box)


# Our own small encoders: for pictures of 32 to 64 pixels, quick on a CPU, trained from scratch by
# `fmray.fewshot.pretrain`.
#
# In: normalised pixels [B, 3, H, W], H = W, a multiple of 8. Out: features [B, d]. Neither keeps
# batch statistics: an image's features do not depend on the batch it came in, nor on how many
# workers shared it.

SIZE = 32  # pixels, where nothing else is asked for


class SmallViT(nn.Module):
    """A vision transformer on 8x8-pixel steps: strided convolutions for a patch (Xiao et al. 2021),
    fixed sine positions (as MoCo v3's), pre-norm blocks, mean over tokens. 0.7 M parameters,
    d = 96.
    """

    def __init__(self, width: int = 96, depth: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 4, 3, stride=2, padding=1),
            nn.GroupNorm(8, width // 4),
            nn.GELU(),
            nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1),
            nn.GroupNorm(8, width // 2),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
        )
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        grid = self.stem(images)  # [B, width, H/8, W/8]
        tokens = grid.flatten(2).mT
        return self.norm(self.blocks(tokens + _positions(grid)).mean(1))


class SmallConv(nn.Module):
    """A residual network with group norm: four stages of one block, mean over places. 0.9 M
    parameters, d = 192.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 192)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 5, stride=2, padding=2, bias=False)
        before = (widths[0], *widths[:-1])
        self.stages = nn.Sequential(
            *(
                _Residual(inputs, outputs, stride=1 if stage == 0 else 2)
                for stage, (inputs, outputs) in enumerate(zip(before, widths, strict=True))
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(self.stages(self.stem(images))).mean((2, 3))


class _Block(nn.Module):
    """Self-attention and a two-layer perceptron, each on the normalised residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, T, width / heads]
            for part in self.qkv(self.norm_attention(tokens)).chunk(3, dim=-1)
        )
        attended = functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.output(attended.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm_mlp(tokens))


class _Residual(nn.Module):
    """A pre-activation residual block (He et al. 2016) with group norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm_first, self.norm_second = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = functional.relu(self.norm_first(inputs))
        return self.shortcut(inputs) + self.second(
            functional.relu(self.norm_second(self.first(hidden)))
        )


def _positions(grid: Tensor) -> Tensor:
    """Sines and cosines of row and column, [H * W, width], for a grid [B, width, H, W]."""
    _, width, height, columns = grid.shape
    steps = width // 4
    frequency = torch.exp(torch.arange(steps, device=grid.device) * (-math.log(1e4) / steps))
    row, column = (torch.arange(n, device=grid.device)[:, None] * frequency for n in grid.shape[2:])
    parts = [part[:, None].expand(height, columns, steps) for part in (row.sin(), row.cos())] + [
        part[None].expand(height, columns, steps) for part in (column.sin(), column.cos())
    ]
    return torch.cat(parts, dim=-1).flatten(0, 1).to(grid.dtype)


DESCRIPTION, WEIGHTS, FORMAT = "encoder.json", "model.safetensors", 1
SMALL = {"vit": SmallViT, "conv": SmallConv}
# what checkpoints of self-supervised training put before the backbone's own names; the query
# encoder's before the key encoder's, which is not listed
PREFIXES = ("", "module.base_encoder.", "module.encoder_q.", "base_encoder.", "encoder_q.")
PREFIXES += ("module.backbone.", "backbone.", "module.", "model.", "encoder.")
# classifiers and projectors, which an encoder does without
HEADS = ("head.", "head_dist.", "fc.", "classifier.")

_logger = logging.getLogger(__name__)


class Encoder(nn.Module):
    """An image encoder: (float images [B, 3, H, W], normalised by `preprocess`) -> [B, features].

    `name` as given to `create_encoder`; `features` is d; `preprocess` decodes and normalises;
    `model` is the library's own module; `architecture` rebuilds it without a hub.
    """

    def __init__(
        self, name: str, model: nn.Module, preprocess: Preprocess, architecture: dict[str, Any]
    ) -> None:
        super().__init__()
        self.name, self.model, self.architecture = name, model, architecture
        self._kind = name.split("/", 1)[0]
        self._options: dict[str, Any] = {}
        self.resize(preprocess)

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images, **self._options)
        if self._kind == "clip":
            return output.image_embeds
        if self._kind != "hf":
            return output
        if _has_class_token(self.model):
            return output.last_hidden_state[:, 0]
        if output.pooler_output is not None:
            return output.pooler_output.flatten(1)
        hidden = output.last_hidden_state  # [B, T, d] tokens or [B, d, H, W] maps
        return hidden.mean(1) if hidden.dim() == 3 else hidden.mean((2, 3))

    def resize(self, preprocess: Preprocess) -> None:
        """Take images of another size; positions are interpolated where the model has any."""
        if self._kind == "timm" and hasattr(self.model, "set_input_size"):
            self.model.set_input_size(img_size=preprocess.size)
        elif self._kind == "small" and preprocess.size % 8:
            raise ValueError(f"{self.name}: image_size must be a multiple of 8: {preprocess.size}")
        elif self._kind in ("clip", "hf") and (
            "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        ):
            own = getattr(self.model.config, "image_size", preprocess.size)
            self._options = {"interpolate_pos_encoding": own != preprocess.size}
        self.preprocess = preprocess
        mode = self.training
        with torch.no_grad():
            pixels = torch.zeros(1, 3, preprocess.size, preprocess.size)
            parameter = next(self.model.parameters())
            self.features = self.eval()(pixels.to(parameter.device, parameter.dtype)).shape[1]
        self.train(mode)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the directory that `create_encoder(..., checkpoint=directory)` reads.

        encoder.json comes last: a directory that has one is whole.
        """
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        description = {
            "format": FORMAT,
            "name": self.name,
            "features": self.features,
            "architecture": self.architecture,
            "preprocess": asdict(self.preprocess),
        }
        tensors = {
            name: value.detach().cpu().clone().contiguous()
            for name, value in self.model.state_dict().items()
        }
        with tempfile.TemporaryDirectory(dir=path, prefix=".saving-") as folder:
            save_file(tensors, Path(folder) / WEIGHTS, metadata={"format": "pt"})
            (Path(folder) / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
            for file in (WEIGHTS, DESCRIPTION):
                os.replace(Path(folder) / file, path / file)


def create_encoder(
    name: str,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    image_size: int | None = None,
) -> Encoder:
    """An encoder by name, in eval mode.

    name: `timm/NAME`, `clip/NAME`, `hf/NAME`, `small/vit` or `small/conv`; NAME is the library's or
    the hub's, or a directory in the library's own format. A bare NAME is timm's. checkpoint: a
    directory written by `save_pretrained`, or for timm a state dict (.safetensors, .pth), a MoCo
    checkpoint included. Without one, `pretrained` loads the library's weights; small encoders have
    none and start at random. image_size: pixels, where not the encoder's own.

    Raises ValueError for an unknown name, weights that cannot be had or do not fit.
    """
    if "/" not in name:
        name = f"timm/{name}"
    kind = name.split("/", 1)[0]
    if kind not in ("timm", "clip", "hf", "small"):
        raise ValueError(
            f"encoder {name!r}: write timm/NAME, clip/NAME, hf/NAME, small/vit or small/conv"
        )
    if checkpoint is not None and Path(checkpoint).is_dir():
        encoder = _saved(name, Path(checkpoint))
    else:
        file = None if checkpoint is None else Path(checkpoint)
        if file is not None and not file.is_file():
            raise ValueError(f"checkpoint {file}: there is no such file or directory")
        if file is not None and kind != "timm":
            raise ValueError(f"checkpoint {file}: {name} takes a directory of ours, not a file")
        build = {"timm": _timm, "clip": _hugging_face, "hf": _hugging_face, "small": _small}[kind]
        encoder = build(name, pretrained and file is None)
        if file is not None:
            load_backbone(encoder.model, file)
    if image_size is not None and image_size != encoder.preprocess.size:
        encoder.resize(encoder.preprocess.resized(image_size))
    return encoder.eval()


def load_backbone(model: nn.Module, file: Path) -> None:
    """Load a state dict into a timm model, whatever its training put before the names.

    file: .safetensors, or a torch file of tensors (a `state_dict` or `model` entry is taken). Heads
    and projectors are left out. Raises ValueError naming what is missing, superfluous or of another
    shape.
    """
    own, found = model.state_dict(), _read(file)
    prefix = max(PREFIXES, key=lambda start: sum(start + name in found for name in own))
    tensors = {
        key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)
    }
    tensors = {
        key: value for key, value in tensors.items() if key in own or not key.startswith(HEADS)
    }
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise ValueError(
            f"{file}: not the weights of this model (prefix {prefix!r}): "
            f"{_some(missing, 'missing')}; {_some(extra, 'not in the model')}"
        )
    for key, value in tensors.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"{file}: {prefix}{key} is {list(value.shape)}; "
                f"the model asks for {list(own[key].shape)}"
            )
    model.load_state_dict(tensors)


def _timm(name: str, pretrained: bool) -> Encoder:
    import timm
    from timm.data import resolve_model_data_config

    source = name.removeprefix("timm/")
    if Path(source).is_dir():
        config = _read_json(Path(source) / "config.json")
        options = {k: v for k, v in (config.get("model_args") or {}).items() if k != "num_classes"}
        architecture = {"name": config["architecture"], "options": options}
        given = f"local-dir:{source}"
    else:
        if not timm.is_model(source.split(".")[0]) and ":" not in source:
            near = difflib.get_close_matches(source, timm.list_models(), n=3)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise ValueError(f"encoder {name!r}: timm has no model {source!r}{hint}")
        architecture, given = {"name": source, "options": {}}, source
    model = _fetch(name, timm.create_model, given, pretrained=pretrained, num_classes=0)
    data = resolve_model_data_config(model)
    # a transformer may have been built for other images than its weights were first trained on
    size = (getattr(getattr(model, "patch_embed", None), "img_size", None) or data["input_size"])[
        -1
    ]
    preprocess = Preprocess(
        size,
        tuple(data["mean"]),
        tuple(data["std"]),
        shorter=int(size / data["crop_pct"]),
        squash=data["crop_mode"] == "squash",
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
    )
    return Encoder(name, model, preprocess, architecture)


def _hugging_face(name: str, pretrained: bool) -> Encoder:
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        CLIPVisionModelWithProjection,
    )
    from transformers.utils import logging as transformers_logging

    kind, source = name.split("/", 1)
    if pretrained:
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # a table of what is not used; checked below
        try:
            model, loading = _fetch(
                name,
                (CLIPVisionModelWithProjection if kind == "clip" else AutoModel).from_pretrained,
                source,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        finally:
            transformers_logging.set_verbosity(verbosity)
        wrong = [key for key in loading["missing_keys"] if not key.startswith("pooler.")]
        wrong += [key for key, *_ in loading["mismatched_keys"]]
        if wrong:
            raise ValueError(f"encoder {name!r}: {_some(sorted(wrong), 'weights do not fit')}")
        config = model.config
    else:
        config = _fetch(name, AutoConfig.from_pretrained, source)
        config = config.vision_config if kind == "clip" and "vision_config" in config else config
        model = _from_config(kind, config.to_dict())
    if hasattr(config, "vision_config"):
        raise ValueError(f"encoder {name!r}: a {config.model_type} has several towers; see clip/")
    processor = _fetch(name, AutoImageProcessor.from_pretrained, source)
    size, crop = processor.size, processor.crop_size if processor.do_center_crop else None
    shorter = size.shortest_edge
    side = crop.height if crop is not None else shorter or size.height
    resample = getattr(processor, "resample", None)
    preprocess = Preprocess(
        side,
        tuple(processor.image_mean),
        tuple(processor.image_std),
        shorter=shorter if crop is not None else None,
        squash=shorter is None,
        interpolation="bilinear" if resample == 2 else "bicubic",
    )
    return Encoder(name, _without_unused(model), preprocess, config.to_dict())


def _small(name: str, pretrained: bool) -> Encoder:
    kind = name.removeprefix("small/")
    if kind not in SMALL:
        raise ValueError(f"encoder {name!r}: the small encoders are small/vit and small/conv")
    if pretrained:
        _logger.warning("%s has no weights on a hub: it starts at random", name)
    return Encoder(name, SMALL[kind](), Preprocess(SIZE, (0.5,) * 3, (0.5,) * 3), {})


def _saved(name: str, path: Path) -> Encoder:
    """An encoder that `save_pretrained` wrote."""
    file = path / DESCRIPTION
    if not file.is_file():
        raise ValueError(
            f"checkpoint {path}: it has no {DESCRIPTION}; a directory of timm's or of Hugging "
            f"Face's goes into the name, as in hf/{path}"
        )
    description = _read_json(file)
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{file}: format {description.get('format')!r}; this version of fmray reads {FORMAT}"
        )
    if description["name"] != name:
        raise ValueError(f"{file}: it is a {description['name']!r}, and {name!r} was asked for")
    architecture = description["architecture"]
    kind, source = name.split("/", 1)
    if kind == "timm":
        import timm

        model = timm.create_model(architecture["name"], num_classes=0, **architecture["options"])
    elif kind == "small":
        model = SMALL[source]()
    else:
        model = _without_unused(_from_config(kind, architecture))
    values = description["preprocess"]
    for key in ("mean", "std"):
        values[key] = tuple(values[key])
    # positions have the saved size's shape before the weights go in
    encoder = Encoder(name, model, Preprocess(**values), architecture)
    tensors, own = _read(path / WEIGHTS), encoder.model.state_dict()
    wrong = sorted(tensors.keys() ^ own.keys()) or sorted(
        key for key, value in tensors.items() if value.shape != own[key].shape
    )
    if wrong:
        raise ValueError(f"{path / WEIGHTS}: does not fit {DESCRIPTION}: {_some(wrong, 'differ')}")
    encoder.model.load_state_dict(tensors)
    return encoder


def _from_config(kind: str, values: dict[str, Any]) -> nn.Module:
    """A Hugging Face model with random weights from its configuration as a dict."""
    from transformers import AutoConfig, AutoModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    if kind == "clip":
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**values))
    values = dict(values)
    return AutoModel.from_config(AutoConfig.for_model(values.pop("model_type"), **values))


def _has_class_token(model: nn.Module) -> bool:
    return any(name.endswith("cls_token") for name, _ in model.named_parameters())


def _without_unused(model: nn.Module) -> nn.Module:
    """Drop what features do not depend on: the layer after the class token (random in many
    checkpoints), and the mask of self-supervised training. A parameter without a gradient stops
    DistributedDataParallel.
    """
    if _has_class_token(model) and getattr(model, "pooler", None) is not None:
        model.pooler = None
    for name, parameter in model.named_parameters():
        if name.endswith("mask_token"):
            parameter.requires_grad_(False)
    return model


def _fetch(name: str, function: Any, source: str, **options: Any) -> Any:
    """Call a library's loader; what the hub or the disk lacks becomes one line."""
    try:
        return function(source, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"encoder {name!r}: its files cannot be had ({reason}); give encoder.checkpoint, or a "
            "directory in its name"
        ) from error


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a weights file."""
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"{file}: not a readable safetensors file: {error}") from error
    found = torch.load(file, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            return found[key]
    return found


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not readable as JSON: {error}") from error


def _some(names: list[str], what: str) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what}" + (f" ({shown})" if names else "")

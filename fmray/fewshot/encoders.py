"""Image encoders by name: timm, CLIP's image tower, Hugging Face vision models, and two small ones.

`create_encoder` returns an `Encoder`: a module from normalised pixels to features, with the
preprocessing it was trained with. A saved encoder is a folder:

    encoder.json        name, what rebuilds the architecture without a hub, preprocessing
    model.safetensors   the weights

`encoder.json` is written last: a folder that has one is complete.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from fmray.runtime.files import atomic_path, check_weights, write_json

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DESCRIPTION, WEIGHTS, FORMAT = "encoder.json", "model.safetensors", 1

# Prefixes of the backbone's names in checkpoints of self-supervised training. MoCo's query encoder
# is listed; its key encoder is not, so that it is never taken.
PREFIXES = ("", "module.base_encoder.", "module.encoder_q.", "base_encoder.", "encoder_q.")
PREFIXES += ("module.backbone.", "backbone.", "module.", "model.", "encoder.")
# classifiers and projectors, which an encoder has no use for
HEADS = ("head.", "head_dist.", "fc.", "classifier.")

_logger = logging.getLogger(__name__)


# --- Preprocessing ---


@dataclass(frozen=True)
class Preprocess:
    """Turns images into the pixels that one encoder takes.

    Resizing and normalising are separate, so that pixels can be stored as bytes, augmented, and
    moved to a device at a quarter of the size.
    """

    size: int  #: side of the resulting square, in pixels
    mean: tuple[float, float, float] = IMAGENET_MEAN  #: per RGB channel, of values in 0..1
    std: tuple[float, float, float] = IMAGENET_STD
    shorter: int | None = None  #: resize the shorter side to this before the centre crop; `size`
    squash: bool = False  #: resize to the square without a crop, whatever the aspect ratio
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def pixels(self, images: Iterable[Image.Image]) -> Tensor:
        """Return uint8 [n, 3, size, size] of n RGB images of any size and aspect ratio."""
        square = np.dtype((np.uint8, (self.size, self.size, 3)))
        pixels = np.fromiter((np.asarray(self._square(image)) for image in images), dtype=square)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return (value - mean) / std as float32 of the same shape [..., 3, H, W].

        Args:
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
        """Return the same preprocessing for another size; the crop takes the same share."""
        shorter = None if self.shorter is None else round(self.shorter * size / self.size)
        return Preprocess(size, self.mean, self.std, shorter, self.squash, self.interpolation)

    def _square(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        box = (0.0, 0.0, float(width), float(height))
        if not self.squash:
            # the crop's box in the source, so that crop and resize are one pass
            side = min(width, height) * self.size / max(self.shorter or 0, self.size)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
        resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
        return image.resize((self.size, self.size), resample[self.interpolation], box=box)


# --- Encoders ---


class Encoder(nn.Module):
    """An image encoder: float images [B, 3, H, W], normalised by `preprocess`, to [B, features].

    Attributes:
        name: as given to `create_encoder`.
        features: d, the number of features.
        preprocess: decodes and normalises images for this encoder.
        model: the library's own module.
        architecture: what rebuilds the module without a hub.
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
        """Accept images of another size; position embeddings, if any, are interpolated.

        Raises:
            ValueError: a size that a small encoder cannot take.
        """
        if self._kind == "timm" and hasattr(self.model, "set_input_size"):
            self.model.set_input_size(img_size=preprocess.size)
        elif self._kind == "small" and preprocess.size % 8:
            raise ValueError(f"{self.name}: image_size must be a multiple of 8: {preprocess.size}")
        elif self._kind in ("clip", "hf") and (
            "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        ):
            native = getattr(self.model.config, "image_size", preprocess.size)
            self._options = {"interpolate_pos_encoding": native != preprocess.size}
        self.preprocess = preprocess
        # the number of features is what a forward pass gives
        mode = self.training
        with torch.no_grad():
            pixels = torch.zeros(1, 3, preprocess.size, preprocess.size)
            parameter = next(self.model.parameters())
            self.features = self.eval()(pixels.to(parameter.device, parameter.dtype)).shape[1]
        self.train(mode)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the folder that `create_encoder(..., checkpoint=directory)` reads."""
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
        with atomic_path(path / WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_json(path / DESCRIPTION, description, indent=2)


def create_encoder(
    name: str,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    image_size: int | None = None,
) -> Encoder:
    """Create an encoder in eval mode.

    Args:
        name: `timm/NAME`, `clip/NAME`, `hf/NAME`, `small/vit` or `small/conv`. NAME is a name of
            the library or the hub, or a folder in the library's own format. A bare NAME is timm's.
        checkpoint: a folder written by `save_pretrained`, or for timm a state dict (.safetensors,
            .pth), such as MoCo's.
        pretrained: load the library's weights where no checkpoint is given. Small encoders have
            none and start at random.
        image_size: in pixels; the encoder's own by default.

    Raises:
        ValueError: an unknown name, or weights that are missing or do not fit.
    """
    if "/" not in name:
        name = f"timm/{name}"
    kind = name.split("/", 1)[0]
    if kind not in ("timm", "clip", "hf", "small"):
        raise ValueError(
            f"encoder {name!r}: write timm/NAME, clip/NAME, hf/NAME, small/vit or small/conv"
        )
    check_files(name, checkpoint)
    if checkpoint is not None and Path(checkpoint).is_dir():
        encoder = _load_saved(name, Path(checkpoint))
    else:
        file = None if checkpoint is None else Path(checkpoint)
        if file is not None and kind != "timm":
            raise ValueError(
                f"checkpoint {file}: {name} needs a folder that fmray saved, not a file"
            )
        build = {
            "timm": _build_timm,
            "clip": _build_hugging_face,
            "hf": _build_hugging_face,
            "small": _build_small,
        }[kind]
        encoder = build(name, pretrained and file is None)
        if file is not None:
            load_backbone(encoder.model, file)
    if image_size is not None and image_size != encoder.preprocess.size:
        encoder.resize(encoder.preprocess.resized(image_size))
    return encoder.eval()


def check_files(name: str, checkpoint: str | Path | None) -> None:
    """Check the files that `create_encoder` would load, without reading weights.

    Raises:
        ValueError: a file is missing, cut, or something else than weights.
    """
    if checkpoint is not None and not Path(checkpoint).exists():
        raise ValueError(f"checkpoint {checkpoint}: no such file or folder")
    folder = checkpoint or name.partition("/")[2]
    if folder and Path(folder).exists():
        check_weights(Path(folder))


# --- Builders, one per library ---


def _build_timm(name: str, pretrained: bool) -> Encoder:
    import timm
    from timm.data import resolve_model_data_config

    source = name.removeprefix("timm/")
    if Path(source).is_dir():
        config = _read_json(Path(source) / "config.json")
        options = {k: v for k, v in (config.get("model_args") or {}).items() if k != "num_classes"}
        architecture = {"name": config["architecture"], "options": options}
        timm_name = f"local-dir:{source}"
    else:
        if not timm.is_model(source.split(".")[0]) and ":" not in source:
            near = difflib.get_close_matches(source, timm.list_models(), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"encoder {name!r}: timm has no model {source!r}{hint}")
        architecture, timm_name = {"name": source, "options": {}}, source
    model = _fetch(name, timm.create_model, timm_name, pretrained=pretrained, num_classes=0)
    data = resolve_model_data_config(model)
    # a transformer may be built for another size than its weights were first trained on
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


def _build_hugging_face(name: str, pretrained: bool) -> Encoder:
    from transformers import AutoConfig, AutoImageProcessor

    kind, source = name.split("/", 1)
    if pretrained:
        model = _load_hugging_face(name, kind, source)
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


def _load_hugging_face(name: str, kind: str, source: str) -> nn.Module:
    """Load a model with its weights.

    Raises:
        ValueError: weights that are missing (other than the pooler's, which is dropped) or of
            another shape.
    """
    from transformers import AutoModel, CLIPVisionModelWithProjection
    from transformers.utils import logging as transformers_logging

    # transformers would print a table of all unused weights
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
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
        raise ValueError(f"encoder {name!r}: {_shortened(sorted(wrong), 'weights do not fit')}")
    return model


def _build_small(name: str, pretrained: bool) -> Encoder:
    kind = name.removeprefix("small/")
    if kind not in SMALL:
        raise ValueError(f"encoder {name!r}: the small encoders are small/vit and small/conv")
    if pretrained:
        _logger.warning("%s has no pretrained weights: it starts at random", name)
    return Encoder(name, SMALL[kind](), Preprocess(SMALL_SIZE, (0.5,) * 3, (0.5,) * 3), {})


def _from_config(kind: str, values: dict[str, Any]) -> nn.Module:
    """Build a Hugging Face model with random weights from its configuration as a dict."""
    from transformers import AutoConfig, AutoModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    if kind == "clip":
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**values))
    values = dict(values)
    return AutoModel.from_config(AutoConfig.for_model(values.pop("model_type"), **values))


def _has_class_token(model: nn.Module) -> bool:
    return any(name.endswith("cls_token") for name, _ in model.named_parameters())


def _without_unused(model: nn.Module) -> nn.Module:
    """Drop the parameters that features do not depend on, and return the model.

    These are the pooling layer after the class token (random in many checkpoints) and the mask
    token of self-supervised training. DistributedDataParallel fails on a parameter that gets no
    gradient.
    """
    if _has_class_token(model) and getattr(model, "pooler", None) is not None:
        model.pooler = None
    for name, parameter in model.named_parameters():
        if name.endswith("mask_token"):
            parameter.requires_grad_(False)
    return model


def _fetch(name: str, function: Any, source: str, **options: Any) -> Any:
    """Call a library's loader; turn what the hub or the disk lacks into an error of one line."""
    try:
        return function(source, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"encoder {name!r}: cannot load its files ({reason}); set encoder.checkpoint, or name"
            " a local folder"
        ) from error


# --- Weights from files ---


def _load_saved(name: str, path: Path) -> Encoder:
    """Load an encoder that `save_pretrained` wrote.

    Raises:
        ValueError: the folder holds another encoder, or is damaged.
    """
    file = path / DESCRIPTION
    if not file.is_file():
        raise ValueError(
            f"checkpoint {path}: it has no {DESCRIPTION}; a folder in the format of timm or"
            f" Hugging Face goes into encoder.name, such as hf/{path}"
        )
    description = _read_json(file)
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{file}: format {description.get('format')!r}; this version of fmray reads {FORMAT}"
        )
    if description["name"] != name:
        raise ValueError(f"{file}: it is a {description['name']!r}, not a {name!r}")
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
    # `Encoder` resizes the position embeddings to the saved shape before the weights are loaded
    encoder = Encoder(name, model, Preprocess(**values), architecture)
    tensors, expected = _read_tensors(path / WEIGHTS), encoder.model.state_dict()
    wrong = sorted(tensors.keys() ^ expected.keys()) or sorted(
        key for key, value in tensors.items() if value.shape != expected[key].shape
    )
    if wrong:
        raise ValueError(
            f"{path / WEIGHTS}: does not fit {DESCRIPTION}: {_shortened(wrong, 'differ')}"
        )
    encoder.model.load_state_dict(tensors)
    return encoder


def load_backbone(model: nn.Module, file: Path) -> None:
    """Load a state dict into a timm model, whatever prefix its names have (see `PREFIXES`).

    Args:
        file: .safetensors, or a torch file of tensors, possibly below `state_dict` or `model`.
            Heads and projectors are ignored.

    Raises:
        ValueError: weights that are missing, superfluous or of another shape.
    """
    expected, stored = model.state_dict(), _read_tensors(file)
    prefix = max(PREFIXES, key=lambda start: sum(start + name in stored for name in expected))
    tensors = {
        key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)
    }
    tensors = {
        key: value for key, value in tensors.items() if key in expected or not key.startswith(HEADS)
    }
    missing = sorted(expected.keys() - tensors.keys())
    extra = sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{file}: not the weights of this model (prefix {prefix!r}): "
            f"{_shortened(missing, 'missing')}; {_shortened(extra, 'not in the model')}"
        )
    for key, value in tensors.items():
        if value.shape != expected[key].shape:
            raise ValueError(
                f"{file}: {prefix}{key} is {list(value.shape)}; "
                f"the model needs {list(expected[key].shape)}"
            )
    model.load_state_dict(tensors)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"{file}: not a readable safetensors file: {error}") from error
    content = torch.load(file, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            return content[key]
    return content


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not readable as JSON: {error}") from error


def _shortened(names: list[str], what: str) -> str:
    """Return `4 missing (a, b, c, ...)`."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what}" + (f" ({shown})" if names else "")


# --- Small encoders: for images of 32 to 64 pixels, trained from scratch on a CPU ---
#
# They take squares whose side is a multiple of 8. They use no batch statistics: the features of an
# image do not depend on the other images of its batch, nor on the number of ranks that share it.

SMALL_SIZE = 32  # pixels, unless `image_size` is given


class SmallViT(nn.Module):
    """A vision transformer with 8x8-pixel tokens: 0.7 M parameters, d = 96.

    Strided convolutions make the tokens (Xiao et al. 2021); positions are fixed sines, as in
    MoCo v3; blocks normalise first; features are the mean over tokens.
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
    """A residual network with group norm: 0.9 M parameters, d = 192.

    Four stages of one block; features are the mean over positions.
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


SMALL = {"vit": SmallViT, "conv": SmallConv}


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
    """Return sines and cosines of row and column, [H * W, width], for a grid [B, width, H, W]."""
    _, width, height, columns = grid.shape
    steps = width // 4
    frequency = torch.exp(torch.arange(steps, device=grid.device) * (-math.log(1e4) / steps))
    row, column = (torch.arange(n, device=grid.device)[:, None] * frequency for n in grid.shape[2:])
    parts = [part[:, None].expand(height, columns, steps) for part in (row.sin(), row.cos())] + [
        part[None].expand(height, columns, steps) for part in (column.sin(), column.cos())
    ]
    return torch.cat(parts, dim=-1).flatten(0, 1).to(grid.dtype)

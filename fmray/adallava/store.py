"""An adaptive model on disk: the stock model's own directory, with two files more.

config.json, model*.safetensors, ...   the base; stock transformers loads it from here, and sees
nothing else adaptive.json                          layout, latency token, scheduler, and where the
base is adaptive.safetensors                   latency encoder and scheduler
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from fmray.adallava.layout import SwitchLayout

if TYPE_CHECKING:
    from fmray.adallava.model import AdaptiveVLM

DESCRIPTION = "adaptive.json"
WEIGHTS = "adaptive.safetensors"
FORMAT = 1


def is_adaptive(path: str | Path) -> bool:
    """Whether a directory holds an adaptive model (and not just a stock one)."""
    return (Path(path) / DESCRIPTION).is_file()


def save(model: AdaptiveVLM, path: Path, include_base: bool = True) -> None:
    """Write the model to a new or existing directory; files are complete before they appear under
    their names.

    include_base: False writes only the adaptive parts and names where the base was loaded from.
    """
    path.mkdir(parents=True, exist_ok=True)
    reference = None if include_base else model.base.config._name_or_path
    if not include_base and not reference:
        raise ValueError(
            "the base model was not loaded from anywhere; it must be saved too (include_base=True)"
        )
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        if include_base:
            model.base.save_pretrained(folder)
        tensors = {
            name: value.detach().contiguous().cpu()
            for part in ("latency_encoder", "scheduler")
            if getattr(model, part) is not None
            for name, value in getattr(model, part).state_dict(prefix=f"{part}.").items()
        }
        save_file(tensors, Path(folder) / WEIGHTS, metadata={"format": "pt"})
        description = {
            "format": FORMAT,
            "layout": model.layout.to_dict(),
            "latency_token": model.latency_token,
            "scheduler": model.scheduler_kind,
            "tau": model.tau,
            "penalty": model.penalty,
            "base": reference,
        }
        (Path(folder) / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        # the description last: a directory that has one is whole
        names = sorted(os.listdir(folder), key=lambda name: name == DESCRIPTION)
        for name in names:
            shutil.move(Path(folder) / name, path / name)


def load(cls: type[AdaptiveVLM], path: Path, **options: Any) -> AdaptiveVLM:
    """Read what `save` wrote; options (dtype, attn_implementation, ...) go to the base's
    `from_pretrained`.
    """
    file = path / DESCRIPTION
    if not file.is_file():
        raise ValueError(f"{path}: not an adaptive model: it has no {DESCRIPTION}")
    try:
        description = json.loads(file.read_text())
        version = description["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the description of an adaptive model: {error}") from error
    if version != FORMAT:
        raise ValueError(f"{file}: format {version!r}; this version of fmray reads format {FORMAT}")
    missing = {
        "layout",
        "latency_token",
        "scheduler",
        "tau",
        "penalty",
        "base",
    } - description.keys()
    if missing:
        raise ValueError(f"{file}: missing {', '.join(sorted(missing))}")
    weights = path / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{path}: {WEIGHTS} is missing beside {DESCRIPTION}")
    options.setdefault("dtype", "auto")
    base = AutoModelForImageTextToText.from_pretrained(description["base"] or path, **options)
    model = cls(
        base,
        SwitchLayout.from_dict(description["layout"]),
        description["latency_token"],
        description["scheduler"],
        description["tau"],
        description["penalty"],
    )
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights}: not a readable safetensors file: {error}") from error
    own = {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith(("latency_encoder.", "scheduler."))
    }
    if own.keys() != tensors.keys():
        wrong = sorted(own.keys() ^ tensors.keys())
        raise ValueError(f"{weights}: tensors do not fit {DESCRIPTION}: {', '.join(wrong)}")
    for name, value in tensors.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"{weights}: {name} is {list(value.shape)}; "
                f"{DESCRIPTION} asks for {list(own[name].shape)}"
            )
        own[name].copy_(value)
    return model.eval()

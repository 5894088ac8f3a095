"""Adaptive models on disk: the stock model's own directory with two more files.

::

    config.json, model*.safetensors, ...   the base; stock transformers loads it from here
    adaptive.json                          layout, latency token, scheduler, where the base is
    adaptive.safetensors                   latency encoder and scheduler

A directory without adaptive.json is a stock model or incomplete: it is written last.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fmray.adallava.layout import SwitchLayout
from fmray.runtime.files import check_weights, sync, write_json

DESCRIPTION = "adaptive.json"
WEIGHTS = "adaptive.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Description:
    """What adaptive.json holds."""

    layout: SwitchLayout
    latency_token: str
    scheduler: str
    tau: float
    penalty: float
    base: str | None = None  # where the base was loaded from; None: it is in the same directory
    proven: str | None = None  # version of transformers that the model was proven with


def is_adaptive(path: str | Path) -> bool:
    """Return whether a directory holds an adaptive model (and not just a stock one)."""
    return (Path(path) / DESCRIPTION).is_file()


def write(
    path: Path, base: nn.Module, description: Description, weights: Mapping[str, Tensor]
) -> None:
    """Write an adaptive model to a new or existing directory.

    Files are complete before they appear under their names. The base is written where
    `description.base` is None.
    """
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        temporary = Path(folder)
        if description.base is None:
            base.save_pretrained(temporary)
        tensors = {name: value.detach().contiguous().cpu() for name, value in weights.items()}
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        for file in temporary.iterdir():
            sync(file)
            os.replace(file, path / file.name)
    fields = {**vars(description), "layout": description.layout.to_dict()}
    write_json(path / DESCRIPTION, {"format": FORMAT, **fields}, indent=2)


def read(path: Path) -> tuple[Description, dict[str, Tensor]]:
    """Read the description and the adaptive weights of a directory.

    Raises:
        ValueError: not an adaptive model, an unknown format, or a damaged or missing file.
    """
    file = path / DESCRIPTION
    if not file.is_file():
        raise ValueError(f"{path}: not an adaptive model: it has no {DESCRIPTION}")
    try:
        fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = fields["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the description of an adaptive model: {error}") from error
    if version != FORMAT:
        raise ValueError(f"{file}: format {version!r}; this version of fmray reads format {FORMAT}")
    names = Description.__dataclass_fields__.keys()
    missing = names - fields.keys() - {"proven"}  # which earlier versions did not write
    if missing:
        raise ValueError(f"{file}: missing {', '.join(sorted(missing))}")
    layout = SwitchLayout.from_dict(fields["layout"])
    description = Description(
        **{name: fields[name] for name in names if name in fields} | {"layout": layout}
    )
    weights = path / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{path}: {WEIGHTS} is missing; {DESCRIPTION} is there")
    base = Path(description.base or path)
    if base.is_dir():  # else a hub name
        check_weights(base)
    try:
        return description, load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights}: not a readable safetensors file: {error}") from error


def copy_weights(weights: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Copy the weights read from `path` into the state of the modules that its description makes.

    Raises:
        ValueError: names or shapes differ.
    """
    file = path / WEIGHTS
    if state.keys() != weights.keys():
        wrong = ", ".join(sorted(state.keys() ^ weights.keys()))
        raise ValueError(f"{file}: tensors do not fit {DESCRIPTION}: {wrong}")
    for name, value in weights.items():
        if value.shape != state[name].shape:
            raise ValueError(
                f"{file}: {name} is {list(value.shape)}; "
                f"{DESCRIPTION} asks for {list(state[name].shape)}"
            )
        state[name].copy_(value)

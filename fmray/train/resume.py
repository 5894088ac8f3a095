"""What a checkpoint and the job that resumes it must have in common.

A run is resumed on the same data, from the same model and under the same settings. Data and model
are compared by content: hashes of the store's records, images and processor, and of the model's
config and weights. Paths are left out, so that a folder may be moved or mounted elsewhere. Learning
rates, the number of steps and what decides how a run is carried out may change; each change is
reported. The driver compares before it starts workers, each worker before it loads.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from fmray.config import AdaLlavaRecipe
from fmray.config.fewshot import FewshotRecipe
from fmray.data.image_store import ImageManifest
from fmray.data.store import Manifest
from fmray.runtime.files import digest_of, dumps, read_header, read_json, weight_files
from fmray.train.checkpoint import TrainState, flatten_settings

Recipe = AdaLlavaRecipe | FewshotRecipe

_SECTIONS = {
    "adallava": {"seed", "model", "adaptive", "data", "train"},
    "fewshot": {"seed", "encoder", "episodes", "train"},
}
_CHOICE = {"select", "target"}  # sections of a few-shot recipe that its tasks depend on
# settings that change how a run is carried out, not what it computes
_FREE = {
    "adallava": {
        "data.check_images",
        "data.loader_threads",
        "data.prefetch_batches",
        "data.rows_per_shard",
        "train.micro_batch",
        "train.gradient_checkpointing",
        "train.eval_every",
        "train.eval_rows",
        "train.eval_budgets",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.skip_nonfinite",
    },
    "fewshot": {
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.skip_nonfinite",
        "train.eval_every",
        "train.eval_split",
    },
}
# settings that change the steps after the checkpoint, on purpose
_SCHEDULE = {"train.lr", "train.scheduler_lr", "train.warmup_ratio", "train.steps", "train.epochs"}
_PLACES = re.compile(r"(base\.)?(data\.(store|train|validation|image_folder)$|images\.)")
_MODEL = {"model.source", "model.revision", "encoder.checkpoint"}
_CONTENT = "content."  # prefix of hashes among the settings
_PARTS = {
    # a few-shot store has images and their classes only
    "records": "the records of the store",
    "images": "the images of the store",
    "processor": "the processor of the store",
    "model": "the model to start from",
}

_SAMPLE = 4096  # bytes read of a tensor, or of a block of a file
_BLOCKS = 1024  # read of a weights file other than safetensors
_ADAPTIVE, _ADAPTIVE_WEIGHTS = "adaptive.json", "adaptive.safetensors"
_CONFIGS = ("config.json", "encoder.json", _ADAPTIVE)  # of any model, and of fmray's two kinds


# --- Settings ---


def training_settings(recipe: FewshotRecipe, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the dotted settings that decide what a finetuning on `tasks` computes."""
    settings = _settings(recipe, tasks).items()
    return {name: value for name, value in settings if name not in _FREE[recipe.kind]}


def run_settings(recipe: Recipe, tasks: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a checkpoint stores for `check_resume`: settings, and hashes of store and model.

    Reads the store's manifest and some megabytes of the model.

    Args:
        tasks: names of the tasks to finetune on (few-shot only).
    """
    settings = without_places(_settings(recipe, tasks)) | content(recipe)
    choice = recipe.model_dump(mode="json", include=_CHOICE, exclude={"select": {"weights"}})
    return settings | flatten_settings(choice)


def check_resume(
    state: TrainState, recipe: Recipe, now: dict[str, Any], where: Path | str
) -> list[str]:
    """Check that a run can be resumed from a checkpoint; see `compare`.

    Args:
        state: of the checkpoint.
        recipe: of the job.
        now: its `run_settings`.
        where: name of the checkpoint, for messages.
    """
    before, free = state.settings, _FREE[recipe.kind] | _SCHEDULE
    # settings that did not exist yet had their defaults
    defaults = _settings(type(recipe)(name="defaults"))
    if "select.method" not in before:  # an earlier version of fmray did not store these
        defaults |= {name: now[name] for name in now if name.partition(".")[0] in _CHOICE}
    return compare(before, now, where, defaults, free)


def compare(
    before: dict[str, Any],
    now: dict[str, Any],
    where: Path | str,
    defaults: dict[str, Any],
    free: Collection[str] = (),
) -> list[str]:
    """Compare the settings of a run with those under which it shall resume.

    Args:
        before: dotted settings, those of a search's base recipe under `base.`, and `content`.
        now: the same.
        where: what has `before`, for messages.
        defaults: values of settings that `before` lacks: a later version of fmray has added them.
        free: names of settings that may change.

    Returns:
        A line for each setting that changes, and one if contents cannot be compared.

    Raises:
        ValueError: what may not change has; the message names it.
    """
    notes, changed = [], []

    # contents
    for part, text in _PARTS.items():
        old, new = (values.get(_CONTENT + part) for values in (before, now))
        if old is not None and new is not None and old != new:
            changed.append(f"{text} changed (sha256 {old[:12]} -> {new[:12]})")
    parts = ("records", "images", "processor") if _CONTENT + "processor" in now else ("images",)
    known = {part for part in parts if _CONTENT + part in before.keys() & now.keys()}
    if known != set(parts):
        unknown = ", ".join(part for part in parts if part not in known)
        notes.append(
            f"the store's {unknown} cannot be compared with {where}: one of the two has no hashes"
            " (an earlier version of fmray made it)"
        )

    # settings
    for name in sorted(without_places(before | now)):
        old, new = before.get(name, defaults.get(name)), now.get(name)
        if old == new or name.startswith(_CONTENT) or (name in free and name not in before):
            continue
        if name in free:
            notes.append(f"{name}: {dumps(old)} -> {dumps(new)}")
        elif name.removeprefix("base.") not in _MODEL or not _moved(before, now, old, new):
            changed.append(f"{name} was {old!r} and is {new!r}")
    if changed:
        raise ValueError(
            f"{where} cannot be resumed: {'; '.join(changed)}; set it back, or give a new --run-id"
        )
    return notes


def same_training(recipe: Recipe, other: Recipe) -> bool:
    """Return whether two recipes differ at most in places, names, cluster and tracking.

    The model may have moved, but not to a folder of another name: a search may vary it.
    """
    left, right = (
        without_places(flatten_settings(r.model_dump(exclude={"name", "cluster", "tracking"})))
        for r in (recipe, other)
    )
    return all(
        left.get(name) == right.get(name)
        or (name in _MODEL and _same_name(left.get(name), right.get(name)))
        for name in left | right
    )


def _same_name(old: Any, new: Any) -> bool:
    """Return whether two absolute paths may be of one folder that was moved."""
    if not all(isinstance(value, str) and Path(value).is_absolute() for value in (old, new)):
        return False
    return Path(old).name == Path(new).name


def without_places(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without paths of data, whose content is compared instead."""
    return {name: value for name, value in settings.items() if not _PLACES.match(name)}


def _settings(recipe: Recipe, tasks: Sequence[str] = ()) -> dict[str, Any]:
    values = recipe.model_dump(mode="json", include=_SECTIONS[recipe.kind])
    if isinstance(recipe, FewshotRecipe):
        values |= {"tasks": list(tasks), "weights": recipe.select.weights}
    else:
        values["zero"] = {"stage": recipe.zero.stage}
    return flatten_settings(values)


def _moved(before: dict[str, Any], now: dict[str, Any], old: Any, new: Any) -> bool:
    """Return whether a model's new name or path does not mean another model."""
    if _CONTENT + "model" in before:
        return _CONTENT + "model" in now  # the hashes decide
    return all(isinstance(value, str) and Path(value).is_absolute() for value in (old, new))


# --- Contents ---


def content(recipe: Recipe) -> dict[str, str]:
    """Return the hashes of the store and of the model that a run starts from, as `content.PART`.

    A model of the hub has none unless this machine has it.
    """
    return {_CONTENT + part: digest for part, digest in _hashes(recipe)}


def _hashes(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if isinstance(recipe, FewshotRecipe):
        yield "images", ImageManifest.read(recipe.images.store).fingerprint
        source, revision = recipe.encoder.checkpoint, None
    else:
        manifest = Manifest.read(recipe.data.store)
        yield from manifest.content.items()
        yield "processor", manifest.processor
        source, revision = recipe.model.source, recipe.model.revision
    digest = None if source in (None, "scratch") else model_digest(source, revision)
    if digest is not None:
        yield "model", digest


def model_digest(source: str | Path, revision: str | None = None) -> str | None:
    """Return a SHA-256 of the config and the weights of a model.

    Of the weights, which may have many gigabytes, it takes names, shapes and types, and the middle
    4 KiB of each tensor (of a file that is not safetensors: 4 KiB in 1024 places). So it is a
    matter of a second, and any training of a tensor changes it.

    Args:
        source: folder, weights file, or name on the hub.
        revision: on the hub.

    Returns:
        None if this machine does not have all files.
    """
    path = Path(source)
    if path.is_file():
        return _sample(path)
    if not path.is_dir():
        from fmray.data.base_model import local_folder  # imports transformers

        path = local_folder(str(source), revision)
    if path is None:
        return None
    try:
        weights = [*weight_files(path), path / _ADAPTIVE_WEIGHTS]
    except ValueError:  # a download that is not complete
        return None
    weights = [file for file in weights if file.is_file()]
    parts: dict[str, Any] = {file.name: _sample(file) for file in weights}
    parts |= {name: read_json(path / name) for name in _CONFIGS if (path / name).is_file()}
    base = parts.get(_ADAPTIVE, {}).pop("base", None)  # where an adaptive model has its base
    parts["base"] = base and model_digest(base)
    return digest_of(parts) if weights else None


def _sample(file: Path) -> str:
    """Return a SHA-256 of parts of a weights file; see `model_digest`."""
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        start, tensors = read_header(file)
        offsets = sorted(tensor["data_offsets"] for tensor in tensors.values())
        ranges = [(start + begin, start + end) for begin, end in offsets]
    else:
        tensors, block = {}, max(_SAMPLE, size // _BLOCKS)
        ranges = [(begin, min(begin + block, size)) for begin in range(0, size, block)]
    digest = hashlib.sha256(digest_of([size, tensors]).encode())
    with file.open("rb", buffering=0) as data:
        for begin, end in ranges:
            count = min(_SAMPLE, end - begin)
            data.seek(begin + (end - begin - count) // 2)
            digest.update(data.read(count))
    return digest.hexdigest()

"""Checkpoints of a run: where they lie, what they hold, and which one is resumed.

In: the run's folder `<storage>/<run id>`, visible from every node. A checkpoint is
`checkpoint-<step>/` with `deepspeed/` (all ranks), `recipe.yaml` and `state.json`; it is written
under another name and moved when complete. DeepSpeed reads its files with pickle: storage must be
trusted. `model/` beside them is safetensors.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fmray.config import Recipe

STATE_FILE = "state.json"
TAG = "deepspeed"
UNIVERSAL = "universal"

# settings that change how a run is carried out, not what it computes
FREE_SETTINGS = {
    "data": {"store", "loader_threads", "prefetch_batches", "rows_per_shard"},
    "train": {
        "micro_batch",
        "gradient_checkpointing",
        "eval_every",
        "eval_rows",
        "eval_budgets",
        "checkpoint_every",
        "keep_checkpoints",
    },
}


@dataclass(frozen=True)
class TrainState:
    """What `state.json` holds. step: optimizer steps done; cursor: steps done in this epoch.

    Best: of `accuracy`.
    """

    step: int
    epoch: int
    cursor: int
    seed: int
    world_size: int
    zero_stage: int
    config_hash: str
    settings: dict[str, Any]
    best: float | None
    best_step: int | None


def training_settings(recipe: Recipe) -> dict[str, Any]:
    """Dotted settings that decide what a run computes.

    A checkpoint is only resumed under equal ones.
    """
    values = recipe.model_dump(mode="json", include={"seed", "model", "adaptive", "data", "train"})
    for section, names in FREE_SETTINGS.items():
        for name in names:
            values[section].pop(name)
    values["zero"] = {"stage": recipe.zero.stage}
    return flatten_settings(values)


def flatten_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with dotted names."""
    flat: dict[str, Any] = {}

    def flatten(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                flatten(f"{prefix}.{key}" if prefix else key, child)
        else:
            flat[prefix] = value

    flatten("", values)
    return flat


def settings_hash(settings: dict[str, Any]) -> str:
    """Twelve hex digits of SHA-256 over the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def read_state(checkpoint: Path) -> TrainState:
    """The `state.json` of a checkpoint. Raises ValueError when it is missing or not one of ours."""
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{checkpoint}: no {STATE_FILE}, so this checkpoint is not complete; "
            "remove the folder to resume from an older one"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: not JSON ({error}); remove {checkpoint.name}/ to resume from an older one"
        ) from error
    names = {field.name for field in fields(TrainState)}
    if not isinstance(values, dict) or set(values) != names:
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path}: should hold {sorted(names)}, holds {found}")
    return TrainState(**values)


def check_state(state: TrainState, recipe: Recipe, checkpoint: Path) -> None:
    """Raises ValueError, naming the settings, when recipe and checkpoint do not go together."""
    check_settings(state, training_settings(recipe), checkpoint)
    workers = max(1, recipe.cluster.workers)
    if state.zero_stage == 0 and state.world_size != workers:
        raise ValueError(
            f"{checkpoint} was made by {state.world_size} workers with zero.stage 0, which can "
            f"only be resumed by as many, not by {workers}; set cluster.workers back"
        )


def check_settings(state: TrainState, now: dict[str, Any], checkpoint: Path) -> None:
    """Raises ValueError, naming the settings, when they are others than the checkpoint's."""
    if state.config_hash == settings_hash(now):
        return
    changed = [
        f"{key} was {state.settings.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(state.settings.keys() | now.keys())
        if state.settings.get(key) != now.get(key)
    ]
    raise ValueError(
        f"{checkpoint} was made by another recipe (config hash {state.config_hash}, now "
        f"{settings_hash(now)}): "
        f"{'; '.join(changed)}; use these values, or a new --run-id"
    )


def find_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    found = sorted(path for path in run_dir.glob("checkpoint-*") if path.is_dir())
    return found[-1] if found else None


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies; names sort by step."""
    return run_dir / f"checkpoint-{step:08d}"


def save_checkpoint(engine: Any, run_dir: Path, state: TrainState, recipe_text: str) -> Path:
    """Write a checkpoint; every rank must call this.

    Returns its folder, complete on every rank's return.
    """
    final = checkpoint_path(run_dir, state.step)
    partial = run_dir / f".{final.name}.partial"
    first = engine.global_rank == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(partial), tag=TAG, save_latest=False)
    dist.barrier()
    if first:
        (partial / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
        (partial / STATE_FILE).write_text(
            json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8"
        )
        if final.exists():  # written by a worker group that died before it could report it
            shutil.rmtree(final)
        os.replace(partial, final)
    dist.barrier()
    return final


def prune_checkpoints(run_dir: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest and the best.

    What Ray does by score where it knows of the checkpoints.
    """
    found = sorted(run_dir.glob("checkpoint-*"))
    best = [
        path
        for path in found
        if best_step is not None and path == checkpoint_path(run_dir, best_step)
    ]
    kept = {found[-1], *best[: keep - 1]} if found else set()
    for path in reversed(found):
        if len(kept) < keep:
            kept.add(path)
    for path in found:
        if path not in kept:
            shutil.rmtree(path)


def make_universal(checkpoint: Path, stage: int) -> None:
    """Convert DeepSpeed's files to its universal format, which any number of workers can load.

    Rank 0 only.
    """
    from deepspeed.checkpoint import ds_to_universal

    final = checkpoint / UNIVERSAL
    if final.is_dir():
        return
    partial = checkpoint / f".{UNIVERSAL}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every tensor
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(checkpoint / TAG),
                output_folder=str(partial),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=stage <= 2,
            )
        )
    (checkpoint / "latest_universal").unlink(missing_ok=True)
    os.replace(partial, final)


def load_checkpoint(engine: Any, checkpoint: Path, universal: bool) -> None:
    """Restore weights, optimizer and learning-rate schedule; every rank must call this."""
    loaded, _ = engine.load_checkpoint(str(checkpoint), tag=UNIVERSAL if universal else TAG)
    if loaded is None:
        raise ValueError(
            f"{checkpoint}: DeepSpeed found nothing to load in {TAG}/; the folder is not complete"
        )
    if universal:
        # DeepSpeed 0.19 gives all parameter groups the first one's learning rate, and (stage 3) one
        # and the same step counter, which then counts a step once for each of them
        optimizer = engine.optimizer.optimizer
        for values in optimizer.state.values():
            if isinstance(values.get("step"), Tensor):
                values["step"] = values["step"].clone()
        for group, lr in zip(
            optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = lr


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, whole, on the CPU; every rank must call this (ZeRO-3 gathers).

    Only rank 0 gets the tensors, the others an empty dict.
    """
    import deepspeed

    first = dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        sharded = [tensor] if hasattr(tensor, "ds_id") else []
        with deepspeed.zero.GatheredParameters(sharded):
            if first:
                state[name] = tensor.detach().to("cpu", copy=True)
    return state


def export_model(model: nn.Module, state: dict[str, Tensor], processor: Any, target: Path) -> None:
    """Save `model` with the weights `state` and the processor as a safetensors directory.

    Moved when complete.
    """
    model.load_state_dict(state, strict=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with torch.no_grad():
        model.save_pretrained(partial)
    processor.save_pretrained(partial)
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)

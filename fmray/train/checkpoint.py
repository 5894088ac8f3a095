"""Checkpoints of a run: what they contain, how they are written, checked, resumed and exported.

A run's folder `<storage>/<run id>` is visible from every node, or with a mirror each node has its
own (`mirror.py`). A checkpoint is the folder `checkpoint-<step>/` in it, with `deepspeed/` (the
shards of all ranks), `recipe.yaml`, `state.json` and `manifest.json`. It is written under another
name, renamed when complete, and compared with its manifest before it is used.

DeepSpeed reads its files with pickle, so storage must be trusted. The exported `model/` is
safetensors.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from fmray.runtime import files, ray_private
from fmray.runtime.run_log import event

STATE_FILE = "state.json"
TAG = "deepspeed"
UNIVERSAL = "universal"
STORAGE_HOURS = 3  # how long ranks wait for each other while files are written, read or converted


# --- State and settings ---


@dataclass(frozen=True)
class TrainState:
    """Content of `state.json`."""

    step: int  # optimizer steps done
    epoch: int
    cursor: int  # steps done in this epoch
    seed: int
    world_size: int
    zero_stage: int
    config_hash: str
    settings: dict[str, Any]
    best: float | None  # highest accuracy so far
    best_step: int | None
    skipped_steps: int = 0  # so far, because of a loss or gradient that was not finite


def flatten_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings under dotted names."""
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
    """Return twelve hex digits of the SHA-256 of the settings."""
    return files.digest_of(settings)[:12]


def read_state(checkpoint: Path) -> TrainState:
    """Read the `state.json` of a checkpoint.

    Raises:
        ValueError: another version of fmray wrote it.
    """
    path = checkpoint / STATE_FILE
    return parse_state(path.read_text(encoding="utf-8"), str(path))


def parse_state(text: str, where: str) -> TrainState:
    """Parse the content of a `state.json`; see `read_state`."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if isinstance(values, dict):
        values = {"skipped_steps": 0} | values  # the previous release does not count them
    names = {field.name for field in fields(TrainState)}
    if not isinstance(values, dict) or set(values) != names:
        contents = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{where}: should contain {sorted(names)}, contains {contents}")
    try:
        return TypeAdapter(TrainState).validate_python(values)
    except ValidationError as error:
        mistake = error.errors()[0]
        raise ValueError(f"{where}: {mistake['loc'][0]}: {mistake['msg']}") from error


# --- The checkpoints of a run ---


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint of `step`; names sort by step."""
    return run_dir / f"checkpoint-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """List all checkpoints, newest first, damaged ones included."""
    return sorted((p for p in run_dir.glob("checkpoint-*") if p.is_dir()), reverse=True)


def find_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint that has no `quick_fault`; None without any.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    faults: list[str] = []
    for path in list_checkpoints(run_dir):
        fault = quick_fault(path)
        if fault is None:
            return path
        faults.append(f"{path.name}: {fault}")
    raise_if_all_damaged(run_dir, faults)
    return None


def quick_fault(path: Path) -> str | None:
    """Return a checkpoint's first fault by the sizes of its files and the content of its state."""

    def state(entries: dict[str, files.Entry]) -> dict[str, files.Entry]:
        return {name: entry for name, entry in entries.items() if name == STATE_FILE}

    return files.fault(path, hashes=False) or files.fault(path, hashes=True, needed=state)


def raise_if_all_damaged(run_dir: Path, faults: list[str]) -> None:
    """Raise ValueError if `faults` is not empty: starting again from step 0 is the user's choice.

    Args:
        faults: of each checkpoint in `run_dir`; none of them can be used.
    """
    if faults:
        raise ValueError(
            f"{run_dir}: all checkpoints are damaged ({'; '.join(faults)}); restore one, or remove"
            " them to start from step 0"
        )


def checkpoints_to_keep(
    names: Iterable[str], step: int, keep: int, best_step: int | None
) -> set[str]:
    """Return the names of at most `keep` checkpoints that stay.

    In this order: that of `step` (just made), the best, then the newest before `step`. Later ones
    belong to steps that have been rolled back.
    """
    newest_first = sorted(names, reverse=True)
    current = checkpoint_path(Path(), step).name
    best_name = checkpoint_path(Path(), best_step).name if best_step else None
    best = [name for name in newest_first if name == best_name]
    before = [name for name in newest_first if name < current]
    return set(list(dict.fromkeys([current, *best, *before]))[:keep])


def prune_checkpoints(run_dir: Path, step: int, keep: int, best_step: int | None) -> None:
    """Remove all but `checkpoints_to_keep`; called by one rank per folder."""
    paths = list_checkpoints(run_dir)
    names_to_keep = checkpoints_to_keep((path.name for path in paths), step, keep, best_step)
    for path in paths:
        if path.name not in names_to_keep:
            shutil.rmtree(path)


# --- Saving and loading ---


def new_storage_group() -> dist.ProcessGroup:
    """Return a process group of all ranks with a timeout for slow storage; collective.

    Uses gloo, which needs no GPU. Call it a fixed number of times per worker group: each call
    connects all ranks.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(hours=STORAGE_HOURS))


def save_checkpoint(
    engine: Any,
    run_dir: Path,
    state: TrainState,
    recipe_text: str,
    folder_ranks: Sequence[int],
    group: dist.ProcessGroup,
) -> Path:
    """Write a checkpoint and return its folder, which is complete on return; collective.

    Args:
        folder_ranks: the ranks that see the same `run_dir` as this rank. If that is not all ranks,
            each node's folder gets the shards of its ranks and the manifest of all.
        group: from `new_storage_group`.
    """
    final = checkpoint_path(run_dir, state.step)
    partial = run_dir / f".{final.name}.partial"
    leads_folder = engine.global_rank == folder_ranks[0]

    # each rank writes its shards
    if leads_folder:
        for leftover in run_dir.glob(".checkpoint-*"):  # of a worker group that died
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    dist.barrier(group=group)
    try:
        engine.save_checkpoint(str(partial), tag=TAG, save_latest=False)
    except RuntimeError as error:  # on a full disk torch reports "unexpected pos 576 vs 534"
        free = shutil.disk_usage(run_dir).free / 2**20
        raise RuntimeError(f"writing {partial} failed with {free:.1f} MiB free: {error}") from error
    dist.barrier(group=group)
    if engine.global_rank == 0:
        (partial / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
        text = files.dumps(asdict(state), indent=1) + "\n"
        (partial / STATE_FILE).write_text(text, encoding="utf-8")

    # each rank hashes the files that it has just written, which its node has in memory
    rank_files = files.describe_files(partial, _files_of(partial, engine.global_rank))
    assert rank_files or state.zero_stage == 0, f"rank {engine.global_rank} wrote no shard"
    parts: list[Any] = [None] * state.world_size
    dist.all_gather_object(parts, rank_files, group=group)

    # one rank per folder completes it
    if leads_folder:
        files.write_manifest(partial, {k: v for part in parts for k, v in part.items()})
        for folder in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
            files.sync(folder)
        files.replace_folder(partial, final)  # what it replaces is rolled back, or damaged
    dist.barrier(group=group)
    return final


def shard_rank(name: str) -> int | None:
    """Return the rank that a DeepSpeed file belongs to; None if it is not a shard."""
    match = re.search(r"zero_pp_rank_(\d+)_", name)
    return int(match[1]) if match else None


def _files_of(checkpoint: Path, rank: int) -> list[Path]:
    """Return the files that `rank` has written; rank 0 has written those that are not shards."""
    paths = [path for path in checkpoint.rglob("*") if path.is_file()]
    return [path for path in paths if (shard_rank(path.name) or 0) == rank]


def needs_universal(state: TrainState, world_size: int) -> bool:
    """Return whether `world_size` ranks need a converted checkpoint.

    ZeRO partitions the states over the ranks that save; without it, rank 0 has them all.
    """
    return state.zero_stage > 0 and state.world_size != world_size


def make_universal(
    checkpoint: Path, stage: int, folder_ranks: Sequence[int], group: dist.ProcessGroup
) -> None:
    """Convert a checkpoint to DeepSpeed's universal format, for any world size; collective.

    One rank per folder converts, unless an intact conversion exists.

    Args:
        folder_ranks: the ranks that see the same folder as this rank.
        group: from `new_storage_group`.
    """
    if dist.get_rank() == folder_ranks[0]:
        _convert(checkpoint, stage)
    dist.barrier(group=group)


def _convert(checkpoint: Path, stage: int) -> None:
    target = checkpoint / UNIVERSAL
    if target.is_dir():
        fault = files.fault(target, hashes=True)
        if fault is None:
            return
        event(checkpoint.parent, f"{checkpoint.name}/{UNIVERSAL}: {fault}; converting again")
    with files.atomic_folder(target) as partial:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every tensor
            ray_private.convert_to_universal(
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
        entries = files.describe_files(partial, [p for p in partial.rglob("*") if p.is_file()])
        files.write_manifest(partial, entries)


def load_checkpoint(engine: Any, checkpoint: Path, universal: bool) -> None:
    """Load weights, optimizer and the place in the learning-rate schedule; collective.

    The learning rates are those of the engine's schedule, not of the checkpoint.
    """
    schedule = getattr(engine, "lr_scheduler", None)  # a `TorchEngine` has none
    rates = list(schedule.base_lrs) if schedule is not None else []
    loaded, _ = engine.load_checkpoint(str(checkpoint), tag=UNIVERSAL if universal else TAG)
    if loaded is None:
        raise ValueError(
            f"{checkpoint}: DeepSpeed found nothing to load in {TAG}/; the folder is incomplete"
        )
    if universal:
        # DeepSpeed 0.19 has one shared step counter in stage 3, which then counts a step once per
        # group
        for values in engine.optimizer.optimizer.state.values():
            if isinstance(values.get("step"), Tensor):
                values["step"] = values["step"].clone()
    if schedule is not None:
        # The checkpoint has the rates of its own recipe (and DeepSpeed 0.19 gives all parameter
        # groups of a universal one the rate of the first): compute them anew.
        schedule.base_lrs = rates
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        schedule._last_lr = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
        groups = engine.optimizer.param_groups
        for group, base, lr in zip(groups, rates, schedule._last_lr, strict=True):
            group["initial_lr"], group["lr"] = base, lr


# --- The exported model ---


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, unpartitioned, on the CPU; collective (ZeRO-3 gathers).

    Only rank 0 gets the tensors, the others an empty dict.
    """
    import deepspeed

    is_rank_zero = dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        partitioned = [tensor] if ray_private.is_zero_param(tensor) else []
        with deepspeed.zero.GatheredParameters(partitioned):
            if is_rank_zero:
                state[name] = tensor.detach().to("cpu", copy=True)
    return state


def export_model(model: nn.Module, state: dict[str, Tensor], processor: Any, target: Path) -> None:
    """Save `model` with the weights `state`, and the processor, as a safetensors folder."""
    model.load_state_dict(state, strict=True)
    with files.atomic_folder(target) as partial:
        with torch.no_grad():
            model.save_pretrained(partial)
        processor.save_pretrained(partial)

"""Checkpoints of a run: where they lie, what they hold, and which one is resumed.

In: the run's folder `<storage>/<run id>`, visible from every node. A checkpoint is
`checkpoint-<step>/` with `deepspeed/` (all ranks), `recipe.yaml`, `state.json` and the manifest of
them; it is written under another name and moved when complete, and compared with its manifest
before it is used. DeepSpeed reads its files with pickle: storage must be trusted. `model/` beside
them is safetensors.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fmray.runtime import files as manifest
from fmray.runtime import ray_private
from fmray.runtime.run_log import event

STATE_FILE = "state.json"
TAG = "deepspeed"
UNIVERSAL = "universal"
STORAGE_HOURS = 3  # how long ranks wait for one another while files are written, read or converted


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
    """The `state.json` of a whole checkpoint. Raises ValueError when it is of another fmray."""
    path = checkpoint / STATE_FILE
    return parse_state(path.read_text(encoding="utf-8"), str(path))


def parse_state(text: str, where: str) -> TrainState:
    """See `read_state`."""
    values = json.loads(text)
    names = {field.name for field in fields(TrainState)}
    if set(values) != names:
        raise ValueError(f"{where}: should hold {sorted(names)}, holds {sorted(values)}")
    return TrainState(**values)


def check_settings(state: TrainState, now: dict[str, Any], checkpoint: Path | str) -> None:
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
    """The newest checkpoint whose files are there in full, by their sizes; None where there is no
    checkpoint.

    Raises ValueError, naming what is wrong with each, when there are some and none is whole: to
    begin again from step 0 is for the user to decide.
    """
    passed: list[str] = []
    for path in newest_first(run_dir):
        wrong = manifest.fault(path, hashes=False)
        if wrong is None:
            return path
        passed.append(f"{path.name}: {wrong}")
    refuse_all(run_dir, passed)
    return None


def newest_first(run_dir: Path) -> list[Path]:
    """All checkpoints, whole or not."""
    return sorted((p for p in run_dir.glob("checkpoint-*") if p.is_dir()), reverse=True)


def refuse_all(run_dir: Path, passed: list[str]) -> None:
    """Raises ValueError when there are checkpoints, and something is wrong with each."""
    if passed:
        raise ValueError(
            f"{run_dir}: no checkpoint is whole ({'; '.join(passed)}); restore one, or remove them"
            " to begin from step 0"
        )


def new_storage_group() -> dist.ProcessGroup:
    """A process group of all ranks that waits for slow storage longer than for a slow step, and
    needs no GPU for it. Every rank must call this; once a worker group, for it connects them all.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(hours=STORAGE_HOURS))


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies; names sort by step."""
    return run_dir / f"checkpoint-{step:08d}"


def save_checkpoint(
    engine: Any,
    run_dir: Path,
    state: TrainState,
    recipe_text: str,
    here: Sequence[int],
    group: dist.ProcessGroup,
) -> Path:
    """Write a checkpoint; every rank must call this.

    here: the ranks that see this rank's `run_dir`. Where that is not all of them, each node's
    folder gets the files of its ranks and the manifest of all. group: a `new_storage_group`.

    Returns its folder, complete on every rank's return.
    """
    final = checkpoint_path(run_dir, state.step)
    partial = run_dir / f".{final.name}.partial"
    first, leads = engine.global_rank == 0, engine.global_rank == here[0]
    if leads:
        for left in run_dir.glob(".checkpoint-*.partial"):  # by a worker group that died
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    dist.barrier(group=group)
    try:
        engine.save_checkpoint(str(partial), tag=TAG, save_latest=False)
    except RuntimeError as error:  # of a full disk torch says "unexpected pos 576 vs 534"
        free = shutil.disk_usage(run_dir).free / 2**20
        raise RuntimeError(f"writing {partial} failed with {free:.1f} MiB free: {error}") from error
    dist.barrier(group=group)
    if first:
        (partial / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
        text = json.dumps(asdict(state), indent=1) + "\n"
        (partial / STATE_FILE).write_text(text, encoding="utf-8")
    # each rank hashes what it has just written, which its node still has in memory
    mine = manifest.describe_files(partial, _files_of(partial, engine.global_rank))
    assert mine or state.zero_stage == 0, f"rank {engine.global_rank} wrote no shard"
    parts: list[Any] = [None] * state.world_size
    dist.all_gather_object(parts, mine, group=group)
    if leads:
        manifest.write_manifest(partial, {k: v for part in parts for k, v in part.items()})
        for folder in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
            manifest.sync(folder)
        if final.exists():  # of a lost future, or not whole
            shutil.rmtree(final)
        os.replace(partial, final)
        manifest.sync(run_dir)
    dist.barrier(group=group)
    return final


def owner(name: str) -> int | None:
    """The rank whose shard a file of DeepSpeed's is; None for what is not a shard."""
    found = re.search(r"zero_pp_rank_(\d+)_", name)
    return int(found[1]) if found else None


def _files_of(checkpoint: Path, rank: int) -> list[Path]:
    """The files that DeepSpeed's `rank` has written; what is not a rank's shard is rank 0's."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    return [path for path in files if (owner(path.name) or 0) == rank]


def kept_checkpoints(names: Iterable[str], step: int, keep: int, best_step: int | None) -> set[str]:
    """Which of the checkpoints stay: the one just made (of `step`), the best, and the newest before
    it. Later ones are of a future that was lost."""
    found = sorted(names, reverse=True)
    newest = checkpoint_path(Path(), step).name
    best = [name for name in found if best_step and name == checkpoint_path(Path(), best_step).name]
    before = [name for name in found if name < newest]
    return set(list(dict.fromkeys([newest, *best, *before]))[:keep])


def prune_checkpoints(run_dir: Path, step: int, keep: int, best_step: int | None) -> None:
    """Remove the checkpoints that do not stay. One rank a folder."""
    found = newest_first(run_dir)
    kept = kept_checkpoints((path.name for path in found), step, keep, best_step)
    for path in found:
        if path.name not in kept:
            shutil.rmtree(path)


def needs_universal(state: TrainState, world_size: int) -> bool:
    """Whether another number of workers has divided the states; without ZeRO, rank 0 has all."""
    return state.zero_stage > 0 and state.world_size != world_size


def make_universal(
    checkpoint: Path, stage: int, here: Sequence[int], group: dist.ProcessGroup
) -> None:
    """Convert DeepSpeed's files to its universal format, which any number of workers can load.

    Once a folder, verified before it is used again, complete or not at all. Every rank must call
    this. here: the ranks that see this rank's folder. group: a `new_storage_group`.
    """
    if dist.get_rank() == here[0]:
        _convert(checkpoint, stage)
    dist.barrier(group=group)


def _convert(checkpoint: Path, stage: int) -> None:
    final = checkpoint / UNIVERSAL
    if final.is_dir():
        wrong = manifest.fault(final, hashes=True)
        if wrong is None:
            return
        event(checkpoint.parent, f"{checkpoint.name}/{UNIVERSAL}: {wrong}; converted again")
        shutil.rmtree(final)
    partial = checkpoint / f".{UNIVERSAL}.partial"
    shutil.rmtree(partial, ignore_errors=True)
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
    files = manifest.describe_files(partial, [p for p in partial.rglob("*") if p.is_file()])
    manifest.write_manifest(partial, files)
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
        sharded = [tensor] if ray_private.is_zero_param(tensor) else []
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

"""Pretraining of a small encoder from scratch, in this process: SimCLR, MoCo or supervised.

Uses the train classes of the image store. Writes `model/` (for `encoder.checkpoint`), log.jsonl and
state.pt to the run's folder; the same run id resumes from state.pt. The images and views of a step
depend on the seed and the step alone.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmray.config import LoadedRecipe
from fmray.config.fewshot import FewshotRecipe, PretrainConfig
from fmray.data.image_store import ImageStore
from fmray.fewshot import Encoder, create_encoder
from fmray.fewshot.pretrain import MoCo, SimCLR, Supervised, augment
from fmray.runtime import tracking
from fmray.runtime.console import changed_settings, say
from fmray.runtime.files import atomic_path
from fmray.runtime.run_log import Progress, StepLog, event
from fmray.train.checkpoint import flatten_settings
from fmray.train.engine import lr_factor
from fmray.train.fewshot.encoder import ImageReader, decode_all, export_encoder
from fmray.train.finite import LISTED, FiniteCheck, all_finite
from fmray.train.resume import compare

STATE_EVERY = 250  # steps
WARMUP = 0.05  # share of the steps


@dataclass(frozen=True)
class Pretrained:
    """A pretrained encoder."""

    model_dir: Path
    metrics: dict[str, float]  #: of the last step; empty if the run was already complete


def pretrain_encoder(loaded: LoadedRecipe[FewshotRecipe], run_id: str) -> Pretrained:
    """Pretrain the encoder of a recipe and report how to use it.

    Raises:
        ValueError: as in `pretrain`.
    """
    recipe = loaded.recipe.with_absolute_paths()
    run_dir = recipe.cluster.storage / run_id
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(loaded.dump(), encoding="utf-8")
    say(changed_settings(loaded, run_dir / "recipe.yaml"))
    result = pretrain(recipe, run_dir, run_id)
    say(f"use it with --set encoder.checkpoint={result.model_dir}")
    return result


def pretrain(recipe: FewshotRecipe, run_dir: Path, run_id: str) -> Pretrained:
    """Pretrain the recipe's encoder into `run_dir`, unless that is done already.

    Raises:
        ValueError: collections without train classes, too few images, or a run that was started
            with other settings.
        Diverged: a loss, gradient or weight is not finite.
    """
    config, target = recipe.pretrain, run_dir / "model"
    store = ImageStore.open(recipe.images.store, recipe.images.cache)
    rows, labels = _images(store, config)
    settings = {
        "seed": recipe.seed,
        "encoder": recipe.encoder.model_dump(exclude={"checkpoint", "pretrained"}),
        "pretrain": config.model_dump(mode="json", exclude={"skip_nonfinite"}),
        "store": store.fingerprint,
    }
    state = _read_state(run_dir / "state.pt", settings)
    if target.is_dir() and (state is None or state["step"] == config.steps):
        say(f"{run_id}: already pretrained: {target}")
        return Pretrained(target, {})

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective, optimizer = _build(recipe, int(labels.max()) + 1, device, state)
    preprocess = objective.encoder.preprocess
    reader = ImageReader(store, preprocess, decode_all(store, preprocess))
    start = 0 if state is None else state["step"]
    check = _finite_check(config, run_dir, run_id, state)
    say(
        f"{run_id}: {config.objective} of {recipe.encoder.name} on {len(rows)} images, steps"
        f" {start + 1} to {config.steps}, in this process"
    )

    metrics: dict[str, float] = {}
    with (
        tracking.open_job_run(recipe, run_id, "pretrain_encoder") as run,
        StepLog(run_dir / "log.jsonl", keep_until=start, enabled=True) as log,
        Progress(config.steps, start, True, run_id) as progress,
    ):
        for step in range(start, config.steps):
            began = time.monotonic()
            chosen = _batch(len(rows), config.batch, recipe.seed, step)
            images = reader[rows[chosen]].to(device)
            loss, norm = _train_step(
                objective, optimizer, images, labels[chosen], config, recipe.seed, step
            )
            metrics = {
                "loss": loss,
                "grad_norm": norm,
                "images_per_s": len(chosen) / (time.monotonic() - began),
            }

            # report, and save every now and then
            done = step + 1
            log.write(done, metrics)
            run.log(done, **{f"pretrain/{name}": value for name, value in metrics.items()})
            progress.update(done, metrics)
            check.step(done, metrics, partial(_name_images, rows[chosen]))
            if done % STATE_EVERY == 0 or done == config.steps:
                check.weights(done, all_finite(objective.state_dict().values()))
                state = {
                    "step": done,
                    "skipped_steps": check.skipped,
                    "settings": settings,
                    "objective": objective.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                with atomic_path(run_dir / "state.pt") as temporary:
                    torch.save(state, temporary)
        export_encoder(objective.encoder, target)
    if check.skipped:
        say(f"skipped steps, because of a loss not finite: {check.skipped}")
    say(f"model: {target}")
    return Pretrained(target, metrics)


def _finite_check(
    config: PretrainConfig, run_dir: Path, run_id: str, state: dict[str, Any] | None
) -> FiniteCheck:
    """What stops the run, or skips a step, when a value is not finite."""

    def advice(step: int) -> str:
        if not (run_dir / "state.pt").is_file():
            return "nothing is exported, and no state was saved; lower pretrain.lr"
        return (
            "nothing is exported; the last finite state is in state.pt, from which the same"
            " --run-id resumes; lower pretrain.lr"
        )

    skipped = 0 if state is None else state.get("skipped_steps", 0)
    return FiniteCheck(
        run_id,
        lambda text: event(run_dir, text),
        advice,
        config.skip_nonfinite,
        skipped,
        "pretrain.skip_nonfinite",
    )


def _build(
    recipe: FewshotRecipe, classes: int, device: torch.device, state: dict[str, Any] | None
) -> tuple[SimCLR | MoCo | Supervised, torch.optim.Optimizer]:
    """Return objective and optimizer, at the start or as in a saved state."""
    config = recipe.pretrain
    torch.manual_seed(recipe.seed)  # for the initial weights and MoCo's queue
    encoder = create_encoder(
        recipe.encoder.name, pretrained=False, image_size=recipe.encoder.image_size
    )
    objective = _objective(encoder, config, classes).to(device).train()
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    if state is not None:
        objective.load_state_dict(state["objective"])
        optimizer.load_state_dict(state["optimizer"])
    return objective, optimizer


def _train_step(
    objective: SimCLR | MoCo | Supervised,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: np.ndarray,
    config: PretrainConfig,
    seed: int,
    step: int,
) -> tuple[float, float]:
    """Take an optimizer step on two views of uint8 images [B, 3, H, W].

    Returns loss and gradient norm. If one is not finite, nothing changes.
    """
    before = [buffer.clone() for buffer in objective.buffers()]  # batch statistics, MoCo's queue
    generator = torch.Generator().manual_seed((seed << 32) + step)
    normalise = objective.encoder.preprocess.normalise
    first, second = (normalise(augment(images, generator)) for _ in range(2))
    loss = objective(first, second, torch.from_numpy(labels).to(images.device))
    for group in optimizer.param_groups:
        group["lr"] = config.lr * lr_factor(step, config.steps, WARMUP)
    optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    loss_value, norm_value = torch.stack([loss.detach(), norm]).tolist()
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        for buffer, value in zip(objective.buffers(), before, strict=True):
            buffer.copy_(value)
        return loss_value, norm_value
    optimizer.step()
    if isinstance(objective, MoCo):
        objective.update()
    return loss_value, norm_value


def _images(store: ImageStore, config: PretrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return row ids [n] of the train classes, and their classes [n] over all collections.

    Raises:
        ValueError: a named collection without train classes, or fewer images than a batch.
    """
    parts = []
    for name in config.collections or store.collections:
        part = store.select(name, "train").rows
        if not len(part) and config.collections:
            raise ValueError(f"pretrain.collections: {name} has no train classes; remove it")
        parts.append(part)
    rows = np.concatenate(parts)
    if len(rows) < config.batch:
        raise ValueError(f"pretrain.batch: {config.batch} is more than the {len(rows)} images")
    first = np.array([entry.first for entry in store.classes])
    return rows, np.unique(np.searchsorted(first, rows, side="right"), return_inverse=True)[1]


def _objective(
    encoder: Encoder, config: PretrainConfig, classes: int
) -> SimCLR | MoCo | Supervised:
    if config.objective == "simclr":
        return SimCLR(encoder, config.temperature)
    if config.objective == "moco":
        return MoCo(encoder, config.temperature, config.queue, config.momentum)
    return Supervised(encoder, classes)


def _name_images(rows: np.ndarray) -> str:
    return f"images {', '.join(map(str, rows[:LISTED]))}{' ...' if len(rows) > LISTED else ''}"


def _batch(images: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Return the images [batch] of a step; an epoch has each once and drops an incomplete batch."""
    epoch, number = divmod(step, images // batch)
    order = np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(images)
    return order[number * batch : (number + 1) * batch]


def _read_state(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the saved state of a run, None if it has none; prints the settings that change.

    Raises:
        ValueError: the run was started with other images or settings, or has taken more steps.
    """
    if not path.is_file():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    before, now = map(_flat, (state["settings"], settings))
    for note in compare(before, now, path, {}, free={"pretrain.lr", "pretrain.steps"}):
        say(note)
    steps = settings["pretrain"]["steps"]
    if state["step"] > steps:
        raise ValueError(
            f"pretrain.steps: {path} has taken {state['step']} steps, and the recipe asks for"
            f" {steps}; ask for at least {state['step']}, or give a new --run-id"
        )
    return state


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat = flatten_settings(settings)
    return flat | {"content.images": flat.pop("store")}

"""Pretraining a small encoder from scratch, in this process: SimCLR, MoCo, or supervised.

In: the `encoder` and `pretrain` sections of a recipe, its image store (train classes only), and a
run id. Out: in the run's folder `model/` for `encoder.checkpoint`, `log.jsonl` and `state.pt`, from
which the same run id goes on. A step's images and views depend on the seed and the step alone.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmray.config import LoadedRecipe
from fmray.config.fewshot import FewshotRecipe, PretrainConfig
from fmray.data.image_store import ImageStore
from fmray.fewshot import Encoder, create_encoder
from fmray.fewshot.pretrain import MoCo, SimCLR, Supervised, augment
from fmray.runtime import tracking
from fmray.runtime.console import changed_settings, say
from fmray.runtime.run_log import Progress, StepLog
from fmray.train.engine import lr_factor
from fmray.train.fewshot.encoder import ImageReader, decode_all, export_encoder

STATE_EVERY = 250  # steps
WARMUP = 0.05  # of the steps


@dataclass(frozen=True)
class Pretrained:
    """model_dir: of the encoder. metrics: of the last step; empty where nothing was left to do."""

    model_dir: Path
    metrics: dict[str, float]


def pretrain_encoder(loaded: LoadedRecipe[FewshotRecipe], run_id: str) -> Pretrained:
    """The job: pretrain, print the end. Raises ValueError as `pretrain`."""
    recipe = loaded.recipe.with_absolute_paths()
    run_dir = recipe.cluster.storage / run_id
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(loaded.dump(), encoding="utf-8")
    say(changed_settings(loaded, run_dir / "recipe.yaml"))
    result = pretrain(recipe, run_dir, run_id)
    say(f"use it with --set encoder.checkpoint={result.model_dir}")
    return result


def pretrain(recipe: FewshotRecipe, run_dir: Path, run_id: str) -> Pretrained:
    """Pretrain the recipe's encoder into `run_dir`, or find that it is done.

    Raises ValueError for a store without the collections, or a run of other settings.
    """
    config, target = recipe.pretrain, run_dir / "model"
    store = ImageStore.open(recipe.images.store, recipe.images.cache)
    rows, labels = _images(store, config)
    settings = {
        "seed": recipe.seed,
        "encoder": recipe.encoder.model_dump(exclude={"checkpoint", "pretrained"}),
        "pretrain": config.model_dump(mode="json"),
        "store": store.fingerprint,
    }
    state = _read_state(run_dir / "state.pt", settings)
    if target.is_dir():
        say(f"{run_id}: pretrained before, {target}")
        return Pretrained(target, {})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(recipe.seed)  # of the first weights and of MoCo's queue
    encoder = create_encoder(
        recipe.encoder.name, pretrained=False, image_size=recipe.encoder.image_size
    )
    pictures = ImageReader(store, encoder.preprocess, decode_all(store, encoder.preprocess))
    objective = _objective(encoder, config, int(labels.max()) + 1).to(device).train()
    learnt = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=config.lr, weight_decay=config.weight_decay)
    start = 0
    if state is not None:
        objective.load_state_dict(state["objective"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
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
            images = pictures[rows[chosen]].to(device)
            generator = torch.Generator().manual_seed((recipe.seed << 32) + step)
            first, second = (
                encoder.preprocess.normalise(augment(images, generator)) for _ in range(2)
            )
            loss = objective(first, second, torch.from_numpy(labels[chosen]).to(device))
            for group in optimizer.param_groups:
                group["lr"] = config.lr * lr_factor(step, config.steps, WARMUP)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if isinstance(objective, MoCo):
                objective.update()
            metrics = {
                "loss": float(loss.detach()),
                "images_per_s": len(chosen) / (time.monotonic() - began),
            }
            done = step + 1
            log.write(done, metrics)
            run.log(done, **{f"pretrain/{name}": value for name, value in metrics.items()})
            progress.update(done, metrics)
            if done % STATE_EVERY == 0 or done == config.steps:
                values = {
                    "step": done,
                    "settings": settings,
                    "objective": objective.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                torch.save(values, run_dir / ".state.pt.partial")
                os.replace(run_dir / ".state.pt.partial", run_dir / "state.pt")
        export_encoder(encoder, target)
    say(f"model: {target}")
    return Pretrained(target, metrics)


def _images(store: ImageStore, config: PretrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """Row ids [n] of the train classes, and their classes [n] counted over all collections.

    Raises ValueError for a collection that has none, and fewer images than a batch.
    """
    parts = []
    for name in config.collections or store.collections:
        found = store.select(name, "train").rows
        if not len(found) and config.collections:
            raise ValueError(f"pretrain.collections: {name} has no train classes; leave it out")
        parts.append(found)
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


def _batch(images: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Positions [batch] of step `step`: every image once a round, the last few of it left out."""
    turn, place = divmod(step, images // batch)
    order = np.random.default_rng(np.random.SeedSequence([seed, turn])).permutation(images)
    return order[place * batch : (place + 1) * batch]


def _read_state(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["settings"] != settings:
        changed = [key for key in settings if state["settings"].get(key) != settings[key]]
        raise ValueError(
            f"{path} was made with other settings ({', '.join(changed)}); use a new --run-id"
        )
    return state

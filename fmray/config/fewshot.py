"""The recipe of the few-shot jobs (`kind: fewshot`): images, encoder, episodes, finetuning, tasks.

jobs/{prepare_data,pretrain,select_tasks,train,evaluate,compare}.py read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, Field

from fmray.config.base import BaseRecipe, Location, Section, batch_conflicts

Method = Literal["direct", "standard", "lp_ft", "maml", "multitask"]
Selection = Literal[
    "all", "random", "no_diversity", "no_consistency", "selected", "top_k", "leep", "logme"
]
METHODS: tuple[str, ...] = get_args(Method)
SELECTIONS: tuple[str, ...] = get_args(Selection)


def _collection_name(name: str) -> str:
    if not name or not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError(
            f"{name!r}: letters, digits, `_` and `-` only (it names a folder and a task)"
        )
    return name


CollectionName = Annotated[str, AfterValidator(_collection_name)]


class CollectionConfig(Section):
    """One collection of labelled images."""

    path: Location = Field(description="a folder or a Parquet file")
    format: Literal["parquet", "folders", "meta_dataset"] | None = Field(
        None, description="default: detected at `path`"
    )
    layout: Literal["classes", "splits", "leaves"] | None = Field(
        None,
        description="of folders: `classes`, or `splits` (train, val, test) of classes, whose images"
        " may be at any depth; or `leaves`: each folder that holds images is a class, named by its"
        " path; default: as the folders show, an error where they can be read in several ways",
    )
    split: Literal["given", "hash"] | Location = Field(
        "given",
        description="splits of the classes: given by the data, a seeded hash (70/15/15), or a JSON "
        "file {train|val|test: [class names]}; data without splits are hashed",
    )
    specification: Location | None = Field(
        None, description="Meta-Dataset's dataset_spec.json; default: the one next to the records"
    )


class ImagesConfig(Section):
    """The image store that all few-shot jobs read."""

    store: Location = Field(Path("runs/images"), description="visible from every node")
    collections: dict[CollectionName, CollectionConfig] = Field(
        {}, description="name -> source of its images"
    )
    on_bad_row: Literal["error", "skip"] = "error"
    check_images: Literal["stat", "hash"] = Field(
        "stat",
        description="how prepare_data notices replaced files: by size and time, or by content, "
        "which reads all of them",
    )
    rows_per_group: int = Field(256, ge=1, description="images in a Parquet row group, at most")
    cache: Location | None = Field(
        None, description="node-local folder for the memory map; default: a folder in the store"
    )


class EncoderConfig(Section):
    """The image encoder."""

    name: str = Field(
        "timm/vit_small_patch16_224",
        description="`timm/NAME`, `clip/HUB-NAME`, `hf/HUB-NAME` or `small/vit` and `small/conv`",
    )
    checkpoint: Location | None = Field(
        None,
        description="encoder directory of fmray, or weights file of timm; default: the hub's",
    )
    pretrained: bool = Field(True, description="without a checkpoint: load the hub's weights")
    image_size: int | None = Field(None, ge=8, description="pixels; default: the encoder's own")


class PretrainConfig(Section):
    """Contrastive or supervised pretraining of a small encoder."""

    objective: Literal["simclr", "moco", "supervised"] = "simclr"
    collections: tuple[str, ...] = Field((), description="default: all with train classes")
    steps: int = Field(1500, ge=1)
    batch: int = Field(128, ge=2)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    temperature: float = Field(0.2, gt=0)
    queue: int = Field(4096, ge=1, description="length of the key queue, objective `moco`")
    momentum: float = Field(0.99, ge=0, lt=1, description="of the key encoder, objective `moco`")
    skip_nonfinite: int = Field(
        0, ge=0, description="steps that may be skipped, as `train.skip_nonfinite`"
    )


class EpisodeConfig(Section):
    """N-way K-shot episodes."""

    ways: int = Field(15, ge=2)
    shots: int = Field(1, ge=1)
    queries: int = Field(10, ge=1, description="per class")
    tasks: int = Field(200, ge=1, description="distinct finetuning tasks (M)")


class FewshotTrainConfig(Section):
    """Finetuning an encoder."""

    method: Method = "multitask"
    steps: int = Field(1000, ge=1)
    episodes_per_step: int = Field(1, ge=1, description="over all workers")
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(1e-5, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    gradient_clip: float = Field(1.0, ge=0, description="0: off")
    temperature: float = Field(
        10.0, gt=0, description="initial temperature of the cosine; it is trained"
    )
    probe_steps: int = Field(200, ge=1, description="of the linear probe, method lp_ft")
    inner_lr: float = Field(0.01, gt=0, description="method maml")
    inner_steps: int = Field(3, ge=1, description="method maml")
    order: Literal[1, 2] = Field(1, description="of MAML's gradient")
    strategy: Literal["ddp", "zero"] = "ddp"
    eval_every: int | None = Field(
        None, ge=1, description="steps between evaluations on the target; default: never"
    )
    eval_split: Literal["train", "val", "test", "all"] | None = Field(
        None,
        description="split for these evaluations; default: target.split (other tasks of it)",
    )
    checkpoint_every: int | None = Field(None, ge=1, description="steps; default: at the end only")
    keep_checkpoints: int = Field(2, ge=1)
    skip_nonfinite: int = Field(
        0,
        ge=0,
        description="steps of the run that may have a loss or gradient that is not finite: they"
        " change no weight; one more stops the run",
    )


class SelectConfig(Section):
    """Which candidate tasks to finetune on (Algorithm 1 and its baselines)."""

    method: Selection = "selected"
    only: tuple[str, ...] = Field(
        (), description="names of candidate tasks that replace the method's choice"
    )
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="name of a task -> its share of the episodes; default: 1 for each"
    )
    threshold: float = Field(0.05, ge=0, description="p of Algorithm 1")
    covariance: Literal["oas", "ledoit_wolf", "ml", "diag"] = "oas"
    weighting: Literal["task", "sample"] = "task"
    tasks: Literal["collection", "classes", "episodes"] = Field(
        "collection",
        description="what a candidate task is: a collection, a group of classes, or an episode",
    )
    classes_per_task: int = Field(20, ge=2, description="tasks: classes")
    episodes: int = Field(100, ge=1, description="candidates, tasks: episodes")
    candidates: tuple[str, ...] = Field((), description="collections; default: all but the target")
    k: int | None = Field(
        None,
        ge=1,
        description="number of tasks for random, top_k, leep and logme; "
        "default: as many as Algorithm 1 selects",
    )
    images_per_class: int = Field(64, ge=2, description="images embedded for the moments of a task")


class TargetConfig(Section):
    """The task that the encoder is finetuned for."""

    collection: str
    split: Literal["train", "val", "test", "all"] = "test"
    unlabelled: int = Field(256, ge=2, description="images for the target's moments")


class FewshotEvaluateConfig(Section):
    """Accuracy over many test tasks."""

    sampler: Literal["fixed", "meta_dataset_v1"] = Field(
        "fixed", description="meta_dataset_v1 draws ways and shots by Meta-Dataset's rules"
    )
    tasks: int = Field(1500, ge=2)
    ways: int = Field(
        15, ge=2, description="targets with fewer classes use all of them, with a note"
    )
    shots: tuple[int, ...] = Field((1, 5), min_length=1)
    queries: int = Field(15, ge=1, description="per class")
    batch: int = Field(256, ge=1, description="images per encoder call")


class CompareConfig(Section):
    """The table of `jobs/compare.py`: target x (method, selection)."""

    targets: tuple[TargetConfig, ...] = ()
    methods: tuple[Method, ...] = ("direct", "standard", "lp_ft", "maml", "multitask")
    selections: tuple[Selection, ...] = Field(
        ("all", "random", "no_diversity", "no_consistency", "selected"),
        description="of method multitask; the other methods train on all candidates",
    )
    random_seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    lr: dict[Method, float] = Field({}, description="learning rates that differ from train.lr")


class FewshotRecipe(BaseRecipe):
    """One few-shot job."""

    kind: Literal["fewshot"] = "fewshot"
    images: ImagesConfig = ImagesConfig()
    encoder: EncoderConfig = EncoderConfig()
    pretrain: PretrainConfig = PretrainConfig()
    target: TargetConfig | None = None
    select: SelectConfig = SelectConfig()
    episodes: EpisodeConfig = EpisodeConfig()
    train: FewshotTrainConfig = FewshotTrainConfig()
    evaluate: FewshotEvaluateConfig = FewshotEvaluateConfig()
    compare: CompareConfig = CompareConfig()

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """See `Section.conflicts`."""
        yield from batch_conflicts(
            self.cluster, "train.episodes_per_step", self.train.episodes_per_step, 1, "one episode"
        )
        elastic = len(self.cluster.world_sizes) > 1
        if elastic and self.train.strategy == "zero" and self.train.optimizer == "sgd":
            yield (
                "cluster.workers",
                "ZeRO's sgd states fit one number of workers; use train.optimizer: adamw,"
                " train.strategy: ddp, or a fixed number",
            )
        if self.train.eval_every is not None and self.target is None:
            yield "train.eval_every", "evaluations need a target: set target.collection"
        if self.train.method == "maml" and self.train.strategy == "zero":
            yield "train.strategy", "maml needs complete weights in each worker: use ddp"
        only = self.select.only
        if len(set(only)) < len(only):
            twice = next(name for name in only if only.count(name) > 1)
            yield "select.only", f"{twice!r} is listed twice; keep one of them"
        # Every collection that the recipe names exists.
        known = self.images.collections
        named = [("target.collection", self.target.collection)] if self.target else []
        named += [
            (f"compare.targets.{i}.collection", target.collection)
            for i, target in enumerate(self.compare.targets)
        ]
        named += [(f"select.candidates.{i}", name) for i, name in enumerate(self.select.candidates)]
        for key, name in named:
            if known and name not in known:
                yield key, f"images.collections has no {name!r}; it has {', '.join(known)}"
        yield from super().conflicts()

    def with_absolute_paths(self) -> Self:
        """See `BaseRecipe.with_absolute_paths`."""
        changed = {
            "images": self.images.absolute("store", "cache"),
            "encoder": self.encoder.absolute("checkpoint"),
        }
        return super().with_absolute_paths().model_copy(update=changed)


__all__ = ["METHODS", "SELECTIONS", "FewshotRecipe", "Method", "Selection"]

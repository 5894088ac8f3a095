"""The recipe of an AdaLLaVA job, `kind: adallava`: model, switches, data, training, evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from fmray.config.base import BaseRecipe, Location, Section, Share, batch_conflicts

Decay = Annotated[float, Field(ge=0, lt=1)]


class ScratchConfig(Section):
    """A small LLaVA made from sizes, for `model.source: scratch` (no download)."""

    text_family: Literal["llama", "qwen2", "phi"] = "llama"
    layers: int = Field(8, ge=2)
    hidden: int = Field(128, ge=8)
    heads: int = Field(4, ge=1)
    kv_heads: int | None = Field(None, ge=1, description="grouped-query attention; default: heads")
    intermediate: int = Field(352, ge=8)
    vision_layers: int = Field(2, ge=1)
    vision_hidden: int = Field(64, ge=8)
    vision_heads: int = Field(2, ge=1)
    image_size: int = Field(32, ge=8)
    patch_size: int = Field(16, ge=2)
    max_vocabulary: int = Field(4096, ge=16)


class LoraConfig(Section):
    """LoRA (peft) on the linear layers of the decoder."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)


class ModelConfig(Section):
    """Which base model, how it is loaded and which parts of it learn."""

    source: str = Field(
        "scratch", description="hub name, directory (stock or adaptive), or `scratch`"
    )
    revision: str | None = None
    scratch: ScratchConfig = ScratchConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    freeze: tuple[Literal["vision", "projector", "language"], ...] = ("vision",)
    lora: LoraConfig | None = None


class AdaptiveConfig(Section):
    """The switches, the latency token and how plans are drawn; null trains the base model alone."""

    design: Literal["layers", "heads"] = "layers"
    first: int | None = Field(None, ge=1, description="first switchable layer; default: half")
    unit: int = Field(8, ge=1, description="heads per unit, design `heads`")
    latency_token: Literal["inline", "probe"] = "inline"
    scheduler: Literal["learned", "static", "random", "deterministic"] = "learned"
    tau: float = Field(5.0, gt=0, description="temperature of the Gumbel-softmax")
    penalty: float = Field(1.0, ge=0, description="lambda of the deterministic baseline")
    min_budget: float | None = Field(
        None, gt=0, le=1, description="smallest training budget; default: the smallest there is"
    )


class ShapesConfig(Section):
    """The generated visual-question set, written in LLaVA's format."""

    pictures: int = Field(20_000, ge=1)
    validation_pictures: int = Field(500, ge=1)
    grid: int = Field(2, ge=2, le=4, description="cells a side")
    image_size: int = Field(32, ge=16)
    turns: int = Field(4, ge=1, le=16, description="questions a picture")
    two_hop: float = Field(0.4, ge=0, le=1, description="share of questions that need two look-ups")
    relations: int = Field(
        3, ge=1, le=3, description="beside, vertical, opposite (larger grids: right, below)"
    )
    colors: int = Field(4, ge=2, le=8)
    shapes: int = Field(3, ge=2, le=6)
    empty: float = Field(0.0, ge=0, lt=1, description="share of empty cells")
    jitter: int = Field(2, ge=0, description="pixels a shape may lie off its cell's middle")


class DataConfig(Section):
    """Instruction data: LLaVA JSON or JSONL (or generated shapes) -> Parquet store -> batches."""

    store: Location = Field(
        Path("runs/store"), description="Parquet store; visible from every node"
    )
    train: Location | None = Field(None, description="LLaVA JSON or JSONL file")
    validation: Location | None = Field(None, description="LLaVA JSON or JSONL file")
    validation_share: float = Field(
        0.05, gt=0, lt=1, description="held out by id when no validation file"
    )
    image_folder: Location | None = None
    shapes: ShapesConfig | None = Field(None, description="generate the data instead of reading it")
    on_bad_row: Literal["error", "skip"] = "error"
    rows_per_shard: int = Field(1024, ge=1)
    max_length: int = Field(
        2048, ge=8, description="tokens; longer samples are cut at a turn, or are bad rows"
    )
    samples: Literal["turn", "conversation"] = Field(
        "turn", description="one training sample per supervised turn, or per conversation"
    )
    loader_threads: int = Field(1, ge=1)
    prefetch_batches: int = Field(4, ge=1)


class ZeroConfig(Section):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_parameters: Literal["none", "cpu"] = "none"
    parameter_persistence: int = Field(
        100_000, ge=0, description="stage 3: parameters smaller than this stay whole"
    )


class TrainConfig(Section):
    """Optimisation, evaluation during training and checkpoints."""

    lr: float = Field(1e-5, gt=0)
    scheduler_lr: float | None = Field(
        None, gt=0, description="lr of latency encoder and scheduler; default: lr"
    )
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    epochs: float = Field(1.0, gt=0)
    steps: int | None = Field(None, ge=1, description="overrides epochs")
    global_batch: int = Field(128, ge=1)
    micro_batch: int = Field(16, ge=1, description="samples per worker and forward pass")
    gradient_clip: float = Field(1.0, ge=0, description="0: off")
    gradient_checkpointing: bool = False
    eval_every: int | None = Field(None, ge=1, description="steps; default: at the end only")
    eval_rows: int = Field(512, ge=1)
    eval_budgets: tuple[Share, ...] = Field((0.5, 0.75, 1.0), min_length=1)
    checkpoint_every: int | None = Field(None, ge=1, description="steps; default: at the end only")
    keep_checkpoints: int = Field(2, ge=1)


class EvaluateConfig(Section):
    """What `jobs/evaluate.py` measures."""

    budgets: tuple[Share, ...] = Field((0.5, 0.6, 0.7, 0.75, 0.85, 0.95, 1.0), min_length=1)
    plans: tuple[Literal["learned", "random", "static", "importance"], ...] = Field(
        ("learned", "random", "static"), min_length=1
    )
    rows: int | None = Field(None, ge=1, description="default: all")
    batch: int = Field(64, ge=1)
    calibration_rows: int = Field(
        512, ge=1, description="rows of the training split that static plans are fitted on"
    )


class AdaLlavaRecipe(BaseRecipe):
    """One AdaLLaVA job, whole."""

    kind: Literal["adallava"] = "adallava"
    model: ModelConfig = ModelConfig()
    adaptive: AdaptiveConfig | None = None
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    zero: ZeroConfig = ZeroConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """See `BaseRecipe.conflicts`."""
        return conflicts(self)

    def with_absolute_paths(self) -> Self:
        """See `BaseRecipe.with_absolute_paths`; `model.source` too, where it is a folder."""
        model = self.model
        if model.source != "scratch" and Path(model.source).is_dir():
            model = model.model_copy(update={"source": str(Path(model.source).absolute())})
        data = self.data.absolute("store", "train", "validation", "image_folder")
        recipe = super().with_absolute_paths()
        return recipe.model_copy(update={"model": model, "data": data})


def conflicts(recipe: AdaLlavaRecipe) -> Iterator[tuple[str, str]]:
    """The clashes of a recipe: (dotted key, what is wrong and what would be right)."""
    model, data, train, zero = recipe.model, recipe.data, recipe.train, recipe.zero
    yield from _scratch_conflicts(model.scratch)
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield "model.attention", "flash_attention_2 needs model.dtype: bfloat16 (or use sdpa)"
    if recipe.adaptive:
        yield from _adaptive_conflicts(recipe, recipe.adaptive)
    elif set(model.freeze) == {"vision", "projector", "language"} and not model.lora:
        yield "model.freeze", "all three parts are frozen and nothing learns; leave one out"
    if data.train and data.shapes:
        yield "data.train", "data.shapes generates the data; set one of the two to null"
    if data.validation and not data.train:
        yield "data.validation", "needs data.train beside it"
    if zero.offload_parameters == "cpu" and zero.stage != 3:
        yield "zero.offload_parameters", f"needs zero.stage: 3, not {zero.stage} (or use none)"
    if zero.offload_optimizer == "cpu" and zero.stage == 0:
        yield "zero.offload_optimizer", "needs zero.stage: 1, 2 or 3, not 0 (or use none)"
    micro = f"micro_batch {train.micro_batch}"
    yield from batch_conflicts(
        recipe.cluster, "train.global_batch", train.global_batch, train.micro_batch, micro
    )
    uri = recipe.tracking.uri
    if uri is not None and not re.match(r"https?://.|sqlite:///.", uri):
        yield (
            "tracking.uri",
            f"should be http(s)://HOST or sqlite:///FILE, not {uri!r} (MLflow 3 has no file store)",
        )
    if recipe.tracking.register_as and not recipe.tracking.enabled:
        yield "tracking.register_as", "the model registry needs tracking.enabled: true"


def _scratch_conflicts(scratch: ScratchConfig) -> Iterator[tuple[str, str]]:
    kv_heads = scratch.kv_heads or scratch.heads
    if scratch.heads % kv_heads:
        yield (
            "model.scratch.kv_heads",
            f"should divide heads ({scratch.heads}); {kv_heads} does not",
        )
    # Rotary embeddings turn pairs of channels: a head needs an even number of them.
    if scratch.hidden % (2 * scratch.heads):
        yield (
            "model.scratch.hidden",
            f"{scratch.hidden} should be a multiple of 2 x heads = {2 * scratch.heads}",
        )
    if scratch.vision_hidden % scratch.vision_heads:
        yield (
            "model.scratch.vision_hidden",
            f"{scratch.vision_hidden} should be a multiple of vision_heads ="
            f" {scratch.vision_heads}",
        )
    if scratch.image_size % scratch.patch_size:
        yield (
            "model.scratch.image_size",
            f"{scratch.image_size} should be a multiple of patch_size = {scratch.patch_size}",
        )


def _adaptive_conflicts(
    recipe: AdaLlavaRecipe, adaptive: AdaptiveConfig
) -> Iterator[tuple[str, str]]:
    if adaptive.latency_token == "probe" and recipe.model.attention == "flash_attention_2":
        yield (
            "adaptive.latency_token",
            "probe needs an attention mask of its own: use model.attention: sdpa, or inline",
        )
    if recipe.model.source != "scratch":
        return
    layers = recipe.model.scratch.layers
    first = adaptive.first or layers // 2
    if first >= layers:
        yield (
            "adaptive.first",
            f"{first} leaves no layer to switch; at most {layers - 1} for {layers} layers",
        )
    # The layers before `first` always run, and the output head beside them: no plan costs less.
    elif adaptive.min_budget is not None and adaptive.min_budget < first / layers:
        yield (
            "adaptive.min_budget",
            f"{adaptive.min_budget} is below what the first {first} of {layers} layers cost; at"
            f" least {first / layers:.3g}, or null",
        )

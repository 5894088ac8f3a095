"""The recipe of an AdaLLaVA job (`kind: adallava`): model, units, data, training, evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from fmray.config.base import BaseRecipe, Location, Section, Share, batch_conflicts

Decay = Annotated[float, Field(ge=0, lt=1)]


class ScratchConfig(Section):
    """Sizes of a small LLaVA with random weights, for `model.source: scratch` (no download)."""

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

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """See `Section.conflicts`."""
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            yield "kv_heads", f"should divide heads ({self.heads}); {kv_heads} does not"
        # Rotary embeddings rotate pairs of channels: a head needs an even number of them.
        if self.hidden % (2 * self.heads):
            yield "hidden", f"{self.hidden} should be a multiple of 2 x heads = {2 * self.heads}"
        if self.vision_hidden % self.vision_heads:
            yield (
                "vision_hidden",
                f"{self.vision_hidden} should be a multiple of vision_heads = {self.vision_heads}",
            )
        if self.image_size % self.patch_size:
            yield (
                "image_size",
                f"{self.image_size} should be a multiple of patch_size = {self.patch_size}",
            )


class LoraConfig(Section):
    """LoRA (peft) on the linear layers of the decoder."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)


class ModelConfig(Section):
    """The base model, how it is loaded and which of its parts train."""

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
    """Units, latency token and scheduler; null trains the base model without them."""

    design: Literal["layers", "heads"] = "layers"
    first: int | None = Field(None, ge=1, description="first switchable layer; default: half")
    unit: int = Field(8, ge=1, description="heads per unit, design `heads`")
    latency_token: Literal["inline", "probe"] = "inline"
    scheduler: Literal["learned", "static", "random", "deterministic"] = "learned"
    tau: float = Field(5.0, gt=0, description="temperature of the Gumbel-softmax")
    penalty: float = Field(1.0, ge=0, description="lambda of the deterministic baseline")
    min_budget: float | None = Field(
        None, gt=0, le=1, description="smallest training budget; default: the smallest possible"
    )


class ShapesConfig(Section):
    """A generated set of visual questions, in LLaVA's format."""

    pictures: int = Field(20_000, ge=1)
    validation_pictures: int = Field(500, ge=1)
    grid: int = Field(2, ge=2, le=4, description="cells per side")
    image_size: int = Field(32, ge=16)
    turns: int = Field(4, ge=1, le=16, description="questions per image")
    two_hop: float = Field(0.4, ge=0, le=1, description="share of questions that need two look-ups")
    relations: int = Field(
        3,
        ge=1,
        le=3,
        description="kinds of relation: beside, vertical, opposite (larger grids: right, below)",
    )
    colors: int = Field(4, ge=2, le=8)
    shapes: int = Field(3, ge=2, le=6)
    empty: float = Field(0.0, ge=0, lt=1, description="share of empty cells")
    jitter: int = Field(
        2, ge=0, description="largest offset of a shape from its cell's centre, in pixels"
    )


class DataConfig(Section):
    """Instruction data: LLaVA JSON or JSONL (or generated shapes) -> Parquet store -> batches."""

    store: Location = Field(
        Path("runs/store"), description="Parquet store; visible from every node"
    )
    train: Location | None = Field(None, description="LLaVA JSON or JSONL file")
    validation: Location | None = Field(None, description="LLaVA JSON or JSONL file")
    validation_share: float = Field(
        0.05, gt=0, lt=1, description="held out by id if there is no validation file"
    )
    image_folder: Location | None = None
    shapes: ShapesConfig | None = Field(None, description="generate the data instead of reading it")
    on_bad_row: Literal["error", "skip"] = "error"
    check_images: Literal["stat", "hash"] = Field(
        "stat",
        description="how prepare_data notices replaced images: by size and time, or by content, "
        "which reads all of them",
    )
    rows_per_shard: int = Field(1024, ge=1)
    max_length: int = Field(
        2048,
        ge=8,
        description="tokens, in training and evaluation; answers that end later are left out, and"
        " a row whose first answer does is a bad row",
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
        100_000, ge=0, description="stage 3: smaller parameters are not sharded"
    )


class TrainConfig(Section):
    """Optimization, evaluation during training, and checkpoints."""

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
    eval_rows: int = Field(
        512, ge=1, description="first rows (conversations) of the validation split"
    )
    eval_budgets: tuple[Share, ...] = Field((0.5, 0.75, 1.0), min_length=1)
    checkpoint_every: int | None = Field(None, ge=1, description="steps; default: at the end only")
    keep_checkpoints: int = Field(2, ge=1)
    skip_nonfinite: int = Field(
        0,
        ge=0,
        description="steps of the run that may have a loss or gradient that is not finite: they"
        " change no weight; one more stops the run",
    )


class EvaluateConfig(Section):
    """Budgets and plans that `jobs/evaluate.py` measures."""

    budgets: tuple[Share, ...] = Field((0.5, 0.6, 0.7, 0.75, 0.85, 0.95, 1.0), min_length=1)
    plans: tuple[Literal["learned", "random", "static", "importance"], ...] = Field(
        ("learned", "random", "static"), min_length=1
    )
    rows: int | None = Field(
        None, ge=1, description="first rows (conversations) of the validation split; default: all"
    )
    batch: int = Field(64, ge=1, description="samples")
    calibration_rows: int = Field(
        512, ge=1, description="training rows that static plans are fitted on"
    )


class AdaLlavaRecipe(BaseRecipe):
    """One AdaLLaVA job: prepare_data, train and evaluate read the same recipe."""

    kind: Literal["adallava"] = "adallava"
    model: ModelConfig = ModelConfig()
    adaptive: AdaptiveConfig | None = None
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    zero: ZeroConfig = ZeroConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """See `Section.conflicts`."""
        model, data, train, zero = self.model, self.data, self.train, self.zero
        if model.attention == "flash_attention_2" and model.dtype == "float32":
            yield "model.attention", "flash_attention_2 needs model.dtype: bfloat16 (or use sdpa)"
        if self.adaptive:
            yield from self._adaptive_conflicts(self.adaptive)
        elif set(model.freeze) == {"vision", "projector", "language"} and not model.lora:
            yield "model.freeze", "all three parts are frozen and nothing trains; leave one out"
        if data.train and data.shapes:
            yield "data.train", "data.shapes generates the data; set one of the two to null"
        if data.validation and not data.train:
            yield "data.validation", "needs data.train too"
        if zero.offload_parameters == "cpu" and zero.stage != 3:
            yield "zero.offload_parameters", f"needs zero.stage: 3, not {zero.stage} (or use none)"
        if zero.offload_optimizer == "cpu" and zero.stage == 0:
            yield "zero.offload_optimizer", "needs zero.stage: 1, 2 or 3, not 0 (or use none)"
        micro = f"micro_batch {train.micro_batch}"
        yield from batch_conflicts(
            self.cluster, "train.global_batch", train.global_batch, train.micro_batch, micro
        )
        yield from super().conflicts()

    def _adaptive_conflicts(self, adaptive: AdaptiveConfig) -> Iterator[tuple[str, str]]:
        if adaptive.latency_token == "probe" and self.model.attention == "flash_attention_2":
            yield (
                "adaptive.latency_token",
                "probe needs its own attention mask: use model.attention: sdpa, or inline",
            )
        if self.model.source != "scratch":
            return
        layers = self.model.scratch.layers
        first = adaptive.first or layers // 2
        if first >= layers:
            yield (
                "adaptive.first",
                f"{first} leaves no switchable layer; at most {layers - 1} for {layers} layers",
            )
        # The layers before `first` and the output head always run: no plan costs less.
        elif adaptive.min_budget is not None and adaptive.min_budget < first / layers:
            yield (
                "adaptive.min_budget",
                f"{adaptive.min_budget} is below the cost of the first {first} of {layers} layers;"
                f" use at least {first / layers:.3g}, or null",
            )

    def with_absolute_paths(self) -> Self:
        """See `BaseRecipe.with_absolute_paths`; includes a `model.source` that is a folder."""
        model = self.model
        if model.source != "scratch" and Path(model.source).is_dir():
            model = model.model_copy(update={"source": str(Path(model.source).absolute())})
        data = self.data.absolute("store", "train", "validation", "image_folder")
        recipe = super().with_absolute_paths()
        return recipe.model_copy(update={"model": model, "data": data})

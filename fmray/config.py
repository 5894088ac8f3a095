"""Every setting of fmray: typed models, and one way to load them.

In: a YAML recipe (with at most one `extends:` parent) and dotted `--set` overrides. Out: a
`Recipe`, the origin of each value and a resolved dump. A user's mistake is a `ConfigError` of one
line. How files are read is in `recipe_file.py`, which settings clash in `recipe_checks.py`, the
command line in `job_arguments.py` and `config_command.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypeVar

from fmray.recipe_checks import check_mirror, conflicts
from fmray.recipe_file import ConfigError, Entry, dump_value, explain, read

__all__ = [
    "ConfigError",
    "Job",
    "LoadedRecipe",
    "Recipe",
    "Section",
    "load",
]

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Location = Annotated[Path, AfterValidator(Path.expanduser)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]


def _number_or_range(value: Any) -> Any:
    """Pydantic would name the members of the union, not what is right."""
    match value:
        case [fewest, most] if type(fewest) is type(most) is int and 1 <= fewest <= most:
            return fewest, most
        case _ if type(value) is int and value >= 0:
            return value
    raise PydanticCustomError(
        "workers", "should be a number such as 2, or [fewest, most] such as [2, 4]"
    )


Workers = Annotated[int | tuple[int, int], BeforeValidator(_number_or_range)]


MirrorUri = Annotated[str, AfterValidator(check_mirror)]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values are not changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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


class ClusterConfig(Section):
    """Where it runs: Ray address, workers and what each of them gets."""

    address: str | None = Field(
        None, description="Ray address; default: RAY_ADDRESS, a running one, or a new one"
    )
    storage: Location = Field(
        Path("runs"),
        description="checkpoints and results; visible from every node, or with `mirror` each node's"
        " own",
    )
    mirror: MirrorUri | None = Field(
        None,
        description="where checkpoints and the model are copied, and fetched from:"
        " s3://BUCKET/PREFIX?endpoint_override=HOST:PORT, or any URI that pyarrow opens",
    )
    workers: Workers = Field(
        1,
        description="0: in this process (Ray Train local mode); [FEWEST, MOST]: as many as there is"
        " room for, changed while it runs as nodes come and go",
    )
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    data_cpus: float = Field(1.0, ge=0, description="CPUs left for Ray Data and the driver")
    gpu_memory_gib: float | None = Field(None, gt=0, description="per GPU, for `fmray doctor`")
    timeout_s: int = Field(
        300, ge=10, description="how long workers may take to be placed, and wait for one another"
    )
    max_failures: int = Field(
        3, ge=0, description="restarts in a row without a new checkpoint; then the job gives up"
    )

    @property
    def fewest_workers(self) -> int:
        """Below this number the job does not run. 0: in this process."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """As many as it takes when there is room. 0: in this process."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def world_sizes(self) -> range:
        """The numbers of ranks that a training may have."""
        return range(max(self.fewest_workers, 1), max(self.most_workers, 1) + 1)


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


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = True
    uri: str | None = Field(
        None, description="default: sqlite in the storage folder; or http(s)://"
    )
    experiment: str = "fmray"
    register_as: str | None = Field(None, description="name in the model registry")


class Job(Section):
    """What the recipes of all kinds of job have."""

    kind: str
    name: str = Field(pattern=NAME)
    seed: int = Field(0, ge=0)
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Settings that clash: (dotted key, what is wrong and what would be right)."""
        yield from ()

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        for key, text in self.conflicts():
            # The key travels in the context, so that the loader can say file and line.
            raise PydanticCustomError("conflict", "{key}: {text}", {"key": key, "text": text})
        return self


class Recipe(Job):
    """One AdaLLaVA job, whole."""

    kind: Literal["adallava"] = "adallava"
    model: ModelConfig = ModelConfig()
    adaptive: AdaptiveConfig | None = None
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    zero: ZeroConfig = ZeroConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """See `recipe_checks`."""
        return conflicts(self)


R = TypeVar("R", bound=Job, default=Recipe)


@dataclass(frozen=True)
class LoadedRecipe(Generic[R]):
    """A recipe and where each value came from: dotted key -> `file:line`, `--set` or `default`."""

    recipe: R
    origins: dict[str, str]

    @property
    def hash(self) -> str:
        """12 hex digits that change with any resolved value."""
        values = json.dumps(self.recipe.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()[:12]

    def dump(self) -> str:
        """All values as YAML that loads again, each with its origin as a comment."""
        return "\n".join(self._lines(self.recipe.model_dump(mode="json"), "")) + "\n"

    def _lines(self, values: dict[str, Any], prefix: str) -> Iterator[str]:
        indent = "  " * prefix.count(".")
        for name, value in values.items():
            if isinstance(value, dict) and value:
                yield f"{indent}{name}:"
                yield from self._lines(value, f"{prefix}{name}.")
            else:
                yield f"{indent}{name}: {dump_value(value)}  # {self.origins[prefix + name]}"


def load(
    path: Path, overrides: Sequence[str] = (), kinds: Sequence[type[R]] = (Recipe,)
) -> LoadedRecipe[R]:
    """Read a recipe, its parents and the overrides (`train.lr=1e-5`) on top.

    Args:
        kinds: the kinds of recipe that will do; the file's `kind` says which it is, and a file that
            does not say is of the first.

    Raises:
        ConfigError: one line: file:line, the key, what is wrong and what would be right.
    """
    path = Path(path)
    tree = read(path, overrides)
    model = _kind(tree, path, kinds)
    try:
        # JSON's strict mode is the useful one: `true` is no number and "5" is text, yet a list may
        # fill a tuple.
        recipe = model.model_validate_json(json.dumps(tree.plain()), strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, tree, path, model)) from error
    return LoadedRecipe(recipe, dict(_origins(recipe.model_dump(mode="json"), tree, "")))


def _kind(tree: Entry, path: Path, kinds: Sequence[type[R]]) -> type[R]:
    written = tree.value.get("kind") if isinstance(tree.value, dict) else None
    if written is None:
        return kinds[0]
    known = {kind.model_fields["kind"].default: kind for kind in kinds}
    if written.value not in known:
        right = " or ".join(f"kind: {name}" for name in known)
        raise ConfigError(
            f"{written.origin}: kind: this needs a recipe of {right}, not of {written.value!r}"
        )
    return known[written.value]


def _origins(values: dict[str, Any], tree: Entry | None, prefix: str) -> Iterator[tuple[str, str]]:
    written = tree.value if tree and isinstance(tree.value, dict) else {}
    for name, value in values.items():
        entry = written.get(name)
        if isinstance(value, dict) and value:
            yield from _origins(value, entry, f"{prefix}{name}.")
        else:
            yield prefix + name, entry.origin if entry else "default"

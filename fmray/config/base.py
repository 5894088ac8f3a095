"""What the recipes of every kind of job share: section base class, cluster, tracking, checks.

Used by the modules that define one kind of recipe each. Loading is in `recipes.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Location = Annotated[Path, AfterValidator(Path.expanduser)]
Share = Annotated[float, Field(gt=0, le=1)]


S3_OPTIONS = {"endpoint_override", "region", "scheme"}


def check_mirror(value: str) -> str:
    """The URI, if it is one of a store and holds no credentials."""
    parts = urlsplit(value)
    secret = parts.password or (parts.scheme == "s3" and parts.username)
    if secret or re.search("key|secret|token", parts.query, re.IGNORECASE):
        text = (
            "credentials do not belong in a recipe: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            " on the nodes, or use the instance's role"
        )
        # as a clash of settings is said: without the value
        context = {"key": "cluster.mirror", "text": text}
        raise PydanticCustomError("conflict", "{key}: {text}", context)
    if parts.scheme == "s3":
        unknown = [name for name, _ in parse_qsl(parts.query) if name not in S3_OPTIONS]
        if parts.netloc and not unknown:
            return value
    elif parts.scheme or value.startswith("/"):
        return value
    raise PydanticCustomError(
        "mirror",
        "should be s3://BUCKET/PREFIX, with ?region=, endpoint_override= or scheme=;"
        " another URI that pyarrow opens; or an absolute path",
    )


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

    def absolute(self, *names: str) -> Self:
        """A copy in which the paths `names` (None stays None) are absolute."""
        paths = {name: getattr(self, name) for name in names}
        return self.model_copy(
            update={name: path.absolute() for name, path in paths.items() if path is not None}
        )


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


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = True
    uri: str | None = Field(
        None, description="default: sqlite in the storage folder; or http(s)://"
    )
    experiment: str = "fmray"
    register_as: str | None = Field(None, description="name in the model registry")


class BaseRecipe(Section):
    """What the recipes of all kinds of job have."""

    kind: str
    name: str = Field(pattern=NAME)
    seed: int = Field(0, ge=0)
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Settings that clash: (dotted key, what is wrong and what would be right)."""
        yield from ()

    def with_absolute_paths(self) -> Self:
        """A copy with absolute paths: workers run in another directory."""
        return self.model_copy(update={"cluster": self.cluster.absolute("storage")})

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        for key, text in self.conflicts():
            # The key travels in the context, so that the loader can say file and line.
            raise PydanticCustomError("conflict", "{key}: {text}", {"key": key, "text": text})
        return self


def batch_conflicts(
    cluster: ClusterConfig, key: str, batch: int, unit: int, unit_name: str
) -> Iterator[tuple[str, str]]:
    """Whether a step's `batch` divides into whole passes of `unit`, or, where the number of workers
    changes, whether there is something for each; some passes are then not full."""
    most = cluster.world_sizes[-1]
    if len(cluster.world_sizes) > 1:
        if batch < most:
            yield key, f"{batch} leaves nothing for some of {most} workers; {most} or more would do"
        return
    step = most * unit
    if batch % step:
        right = " or ".join(str(n * step) for n in (batch // step, -(-batch // step)) if n)
        yield (
            key,
            f"{batch} is not a multiple of {most} workers x {unit_name} = {step};"
            f" {right} would be right",
        )

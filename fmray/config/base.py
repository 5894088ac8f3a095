"""The parts that recipes of every kind share: base classes, cluster, tracking and their checks.

One module per kind of recipe builds on it; loading is in `recipes.py`.
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
    """Return the URI if it names a store and holds no credentials."""
    parts = urlsplit(value)
    secret = parts.password or (parts.scheme == "s3" and parts.username)
    if secret or re.search("key|secret|token", parts.query, re.IGNORECASE):
        # An error of this type is reported without the value.
        raise PydanticCustomError(
            "credentials",
            "credentials do not belong in a recipe: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            " on the nodes, or use the instance's role",
        )
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
    """Check a number or a range; Pydantic's message would list the members of the union."""
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
    """Base class of all sections: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield settings that contradict each other: (dotted key, what is wrong and what is right).

        Keys are relative to the section.
        """
        yield from ()

    def absolute(self, *names: str) -> Self:
        """Return a copy in which the paths `names` are absolute; None stays None."""
        paths = {name: getattr(self, name) for name in names}
        return self.model_copy(
            update={name: path.absolute() for name, path in paths.items() if path is not None}
        )

    @model_validator(mode="after")
    def _no_conflicts(self) -> Self:
        for key, text in self.conflicts():
            # The key is in the context: `yaml_file.explain` finds its file and line.
            raise PydanticCustomError("conflict", "{key}: {text}", {"key": key, "text": text})
        return self


class ClusterConfig(Section):
    """Where the job runs: Ray address, workers and their resources."""

    address: str | None = Field(
        None, description="Ray address; default: RAY_ADDRESS, a running one, or a new one"
    )
    storage: Location = Field(
        Path("runs"),
        description="checkpoints and results; visible from every node, or with `mirror` a folder of"
        " each node",
    )
    mirror: MirrorUri | None = Field(
        None,
        description="store for copies of checkpoints and the model:"
        " s3://BUCKET/PREFIX?endpoint_override=HOST:PORT, or any URI that pyarrow opens",
    )
    workers: Workers = Field(
        1,
        description="0: in this process (Ray Train local mode); [FEWEST, MOST]: as many as fit,"
        " adjusted during the run as nodes join and leave",
    )
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    data_cpus: float = Field(1.0, ge=0, description="CPUs left for Ray Data and the driver")
    gpu_memory_gib: float | None = Field(None, gt=0, description="per GPU, for `fmray doctor`")
    timeout_s: int = Field(
        300, ge=10, description="limit for placing the workers, and for waits between them"
    )
    max_failures: int = Field(
        3, ge=0, description="restarts in a row without a new checkpoint before the job gives up"
    )

    @property
    def fewest_workers(self) -> int:
        """The smallest number of workers that the job runs with; 0: in this process."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """The largest number of workers that the job uses; 0: in this process."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def world_sizes(self) -> range:
        """The numbers of ranks that a training run may have."""
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
    """The settings and checks of every kind of recipe."""

    kind: str
    name: str = Field(pattern=NAME)
    seed: int = Field(0, ge=0)
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """See `Section.conflicts`; subclasses add their own."""
        uri = self.tracking.uri
        if uri is not None and not re.match(r"https?://.|sqlite:///.", uri):
            yield (
                "tracking.uri",
                f"should be http(s)://HOST or sqlite:///FILE, not {uri!r} (MLflow 3 has no file"
                " store)",
            )
        if self.tracking.register_as and not self.tracking.enabled:
            yield "tracking.register_as", "the model registry needs tracking.enabled: true"

    def with_absolute_paths(self) -> Self:
        """Return a copy with absolute paths: workers run in another directory."""
        return self.model_copy(update={"cluster": self.cluster.absolute("storage")})


def batch_conflicts(
    cluster: ClusterConfig, key: str, batch: int, unit: int, unit_name: str
) -> Iterator[tuple[str, str]]:
    """Yield a conflict if a step's batch does not divide over the workers.

    With a fixed number of workers each of them does full passes. If the number may change, passes
    may be partial, but each worker needs at least one sample.

    Args:
        key: of the batch in the recipe.
        unit: samples per worker and pass, which the message calls `unit_name`.
    """
    most = cluster.world_sizes[-1]
    if len(cluster.world_sizes) > 1:
        if batch < most:
            yield key, f"{batch} leaves nothing for some of {most} workers; use {most} or more"
        return
    step = most * unit
    if batch % step:
        multiples = " or ".join(str(n * step) for n in (batch // step, -(-batch // step)) if n)
        yield (
            key,
            f"{batch} is not a multiple of {most} workers x {unit_name} = {step}; use {multiples}",
        )

"""The settings of the endpoint: one typed, flat model.

They come from `args:` of a Serve config file, `key=value` words of `serve run`, or the options of
`fmray serve`. The model is flat because `serve run` passes flat words; it passes them as text,
which Pydantic converts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from fmray.adallava.cost import exact_number
from fmray.config.base import Location, Section
from fmray.config.yaml_file import unknown_key

REGISTRY = "models:/"
ALIAS = "@production"


def _budget(text: str) -> str:
    if not 0 < exact_number(text, "budget") <= 1:
        raise ValueError(f"{text!r} is no budget; write a number in (0, 1]")
    return text


def _as_text(value: Any) -> Any:
    """Return a number's decimal text; budgets are exact decimals, not floats."""
    return str(value) if type(value) in (int, float) else value


BudgetText = Annotated[str, BeforeValidator(_as_text), AfterValidator(_budget)]


def _host_names(value: Any) -> Any:
    """Return comma-separated names as a list: `serve run` passes words."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


HostNames = Annotated[
    tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")], ...],
    BeforeValidator(_host_names),
]


class ServeConfig(Section):
    """The model, its replicas and engine, and the limits on requests."""

    model: str = Field(
        min_length=1,
        description="directory of an adaptive model, or models:/NAME@production (MLflow)",
    )
    name: str | None = Field(
        None,
        pattern=r"^[\w][\w./:@-]*$",
        max_length=128,
        description="the model's name for clients; default: its name in the registry or its folder",
    )
    release: str | None = Field(
        None,
        description="any text; another one makes `serve deploy` rebuild the application and so take"
        " the current production version (Serve ignores a config that did not change)",
    )
    storage: Location = Field(
        Path("runs"), description="folder of the registry's sqlite file and of fetched models"
    )
    tracking_uri: str | None = Field(None, description="MLflow server; default: sqlite in storage")
    keys_file: Location | None = Field(
        None, description="YAML file of bearer keys; default: FMRAY_API_KEYS, or no keys"
    )
    require_keys: bool = Field(
        False, description="do not start without keys; set if the builder found some"
    )

    # --- Replicas ---
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float | None = Field(
        None, gt=0, description="autoscaling target, requests per replica; default: max_rows"
    )
    max_ongoing_requests: int | None = Field(
        None,
        ge=1,
        description="per replica; default: max_rows + max_queue, so that requests wait in the "
        "engine's queue, which is fair and knows their deadlines",
    )
    max_queued_requests: int = Field(
        256, ge=-1, description="requests waiting at each proxy beyond that; then Ray Serve refuses"
    )
    surge_percent: int = Field(
        25,
        ge=0,
        le=100,
        description="extra replicas during an update, at least one, so that the old ones serve "
        "until the new ones are ready; 0 if there is no room for one more",
    )
    cpus: float = Field(1.0, ge=0, description="CPUs of each replica, for placement")
    gpus: float = Field(0.0, ge=0)
    threads: int | None = Field(None, ge=1, description="torch threads; default: torch's own")
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str | None = Field(None, description="default: cuda if there is a GPU, else cpu")

    # --- Engine ---
    max_rows: int = Field(8, ge=1, description="requests in the running batch")
    kv_mib: int = Field(1024, ge=1, description="limit on keys and values")
    vision_mib: int = Field(256, ge=0, description="limit on cached image features")
    prefix_mib: int = Field(256, ge=0, description="limit on cached prompt prefixes")
    calibration: Location | None = Field(
        None, description="JSON of the cost-to-time model; measured at start-up if missing"
    )
    calibration_s: float = Field(20.0, gt=0, description="duration of that measurement")
    auto: bool = Field(True, description="lower budgets under load; false: `auto` is budget 1")
    floor: BudgetText = Field("0.5", description="smallest budget that `auto` uses")
    p95_ms: float = Field(
        2000.0, gt=0, description="the 95th percentile of latency that `auto` keeps"
    )
    p95_of: Literal["first_token", "answer"] = "first_token"
    max_queue: int = Field(256, ge=1, description="requests waiting in the engine; then 429")

    # --- Requests ---
    max_new_tokens: int = Field(128, ge=1, description="for requests without max_tokens")
    max_output_tokens: int = Field(1024, ge=1, description="upper limit of a request's max_tokens")
    request_timeout_s: float = Field(120.0, gt=0, description="from first to last byte")
    read_timeout_s: float = Field(30.0, gt=0, description="limit for reading a request's body")
    allowed_hosts: HostNames = Field(
        (),
        description="names in the Host header that a server without keys accepts besides addresses "
        "and localhost, such as that of a proxy in front; a list or comma-separated",
    )
    max_body_mib: int = Field(16, ge=1, le=1024)
    max_bodies_mib: int = Field(
        256, ge=1, description="all bodies being read or waiting to be decoded; then 503"
    )
    max_caller_bodies_mib: int | None = Field(
        None,
        ge=1,
        description="those of one key, or of one address without keys; then 429; default: a quarter"
        " of max_bodies_mib, at least max_body_mib",
    )
    max_messages: int = Field(128, ge=1)
    max_characters: int = Field(65_536, ge=1, description="text of all messages together")
    max_images: int = Field(8, ge=0)
    max_pixels: int = Field(16_000_000, ge=1, description="all images of a request together")
    image_processes: int = Field(
        3, ge=1, description="that decode images; one caller uses all but one of them"
    )
    image_timeout_s: float | None = Field(
        None,
        gt=0,
        description="for decoding the images of a request; default: 10, at most half of "
        "health_timeout_s",
    )
    image_memory_mib: int | None = Field(
        None,
        ge=256,
        description="address space of each of these processes; default: 512 and 64 bytes for each "
        "of max_pixels",
    )

    # --- Life cycle ---
    drain_s: float = Field(30.0, ge=0, description="time for running answers to finish at shutdown")
    health_period_s: float = Field(10.0, gt=0)
    health_timeout_s: float = Field(30.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _unknown_keys(cls, values: Any) -> Any:
        """Name the nearest key here: Ray Serve builds the settings, and shows Pydantic's text."""
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                context = {"key": str(key), "text": unknown_key([str(key)], cls)}
                raise PydanticCustomError("conflict", "{key}: {text}", context)
        return values

    @field_validator("model")
    @classmethod
    def _model(cls, value: str) -> str:
        if value.startswith(REGISTRY) and (
            not value.endswith(ALIAS) or len(value) == len(REGISTRY + ALIAS)
        ):
            raise ValueError(f"{value!r}: write {REGISTRY}NAME{ALIAS} for a model of the registry")
        return value

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """See `Section.conflicts`."""
        for larger, smaller in (
            ("max_replicas", "min_replicas"),
            ("max_output_tokens", "max_new_tokens"),
            ("max_bodies_mib", "max_body_mib"),
            ("max_caller_bodies_mib", "max_body_mib"),
        ):
            limit, value = getattr(self, larger), getattr(self, smaller)
            if limit is not None and limit < value:
                yield larger, f"{limit} is smaller than {smaller} ({value})"
        if 2 * self.image_seconds > self.health_timeout_s:
            yield (
                "image_timeout_s",
                f"{self.image_seconds:g} is more than half of health_timeout_s "
                f"({self.health_timeout_s:g}), and health checks wait for an image",
            )

    @property
    def image_seconds(self) -> float:
        """`image_timeout_s` or its default."""
        return self.image_timeout_s or min(10.0, self.health_timeout_s / 2)

    @property
    def image_memory(self) -> int:
        """`image_memory_mib` or its default."""
        return self.image_memory_mib or 512 + 64 * self.max_pixels // 2**20

    @property
    def caller_bodies_mib(self) -> int:
        """`max_caller_bodies_mib` or its default."""
        return self.max_caller_bodies_mib or max(self.max_bodies_mib // 4, self.max_body_mib)

    @property
    def registered_name(self) -> str | None:
        """NAME of models:/NAME@production; None for a directory."""
        if self.model.startswith(REGISTRY):
            return self.model.removeprefix(REGISTRY).removesuffix(ALIAS)
        return None

    @property
    def public_name(self) -> str:
        """The model's name for clients."""
        return self.name or self.registered_name or Path(self.model).resolve().name

"""Every setting of the endpoint: one typed, flat model.

In: `args:` of a Serve config file, `key=value` words of `serve run`, or the options of `fmray
serve`. Out: a `ServeConfig`. It is flat because `serve run` passes flat words, which also arrive as
text and are converted here.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from fmray.adallava.cost import exact_number
from fmray.config.base import Location, Section

REGISTRY = "models:/"
ALIAS = "@production"


def _budget(text: str) -> str:
    if not 0 < exact_number(text, "budget") <= 1:
        raise ValueError(f"{text!r} is no budget; a number in (0, 1] is")
    return text


BudgetText = Annotated[str, AfterValidator(_budget)]


class ServeConfig(Section):
    """What is served, how many requests at once, and what is refused."""

    model: str = Field(
        min_length=1,
        description="directory of an adaptive model, or models:/NAME@production (MLflow)",
    )
    name: str | None = Field(
        None,
        pattern=r"^[\w][\w./:@-]*$",
        max_length=128,
        description="what clients call the model; default: its name in the registry or its folder",
    )
    release: str | None = Field(
        None,
        description="any text: with another one, `serve deploy` builds the application again and so"
        " takes the version in production by then; Serve leaves one alone that did not change",
    )
    storage: Location = Field(
        Path("runs"), description="where the registry's sqlite file and fetched models are"
    )
    tracking_uri: str | None = Field(None, description="MLflow server; default: sqlite in storage")
    keys_file: Location | None = Field(
        None, description="YAML file of bearer keys; default: FMRAY_API_KEYS, or no keys at all"
    )
    require_keys: bool = Field(
        False, description="do not start without keys; set where the builder saw some"
    )

    # -- replicas ----------------------------------------------------------------------------
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float | None = Field(
        None, gt=0, description="autoscaling: requests a replica should have; default: max_rows"
    )
    max_ongoing_requests: int | None = Field(
        None,
        ge=1,
        description="a replica; default: max_rows + max_queue, so that all waiting is done in the "
        "engine's own queue, which is fair and knows of deadlines",
    )
    max_queued_requests: int = Field(
        256, ge=-1, description="waiting at each proxy beyond that; then Ray Serve refuses"
    )
    surge_percent: int = Field(
        25,
        ge=0,
        le=100,
        description="extra replicas during an update, at least one, so that the old ones serve "
        "until the new ones are ready; 0 where there is no room for one more",
    )
    cpus: float = Field(1.0, ge=0, description="of each replica, for placement")
    gpus: float = Field(0.0, ge=0)
    threads: int | None = Field(None, ge=1, description="torch threads; default: torch's own")
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str | None = Field(None, description="default: cuda where there is a GPU, else cpu")

    # -- engine ------------------------------------------------------------------------------
    max_rows: int = Field(8, ge=1, description="requests in the running batch")
    kv_mib: int = Field(1024, ge=1, description="bound on keys and values")
    vision_mib: int = Field(256, ge=0, description="bound on cached picture features")
    prefix_mib: int = Field(256, ge=0, description="bound on reused prompt beginnings")
    calibration: Location | None = Field(
        None, description="JSON of the cost-to-time model; made at start-up where it is not there"
    )
    calibration_s: float = Field(20.0, gt=0, description="time that measuring the machine takes")
    auto: bool = Field(True, description="lower budgets under load; false: `auto` is budget 1")
    floor: BudgetText = Field("0.5", description="smallest budget that `auto` goes down to")
    p95_ms: float = Field(2000.0, gt=0, description="the 95th percentile that `auto` holds")
    p95_of: Literal["first_token", "answer"] = "first_token"
    max_queue: int = Field(256, ge=1, description="requests waiting in the engine; then 429")

    # -- requests ----------------------------------------------------------------------------
    max_new_tokens: int = Field(128, ge=1, description="where a request does not say max_tokens")
    max_output_tokens: int = Field(1024, ge=1, description="the most a request may ask for")
    request_timeout_s: float = Field(120.0, gt=0, description="from the first byte to the last")
    read_timeout_s: float = Field(30.0, gt=0, description="for a request's body to arrive")
    max_body_mib: int = Field(16, ge=1, le=1024)
    max_bodies_mib: int = Field(
        256, ge=1, description="bodies that are read or wait to be decoded, together; then 503"
    )
    max_messages: int = Field(128, ge=1)
    max_characters: int = Field(65_536, ge=1, description="text of all messages")
    max_images: int = Field(8, ge=0)
    max_pixels: int = Field(16_000_000, ge=1, description="of all pictures of a request")

    # -- life --------------------------------------------------------------------------------
    drain_s: float = Field(30.0, ge=0, description="running answers may finish for so long")
    health_period_s: float = Field(10.0, gt=0)
    health_timeout_s: float = Field(30.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _unknown_names(cls, values: Any) -> Any:
        """An unknown setting is an error that names the nearest one."""
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                    hint = f"; did you mean {near[0]}?" if near else ""
                    raise ValueError(f"{key}: there is no such setting{hint}")
        return values

    @field_validator("model")
    @classmethod
    def _model(cls, value: str) -> str:
        if value.startswith(REGISTRY) and (
            not value.endswith(ALIAS) or len(value) == len(REGISTRY + ALIAS)
        ):
            raise ValueError(f"{value!r}: of the registry, {REGISTRY}NAME{ALIAS} is served")
        return value

    @model_validator(mode="after")
    def _agree(self) -> ServeConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas is smaller than min_replicas")
        if self.max_output_tokens < self.max_new_tokens:
            raise ValueError("max_output_tokens is smaller than max_new_tokens")
        if self.max_bodies_mib < self.max_body_mib:
            raise ValueError("max_bodies_mib is smaller than max_body_mib")
        return self

    @property
    def registered_name(self) -> str | None:
        """NAME of models:/NAME@production, or None for a directory."""
        if self.model.startswith(REGISTRY):
            return self.model.removeprefix(REGISTRY).removesuffix(ALIAS)
        return None

    @property
    def public_name(self) -> str:
        """What clients call the model."""
        return self.name or self.registered_name or Path(self.model).resolve().name

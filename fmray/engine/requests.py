"""Input and output types of the engine.

Frozen values that validate themselves on construction, so that the engine can run any `Request`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length", "cancelled", "error"]

#: the point in an answer that a deadline, a p95 target or a prediction refers to
Milestone = Literal["first_token", "answer"]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_input_ids(inputs: dict[str, Tensor]) -> None:
    """Check that `inputs` contains one prompt, input_ids [1, n].

    Raises:
        ValueError: input_ids is missing, or has another shape.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
        shape = list(ids.shape) if isinstance(ids, Tensor) else ids
        raise ValueError(f"input_ids must be [1, n], one row of at least one token; got {shape}")


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one answer.

    A sampled answer depends on the seed and the request alone, not on the other rows of the batch.

    Raises:
        ValueError: a parameter is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0  #: 0: greedy
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()  #: strings that end the answer and are not part of it

    def __post_init__(self) -> None:
        if not _is_integer(self.max_new_tokens) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be an integer >= 1, not {self.max_new_tokens!r}")
        if not _is_finite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature must be a number >= 0, not {self.temperature!r}")
        if not _is_finite(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be a number in (0, 1], not {self.top_p!r}")
        if not _is_integer(self.seed) or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be a 64-bit integer, not {self.seed!r}")
        if not isinstance(self.stop, tuple) or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise ValueError(f"stop must be a tuple of non-empty strings, not {self.stop!r}")


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt with its compute and its sampling parameters, ready for the model.

    Raises:
        ValueError: the inputs are not one unpadded row, or the plan does not fit `units_on`.
    """

    id: str
    #: one unpadded row from the processor: input_ids [1, n], pixel_values, image_grid_thw, ...
    inputs: dict[str, Tensor]
    #: content hash of the images and their preprocessing; None: no image, or do not cache it
    image_key: str | None
    units_on: int  #: at most so many units on (from `AdaptiveVLM.units_for`)
    plan: Tensor | None = None  #: bool [K]; None: the scheduler decides
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        check_input_ids(self.inputs)
        mask = self.inputs.get("attention_mask")
        if mask is not None and not bool(mask.bool().all()):
            raise ValueError("attention_mask has zeros; a request must be one unpadded row")
        if not _is_integer(self.units_on) or self.units_on < 0:
            raise ValueError(f"units_on must be an integer >= 0, not {self.units_on!r}")
        if self.plan is None:
            return
        if self.plan.dim() != 1 or self.plan.dtype != torch.bool:
            raise ValueError("plan must be a bool tensor [K]")
        if int(self.plan.sum()) > self.units_on:
            raise ValueError(
                f"the plan has {int(self.plan.sum())} units on; the request allows {self.units_on}"
            )

    @property
    def prompt_tokens(self) -> int:
        """Prompt length, with image tokens and without the latency token."""
        return self.inputs["input_ids"].shape[1]


@dataclass(frozen=True)
class Result:
    """Summary of a finished request."""

    prompt_tokens: int  #: image tokens included
    completion_tokens: int  #: tokens of all its events; an end token does not count
    units_on: int  #: of the plan that ran; 0 if the request ended before its prefill
    plan: tuple[bool, ...]  #: empty if the request ended before its prefill
    share: float  #: of the decoder layers' operations on the prompt (`CostModel.share`)
    prefill_seconds: float
    seconds: float  #: from `Engine.start` to the end
    vision_hit: bool  #: the image features were cached
    prefix_tokens: int  #: prompt tokens whose lower keys and values were cached


@dataclass(frozen=True)
class Event:
    """Output of one step for one request."""

    request: str
    tokens: tuple[int, ...]  #: new token ids, without the end token
    #: text that is final: complete characters that cannot become part of a stop string
    text: str
    finished: FinishReason | None = None  #: only in the last event
    result: Result | None = None  #: only in the last event
    error: str | None = None  #: only with finished == "error"


@dataclass(frozen=True)
class StepTiming:
    """Amount of work in one step, and its duration."""

    kind: Literal["prefill", "decode"]
    rows: int  #: requests in the step
    tokens: int  #: prompt tokens computed, without reused ones; 0 in a decode step
    units_on: int  #: sum over the rows
    layers: int  #: decoder layers in which at least one row runs
    context: int  #: keys attended to in an always-on layer, sum over the rows
    seconds: float  #: wall time, device time included


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine was created, and its current rows and memory in bytes."""

    started: int
    finished: int
    cancelled: int
    failed: int
    prefill_steps: int
    decode_steps: int
    prompt_tokens: int
    prefix_tokens: int
    completion_tokens: int
    rows_waiting: int
    rows_running: int
    kv_bytes: int
    kv_reserved: int
    kv_bound: int
    vision_bytes: int
    vision_bound: int
    vision_hits: int
    vision_misses: int
    prefix_bytes: int
    prefix_bound: int
    prefix_hits: int
    prefix_misses: int
    #: design H: calls of switchable layers in decode steps, one per pattern and layer
    packed_calls: int
    #: calls for a single row while other rows ran the same layer with other patterns
    packed_unshared: int
    #: times that the patterns of a layer together read at least the weights of the complete layer,
    #: so that the mixed batch saved nothing there compared with all rows at full budget
    packed_unsaved: int

"""What crosses the engine's door: requests in, events and timings out.

In: nothing but torch. Out: small frozen values, each checked where it is made, so that what reaches
the engine can be run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length", "cancelled", "error"]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. temperature 0: greedy. stop: strings that end it and are not shown.

    A sampled answer depends on the seed and the request alone, not on what else is in the batch.
    Raises ValueError for numbers out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _whole(self.max_new_tokens) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens!r}; a whole number from 1")
        if not _finite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature!r}; a number from 0 is needed")
        if not _finite(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}; a number in (0, 1] is needed")
        if not _whole(self.seed) or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed!r}; a whole number of 64 bits is needed")
        if not isinstance(self.stop, tuple) or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise ValueError(f"stop is {self.stop!r}; a tuple of strings, none empty, is needed")


@dataclass(frozen=True, eq=False)
class Request:
    """One question, ready for the model.

    inputs: ONE unpadded row as the processor gives it: input_ids [1, n], pixel_values, image_sizes,
    image_grid_thw, ... image_key: content hash of its pictures and of their preprocessing; None: no
    picture, or nothing of it may be reused. units_on: switches it may have on (from
    `AdaptiveVLM.units_for`). plan: bool [K]; None: the scheduler decides. Raises ValueError for
    shapes that are none.
    """

    id: str
    inputs: dict[str, Tensor]
    image_key: str | None
    units_on: int
    plan: Tensor | None = None
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        ids = self.inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
            shape = list(ids.shape) if isinstance(ids, Tensor) else ids
            raise ValueError(
                f"input_ids must be [1, n], one row of at least one token; got {shape}"
            )
        mask = self.inputs.get("attention_mask")
        if mask is not None and not bool(mask.bool().all()):
            raise ValueError("the row is padded; a request is one unpadded row")
        if not _whole(self.units_on) or self.units_on < 0:
            raise ValueError(f"units_on is {self.units_on!r}; a whole number from 0 is needed")
        if self.plan is not None and (self.plan.dim() != 1 or self.plan.dtype != torch.bool):
            raise ValueError("plan must be a bool tensor [K]")
        if self.plan is not None and int(self.plan.sum()) > self.units_on:
            raise ValueError(
                f"the plan has {int(self.plan.sum())} switches on; the request may have "
                f"{self.units_on}"
            )

    @property
    def prompt_tokens(self) -> int:
        """n, image tokens included and the latency token not."""
        return self.inputs["input_ids"].shape[1]


@dataclass(frozen=True)
class Result:
    """What a finished request was, and took.

    prompt_tokens: image tokens included. completion_tokens: what `Event.tokens` held, the end token
    not counted. units_on: switches of the plan it ran (0 and no plan if it ended before it had
    one). share: of the decoder layers' operations on the prompt that ran (`CostModel.share`).
    prefill_seconds: its prefill step. seconds: from
    `start` to the end. vision_hit: its pictures' features were at hand. prefix_tokens: tokens whose
    lower keys and values were at hand.
    """

    prompt_tokens: int
    completion_tokens: int
    units_on: int
    plan: tuple[bool, ...]
    share: float
    prefill_seconds: float
    seconds: float
    vision_hit: bool
    prefix_tokens: int


@dataclass(frozen=True)
class Event:
    """What one step gave one request.

    tokens: new token ids (an end token is not among them). text: what may be shown now: complete
    characters, nothing that might still become a stop string. finished, result: on the last event.
    error: with finished == "error".
    """

    request: str
    tokens: tuple[int, ...]
    text: str
    finished: FinishReason | None = None
    result: Result | None = None
    error: str | None = None


@dataclass(frozen=True)
class StepTiming:
    """What a step did, and how long it took.

    rows: requests in it. tokens: prompt tokens computed (0 in a decode step; reused ones do not
    count). units_on: sum over rows. layers: decoder layers in which any row ran. context: sum over
    rows of the keys attended to in an always-on layer. seconds: wall time, device included.
    """

    kind: Literal["prefill", "decode"]
    rows: int
    tokens: int
    units_on: int
    layers: int
    context: int
    seconds: float


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine was made, and what it holds now (bytes).

    Design H: packed_calls: calls of switchable layers in decode steps, one a pattern and layer.
    packed_unshared: those for one row while other rows ran the same layer under other patterns.
    packed_unsaved: times that a layer's patterns together read as many weights as the whole layer
    has, or more, so that the mixed batch saved nothing there against every row at full budget.
    """

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
    packed_calls: int
    packed_unshared: int
    packed_unsaved: int

"""Continuous batching of requests that each run their own plan.

A step is the prefill of one request, or one new token for every running request; the two alternate
while both have work. Each layer runs only the rows whose plan has it on. Not thread-safe.

An answer equals that of `AdaptiveVLM.generate` for the request alone, whatever runs in the same
batch, up to the rounding of matrix products of different sizes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from fmray.adallava import AdaptiveVLM
from fmray.engine.forward import Decode, Prefill, Row, max_keys
from fmray.engine.kv_memory import KVMemory
from fmray.engine.requests import EngineStats, Event, FinishReason, Request, Result, StepTiming
from fmray.engine.reuse import PrefixCache, TensorCache
from fmray.engine.tokens import TextStream, generator_of, sample_tokens

MIB = 1 << 20
_COUNTERS = (
    "started",
    "finished",
    "cancelled",
    "failed",
    "prefill_steps",
    "decode_steps",
    "prompt_tokens",
    "prefix_tokens",
    "completion_tokens",
)


def _check_batchable(model: AdaptiveVLM) -> None:
    backbone = model.backbone
    if backbone.attention not in ("sdpa", "eager"):
        raise ValueError(
            f"the engine needs attention 'sdpa' or 'eager', not {backbone.attention!r}"
        )
    rope = (getattr(backbone.config, "rope_parameters", None) or {}).get("rope_type")
    if rope in ("dynamic", "longrope"):
        raise ValueError(
            f"the engine cannot batch rotary type {rope!r}: it depends on the longest row, so rows "
            "would depend on each other"
        )


class Engine:
    """Batches requests of one adaptive model.

    Sets the model to eval mode. Its weights must not change while the engine caches prefixes.
    """

    def __init__(
        self,
        model: AdaptiveVLM,
        tokenizer: Any | None,
        *,
        max_rows: int = 8,
        kv_bytes: int = 1024 * MIB,
        vision_bytes: int = 256 * MIB,
        prefix_bytes: int = 256 * MIB,
        prefix_block: int = 16,
        eos: Sequence[int] | None = None,
    ) -> None:
        """Create an engine without requests.

        Args:
            tokenizer: None if no texts and stop strings are needed.
            max_rows: most requests at a time.
            kv_bytes: bound of the keys and values of running requests.
            vision_bytes: bound of the cached image features; 0: no cache.
            prefix_bytes: bound of the cached prompt prefixes; 0: no cache.
            prefix_block: tokens per block of the prefix cache.
            eos: ids that end an answer; None: those of the model's generation_config.

        Raises:
            ValueError: the model's attention implementation is neither sdpa nor eager, or its
                rotary frequencies depend on the length.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, not {max_rows}")
        _check_batchable(model)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        defaults = model.base.generation_config.eos_token_id
        if eos is None:
            eos = [defaults] if isinstance(defaults, int) else defaults or ()
        self.eos = frozenset(eos)
        dtype = model.backbone.norm.weight.dtype
        self.memory = KVMemory(model.layout, dtype, kv_bytes, max_rows)
        self.images = TensorCache(vision_bytes)
        image_token = getattr(model.base.config, "image_token_id", None)  # none: a text model
        self.prefixes = PrefixCache(prefix_bytes, prefix_block, image_token)
        self._prefill = Prefill(
            model, self.memory, self.images, self.prefixes if prefix_bytes else None
        )
        self._decode = Decode(model, self.memory)
        self._rows: dict[str, Row] = {}  # all rows, by request
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        self._cancelled: list[Row] = []
        self._prefill_next = True
        self._timing: StepTiming | None = None
        self._counts = dict.fromkeys(_COUNTERS, 0)

    # --- Requests ---------------------------------------------------------------------------

    def can_start(self, request: Request) -> bool:
        """Whether there is a free row, and memory for the prompt and the longest answer."""
        return len(self._rows) < self.max_rows and self.memory.has_room(
            self._max_keys(request), request.units_on
        )

    def fits(self, request: Request) -> bool:
        """Whether the request could start if it were alone."""
        return self.memory.fits(self._max_keys(request), request.units_on)

    def start(self, request: Request) -> None:
        """Add a request; a later step runs its prefill.

        Raises:
            ValueError: the request cannot start now (see `can_start`), its id is in use, its plan
                or number of units does not fit the model, or it holds a video.
        """
        units = self.model.layout.num_units
        self.model.backbone.check_inputs(request.inputs)
        if request.id in self._rows:
            raise ValueError(f"request {request.id!r} is running already")
        if request.units_on > units:
            raise ValueError(
                f"the request asks for {request.units_on} units; the model has {units}"
            )
        if request.plan is not None and len(request.plan) != units:
            raise ValueError(f"the plan has {len(request.plan)} units; the model has {units}")
        if not self.can_start(request):
            raise ValueError(
                f"no room for request {request.id!r}: {len(self._rows)} of {self.max_rows} rows "
                f"and {self.memory.reserved} of {self.memory.bound} bytes are in use"
            )
        row = Row(
            request,
            TextStream(self.tokenizer, request.sampling.stop),
            generator_of(request.sampling),
            time.perf_counter(),
        )
        self.memory.reserve(row, self._max_keys(request), request.units_on)
        self._rows[request.id] = row
        self._waiting.append(row)
        self._counts["started"] += 1

    def cancel(self, request_id: str) -> None:
        """Cancel a request at the next step; unknown and finished ids are ignored."""
        row = self._rows.get(request_id)
        if row is not None and row not in self._cancelled:
            self._cancelled.append(row)

    def _max_keys(self, request: Request) -> int:
        return max_keys(request, self.model.latency_token)

    # --- Steps ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Remove cancelled requests, then run one prefill or one decode step.

        A request whose prefill, logits or text fail ends with an `error` event; the others are not
        affected. An exception in a complete decode step is raised, and the step may be repeated.
        """
        events = [self._end(row, "cancelled") for row in self._cancelled]
        self._cancelled.clear()
        self._timing = None
        if self._waiting and (self._prefill_next or not self._running):
            self._prefill_next = False
            events.append(self._step_prefill())
        elif self._running:
            self._prefill_next = True
            events.extend(self._step_decode())
        return events

    def _step_prefill(self) -> Event:
        row = self._waiting.popleft()
        begin = time.perf_counter()
        try:
            logits = self._prefill(row)
            tokens, finite = sample_tokens(logits, [(row.request.sampling, row.generator)])
        except Exception as error:  # noqa: BLE001 - a request's failure must not affect others
            return self._end(row, "error", error=f"{type(error).__name__}: {error}")
        finally:
            self._decode.changed()
        row.prefill_seconds = time.perf_counter() - begin
        self._counts["prefill_steps"] += 1
        self._counts["prompt_tokens"] += row.request.prompt_tokens
        self._counts["prefix_tokens"] += row.prefix_tokens
        self._timing = StepTiming(
            "prefill", 1, row.computed, sum(row.plan), row.layers, row.length, row.prefill_seconds
        )
        self._running.append(row)
        return self._advance(row, tokens[0], finite[0])

    def _step_decode(self) -> list[Event]:
        rows = list(self._running)
        begin = time.perf_counter()
        logits = self._decode(rows)
        sampling = [(row.request.sampling, row.generator) for row in rows]
        tokens, finite = sample_tokens(logits, sampling)
        self._counts["decode_steps"] += 1
        self._timing = StepTiming(
            "decode",
            len(rows),
            0,
            sum(sum(row.plan) for row in rows),
            self._decode.layers,
            sum(row.length for row in rows),
            time.perf_counter() - begin,
        )
        return [
            self._advance(row, token, is_finite)
            for row, token, is_finite in zip(rows, tokens, finite, strict=True)
        ]

    def _advance(self, row: Row, token: int, finite: bool) -> Event:
        """Append a token to a row; returns its event, the last one if the answer ends."""
        if not finite:
            return self._end(row, "error", error="the model's logits are not finite")
        ended = token in self.eos
        tokens = () if ended else (token,)
        row.tokens += len(tokens)
        self._counts["completion_tokens"] += len(tokens)
        reason: FinishReason | None = "stop" if ended else None
        if not ended and row.tokens == row.request.sampling.max_new_tokens:
            reason = "length"
        try:
            text = "" if ended else row.stream.push(token)
            if reason is not None:
                text += row.stream.finish()
        except Exception as error:  # noqa: BLE001 - a request's failure must not affect others
            return self._end(row, "error", tokens, error=f"{type(error).__name__}: {error}")
        if row.stream.stopped:
            reason = "stop"
        if reason is not None:
            return self._end(row, reason, tokens, text)
        row.token = token
        return Event(row.request.id, (token,), text)

    def _end(
        self,
        row: Row,
        reason: FinishReason,
        tokens: tuple[int, ...] = (),
        text: str = "",
        error: str | None = None,
    ) -> Event:
        """Remove a row and free its memory; returns its last event."""
        self.memory.release(row)
        self._rows.pop(row.request.id)
        if row in self._running:
            # As in the arenas, the last row takes its place.
            index = self._running.index(row)
            self._running[index] = self._running[-1]
            self._running.pop()
        elif row in self._waiting:
            self._waiting.remove(row)
        self._decode.changed()
        counter = {"cancelled": "cancelled", "error": "failed"}.get(reason, "finished")
        self._counts[counter] += 1
        return Event(row.request.id, tokens, text, reason, self._result(row), error)

    def _result(self, row: Row) -> Result:
        tokens = row.request.prompt_tokens
        inline = self.model.latency_token == "inline"
        return Result(
            prompt_tokens=tokens,
            completion_tokens=row.tokens,
            units_on=sum(row.plan),
            plan=row.plan,
            share=self.model.cost.share(tokens + inline, row.plan or 0),
            prefill_seconds=row.prefill_seconds,
            seconds=time.perf_counter() - row.started_at,
            vision_hit=row.vision_hit,
            prefix_tokens=row.prefix_tokens,
        )

    # --- State ------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """Number of requests that have started and not ended."""
        return len(self._rows)

    @property
    def timing(self) -> StepTiming | None:
        """Timing of the last step; None if it computed nothing or failed."""
        return self._timing

    @property
    def stats(self) -> EngineStats:
        """Counters, and the current rows and bytes."""
        blocks = self.prefixes.blocks
        return EngineStats(
            **self._counts,
            rows_waiting=len(self._waiting),
            rows_running=len(self._running),
            kv_bytes=self.memory.bytes,
            kv_reserved=self.memory.reserved,
            kv_bound=self.memory.bound,
            vision_bytes=self.images.bytes,
            vision_bound=self.images.bound,
            vision_hits=self.images.hits,
            vision_misses=self.images.misses,
            prefix_bytes=blocks.bytes,
            prefix_bound=blocks.bound,
            prefix_hits=blocks.hits,
            prefix_misses=blocks.misses,
            packed_calls=self._decode.packed_calls,
            packed_unshared=self._decode.packed_unshared,
            packed_unsaved=self._decode.packed_unsaved,
        )

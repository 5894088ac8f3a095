"""Continuous batching of requests that each run their own plan.

In: an `AdaptiveVLM`, a tokenizer, requests that come and go. Out: events, a step at a time. A step
is the prefill of one request or one token for every running request; both take turns while both
have work. Every layer runs only the rows whose switch is on. One thread at a time: the caller's.

An answer is that of `AdaptiveVLM.generate` for the request alone, whatever runs beside it, as far
as the rounding of matrix products of other sizes goes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from fmray.adallava import AdaptiveVLM
from fmray.engine.forward import Decode, Prefill, Row, places_of
from fmray.engine.kv_memory import KVMemory
from fmray.engine.requests import EngineStats, Event, FinishReason, Request, Result, StepTiming
from fmray.engine.reuse import PrefixCache, TensorCache
from fmray.engine.tokens import TextStream, draw, generator_of

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


class Engine:
    """See the module's text.

    max_rows: requests at a time. kv_bytes, vision_bytes, prefix_bytes: bounds of the keys and
    values, of the image features and of the prompts' lower halves that are kept (0: none are).
    prefix_block: tokens in a block of the latter. eos: ids that end an answer; None: those of the
    model's generation_config. tokenizer: None where texts and stop strings are not needed.

    Puts the model in eval mode; its weights must not change while the engine holds prefixes. Raises
    ValueError for an attention implementation other than sdpa and eager, and for rotary frequencies
    that depend on the length.
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
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; at least one is needed")
        backbone = model.backbone
        if backbone.attention not in ("sdpa", "eager"):
            raise ValueError(
                f"the engine needs attention 'sdpa' or 'eager', not {backbone.attention!r}"
            )
        rope = (getattr(backbone.config, "rope_parameters", None) or {}).get("rope_type")
        if rope in ("dynamic", "longrope"):
            raise ValueError(
                f"rotary type {rope!r} changes with the length of the longest row, so rows would "
                "depend on their neighbours; the engine cannot batch them"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        defaults = model.base.generation_config.eos_token_id
        if eos is None:
            eos = [defaults] if isinstance(defaults, int) else defaults or ()
        self.eos = frozenset(eos)
        dtype = backbone.norm.weight.dtype
        self.memory = KVMemory(model.layout, dtype, kv_bytes, max_rows)
        self.pictures = TensorCache(vision_bytes)
        self.prefixes = PrefixCache(prefix_bytes, prefix_block, model.base.config.image_token_id)
        self._prefill = Prefill(
            model, self.memory, self.pictures, self.prefixes if prefix_bytes else None
        )
        self._decode = Decode(model, self.memory)
        self._rows: dict[str, Row] = {}  # all of them, by request
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        self._cancelled: list[Row] = []
        self._prefill_next = True
        self._timing: StepTiming | None = None
        self._counts = dict.fromkeys(_COUNTERS, 0)

    # -- requests come and go

    def can_start(self, request: Request) -> bool:
        """A free row, and room for the keys of its prompt and of the longest answer it may get."""
        return len(self._rows) < self.max_rows and self.memory.has_room(
            self._places(request), request.units_on
        )

    def fits(self, request: Request) -> bool:
        """Whether it could start if nothing else ran."""
        return self.memory.fits(self._places(request), request.units_on)

    def start(self, request: Request) -> None:
        """Join; a later step does the prefill. Raises ValueError for a request that cannot start
        now (`can_start`), has an id in use, or asks for switches that the model does not have.
        """
        units = self.model.layout.num_units
        if request.id in self._rows:
            raise ValueError(f"request {request.id!r} is running already")
        if request.units_on > units:
            raise ValueError(
                f"the request may have {request.units_on} switches on; the model has {units}"
            )
        if request.plan is not None and len(request.plan) != units:
            raise ValueError(f"the plan has {len(request.plan)} switches; the model has {units}")
        if not self.can_start(request):
            raise ValueError(
                f"no room for request {request.id!r}: {len(self._rows)} of {self.max_rows} rows, "
                f"{self.memory.reserved} of {self.memory.bound} bytes are taken"
            )
        row = Row(
            request,
            TextStream(self.tokenizer, request.sampling.stop),
            generator_of(request.sampling),
            time.perf_counter(),
        )
        self.memory.reserve(row, self._places(request), request.units_on)
        self._rows[request.id] = row
        self._waiting.append(row)
        self._counts["started"] += 1

    def cancel(self, request_id: str) -> None:
        """End a request at the next step. One that is unknown, or has just ended, is let be."""
        row = self._rows.get(request_id)
        if row is not None and row not in self._cancelled:
            self._cancelled.append(row)

    def _places(self, request: Request) -> int:
        return places_of(request, self.model.latency_token)

    # -- steps

    @torch.no_grad()
    def step(self) -> list[Event]:
        """One prefill or one token for every running row, after letting go what was cancelled.

        A request whose prefill, logits or text fail ends with an `error` event, and no other does.
        An exception of a decoding step as a whole is raised; the step may be repeated.
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
            tokens, sound = draw(logits, [(row.request.sampling, row.generator)])
        except Exception as error:  # noqa: BLE001 - one request's failure is no other's
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
        return self._advance(row, tokens[0], sound[0])

    def _step_decode(self) -> list[Event]:
        rows = list(self._running)
        begin = time.perf_counter()
        logits = self._decode(rows)
        tokens, sound = draw(logits, [(row.request.sampling, row.generator) for row in rows])
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
            self._advance(row, token, good)
            for row, token, good in zip(rows, tokens, sound, strict=True)
        ]

    def _advance(self, row: Row, token: int, sound: bool) -> Event:
        """A row's new token: what to show of it, and whether it was the last."""
        if not sound:
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
        except Exception as error:  # noqa: BLE001 - one request's failure is no other's
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
        """Let a row go, with all that it held."""
        self.memory.release(row)
        self._rows.pop(row.request.id)
        if row in self._running:
            # as in the arenas: the last one takes its place
            place = self._running.index(row)
            self._running[place] = self._running[-1]
            self._running.pop()
        elif row in self._waiting:
            self._waiting.remove(row)
        self._decode.changed()
        done = {"cancelled": "cancelled", "error": "failed"}.get(reason, "finished")
        self._counts[done] += 1
        return Event(row.request.id, tokens, text, reason, self._result(row), error)

    def _result(self, row: Row) -> Result:
        tokens = row.request.prompt_tokens
        seen = tokens + (self.model.latency_token == "inline")
        return Result(
            prompt_tokens=tokens,
            completion_tokens=row.tokens,
            units_on=sum(row.plan),
            plan=row.plan,
            share=self.model.cost.share(seen, row.plan or 0),
            prefill_seconds=row.prefill_seconds,
            seconds=time.perf_counter() - row.started,
            vision_hit=row.vision_hit,
            prefix_tokens=row.prefix_tokens,
        )

    # -- what is going on

    @property
    def active(self) -> int:
        """Requests started and not ended."""
        return len(self._rows)

    @property
    def timing(self) -> StepTiming | None:
        """Of the last step; None where it had nothing to compute, or failed."""
        return self._timing

    @property
    def stats(self) -> EngineStats:
        """Counters, and bytes held now."""
        blocks = self.prefixes.blocks
        return EngineStats(
            **self._counts,
            rows_waiting=len(self._waiting),
            rows_running=len(self._running),
            kv_bytes=self.memory.bytes,
            kv_reserved=self.memory.reserved,
            kv_bound=self.memory.bound,
            vision_bytes=self.pictures.bytes,
            vision_bound=self.pictures.bound,
            vision_hits=self.pictures.hits,
            vision_misses=self.pictures.misses,
            prefix_bytes=blocks.bytes,
            prefix_bound=blocks.bound,
            prefix_hits=blocks.hits,
            prefix_misses=blocks.misses,
            packed_calls=self._decode.packed_calls,
            packed_unshared=self._decode.packed_unshared,
            packed_unsaved=self._decode.packed_unsaved,
        )

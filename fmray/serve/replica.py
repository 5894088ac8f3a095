"""One replica's work without the web: a model, its engine's worker, and answers as they come.

In: checked requests. Out: `Live`, an answer under way, whose row is freed whatever happens to the
one who asked; and whether the model still answers. The deadline is kept here, by this process's own
clock: no header of a client changes it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from fmray.adallava import AdaptiveVLM
from fmray.config.serve import ServeConfig
from fmray.data.processor import load_processor
from fmray.engine.policy import Ask, Decision, Refused, Unavailable
from fmray.engine.requests import Event, Result, Sampling
from fmray.serve.keys import KeyRing, load_keys
from fmray.serve.openai import ApiError, ChatRequest, Fmray, Message
from fmray.serve.prompts import Prompt, PromptMaker

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from fmray.engine.worker import EngineWorker
    from fmray.serve.guards import Arrival

_logger = logging.getLogger("fmray.serve")
_PREPARING = 2  # threads that decode pictures
HEALTH_CALLER = "-health"  # no key can have this name


class Live:
    """One answer under way. `next` gives what the worker says, in order."""

    def __init__(self, answerer: Answerer, ask: Ask, prompt: Prompt, arrival: float) -> None:
        """arrival: `time.monotonic()` of the request's first byte."""
        self.ask, self.prompt, self.arrival = ask, prompt, arrival
        self.decision: Decision | None = None
        self.first_token: float | None = None  # seconds after arrival
        self.ended: float | None = None
        self._answerer, self._closed = answerer, False
        self._queue: asyncio.Queue[Decision | Event | Refused] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        try:
            answerer.worker.submit(ask, self._deliver, arrival)
        except Refused as error:
            raise refusal(error) from None
        except ValueError as error:
            # What the worker says names budgets and lengths, never texts.
            raise ApiError(400, str(error), code="invalid_value") from None

    def _deliver(self, item: Decision | Event | Refused) -> None:
        """Called from the worker's thread. RuntimeError: the loop has gone, the replica ends."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def next(self) -> Decision | Event:
        """The next thing. Raises ApiError where the answer will not come, or not in time."""
        try:
            async with asyncio.timeout(self._left()):
                item = await self._queue.get()
        except TimeoutError:
            raise self._late() from None
        if isinstance(item, Refused):
            self.ended = time.monotonic() - self.arrival
            raise refusal(item)
        if isinstance(item, Decision):
            self.decision = item
            return item
        now = time.monotonic() - self.arrival
        if self.first_token is None and (item.tokens or item.finished in ("stop", "length")):
            self.first_token = now
        if item.finished is not None:
            self.ended = now
        if item.finished == "error":
            raise ApiError(500, "the model failed on this request", code="model_error")
        if item.finished == "cancelled":
            raise ApiError(
                503,
                "the server stopped this answer; ask again",
                code="unavailable",
                headers={"retry-after": "1"},
            )
        return item

    @property
    def waiting(self) -> bool:
        """Whether `next` has something at once."""
        return not self._queue.empty()

    def _left(self) -> float:
        limit = self._answerer.settings.request_timeout_s
        waits_for_deadline = self.ask.deadline_of == "answer" or self.first_token is None
        if self.ask.strict and self.ask.deadline_ms is not None and waits_for_deadline:
            limit = min(limit, self.ask.deadline_ms / 1e3)
        return max(self.arrival + limit - time.monotonic(), 0.0)

    def _late(self) -> ApiError:
        limit = self._answerer.settings.request_timeout_s
        if time.monotonic() - self.arrival >= limit:
            return ApiError(408, f"no answer within {limit:g} s", code="request_timeout")
        return ApiError(503, "the deadline has passed", code="deadline_missed")

    def close(self) -> None:
        """Free the row if the answer is not over. Takes effect within one step of the engine."""
        if self.ended is None and not self._closed:
            self._answerer.worker.cancel(self.ask.id)
        self._closed = True

    def cost(self, request: ChatRequest, result: Result) -> Fmray:
        """What the finished answer cost."""
        decision, model = self.decision, self._answerer.model
        assert decision is not None, "a decision comes first"
        assert self.ended is not None, "the answer is over"
        of = self.ask.deadline_of
        measured = self.first_token if of == "first_token" else self.ended
        measured_ms = 1e3 * (measured if measured is not None else self.ended)
        layout = model.layout
        tokens = self.prompt.tokens + (model.latency_token == "inline")
        ran = list(result.plan) if result.plan else result.units_on
        met = None if request.deadline_ms is None else measured_ms <= request.deadline_ms
        return Fmray(
            budget=float(decision.budget),
            units_on=result.units_on,
            units=layout.num_units,
            share=model.cost.share(tokens, ran),
            deadline_of=of,
            predicted_ms=decision.predicted_ms,
            measured_ms=measured_ms,
            first_token_ms=None if self.first_token is None else 1e3 * self.first_token,
            answer_ms=1e3 * self.ended,
            deadline_ms=request.deadline_ms,
            deadline_met=met,
            vision_hit=result.vision_hit,
            prefix_tokens=result.prefix_tokens,
            layers=layout.num_layers,
            first_layer=layout.first,
            units_per_layer=layout.units_per_layer,
            plan=list(result.plan) if request.plan else None,
        )


class Answerer:
    """A model with its engine's worker, ready to answer."""

    def __init__(
        self,
        settings: ServeConfig,
        model: AdaptiveVLM,
        processor: ProcessorMixin,
        worker: EngineWorker,
        keys: KeyRing,
    ) -> None:
        self.settings, self.model, self.worker, self.keys = settings, model, worker, keys
        self.created = int(time.time())
        self.answered_at: float | None = None  # when a question was last answered
        self._prompts = PromptMaker(processor, settings, context_of(model))
        self._threads = ThreadPoolExecutor(_PREPARING, thread_name_prefix="fmray-prepare")
        self._checking = asyncio.Lock()
        self._question = self._prompts.make(_question(settings))

    @asynccontextmanager
    async def answer(self, request: ChatRequest, arrival: Arrival) -> AsyncIterator[Live]:
        """Start an answer; leaving the context frees its row.

        Lets the body go, and the request's messages, once they are token ids and pixels. Raises
        ApiError where it is refused.
        """
        loop = asyncio.get_running_loop()
        limit = self.settings.request_timeout_s
        try:
            async with asyncio.timeout(max(0.0, arrival.time + limit - time.monotonic())):
                prompt = await loop.run_in_executor(self._threads, self._prompts.make, request)
        except TimeoutError:
            raise ApiError(408, f"no answer within {limit:g} s", code="request_timeout") from None
        request.messages.clear()  # megabytes of base64 that nobody reads again
        arrival.release()
        try:
            ask = Ask(
                id=f"chatcmpl-{secrets.token_hex(12)}",
                caller=arrival.caller.name,
                inputs=prompt.inputs,
                image_key=prompt.image_key,
                sampling=Sampling(
                    max_new_tokens=prompt.max_new_tokens,
                    temperature=request.temperature,
                    top_p=request.top_p,
                    seed=secrets.randbits(31) if request.seed is None else request.seed,
                    stop=tuple(request.stop or ()),
                ),
                budget=request.budget,
                deadline_ms=request.deadline_ms,
                deadline_of=_deadline_of(request),
                strict=request.strict,
            )
        except ValueError as error:
            raise ApiError(400, str(error), code="invalid_value") from None
        live = Live(self, ask, prompt, arrival.time)
        try:
            yield live
        finally:
            live.close()

    async def check(self) -> None:
        """Whether the model answers: a real question through the engine, or steps just made.

        Raises RuntimeError, after which Ray Serve replaces the replica.
        """
        limit = self.settings.health_timeout_s
        async with self._checking:
            health = self.worker.health()
            if not health.alive or health.error is not None:
                raise RuntimeError("the engine's thread has ended")
            if health.draining:
                return
            if health.busy and self.answered_at is not None:
                if health.idle_seconds > limit:
                    raise RuntimeError(f"the engine made no step for {limit:g} s")
                return  # it is at work for others, and a question would only wait behind them
            try:
                async with asyncio.timeout(0.9 * limit):
                    await self._ask_question()
            except (ApiError, TimeoutError) as error:
                busy = isinstance(error, ApiError) and error.status == 429
                if busy and self.worker.health().idle_seconds <= limit:
                    return
                reason = str(error) or f"no answer within {0.9 * limit:g} s"
                raise RuntimeError(f"the model does not answer: {reason}") from None

    async def _ask_question(self) -> None:
        ask = Ask(
            id=f"health-{secrets.token_hex(8)}",
            caller=HEALTH_CALLER,
            inputs=self._question.inputs,
            image_key=None,  # computed, not looked up
            sampling=Sampling(max_new_tokens=1),
            budget="1",
        )
        live = Live(self, ask, self._question, time.monotonic())
        try:
            while live.ended is None:
                await live.next()
        finally:
            live.close()
        self.answered_at = time.monotonic()

    async def ready(self) -> bool:
        """Workers ready and the model answering; a recent answer or step is proof enough."""
        health = self.worker.health()
        if not health.alive or health.error is not None or health.draining:
            return False
        fresh = self.settings.health_period_s
        if self.answered_at is not None and time.monotonic() - self.answered_at < fresh:
            return True
        try:
            await self.check()
        except RuntimeError as error:
            _logger.warning("not ready: %s", error)
            return False
        return True

    def close(self) -> None:
        """Let running answers finish for `drain_s`, then stop."""
        self.worker.drain(self.settings.drain_s)
        self.worker.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def open_answerer(settings: ServeConfig, directory: Path) -> Answerer:
    """Load a model directory, measure the machine, and start the engine's worker.

    Raises ValueError for a directory that holds no adaptive model with a processor, or where keys
    are required and there are none.
    """
    from fmray.engine.calibration import calibrated
    from fmray.engine.engine import Engine
    from fmray.engine.policy import Budgets
    from fmray.engine.worker import EngineWorker, WorkerSettings

    keys = load_keys(settings.keys_file)
    if settings.require_keys and keys.open:
        raise ValueError(
            "keys are required, and this replica finds none; give keys_file (a path that every "
            "node sees)"
        )
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AdaptiveVLM.from_pretrained(directory, dtype=getattr(torch, settings.dtype))
    model = model.to(device).eval()
    processor = load_processor(directory)
    engine = Engine(
        model,
        processor.tokenizer,
        max_rows=settings.max_rows,
        kv_bytes=settings.kv_mib * 2**20,
        vision_bytes=settings.vision_mib * 2**20,
        prefix_bytes=settings.prefix_mib * 2**20,
    )
    picture = PromptMaker(processor, settings, context_of(model)).make(_question(settings)).inputs
    cost = calibrated(
        engine, model, settings.calibration, seconds=settings.calibration_s, picture=picture
    )
    worker = EngineWorker(
        engine,
        cost,
        Budgets.of(model),
        WorkerSettings(
            p95_seconds=settings.p95_ms / 1e3,
            p95_of=settings.p95_of,
            floor=settings.floor,
            max_queue=settings.max_queue,
            controller=settings.auto,
        ),
        limits={caller.name: caller.limits for caller in keys.callers},
    )
    return Answerer(settings, model, processor, worker, keys)


def context_of(model: AdaptiveVLM) -> int:
    """Tokens of prompt and answer that the decoder has positions for."""
    positions = getattr(model.backbone.config, "max_position_embeddings", None) or 2**31
    return positions - (model.latency_token == "inline")


def refusal(error: Refused) -> ApiError:
    """What the policy refuses, as an answer."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, int(error.retry_after + 0.999)))
    message = str(error)
    if isinstance(error, Unavailable):  # its message may hold what a library said
        message = "this replica takes no requests now; ask again"
    return ApiError(error.status, message, code=error.code, headers=headers)


def _deadline_of(request: ChatRequest) -> str:
    if request.deadline_of is not None:
        return request.deadline_of
    whole = request.deadline_ms is not None and request.asked_tokens is not None
    return "answer" if whole else "first_token"


def _question(settings: ServeConfig) -> ChatRequest:
    """A question about a grey picture, which goes through every part of the model."""
    import base64
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content: list[dict[str, object]] = [{"type": "text", "text": "What is in the picture?"}]
    if settings.max_images:
        content.append({"type": "image_url", "image_url": {"url": url}})
    message = Message.model_validate({"role": "user", "content": content})
    return ChatRequest(model=settings.public_name, messages=[message], max_tokens=1)

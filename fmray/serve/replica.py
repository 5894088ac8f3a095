"""A replica without its web side: the model, the engine's worker, and generations in progress.

`ChatModel.generate` turns a checked request into a `Generation`, which yields the worker's events
and frees its row in the batch however the request ends. Timeouts use this process's clock; no
header of a client changes them. `ChatModel.check_health` asks the model a real question.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import functools
import io
import logging
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from fmray.adallava import AdaptiveVLM
from fmray.config.serve import ServeConfig
from fmray.data.processor import load_processor
from fmray.engine.policy import Ask, DeadlineImpossible, Decision, Refused, Unavailable
from fmray.engine.requests import Event, Result
from fmray.serve.image_pool import ImagePool
from fmray.serve.keys import KeyRing, load_keys
from fmray.serve.openai import ApiError, ChatRequest, Fmray, ImagePart, Message
from fmray.serve.prompts import PromptBuilder

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from fmray.engine.worker import EngineWorker
    from fmray.serve.guards import RequestContext

_logger = logging.getLogger("fmray.serve")
_TEXT_THREADS = 2  # build prompts without images
# A retry has a new deadline: the official clients would ask three times what cannot be answered.
_DO_NOT_RETRY = {"x-should-retry": "false"}
HEALTH_CALLER = "-health"  # not a valid name of a key


class Generation:
    """An answer in progress. `next` returns the worker's decision and events, in order."""

    def __init__(self, model: ChatModel, ask: Ask, arrival_time: float) -> None:
        """Submit a request to the worker.

        Args:
            arrival_time: `time.monotonic()` at the request's first byte.

        Raises:
            ApiError: If the worker refuses the request.
        """
        self.ask, self.arrival_time = ask, arrival_time
        self.decision: Decision | None = None
        self.first_token: float | None = None  # seconds after arrival
        self.ended: float | None = None  # seconds after arrival
        self._model, self._closed = model, False
        self._queue: asyncio.Queue[Decision | Event | Refused] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        try:
            model.worker.submit(ask, self._deliver, arrival_time)
        except Refused as error:
            raise api_error(error) from None
        except ValueError as error:
            # The worker's messages name budgets and lengths, never texts.
            raise ApiError(400, str(error), code="invalid_value") from None

    def _deliver(self, item: Decision | Event | Refused) -> None:
        """Queue an item from the worker's thread.

        Raises:
            RuntimeError: If the event loop is closed because the replica stops.
        """
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def next(self) -> Decision | Event:
        """Return the next item.

        Raises:
            ApiError: If the request is refused, fails, is cancelled or exceeds its time.
        """
        try:
            async with asyncio.timeout(self._seconds_left()):
                item = await self._queue.get()
        except TimeoutError:
            raise self._timeout_error() from None
        elapsed = time.monotonic() - self.arrival_time
        if isinstance(item, Refused):
            self.ended = elapsed
            raise api_error(item)
        if isinstance(item, Decision):
            self.decision = item
            return item
        if self.first_token is None and (item.tokens or item.finished in ("stop", "length")):
            self.first_token = elapsed
        if item.finished is not None:
            self.ended = elapsed
        if item.finished == "error":
            # "TypeError: message": a message may quote a prompt
            kind = (item.error or "").partition(":")[0]
            raise ApiError(500, "the model failed on this request", code="model_error", detail=kind)
        if item.finished == "cancelled":
            raise ApiError(
                503,
                "the server stopped this answer; retry",
                code="unavailable",
                headers={"retry-after": "1"},
            )
        return item

    @property
    def waiting(self) -> bool:
        """Whether `next` returns at once."""
        return not self._queue.empty()

    def _seconds_left(self) -> float:
        limit = self._model.settings.request_timeout_s
        deadline_open = self.ask.deadline_of == "answer" or self.first_token is None
        if self.ask.strict and self.ask.deadline_ms is not None and deadline_open:
            limit = min(limit, self.ask.deadline_ms / 1e3)
        return max(self.arrival_time + limit - time.monotonic(), 0.0)

    def _timeout_error(self) -> ApiError:
        limit = self._model.settings.request_timeout_s
        if time.monotonic() - self.arrival_time >= limit:
            return _request_timeout(limit)
        return ApiError(
            503, "the deadline was missed", code="deadline_missed", headers=_DO_NOT_RETRY
        )

    def close(self) -> None:
        """Free the row if the answer has not ended. Takes effect within one engine step."""
        if self.ended is None and not self._closed:
            self._model.worker.cancel(self.ask.id)
        self._closed = True

    def cost(self, result: Result, with_plan: bool) -> Fmray:
        """Return the `fmray` object of the finished answer."""
        decision, model = self.decision, self._model.model
        assert decision is not None, "the decision precedes the events"
        assert self.ended is not None, "the answer has ended"
        deadline_of, deadline_ms = self.ask.deadline_of, self.ask.deadline_ms
        measured = self.first_token if deadline_of == "first_token" else self.ended
        measured_ms = 1e3 * (measured if measured is not None else self.ended)
        layout = model.layout
        tokens = self.ask.prompt_tokens + (model.latency_token == "inline")
        plan = list(result.plan) if result.plan else result.units_on
        return Fmray(
            budget=float(decision.budget),
            units_on=result.units_on,
            units=layout.num_units,
            share=model.cost.share(tokens, plan),
            deadline_of=deadline_of,
            predicted_ms=decision.predicted_ms,
            measured_ms=measured_ms,
            first_token_ms=None if self.first_token is None else 1e3 * self.first_token,
            answer_ms=1e3 * self.ended,
            deadline_ms=deadline_ms,
            deadline_met=None if deadline_ms is None else measured_ms <= deadline_ms,
            vision_hit=result.vision_hit,
            prefix_tokens=result.prefix_tokens,
            layers=layout.num_layers,
            first_layer=layout.first,
            units_per_layer=layout.units_per_layer,
            plan=list(result.plan) if with_plan else None,
        )


class ChatModel:
    """A model with its engine's worker, ready to answer chat requests."""

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
        # Texts and images have threads and processors of their own: none waits for the other.
        self.prompts = PromptBuilder(processor, settings, context_length(model))
        self._threads = ThreadPoolExecutor(_TEXT_THREADS, thread_name_prefix="fmray-prepare")
        self._image_prompts = PromptBuilder(
            copy.deepcopy(processor), settings, context_length(model)
        )
        self.images = ImagePool(
            settings.image_processes,
            settings.image_seconds,
            settings.image_memory,
            max_waiting=max(1, settings.max_queue // 2),
        )
        self._question = _health_request(settings)
        self._health_lock = asyncio.Lock()
        self._last_health_answer: float | None = None  # time.monotonic()

    @asynccontextmanager
    async def generate(
        self, request: ChatRequest, context: RequestContext
    ) -> AsyncIterator[Generation]:
        """Start an answer; leaving the context manager frees its row.

        Releases the body and the request's messages as soon as they are token ids and pixels.

        Raises:
            ApiError: If the request is refused.
        """
        limit = self.settings.request_timeout_s
        try:
            async with asyncio.timeout(max(0.0, context.arrival_time + limit - time.monotonic())):
                ask = await self._prepare(
                    request, context.caller.name, context.owner, context.caller.limits.weight
                )
        except TimeoutError:
            raise _request_timeout(limit) from None
        request.messages.clear()  # megabytes of base64 that are not needed any more
        context.release()
        generation = Generation(self, ask, context.arrival_time)
        try:
            yield generation
        finally:
            generation.close()

    async def _prepare(
        self, request: ChatRequest, caller: str, owner: str, weight: float = 1.0
    ) -> Ask:
        """Return the engine's form of a request.

        Args:
            owner: Whose share of the image processes is used.

        Raises:
            ApiError: If the request is refused.
        """
        parts = (part for message in request.messages for part in message.parts)
        if any(isinstance(part, ImagePart) for part in parts):
            build = functools.partial(self._image_prompts.build, request, caller)
            return await self.images.run(build, owner, weight)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self.prompts.build, request, caller)

    async def check_health(self) -> None:
        """Check that the model answers, by a real question or by the steps of other requests.

        The question has an image, which is prepared like those of other requests.

        Raises:
            RuntimeError: If it does not; Ray Serve then replaces the replica.
        """
        limit = self.settings.health_timeout_s
        async with self._health_lock:
            health = self.worker.health()
            if not health.alive or health.error is not None:
                raise RuntimeError("the engine's thread has ended")
            if health.draining:
                return
            try:
                async with asyncio.timeout(0.9 * limit):
                    ask = await self._prepare(self._question, HEALTH_CALLER, HEALTH_CALLER)
                    # A busy engine is healthy while it makes steps: the question would only wait.
                    health = self.worker.health()
                    if health.busy and self._last_health_answer is not None:
                        if health.idle_seconds > limit:
                            raise RuntimeError(f"the engine made no step for {limit:g} s")
                        return
                    await self._ask_health_question(ask)
            except (ApiError, TimeoutError) as error:
                overloaded = isinstance(error, ApiError) and error.status == 429
                if overloaded and self.worker.health().idle_seconds <= limit:
                    return
                reason = str(error) or f"no answer within {0.9 * limit:g} s"
                raise RuntimeError(f"the model does not answer: {reason}") from None

    async def _ask_health_question(self, ask: Ask) -> None:
        # Without an image key the features are computed, not read from the cache.
        ask = replace(ask, id=f"health-{secrets.token_hex(8)}", image_key=None)
        generation = Generation(self, ask, time.monotonic())
        try:
            while generation.ended is None:
                await generation.next()
        finally:
            generation.close()
        self._last_health_answer = time.monotonic()

    async def ready(self) -> bool:
        """Return whether the worker accepts requests and the model answers.

        An answer within the last health period counts; otherwise the model is asked.
        """
        health = self.worker.health()
        if not health.alive or health.error is not None or health.draining:
            return False
        period, last = self.settings.health_period_s, self._last_health_answer
        if last is not None and time.monotonic() - last < period:
            return True
        try:
            await self.check_health()
        except RuntimeError as error:
            _logger.warning("not ready: %s", error)
            return False
        return True

    def close(self) -> None:
        """Let running answers finish for up to `drain_s`, then stop the worker."""
        self.worker.drain(self.settings.drain_s)
        self.worker.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.images.close()


def load_chat_model(settings: ServeConfig, directory: Path) -> ChatModel:
    """Load a model directory, calibrate the cost model and start the engine's worker.

    Raises:
        ValueError: If the directory holds no adaptive model with a processor, or keys are required
            and there are none.
    """
    from fmray.engine.calibration import calibrated
    from fmray.engine.engine import Engine
    from fmray.engine.policy import Budgets
    from fmray.engine.worker import EngineWorker, WorkerSettings

    keys = load_keys(settings.keys_file)
    if settings.require_keys and keys.open:
        raise ValueError(
            "keys are required, but this replica has none; set keys_file to a path that every "
            "node can read"
        )

    # Model and engine
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

    # Calibration, with an image like those of requests
    prompts = PromptBuilder(processor, settings, context_length(model))
    inputs = prompts.build(_health_request(settings), HEALTH_CALLER).inputs
    cost = calibrated(
        engine, model, settings.calibration, seconds=settings.calibration_s, image=inputs
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
    chat_model = ChatModel(settings, model, processor, worker, keys)
    chat_model.images.start()
    return chat_model


def context_length(model: AdaptiveVLM) -> int:
    """Return how many tokens of prompt and answer the decoder has positions for."""
    positions = getattr(model.backbone.config, "max_position_embeddings", None) or 2**31
    return positions - (model.latency_token == "inline")


def api_error(error: Refused) -> ApiError:
    """Return a refusal of the engine's policy as an error response."""
    headers = dict(_DO_NOT_RETRY) if isinstance(error, DeadlineImpossible) else {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, int(error.retry_after + 0.999)))
    message = str(error)
    if isinstance(error, Unavailable):  # its message may contain the text of a library's error
        message = "this replica is not accepting requests; retry"
    return ApiError(error.status, message, code=error.code, headers=headers)


def _request_timeout(limit: float) -> ApiError:
    return ApiError(408, f"no answer within {limit:g} s", code="request_timeout")


def _health_request(settings: ServeConfig) -> ChatRequest:
    """Return a question about a grey image at full budget: it runs every part of the model."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content: list[dict[str, object]] = [{"type": "text", "text": "What is in the picture?"}]
    if settings.max_images:
        content.append({"type": "image_url", "image_url": {"url": url}})
    message = Message.model_validate({"role": "user", "content": content})
    return ChatRequest(model=settings.public_name, messages=[message], max_tokens=1, budget="1")

"""A tiny model directory, a scripted worker, the web application around them, and clients."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
import torch
import uvicorn
from PIL import Image
from support.tiny_models import SCRATCH, adaptive

from fmray.adallava import AdaptiveVLM
from fmray.config import ScratchConfig
from fmray.config.serve import ServeConfig
from fmray.data.processor import load_processor, scratch_processor
from fmray.engine.policy import Ask, Decision, Refused
from fmray.engine.requests import Event, Result
from fmray.engine.stats import Histogram, WorkerStats
from fmray.serve.connections import LimitedProtocol
from fmray.serve.image_pool import ImagePool
from fmray.serve.keys import KeyRing
from fmray.serve.metrics import Metrics
from fmray.serve.replica import ChatModel
from fmray.serve.routes import create_app
from fmray.train.adallava.model import scratch_model

WORDS = "what is in the picture ? color topleft red green blue one two three left right a b c d e"


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll a condition; AssertionError if it does not hold within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.05)


def make_model_directory(
    folder: Path, *, design: str = "layers", token: str = "probe", seed: int = 0
) -> Path:
    """Save an adaptive LLaVA with random weights and its processor."""
    config = ScratchConfig(**SCRATCH)
    processor = scratch_processor([WORDS], config)
    torch.manual_seed(seed)
    base = scratch_model(config, processor, torch.float32, "sdpa")
    model = adaptive(base, design, first=1, latency_token=token)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def encoded_image(
    size: tuple[int, int] = (32, 32), color: str | int = "red", kind: str = "PNG", mode: str = "RGB"
) -> bytes:
    """Return the bytes of an image file of one color."""
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, format=kind)
    return buffer.getvalue()


def data_url(encoded: bytes, media: str = "image/png") -> str:
    """Return an image file as clients send it."""
    return f"data:{media};base64,{base64.b64encode(encoded).decode()}"


def chat(*urls: str, text: str = "what is in the picture ?", **fields: Any) -> dict[str, Any]:
    """Return the body of a chat completion request about images."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    content += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}


def post_and_disconnect(url: str, body: dict[str, Any], headers: dict[str, str]) -> None:
    """Send a chat request and disconnect: a stream after its first chunk, else after 0.5 s."""
    path = f"{url}/v1/chat/completions"
    timeout = httpx.Timeout(60 if body.get("stream") else 0.5)
    with (
        contextlib.suppress(httpx.TimeoutException),
        httpx.stream("POST", path, json=body, headers=headers, timeout=timeout) as response,
    ):
        assert body.get("stream"), "the answer came before the timeout"
        assert response.status_code == 200
        next(response.iter_raw())


class Answer(NamedTuple):
    """The response to one request of a `Load`."""

    client: int
    number: int  # of the request, per client
    start: float  # time.monotonic()
    end: float
    status: int  # 0 without a response
    text: str  # the body, or the type of the transport error


class Load:
    """Clients that each send one request after the other until the context manager ends.

    `ask` takes the number of the client and of its request and returns the response. Clients
    pause between requests to leave the CPU to the servers.
    """

    def __init__(
        self, clients: int, ask: Callable[[int, int], httpx.Response], pause: float = 0.0
    ) -> None:
        self.answers: list[Answer] = []
        self._ask, self._pause, self._stop = ask, pause, threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self._runs = [self._pool.submit(self._run, client) for client in range(clients)]

    def _run(self, client: int) -> None:
        number = 0
        while not self._stop.is_set():
            start = time.monotonic()
            try:
                response = self._ask(client, number)
                status, text = response.status_code, response.text
            except httpx.TransportError as error:
                status, text = 0, type(error).__name__
                time.sleep(0.05)
            self.answers.append(Answer(client, number, start, time.monotonic(), status, text))
            number += 1
            self._stop.wait(self._pause)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for run in self._runs:
            run.result()
        self._pool.shutdown()

    @property
    def failures(self) -> list[Answer]:
        """All responses other than 200."""
        return [answer for answer in self.answers if answer.status != 200]


@dataclass
class ScriptedWorker:
    """Stands in for an `EngineWorker` and answers every request with the same tokens."""

    tokens: tuple[str, ...] = ("red ", "and ", "blue")
    refuse: Exception | None = None  # raised by `submit`
    refuse_queued: Refused | None = None  # sent instead of a decision
    hold: threading.Event | None = None  # tokens wait for it
    last: str = "stop"  # reason that ends the answer
    pause: float = 0.0  # seconds between tokens
    alive: bool = True
    draining: bool = False
    asks: list[Ask] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    closed: bool = False

    def submit(self, ask: Ask, on_event: Callable[[Any], None], at: float | None = None) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.asks.append(ask)
        threading.Thread(target=self._answer, args=(ask, on_event), daemon=True).start()

    def _answer(self, ask: Ask, on_event: Callable[[Any], None]) -> None:
        if self.refuse_queued is not None:
            on_event(self.refuse_queued)
            return
        start = time.monotonic()
        on_event(Decision(ask.id, ask.budget or "0.75", 2, 12.5, ask.deadline_of, None, 0.0))
        for number, token in enumerate(self.tokens):
            while self.hold is not None and not self.hold.wait(0.01):
                if ask.id in self.cancelled:
                    break
            if ask.id in self.cancelled:
                on_event(Event(ask.id, (), "", "cancelled", self._result(ask, number, start)))
                return
            time.sleep(self.pause)
            on_event(Event(ask.id, (number,), token))
        result = self._result(ask, len(self.tokens), start)
        error = "broken: prompt text" if self.last == "error" else None
        on_event(Event(ask.id, (), "", self.last, result, error))

    def _result(self, ask: Ask, tokens: int, start: float) -> Result:
        seconds = time.monotonic() - start
        plan = (True, False, True)
        return Result(ask.prompt_tokens, tokens, 2, plan, 0.75, seconds / 2, seconds, False, 0)

    def cancel(self, request_id: str) -> bool:
        self.cancelled.append(request_id)
        return True

    def drain(self, seconds: float) -> bool:
        self.draining = True
        return True

    def close(self) -> None:
        self.closed = True

    def health(self) -> SimpleNamespace:
        return SimpleNamespace(
            alive=self.alive, error=None, busy=False, idle_seconds=0.0, draining=self.draining
        )

    def stats(self) -> WorkerStats:
        empty = Histogram((1.0,), (0, 0), 0.0, 0)
        nothing = dict.fromkeys(
            (
                "submitted", "admitted", "deadlines_promised", "deadlines_met", "deadlines_missed",
                "tokens_out", "callback_errors", "queued", "active",
            ),
            0,
        )  # fmt: skip
        return WorkerStats(
            **nothing,
            finished={},
            refused={},
            draining=self.draining,
            auto_units=3,
            auto_budget=1.0,
            mean_budget=1.0,
            budget=empty,
            units_on=empty,
            queue_seconds=empty,
            first_token_seconds=empty,
            answer_seconds=empty,
            first_token_error=0.0,
            answer_error=0.0,
            calibration_error=(0.0, 0.0),
            speed=(1.0, 1.0),
            engine=None,
        )


def make_chat_model(
    directory: Path,
    worker: Any,
    keys: KeyRing | None = None,
    images: ImagePool | None = None,
    **settings: Any,
) -> ChatModel:
    """Return a directory's model with the given worker; `images` replaces its pool."""
    config = ServeConfig(model=str(directory), name="tiny", **settings)
    model = AdaptiveVLM.from_pretrained(directory).eval()
    made = ChatModel(config, model, load_processor(directory), worker, keys or KeyRing())
    made.images = images or made.images
    return made


def make_app(chat_model: ChatModel) -> Any:
    """Return the web application around a model."""
    metrics = Metrics(chat_model.worker, "test", chat_model.model.layout.num_units)

    async def exposition() -> bytes:
        return metrics.exposition()

    return create_app(chat_model, metrics, exposition)


def client_of(app: Any, **options: Any) -> httpx.AsyncClient:
    """Return a client that calls the application in this process."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", **options)


async def post_in_memory(app: Any, body: dict[str, Any], disconnect: asyncio.Event) -> None:
    """Send a chat request by raw ASGI messages, which can disconnect: httpx's transport cannot."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    sent = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive() -> dict[str, Any]:
        for message in sent:
            return message
        await disconnect.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        pass

    await app(scope, receive, send)


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve the application on a free port of the loopback interface."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, http=LimitedProtocol, log_level="warning", access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_until(lambda: server.started, 30, "uvicorn to start")
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()

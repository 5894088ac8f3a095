"""The web side of an `Answerer`: routes, streams, the page, and the OpenAPI document.

In: an `Answerer`. Out: an ASGI application, which runs in a Ray Serve replica, in uvicorn, or in a
test. Bodies are parsed off the event loop; a client that leaves frees its row.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from fmray import __version__
from fmray.engine.policy import Decision
from fmray.engine.requests import Result
from fmray.serve.guards import Arrival, Guard, gone, log_failure
from fmray.serve.metrics import Metrics
from fmray.serve.openai import (
    AnswerMessage,
    ApiError,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    ErrorBody,
    Fmray,
    ModelCard,
    ModelList,
    Usage,
    parse_request,
)
from fmray.serve.replica import Answerer, Live

_SMALL = 64 * 1024  # bytes of a body that is parsed where it stands
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody}
    for status in (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503)
}
_DONE = b"[DONE]"  # ends a stream
_CLIENT_LEFT = 499  # never seen by anybody but the log

Exposition = Callable[[], Awaitable[bytes]]


def create_app(answerer: Answerer, metrics: Metrics, exposition: Exposition) -> ASGIApp:
    """The whole application, guards outside. exposition: what `/metrics` answers."""
    settings = answerer.settings
    app = FastAPI(title="fmray", version=__version__, docs_url=None, redoc_url=None)
    page, policy = _page()

    @app.get("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": policy})

    @app.get("/healthz", responses={503: {"model": ErrorBody}})
    async def healthz() -> dict[str, str]:
        """Whether the process and its engine's thread live."""
        health = answerer.worker.health()
        if not health.alive or health.error is not None:
            raise ApiError(503, "the engine has stopped", code="unavailable")
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"model": ErrorBody}})
    async def readyz() -> dict[str, str]:
        """Whether workers are ready and the model has just answered a real question."""
        if not await answerer.ready():
            raise ApiError(503, "not ready", code="unavailable")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses=_some(401, 403))
    async def show_metrics() -> Response:
        """Prometheus' text format."""
        return Response(await exposition(), media_type=metrics.content_type)

    @app.get("/v1/models", responses=_some(401, 403))
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[_card(answerer)])

    @app.get("/v1/models/{name:path}", responses=_some(401, 403, 404))
    async def model(name: str) -> ModelCard:
        """That model."""
        _check_name(name, answerer)
        return _card(answerer)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
        | _ERRORS,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}
                },
            }
        },
    )
    async def chat(request: Request) -> Response:
        """Answer a conversation, with pictures, under a budget, a deadline, or as the load lets."""
        arrival: Arrival = request.scope["fmray"]
        if len(arrival.body) <= _SMALL:
            asked = parse_request(arrival.body)
        else:
            asked = await asyncio.to_thread(parse_request, arrival.body)
        _check_name(asked.model, answerer)
        chunks = _Chat(answerer, metrics, asked, arrival)
        if asked.stream:
            return await chunks.stream()
        answer = asyncio.ensure_future(chunks.whole())
        leaving = asyncio.ensure_future(gone(request.receive))
        try:
            await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return Response(status_code=_CLIENT_LEFT)
            return JSONResponse(answer.result().model_dump(exclude_none=False))
        finally:
            answer.cancel()
            leaving.cancel()
            await asyncio.gather(answer, leaving, return_exceptions=True)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        metrics.refused(error)
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        text = {404: "there is no such path", 405: "this path does not take this method"}
        found = ApiError(error.status_code, text.get(error.status_code, "the request is wrong"))
        return JSONResponse(found.body, status_code=found.status, headers=error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again after this answer, and the guard logs it.
        found = ApiError(500, "the server failed; it is logged", code="internal_error")
        metrics.refused(found)
        return JSONResponse(found.body, status_code=500)

    app.openapi = functools.partial(_openapi, app, app.openapi)
    return Guard(app, settings, answerer.keys, metrics.refused)


class _Chat:
    """One chat completion on its way out."""

    def __init__(
        self, answerer: Answerer, metrics: Metrics, asked: ChatRequest, arrival: Arrival
    ) -> None:
        self._answerer, self._metrics, self._asked = answerer, metrics, asked
        self._arrival, self._created = arrival, int(time.time())

    def _start(self) -> Any:
        return self._answerer.answer(self._asked, self._arrival)

    async def whole(self) -> ChatCompletion:
        """The answer in one piece."""
        text: list[str] = []
        async with self._start() as live:
            while True:
                item = await live.next()
                if isinstance(item, Decision):
                    continue
                text.append(item.text)
                if item.finished is not None:
                    break
            assert item.result is not None, "the last event has the result"
            usage, cost = self._account(live, item.result)
            return ChatCompletion(
                id=live.ask.id,
                created=self._created,
                model=self._answerer.settings.public_name,
                choices=[
                    Choice(
                        message=AnswerMessage(content="".join(text)),
                        finish_reason=item.finished,
                    )
                ],
                usage=usage,
                fmray=cost,
            )

    async def stream(self) -> StreamingResponse:
        """The answer as server-sent events; refusals come before the first, with their status."""
        async with AsyncExitStack() as stack:
            live = await stack.enter_async_context(self._start())
            await live.next()  # the decision
            row = stack.pop_all()  # from here on the stream's to let go

        async def events() -> AsyncIterator[bytes]:
            async with row:
                try:
                    async for chunks in self._chunks(live):
                        yield _sse(*chunks)
                except ApiError as error:
                    self._metrics.refused(error)
                    yield _sse(JSONResponse(error.body).body, _DONE)
                except Exception as error:  # noqa: BLE001 - the status is sent: say it in the stream
                    log_failure(error)
                    failed = ApiError(500, "the server failed; it is logged", code="internal_error")
                    yield _sse(JSONResponse(failed.body).body, _DONE)

        return _Stream(
            events(),
            live,
            media_type="text/event-stream",
            headers={"x-accel-buffering": "no"},
        )

    async def _chunks(self, live: Live) -> AsyncIterator[list[bytes]]:
        """The chunks, those together that are there together: each message on its way through Ray
        costs milliseconds of this process and of the proxy."""
        chunk = functools.partial(
            ChatChunk,
            id=live.ask.id,
            created=self._created,
            model=self._answerer.settings.public_name,
        )
        options = self._asked.stream_options
        with_usage = options is not None and options.include_usage
        delta = Delta(role="assistant", content="")
        together = [_dump(chunk(choices=[ChunkChoice(delta=delta)]))]
        while True:
            item = await live.next()
            assert not isinstance(item, Decision), "there is one decision"
            if item.text:
                together.append(_dump(chunk(choices=[ChunkChoice(delta=Delta(content=item.text))])))
            if item.finished is not None:
                break
            if together and not live.waiting:
                yield together
                together = []
        assert item.result is not None, "the last event has the result"
        usage, cost = self._account(live, item.result)
        last = ChunkChoice(delta=Delta(), finish_reason=item.finished)
        together.append(_dump(chunk(choices=[last], fmray=None if with_usage else cost)))
        if with_usage:
            together.append(_dump(chunk(choices=[], usage=usage, fmray=cost)))
        yield [*together, _DONE]

    def _account(self, live: Live, result: Result) -> tuple[Usage, Fmray]:
        cost = live.cost(self._asked, result)
        self._metrics.answered(cost, result)
        usage = Usage(
            prompt_tokens=result.prompt_tokens,
            completion_tokens=result.completion_tokens,
            total_tokens=result.prompt_tokens + result.completion_tokens,
            prompt_tokens_details={"cached_tokens": result.prefix_tokens},
        )
        return usage, cost


class _Stream(StreamingResponse):
    """A stream that frees its row even where it was never iterated."""

    def __init__(self, content: AsyncIterator[bytes], live: Live, **options: Any) -> None:
        super().__init__(content, **options)
        self._live = live

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it; whatever ends it, the row is free after."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._live.close()


def _sse(*chunks: bytes) -> bytes:
    """Server-sent events."""
    return b"".join(b"data: " + chunk + b"\n\n" for chunk in chunks)


def _dump(chunk: ChatChunk) -> bytes:
    """A chunk's JSON: absent rather than null, but for what OpenAI always writes."""
    plain = chunk.model_dump(exclude_none=True)
    for choice in plain["choices"]:
        choice.setdefault("finish_reason", None)
    return JSONResponse(plain).body


def _card(answerer: Answerer) -> ModelCard:
    return ModelCard(id=answerer.settings.public_name, created=answerer.created)


def _check_name(name: str, answerer: Answerer) -> None:
    if name != answerer.settings.public_name:
        raise ApiError(
            404,
            f"there is no such model here; GET /v1/models names {answerer.settings.public_name!r}",
            code="model_not_found",
            param="model",
        )


def _some(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _ERRORS[status] for status in statuses}


def _openapi(app: FastAPI, made: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The document with the request's schema, which FastAPI does not see (we read the body)."""
    document = made()
    schemas = document["components"]["schemas"]
    if "ChatRequest" not in schemas:
        schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas["ChatRequest"] = schema
        document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        for path, methods in document["paths"].items():
            if path not in ("/healthz", "/readyz"):
                for operation in methods.values():
                    operation["security"] = [{}, {"bearer": []}]
    return document


@functools.cache
def _page() -> tuple[str, str]:
    """The page, and the content security policy that lets nothing run but what is in it."""
    html = files("fmray.serve").joinpath("page.html").read_text("utf-8")

    def hashes(tag: str) -> str:
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = [hashlib.sha256(text.encode()).digest() for text in inside]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return html, policy

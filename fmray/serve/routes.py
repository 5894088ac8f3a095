"""The web application around a `ChatModel`: routes, streams, the page and the OpenAPI document.

`create_app` returns an ASGI application, which runs in a Ray Serve replica, in uvicorn or in a
test. Large bodies are parsed off the event loop, and a client that disconnects frees its row.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from fmray import __version__
from fmray.engine.policy import Decision
from fmray.engine.requests import Result
from fmray.serve.guards import (
    Guard,
    RequestContext,
    internal_error,
    log_failure,
    wait_for_disconnect,
)
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
from fmray.serve.replica import ChatModel, Generation

_SMALL_BODY = 64 * 1024  # bytes; larger bodies are parsed in a thread
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody}
    for status in (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503)
}
_HTTP_ERRORS = {404: "no such path", 405: "this path does not support this method"}
_DONE = b"[DONE]"  # ends a stream
_CLIENT_DISCONNECTED = 499  # seen by nobody but the log

Exposition = Callable[[], Awaitable[bytes]]


def create_app(model: ChatModel, metrics: Metrics, exposition: Exposition) -> ASGIApp:
    """Return the application with its guard; `exposition` returns the content of `/metrics`."""
    app = FastAPI(title="fmray", version=__version__, docs_url=None, redoc_url=None)
    _add_page(app)
    _add_status_routes(app, model, metrics, exposition)
    _add_model_routes(app, model)
    _add_chat_route(app, model, metrics)
    _add_error_handlers(app, metrics)
    app.openapi = functools.partial(_openapi, app, app.openapi)
    return Guard(app, model.settings, model.keys, metrics.record_error)


# --- Routes ---


def _add_page(app: FastAPI) -> None:
    page, policy = _page()

    @app.get("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": policy})


def _add_status_routes(
    app: FastAPI, model: ChatModel, metrics: Metrics, exposition: Exposition
) -> None:
    @app.get("/healthz", responses=_errors(403, 503))
    async def healthz() -> dict[str, str]:
        """Whether the process and its engine's thread are alive."""
        health = model.worker.health()
        if not health.alive or health.error is not None:
            raise ApiError(503, "the engine has stopped", code="unavailable")
        return {"status": "ok"}

    @app.get("/readyz", responses=_errors(403, 503))
    async def readyz() -> dict[str, str]:
        """Whether the worker accepts requests and the model has answered a question just now."""
        if not await model.ready():
            raise ApiError(503, "not ready", code="unavailable")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses=_errors(401, 403))
    async def show_metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(await exposition(), media_type=metrics.content_type)


def _add_model_routes(app: FastAPI, model: ChatModel) -> None:
    # The share of the layers that always run changes little with the length.
    min_budget = max(model.model.cost.min_budget(tokens) for tokens in (1, 1024))
    card = ModelCard(id=model.settings.public_name, created=model.created, min_budget=min_budget)

    @app.get("/v1/models", responses=_errors(401, 403))
    async def list_models() -> ModelList:
        """The one served model."""
        return ModelList(data=[card])

    @app.get("/v1/models/{name:path}", responses=_errors(401, 403, 404))
    async def get_model(name: str) -> ModelCard:
        """The served model, if this is its name."""
        _check_name(name, model)
        return card


def _add_chat_route(app: FastAPI, model: ChatModel, metrics: Metrics) -> None:
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
        """Answer a conversation with images, under a budget, a deadline or the current load."""
        context: RequestContext = request.scope["fmray"]
        if len(context.body) <= _SMALL_BODY:
            chat_request = parse_request(context.body)
        else:
            chat_request = await asyncio.to_thread(parse_request, context.body)
        _check_name(chat_request.model, model)
        response = _ChatResponse(model, metrics, chat_request, context)

        # Wait for the response or the disconnect, whichever comes first. A stream watches for the
        # disconnect itself once it has started.
        respond = response.stream if chat_request.stream else response.complete
        answer = asyncio.ensure_future(respond())
        disconnect = asyncio.ensure_future(wait_for_disconnect(request.receive))
        try:
            await asyncio.wait({answer, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else Response(status_code=_CLIENT_DISCONNECTED)
        finally:
            answer.cancel()
            disconnect.cancel()
            await asyncio.gather(answer, disconnect, return_exceptions=True)


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(ApiError)
    async def handle_api_error(request: Request, error: ApiError) -> JSONResponse:
        metrics.record_error(error)
        if error.status == 500:
            log_failure(error, request.scope["fmray"])
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def handle_http_error(request: Request, error: HTTPException) -> JSONResponse:
        text = _HTTP_ERRORS.get(error.status_code, "invalid request")
        body = ApiError(error.status_code, text).body
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def handle_bug(request: Request, error: Exception) -> JSONResponse:
        # Starlette re-raises the error after this response, and the guard logs it.
        response = internal_error()
        metrics.record_error(response)
        return JSONResponse(response.body, status_code=response.status)


# --- Chat completions ---


class _ChatResponse:
    """The response to one chat completion request."""

    def __init__(
        self, model: ChatModel, metrics: Metrics, request: ChatRequest, context: RequestContext
    ) -> None:
        self._model, self._metrics, self._request = model, metrics, request
        self._context, self._created = context, int(time.time())

    def _generate(self) -> AbstractAsyncContextManager[Generation]:
        return self._model.generate(self._request, self._context)

    async def complete(self) -> JSONResponse:
        """Return the complete answer."""
        text: list[str] = []
        async with self._generate() as generation:
            while True:
                item = await generation.next()
                if isinstance(item, Decision):
                    continue
                text.append(item.text)
                if item.finished is not None:
                    break
            assert item.result is not None, "the last event has the result"
            usage, cost = self._account(generation, item.result)
            message = AnswerMessage(content="".join(text))
            completion = ChatCompletion(
                id=generation.ask.id,
                created=self._created,
                model=self._model.settings.public_name,
                choices=[Choice(message=message, finish_reason=item.finished)],
                usage=usage,
                fmray=cost,
            )
            return JSONResponse(completion.model_dump(exclude_none=False))

    async def stream(self) -> StreamingResponse:
        """Return the answer as server-sent events.

        Waits for the engine's decision first, so that a refusal still has its HTTP status.
        """
        async with AsyncExitStack() as stack:
            generation = await stack.enter_async_context(self._generate())
            await generation.next()  # the decision
            row = stack.pop_all()  # from here on the stream frees the row

        async def events() -> AsyncIterator[bytes]:
            async with row:
                try:
                    async for chunks in self._chunks(generation):
                        yield _sse(*chunks)
                except ApiError as error:
                    self._metrics.record_error(error)
                    if error.status == 500:
                        log_failure(error, self._context)
                    yield _sse(JSONResponse(error.body).body, _DONE)
                except Exception as error:  # noqa: BLE001 - the status is sent: report in the stream
                    log_failure(error, self._context)
                    yield _sse(JSONResponse(internal_error().body).body, _DONE)

        return _Stream(
            events(),
            generation,
            media_type="text/event-stream",
            headers={"x-accel-buffering": "no"},
        )

    async def _chunks(self, generation: Generation) -> AsyncIterator[list[bytes]]:
        """Yield the chunks of the stream, with those that are ready at the same time together.

        Each message through Ray costs milliseconds of this process and of the proxy.
        """
        chunk = functools.partial(
            ChatChunk,
            id=generation.ask.id,
            created=self._created,
            model=self._model.settings.public_name,
        )
        options = self._request.stream_options
        with_usage = options is not None and options.include_usage

        # Role, then text as it comes
        delta = Delta(role="assistant", content="")
        ready = [_dump(chunk(choices=[ChunkChoice(delta=delta)]))]
        while True:
            item = await generation.next()
            assert not isinstance(item, Decision), "there is one decision"
            if item.text:
                ready.append(_dump(chunk(choices=[ChunkChoice(delta=Delta(content=item.text))])))
            if item.finished is not None:
                break
            if ready and not generation.waiting:
                yield ready
                ready = []

        # Reason, cost and, if requested, token counts
        assert item.result is not None, "the last event has the result"
        usage, cost = self._account(generation, item.result)
        last = ChunkChoice(delta=Delta(), finish_reason=item.finished)
        ready.append(_dump(chunk(choices=[last], fmray=None if with_usage else cost)))
        if with_usage:
            ready.append(_dump(chunk(choices=[], usage=usage, fmray=cost)))
        yield [*ready, _DONE]

    def _account(self, generation: Generation, result: Result) -> tuple[Usage, Fmray]:
        cost = generation.cost(result, with_plan=self._request.plan)
        self._metrics.record_answer(cost, result)
        usage = Usage(
            prompt_tokens=result.prompt_tokens,
            completion_tokens=result.completion_tokens,
            total_tokens=result.prompt_tokens + result.completion_tokens,
            prompt_tokens_details={"cached_tokens": result.prefix_tokens},
        )
        return usage, cost


class _Stream(StreamingResponse):
    """A streaming response that frees its row even if its content is never iterated."""

    def __init__(
        self, content: AsyncIterator[bytes], generation: Generation, **options: Any
    ) -> None:
        super().__init__(content, **options)
        self._generation = generation

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the stream, then free the row however the stream ended."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


def _sse(*chunks: bytes) -> bytes:
    """Return chunks as server-sent events."""
    return b"".join(b"data: " + chunk + b"\n\n" for chunk in chunks)


def _dump(chunk: ChatChunk) -> bytes:
    """Return a chunk's JSON, without null fields except those that OpenAI always writes."""
    plain = chunk.model_dump(exclude_none=True)
    for choice in plain["choices"]:
        choice.setdefault("finish_reason", None)
    return JSONResponse(plain).body


def _check_name(name: str, model: ChatModel) -> None:
    if name != model.settings.public_name:
        raise ApiError(
            404,
            f"no such model; this server serves {model.settings.public_name!r}",
            code="model_not_found",
            param="model",
        )


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI descriptions of these error statuses."""
    return {status: _ERRORS[status] for status in statuses}


# --- OpenAPI document and page ---


def _openapi(app: FastAPI, make_document: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the document with the request's schema.

    FastAPI does not know it, because the guard reads the body.
    """
    document = make_document()
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
    """Return the page and a content security policy that runs only the page's own code."""
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

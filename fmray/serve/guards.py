"""What stands before every request: keys, sizes, times, and what errors look like.

In: raw ASGI requests, from anybody. Out: requests whose caller is known and whose body is whole and
small enough, handed on as `Arrival` in the scope; and every error as JSON in OpenAI's shape. Ray
Serve's proxy limits neither body nor callers, and obeys timeout headers of clients: here a request
has until `request_timeout_s` after its first byte, whatever its headers say.

Nothing that a client sent is ever logged; a failure is logged as its type and its place.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fmray.config.serve import ServeConfig
from fmray.serve.keys import Caller, KeyRing
from fmray.serve.openai import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_logger = logging.getLogger("fmray.serve")
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz"})  # no key asked for; none says anything secret
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


@dataclass
class Arrival:
    """What the guard knows of a request. time: `time.monotonic()` of its first byte here.

    The body is let go as soon as it is not needed: `release`.
    """

    time: float
    caller: Caller
    held: Held
    body: bytes = b""
    size: int = 0

    def grow(self, size: int) -> None:
        """More of the body is here. Raises ApiError (503) where all together are too much."""
        self.held.size += size
        self.size += size
        if self.held.size > self.held.limit:
            raise ApiError(
                503,
                "too many large requests at once; ask again",
                code="overloaded",
                headers={"retry-after": "1"},
            )

    def release(self) -> None:
        """The body is not needed any more."""
        self.held.size -= self.size
        self.body, self.size = b"", 0


@dataclass
class Held:
    """Bytes of all bodies that are in memory now, and the most that may be."""

    limit: int
    size: int = 0


class Guard:
    """ASGI middleware, outside of everything else."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServeConfig,
        keys: KeyRing,
        count: Callable[[ApiError], None],
    ) -> None:
        """count: told of every error that is answered here."""
        self._app, self._settings, self._keys, self._count = app, settings, keys, count
        self._held = Held(settings.max_bodies_mib * 2**20)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; never raises for what a client does."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                present = {name.lower() for name, _ in message.get("headers", ())}
                extra = [header for header in _HEADERS if header[0] not in present]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        arrival = Arrival(time.monotonic(), Caller("-"), self._held)
        try:
            if not await self._admit(scope, receive, arrival):
                return  # the client left
            scope["fmray"] = arrival
            await self._app(scope, _after_body(receive), guarded_send)
        except ApiError as error:
            self._count(error)
            if not started:
                await respond(error, guarded_send)
        except Exception as error:  # noqa: BLE001 - the last place where it can be kept from logs
            log_failure(error)
            if not started:
                await respond(
                    ApiError(500, "the server failed; it is logged", code="internal_error"),
                    guarded_send,
                )
        finally:
            arrival.release()

    async def _admit(self, scope: Scope, receive: Receive, arrival: Arrival) -> bool:
        """Find the caller and read the body; False where the client left meanwhile."""
        headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))  # the first of equal names
        self._check_origin(headers)
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path not in OPEN_PATHS:
            found = self._keys.find(headers.get(b"authorization"))
            if found is None:
                raise ApiError(
                    401,
                    "a key is needed: Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
            arrival.caller = found
        if scope["method"] != "POST":
            return True
        self._check_kind(headers)
        try:
            async with asyncio.timeout(self._settings.read_timeout_s):
                body = await self._read(headers, receive, arrival)
        except TimeoutError:
            limit = self._settings.read_timeout_s
            raise ApiError(
                408, f"the body did not arrive within {limit:g} s", code="request_timeout"
            ) from None
        if body is None:
            return False
        arrival.body = body
        return True

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """A page of another site must not use a server on its visitor's machine."""
        origin = headers.get(b"origin")
        if origin is not None and origin.partition(b"://")[2] != headers.get(b"host"):
            raise ApiError(403, "requests of other sites' pages are refused", code="origin")

    def _check_kind(self, headers: dict[bytes, bytes]) -> None:
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise ApiError(415, "content-type must be application/json", code="content_type")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise ApiError(415, "compressed bodies are not taken", code="content_encoding")

    async def _read(
        self, headers: dict[bytes, bytes], receive: Receive, arrival: Arrival
    ) -> bytes | None:
        """The whole body, None where the client left; 413 as soon as it is known to be too long."""
        limit = self._settings.max_body_mib * 2**20
        said = headers.get(b"content-length", b"0")
        if not said.isdigit():
            raise ApiError(400, "content-length is no number", code="content_length")
        chunks: list[bytes] = []
        while True:
            if arrival.size > limit or (len(said) > 18 or int(said) > limit):
                raise ApiError(
                    413,
                    f"the body is larger than {self._settings.max_body_mib} MiB",
                    code="body_too_large",
                    headers={"connection": "close"},
                )
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            arrival.grow(len(chunks[-1]))
            if not message.get("more_body", False) and arrival.size <= limit:
                return b"".join(chunks)


def _after_body(receive: Receive) -> Receive:
    """A `receive` for those inside: no body (it is in `Arrival`), then what comes: a disconnect."""
    given = False

    async def after() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": b"", "more_body": False}
        return await receive()

    return after


async def gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def respond(error: ApiError, send: Send) -> None:
    """Send an error as a whole answer."""
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    headers |= error.headers
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def log_failure(error: BaseException) -> None:
    """Log a failure without its message, which may quote a prompt: type and places, all causes."""
    _logger.error("request failed: %s", describe(error))


def describe(error: BaseException) -> str:
    """Type and place of an error and of what caused it, without any message."""
    parts: list[str] = []
    seen: set[int] = set()
    cause: Any = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        frames = traceback.extract_tb(cause.__traceback__)[-6:]
        places = " > ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames)
        parts.append(f"{type(cause).__name__} at {places or 'unknown'}")
        cause = cause.__cause__ or cause.__context__
    return "; caused by ".join(parts)

"""ASGI middleware before every request: keys, body size, read timeout, error responses.

`Guard` identifies the caller, reads the complete body and passes both on as a `RequestContext` in
the scope (key `fmray`). Every error becomes JSON in OpenAI's shape. Ray Serve's proxy limits
neither body size nor callers, and it obeys timeout headers of clients; the limits here apply
whatever the headers say. `fmray.serve.connections` limits what comes before: headers and
connections.

Nothing that a client sent is ever logged, except a well-formed request id: a failure is logged as
its id, caller, type and stack frames.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import secrets
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fmray.config.serve import ServeConfig
from fmray.runtime.files import dumps
from fmray.serve.keys import Caller, KeyRing
from fmray.serve.openai import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_logger = logging.getLogger("fmray.serve")
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz"})  # need no key and return nothing secret
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


@dataclass
class BodyMemory:
    """Memory that the bodies of all requests occupy."""

    limit: int  # bytes, of all callers
    caller_limit: int  # bytes, of each
    size: int = 0  # bytes in use
    sizes: Counter[str] = field(default_factory=Counter)  # owner -> bytes in use

    def reserve(self, owner: str, size: int) -> None:
        """Account for `size` more bytes.

        Raises:
            ApiError: 429 if the owner's bodies exceed their limit, 503 if those of all do.
        """
        self.size += size
        self.sizes[owner] += size
        if self.sizes[owner] > self.caller_limit:
            status, text = 429, "you send too many large requests at once; retry"
        elif self.size > self.limit:
            status, text = 503, "too many large requests at once; retry"
        else:
            return
        raise ApiError(status, text, code="overloaded", headers={"retry-after": "1"})

    def release(self, owner: str, size: int) -> None:
        """Account for `size` bytes less."""
        self.size -= size
        self.sizes[owner] -= size
        if not self.sizes[owner]:
            del self.sizes[owner]


@dataclass
class RequestContext:
    """What the guard knows about a request."""

    id: str
    arrival_time: float  # time.monotonic() at its first byte
    caller: Caller
    memory: BodyMemory
    owner: str = ""  # of the body: the caller's name, or the client's address without keys
    body: bytes = b""
    size: int = 0  # bytes of the body received so far

    def reserve(self, size: int) -> None:
        """Account for `size` more bytes of the body; ApiError if that exceeds a limit."""
        self.size += size
        self.memory.reserve(self.owner, size)

    def release(self) -> None:
        """Drop the body."""
        self.memory.release(self.owner, self.size)
        self.body, self.size = b"", 0


class Guard:
    """The outermost ASGI middleware."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServeConfig,
        keys: KeyRing,
        on_error: Callable[[ApiError], None],
    ) -> None:
        """Wrap `app`; `on_error` is called with every error that the guard responds with."""
        self._app, self._settings, self._keys, self._on_error = app, settings, keys, on_error
        self._hosts = {name.lower() for name in settings.allowed_hosts}
        self._memory = BodyMemory(
            settings.max_bodies_mib * 2**20, settings.caller_bodies_mib * 2**20
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; never raises for what a client does."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        head = scope["method"] == "HEAD"  # answered as GET, without the body
        request_id, extra_headers = _request_id(scope["headers"])

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                present = {name.lower() for name, _ in message.get("headers", ())}
                extra = [header for header in extra_headers if header[0] not in present]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            elif head:
                message = {**message, "body": b""}
            await send(message)

        context = RequestContext(request_id, time.monotonic(), Caller("-"), self._memory)
        try:
            if not await self._admit(scope, receive, context):
                return  # the client disconnected
            inner = {**scope, "fmray": context, "method": "GET" if head else scope["method"]}
            await self._app(inner, _after_body(receive), guarded_send)
        except ApiError as error:
            self._on_error(error)
            if not started:
                await send_error(error, guarded_send)
        except Exception as error:  # noqa: BLE001 - above this, servers log messages with prompts
            log_failure(error, context)
            if not started:
                await send_error(internal_error(), guarded_send)
        finally:
            context.release()

    async def _admit(self, scope: Scope, receive: Receive, context: RequestContext) -> bool:
        """Identify the caller and read the body; return False if the client disconnected."""
        headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))  # first of equal names wins
        self._check_host([value for name, value in scope["headers"] if name == b"host"])
        self._check_origin(headers)
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path in OPEN_PATHS:
            if scope["method"] not in ("GET", "HEAD"):
                close = {"allow": "GET, HEAD", "connection": "close"}
                raise ApiError(405, "this path supports GET and HEAD only", headers=close)
        else:
            caller = self._keys.find(headers.get(b"authorization"))
            if caller is None:
                raise ApiError(
                    401,
                    "missing or unknown API key; send Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
            context.caller = caller
            client = scope.get("client") or ("",)
            context.owner = client[0] if self._keys.open else caller.name
        if scope["method"] != "POST":
            return True
        self._check_content(headers)
        try:
            async with asyncio.timeout(self._settings.read_timeout_s):
                body = await self._read_body(headers, receive, context)
        except TimeoutError:
            limit = self._settings.read_timeout_s
            raise ApiError(
                408, f"the body did not arrive within {limit:g} s", code="request_timeout"
            ) from None
        if body is None:
            return False
        context.body = body
        return True

    def _check_host(self, hosts: list[bytes]) -> None:
        """Reject names that a page can point at this machine after it was loaded (DNS rebinding).

        Such a page is of the same origin as the server; only the name reveals it. A page has no
        key, so a server with keys checks names only if the settings list some.
        """
        if len(hosts) > 1:
            raise ApiError(400, "there is more than one Host header", code="host")
        check = self._keys.open or self._hosts
        if hosts and check and not _host_is_known(hosts[0], self._hosts):
            raise ApiError(
                403,
                "this server accepts no such Host; use its address or localhost, or list the name "
                "in its setting allowed_hosts",
                code="host",
            )

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """Reject pages of other sites: they must not use a server on their visitor's machine."""
        origin = headers.get(b"origin")
        if origin is not None and origin.partition(b"://")[2] != headers.get(b"host"):
            raise ApiError(403, "cross-origin requests are not allowed", code="origin")

    def _check_content(self, headers: dict[bytes, bytes]) -> None:
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise ApiError(415, "content-type must be application/json", code="content_type")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise ApiError(415, "compressed bodies are not supported", code="content_encoding")

    async def _read_body(
        self, headers: dict[bytes, bytes], receive: Receive, context: RequestContext
    ) -> bytes | None:
        """Return the complete body, or None if the client disconnected.

        Raises:
            ApiError: 413 as soon as the body is known to be too large, before it is read.
        """
        limit = self._settings.max_body_mib * 2**20
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit():
            raise ApiError(400, "content-length is not a number", code="content_length")
        chunks: list[bytes] = []
        while True:
            if context.size > limit or len(declared) > 18 or int(declared) > limit:
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
            context.reserve(len(chunks[-1]))
            if not message.get("more_body", False) and context.size <= limit:
                return b"".join(chunks)


_HOST = re.compile(r"(?:\[(?P<ipv6>[0-9a-f:.]+)\]|(?P<name>[^:\[\]]+?)\.?)(?::[0-9]*)?")


def _host_is_known(host: bytes, allowed: set[str]) -> bool:
    """Return whether a Host header has an address, localhost or an allowed name."""
    match = _HOST.fullmatch(host.decode("latin-1").lower())
    if match is None:
        return False
    name = match["ipv6"] or match["name"]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name in allowed
    return True


def _request_id(headers: list[tuple[bytes, bytes]]) -> tuple[str, list[tuple[bytes, bytes]]]:
    """Return the request's id, and the headers of its response.

    A client's id is kept if it is well-formed. Ray Serve adds one to each request and returns it.
    """
    for name, value in headers:
        if name == b"x-request-id" and re.fullmatch(rb"[\w.-]{1,64}", value, re.ASCII):
            return value.decode(), [*_HEADERS]
    made = f"req-{secrets.token_hex(12)}"
    return made, [*_HEADERS, (b"x-request-id", made.encode())]


def _after_body(receive: Receive) -> Receive:
    """Return a `receive` for the inner application: an empty body, then the disconnect.

    The body itself is in the `RequestContext`.
    """
    body_sent = False

    async def after() -> Message:
        nonlocal body_sent
        if not body_sent:
            body_sent = True
            return {"type": "http.request", "body": b"", "more_body": False}
        return await receive()

    return after


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


def internal_error() -> ApiError:
    """Return the response to a failure of the server; the log has its type and stack frames."""
    return ApiError(500, "internal server error; see the server's log", code="internal_error")


async def send_error(error: ApiError, send: Send) -> None:
    """Send an error as a complete response."""
    body = dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    headers |= error.headers
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def log_failure(error: BaseException, context: RequestContext) -> None:
    """Log a failure as types and stack frames: its message may quote a prompt."""
    detail = f" ({error.detail})" if isinstance(error, ApiError) and error.detail else ""
    _logger.error(
        "request failed: id %s, caller %s: %s%s",
        context.id, context.caller.name, describe(error), detail,
    )  # fmt: skip


def describe(error: BaseException) -> str:
    """Return the types and stack frames of an error and its causes, without any message."""
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

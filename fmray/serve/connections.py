"""Limits on HTTP connections, before the first byte reaches the application.

uvicorn's fast parser (httptools) reads headers of any size and waits for them without a limit.
`LimitedProtocol` bounds a request's head in bytes, headers and seconds, the number of connections
that wait for one (idle ones included), and the time for which a client reads nothing of its
response. `fmray serve --local` uses it. Ray Serve's proxy runs uvicorn too, in a process of its
own, which calls `limit_connections` if the environment variable `HOOK` names it when the node
starts: `fmray serve` and the image of `cluster/Dockerfile` set it.
"""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http import auto
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from fmray.runtime.files import dumps

HOOK = ("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "fmray.serve.connections:limit_connections")
KEEP_ALIVE_S = 75  # clients keep pooled connections for up to a minute
MAX_HEAD_BYTES = 64 * 1024  # of the request line and all headers
MAX_HEADERS = 100
HEAD_TIMEOUT_S = 15.0
SEND_TIMEOUT_S = 60.0  # for a client to read the next bytes of a response
MAX_WAITING = 512  # connections without a complete head; the usual limit is 1024 open files

_INVALID = 400, "invalid HTTP request", "invalid_http"
_TOO_LARGE = 431, f"headers of more than {MAX_HEAD_BYTES} bytes", "headers_too_large"
_TOO_MANY = 431, f"more than {MAX_HEADERS} headers", "headers_too_large"
_VERSION = 400, "the HTTP version is not 1.0 or 1.1", "http_version"

# Connections that wait for a head, or for the rest of a body after its response; oldest first.
# Those between two requests count too: else a connection with one short request would escape.
_waiting: dict[LimitedProtocol, None] = {}


def limit_connections() -> list[Any]:
    """Make uvicorn use `LimitedProtocol` in this process; return no middlewares, for Ray."""
    auto.AutoHTTPProtocol = LimitedProtocol
    return []


class _RefusedError(Exception):
    """Raised in a callback of the parser, which then stops."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection of uvicorn with a limited head."""

    _timer: TimerHandle | None = None  # of a head
    _send_timer: TimerHandle | None = None
    _outside = 0  # bytes received since the head began or the body had its last content
    _refusal = _INVALID

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        if self._send_timer is not None:
            self._send_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes."""
        self._outside += len(data)
        super().data_received(data)
        # The parser collects names, values and trailers of any length before it calls back.
        if self._outside > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refusal = _TOO_LARGE
            self.send_400_response("")
        # A line break between two requests stops uvicorn's own timer.
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._wait()

    def _wait(self) -> None:
        """Close the connection in `HEAD_TIMEOUT_S`, and the oldest one if too many wait."""
        self._stop_waiting()
        if self.transport.is_closing() or self.transport.get_protocol() is not self:  # a WebSocket
            return
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)
        self._count()

    def _count(self) -> None:
        _waiting[self] = None
        if len(_waiting) > MAX_WAITING:
            oldest = next(iter(_waiting))
            oldest._stop_waiting()
            oldest.transport.abort()

    def _stop_waiting(self) -> None:
        _waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- Callbacks of the parser ---

    def on_message_begin(self) -> None:
        """Start a request."""
        self._outside = 0
        self._wait()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header, or a trailer."""
        if len(self.headers) >= MAX_HEADERS:
            self._refuse(_TOO_MANY)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the application."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._refuse(_TOO_LARGE)
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            self._refuse(_VERSION)
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Pass a part of the body on."""
        self._outside = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._stop_waiting()
        super().on_message_complete()

    def _refuse(self, refusal: tuple[int, str, str]) -> None:
        self._refusal = refusal
        raise _RefusedError

    # --- Responses ---

    def pause_writing(self) -> None:
        """Close the connection unless the client reads within `SEND_TIMEOUT_S`."""
        super().pause_writing()
        self._send_timer = self.loop.call_later(SEND_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Continue to send."""
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """Respond to a request that is not parsed, in OpenAI's shape, and close the connection."""
        status, message, code = self._refusal
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        body = dumps({"error": error}).encode()
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self.transport.write(
                STATUS_LINE[status]
                + b"content-type: application/json\r\nconnection: close\r\n"
                + b"content-length: %d\r\n\r\n" % len(body)
                + body
            )
        self.transport.close()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of a body that nobody reads."""
        super().on_response_complete()
        if not self.cycle.response_complete or self.transport.is_closing():
            return
        if self.cycle.more_body:
            self._wait()
        else:
            self._count()  # uvicorn's own timer ends it

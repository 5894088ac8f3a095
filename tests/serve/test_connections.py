"""Limits on connections: the size of a request's head, half-open connections, unread bodies."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import httpx
import pytest
from support.serving import serving, wait_until
from uvicorn.config import Config

from fmray.serve import connections
from fmray.serve.connections import HOOK, LimitedProtocol

GET = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"
POST = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\n"


LARGE = 30 * 2**20  # more than the kernel buffers


async def application(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    """Respond with the size of the body; at once, without reading it, to /early."""
    if scope["type"] != "http":
        return
    size, more = 0, scope["path"] != "/early"
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    body = b"a" * LARGE if scope["path"] == "/large" else str(size).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(application) as url:
        yield url


@pytest.fixture
def connect(url: str) -> Iterator[Callable[[bytes], socket.socket]]:
    """Return a function that opens a connection and sends bytes."""
    with contextlib.ExitStack() as stack:

        def opened(data: bytes) -> socket.socket:
            host, port = url.removeprefix("http://").split(":")
            client = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            send(client, data)
            return client

        yield opened


def send(client: socket.socket, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # the server has refused and closed
        client.sendall(data)


def received(client: socket.socket) -> bytes:
    """Return all bytes until the server closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(65536):
            data += part
    return data


def is_open(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def test_requests_within_the_limits_are_answered(url: str) -> None:
    with httpx.Client(base_url=url) as client:
        for number in range(3):  # one connection
            headers = {f"x-{index}": "a" * 500 for index in range(90)}
            assert client.get("/", headers=headers).text == "0"
            assert client.post("/", content=b"a" * (300_000 * number)).text == str(300_000 * number)

        def chunks() -> Iterator[bytes]:
            yield from [b"a"] * 1000
            yield b"a" * 300_000

        assert client.post("/", content=chunks()).text == "301000"


@pytest.mark.parametrize(
    ("head", "status"),
    {
        "one header without an end": (GET + b"X-A: " + b"a" * 2**20, 431),
        "many long headers without an end": (GET + (b"X-A: " + b"a" * 9000 + b"\r\n") * 60, 431),
        "a long header": (GET + b"X-A: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        "101 headers": (GET + b"".join(b"X-%d: a\r\n" % i for i in range(100)) + b"\r\n", 431),
        "a long name": (GET + b"a" * 2**20, 431),
        "a long path": (b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\n\r\n", 431),
        "no version": (b"GET /\r\n\r\n", 400),
        "no HTTP": (b"\x16\x03\x01 hello\r\n\r\n", 400),
    }.values(),
)
def test_a_head_beyond_the_limits_is_refused(
    connect: Callable[[bytes], socket.socket], head: bytes, status: int
) -> None:
    response = received(connect(head))
    if response:  # the reset may overtake it: the client was still sending
        assert response.startswith(b"HTTP/1.1 %d " % status) and b'"error"' in response


def test_long_trailers_close_the_connection(connect: Callable[[bytes], socket.socket]) -> None:
    client = connect(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-A: ")
    for _ in range(20):
        send(client, b"a" * 65_536)
    received(client)  # ends


def test_half_open_connections_are_closed_and_requests_are_not(
    connect: Callable[[bytes], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.3)
    silent, half, blank = connect(b""), connect(GET + b"X-"), connect(GET + b"\r\n")
    slow_body = connect(POST + b"Content-Length: 2\r\n\r\na")
    time.sleep(0.1)
    send(blank, b"\r\n")  # stops uvicorn's timer between two requests
    unread = connect(b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\na")
    assert unread.recv(100).startswith(b"HTTP/1.1 200")
    blank.recv(1000)
    for client in (silent, half, blank, unread):
        wait_until(lambda client=client: not is_open(client), 5, "the end of a connection")
    send(slow_body, b"b")  # the guard limits the time of a body
    assert slow_body.recv(1000).endswith(b"2")
    closed = [known for known in connections._waiting if known.transport.is_closing()]
    assert not closed, "a closed connection is remembered"


def test_clients_that_do_not_read_are_disconnected(
    connect: Callable[[bytes], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = GET.replace(b"/ ", b"/large ", 1) + b"Connection: close\r\n\r\n"
    assert len(received(connect(large))) > LARGE
    monkeypatch.setattr(connections, "SEND_TIMEOUT_S", 0.3)
    client = connect(large)
    time.sleep(0.6)
    assert len(received(client)) < LARGE


def test_the_oldest_of_too_many_half_open_connections_is_closed(
    connect: Callable[[bytes], socket.socket], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_WAITING", 5)
    clients = [connect(GET + b"X-") for _ in range(9)]
    wait_until(lambda: [is_open(client) for client in clients] == [False] * 4 + [True] * 5, 5, "it")
    assert httpx.get(url).text == "0"


def test_idle_connections_count_and_the_oldest_is_closed(
    connect: Callable[[bytes], socket.socket], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_WAITING", 5)
    clients = []
    for _ in range(9):
        clients.append(connect(GET + b"\r\n"))
        assert clients[-1].recv(1000).endswith(b"0")
    wait_until(lambda: [is_open(client) for client in clients] == [False] * 4 + [True] * 5, 5, "it")
    assert httpx.get(url).text == "0"


def test_the_hook_of_ray_changes_uvicorns_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    from uvicorn.protocols.http import auto

    monkeypatch.setattr(auto, "AutoHTTPProtocol", auto.AutoHTTPProtocol)
    module, _, name = HOOK[1].partition(":")
    assert getattr(import_module(module), name)() == [], "Ray expects a list of middlewares"
    config = Config(application)
    config.load()
    assert config.http_protocol_class is LimitedProtocol

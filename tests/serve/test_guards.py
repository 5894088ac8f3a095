"""The guard before every request: keys, body size, timeouts, headers, error responses."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.serving import ScriptedWorker, chat, client_of

from fmray.engine.fairness import CallerLimits
from fmray.serve.keys import VARIABLE, Caller, KeyRing, load_keys

KEY, OTHER = "sk-0123456789abcdef", "sk-fedcba9876543210"


def send(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client_of(app) as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def code(response: httpx.Response) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["code"]


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    path = tmp_path / "keys.yaml"
    hashed = hashlib.sha256(OTHER.encode()).hexdigest()
    path.write_text(
        f"- {{name: alice, key: {KEY}, requests_per_second: 2, max_budget: '0.8'}}\n"
        f"- {{name: bob, sha256: {hashed}}}\n"
    )
    return load_keys(path)


# -- keys --------------------------------------------------------------------------------------


def test_keys_file_with_limits(ring: KeyRing) -> None:
    alice = ring.find(b"Bearer " + KEY.encode())
    assert alice == Caller("alice", CallerLimits(requests_per_second=2, max_budget="0.8"))
    assert ring.find(b"bearer " + OTHER.encode()) == Caller("bob")
    for wrong in (None, b"", b"Bearer", KEY.encode(), b"Basic " + KEY.encode(), b"Bearer \xff\x00"):
        assert ring.find(wrong) is None
    assert KEY not in repr(vars(ring)), "a key is in memory, not only its hash"


def test_every_key_is_compared(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared = []

    def counting(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for key in (KEY, OTHER, "nothing"):
        ring.find(b"Bearer " + key.encode())
    assert compared == [(32, 32)] * 6


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert load_keys(None).open
    monkeypatch.setenv(VARIABLE, f" {KEY}, {OTHER} ,")
    ring = load_keys(None)
    assert ring.find(f"Bearer {OTHER}".encode()) == Caller("key2")
    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(ValueError, match="fewer than 16"):
        load_keys(None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{a: 1}",
        "- {name: a}",
        f"- {{name: a, key: {KEY}, sha256: {'0' * 64}}}",
        "- {name: a, key: short}",
        f"- {{name: a, key: {KEY}, burts: 3}}",
        f"- {{name: a, key: {KEY}, max_budget: '7'}}",
        f"- {{name: '-health', key: {KEY}}}",
        f"[{{name: a, key: {KEY}}}, {{name: a, key: {OTHER}}}]",
        f"- {{name: a, key: [{KEY}}}",
    ],
)
def test_invalid_keys_file_is_an_error_without_the_key(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as raised:
        load_keys(path)
    assert KEY not in str(raised.value) and "\n" not in str(raised.value)


def test_only_page_and_health_work_without_a_key(
    build_app: Callable[..., Any], worker: ScriptedWorker, ring: KeyRing
) -> None:
    app = build_app(worker, ring)
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        response = send(app, "GET", path)
        assert response.status_code == 401 and code(response) == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/healthz", "/readyz"):
        assert send(app, "GET", path).status_code == 200
    good = {"authorization": f"Bearer {KEY}"}
    assert send(app, "GET", "/v1/models", headers=good).json()["data"][0]["id"] == "tiny"
    assert send(app, "POST", "/v1/chat/completions", json=chat(), headers=good).status_code == 200
    assert worker.asks[-1].caller == "alice"


def test_body_is_not_read_without_a_key(
    build_app: Callable[..., Any], worker: ScriptedWorker, ring: KeyRing
) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield b" " * 2**16

    response = send(
        build_app(worker, ring),
        "POST",
        "/v1/chat/completions",
        content=body(),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 401 and read == 0


def test_open_paths_take_get_and_head_only(
    build_app: Callable[..., Any], worker: ScriptedWorker, ring: KeyRing
) -> None:
    """Nobody without a key can make the server read a body."""

    async def body() -> AsyncIterator[bytes]:
        pytest.fail("the body is read")
        yield b""

    app = build_app(worker, ring)
    for path in ("/", "/healthz", "/readyz"):
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            response = send(app, method, path, content=body())
            assert response.status_code == 405 and response.headers["allow"] == "GET, HEAD"
            assert response.headers["connection"] == "close"
        got, head = send(app, "GET", path), send(app, "HEAD", path)
        assert (got.status_code, head.status_code, head.content) == (200, 200, b"")
        assert head.headers["content-length"] == str(len(got.content))
    assert send(app, "HEAD", "/v1/models").status_code == 401


# -- bodies ------------------------------------------------------------------------------------


def post(app: Any, content: Any, **headers: str) -> httpx.Response:
    headers = {"content-type": "application/json"} | headers
    return send(app, "POST", "/v1/chat/completions", content=content, headers=headers)


def test_large_body_is_rejected_by_its_declared_length(app: Any) -> None:
    response = post(app, b"x", **{"content-length": str(300 * 2**20)})
    assert response.status_code == 413 and code(response) == "body_too_large"


def test_large_body_without_length_is_rejected_while_reading(app: Any) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(300):
            read += 2**20
            yield b" " * 2**20

    response = post(app, body())
    assert response.status_code == 413
    assert read <= 18 * 2**20, "more was read than the limit of 16 MiB"


def test_body_of_exactly_the_limit_is_accepted(
    build_app: Callable[..., Any], worker: ScriptedWorker
) -> None:
    app = build_app(worker, max_body_mib=1)
    body = json.dumps(chat()).encode()
    assert post(app, body + b" " * (2**20 - len(body))).status_code == 200
    assert post(app, body + b" " * (2**20 + 1 - len(body))).status_code == 413


def test_slow_body_times_out(build_app: Callable[..., Any], worker: ScriptedWorker) -> None:
    async def body() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.05)

    start = time.monotonic()
    response = post(build_app(worker, read_timeout_s=0.3), body())
    assert response.status_code == 408 and code(response) == "request_timeout"
    assert time.monotonic() - start < 5


def post_slowly(app: Any, *senders: tuple[str, str]) -> list[int]:
    """Send a body of 0.9 MiB by each (address, key) at the same time; return the statuses."""
    complete = json.dumps(chat()).encode()

    async def body() -> AsyncIterator[bytes]:
        yield b" " * (900 * 1024)
        await asyncio.sleep(0.5)
        yield complete

    async def post(address: str, key: str) -> int:
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(app, client=(address, 1))
        url = "http://127.0.0.1/v1/chat/completions"
        async with httpx.AsyncClient(transport=transport, headers=headers) as client:
            return (await client.post(url, content=body())).status_code

    async def run() -> list[int]:
        return await asyncio.gather(*(post(*sender) for sender in senders))

    return asyncio.run(run())


@pytest.mark.parametrize("keyed", [False, True])
def test_bodies_are_bounded_per_caller_and_in_total(
    build_app: Callable[..., Any], worker: ScriptedWorker, ring: KeyRing, keyed: bool
) -> None:
    """A caller is a key, whatever its address, or an address if there are no keys."""
    mine = [("10.0.0.1", KEY), ("10.0.0.2" if keyed else "10.0.0.1", KEY)]
    other = ("10.0.0.1" if keyed else "10.0.0.2", OTHER)
    app = build_app(worker, ring if keyed else None, max_body_mib=1, max_bodies_mib=4)
    assert sorted(post_slowly(app, *mine)) == [200, 429]
    statuses = post_slowly(app, *mine, other)
    assert sorted(statuses[:2]) == [200, 429] and statuses[2] == 200, "others are refused too"
    assert (app._memory.size, app._memory.sizes) == (0, {})

    settings = {"max_body_mib": 1, "max_bodies_mib": 2, "max_caller_bodies_mib": 2}
    app = build_app(worker, ring if keyed else None, **settings)
    assert sorted(post_slowly(app, *mine, other)) == [200, 200, 503]
    assert post_slowly(app, mine[0]) == [200]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-type": ""}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-encoding": "gzip"}, 415),
        ({"content-encoding": "identity"}, 200),
        ({"content-length": "-1"}, 400),
        ({"content-length": "9" * 400}, 413),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "evil.example:8000", "origin": "http://evil.example:8000"}, 403),  # rebinding
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "user@127.0.0.1"}, 403),
        ({"host": ""}, 403),
        ({"host": "LOCALHOST:8000"}, 200),
        ({"host": "localhost."}, 200),
        ({"host": "192.0.2.7:80"}, 200),
        ({"host": "[::1]:8000", "origin": "http://[::1]:8000"}, 200),
        ({"x-request-timeout-seconds": "0"}, 200),
        ({"x-request-id": "\\r\\nset-cookie: a=b"}, 200),
    ],
)
def test_header_checks(app: Any, headers: dict[str, str], status: int) -> None:
    response = post(app, json.dumps(chat()).encode(), **headers)
    assert response.status_code == status, response.text
    if status != 200:
        code(response)
    assert "set-cookie" not in response.headers


def test_a_name_as_host_must_be_allowed_where_no_key_is_needed(
    build_app: Callable[..., Any], worker: ScriptedWorker, ring: KeyRing
) -> None:
    """A page can make its own name point at this machine, but it has no key."""
    name, key = {"host": "fmray.example:8000"}, {"authorization": f"Bearer {KEY}"}
    for path in ("/", "/healthz", "/metrics", "/v1/models"):
        for app, headers, status in (
            (build_app(worker), name, 403),
            (build_app(worker, allowed_hosts=("other.example", "FMRAY.example")), name, 200),
            (build_app(worker, ring), name | key, 200),
            (build_app(worker, ring, allowed_hosts=("a",)), name | key, 403),
        ):
            response = send(app, "GET", path, headers=headers)
            assert response.status_code == status
            if status == 403:
                assert code(response) == "host"
    two = [("host", "127.0.0.1"), ("host", "evil.example")]
    assert send(build_app(worker, ring), "GET", "/healthz", headers=two).status_code == 400


# -- everything else ---------------------------------------------------------------------------


def test_unknown_paths_methods_and_models(app: Any) -> None:
    assert send(app, "GET", "/v1/nothing").status_code == 404
    response = send(app, "GET", "/v1/chat/completions")
    assert response.status_code == 405
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert send(app, "DELETE", "/v1/models").status_code == 405
    response = send(app, "GET", "/v1/models/another")
    assert response.status_code == 404 and code(response) == "model_not_found"
    assert send(app, "GET", "/v1/models/tiny").json()["id"] == "tiny"


def test_bug_is_a_json_error_and_its_log_has_no_prompt(
    app: Any, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    worker.refuse = RuntimeError("the prompt was: secret")
    with caplog.at_level(logging.DEBUG):
        response = post(app, json.dumps(chat(text="secret words")).encode())
    assert response.status_code == 500 and code(response) == "internal_error"
    assert "secret" not in response.text + caplog.text
    assert "RuntimeError at" in caplog.text and "serving.py" in caplog.text
    request_id = response.headers["x-request-id"]
    assert f"id {request_id}, caller anonymous: " in caplog.text


@pytest.mark.parametrize(
    ("sent", "kept"), [("trace-1.2_a", True), ("a" * 65, False), ("a b", False), ("é", False)]
)
def test_failures_are_logged_with_request_id_and_caller(
    build_app: Callable[..., Any],
    worker: ScriptedWorker,
    ring: KeyRing,
    caplog: pytest.LogCaptureFixture,
    sent: str,
    kept: bool,
) -> None:
    worker.last = "error"
    headers = {"authorization": f"Bearer {OTHER}", "x-request-id": sent.encode()}
    response = send(
        build_app(worker, ring), "POST", "/v1/chat/completions", json=chat(), headers=headers
    )
    assert response.status_code == 500
    request_id = sent if kept else response.headers["x-request-id"]
    assert f"id {request_id}, caller bob: ApiError at" in caplog.text
    assert (sent in caplog.text) is kept and KEY not in caplog.text


def test_responses_forbid_sniffing_and_caching(app: Any) -> None:
    for path in ("/", "/v1/models", "/nothing"):
        headers = send(app, "GET", path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"


def test_health_and_readiness(app: Any, worker: ScriptedWorker) -> None:
    assert send(app, "GET", "/healthz").json() == {"status": "ok"}
    assert not worker.asks
    assert send(app, "GET", "/readyz").json() == {"status": "ready"}
    assert len(worker.asks) == 1, "the model was not asked"
    assert "pixel_values" in worker.asks[0].inputs
    assert send(app, "GET", "/readyz").status_code == 200
    assert len(worker.asks) == 1, "a recent answer should count"
    worker.draining = True
    assert send(app, "GET", "/readyz").status_code == 503
    worker.draining, worker.alive = False, False
    for path in ("/readyz", "/healthz"):
        response = send(app, "GET", path)
        assert response.status_code == 503 and code(response) == "unavailable"


def test_not_ready_if_the_model_does_not_answer(
    build_app: Callable[..., Any], worker: ScriptedWorker
) -> None:
    worker.last = "error"
    assert send(build_app(worker), "GET", "/readyz").status_code == 503
    worker.last = "stop"
    import threading

    worker.hold = threading.Event()
    assert send(build_app(worker, health_timeout_s=0.3), "GET", "/readyz").status_code == 503
    assert worker.cancelled, "the row was not freed"


def test_metrics(app: Any, worker: ScriptedWorker) -> None:
    post(app, json.dumps(chat(budget=0.6, deadline_ms=None)).encode())
    post(app, json.dumps(chat(deadline_ms=5000)).encode())
    post(app, b"{")
    response = send(app, "GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    samples = {
        (sample.name, *sorted(v for k, v in sample.labels.items() if k != "replica")): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert samples[("fmray_budget_bucket", "0.6")] == 1
    assert samples[("fmray_budget_count",)] == 2
    assert samples[("fmray_units_on_bucket", "2.0")] == 2
    assert samples[("fmray_time_to_first_token_seconds_count",)] == 2
    assert samples[("fmray_tokens_total", "completion")] == 6
    assert samples[("fmray_deadlines_total", "true")] == 1
    assert samples[("fmray_errors_total", "400", "invalid_json")] == 1
    assert {
        "fmray_queue_requests", "fmray_active_rows", "fmray_auto_budget", "fmray_queue_seconds",
        "fmray_tokens_per_second", "fmray_prediction_error",
    } <= set(families)  # fmt: skip
    for family in families.values():
        assert all(sample.labels["replica"] == "test" for sample in family.samples)


def test_metrics_of_several_replicas_are_merged(
    build_app: Callable[..., Any], directory: Path, worker: ScriptedWorker
) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    from fmray.serve.metrics import Metrics, MetricsBoard, render

    board = MetricsBoard()
    board.publish("a", Metrics(worker, "a", 3).families())
    text = render(board.publish("b", Metrics(worker, "b", 3).families())).decode()
    assert text.count("# TYPE fmray_budget histogram") == 1
    families = {family.name: family for family in text_string_to_metric_families(text)}
    replicas = {sample.labels["replica"] for sample in families["fmray_active_rows"].samples}
    assert replicas == {"a", "b"}


def test_metrics_of_a_silent_replica_are_dropped(
    worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fmray.serve import metrics

    board = metrics.MetricsBoard()
    board.publish("a", metrics.Metrics(worker, "a", 3).families())
    later = time.monotonic() + metrics.STALE_SECONDS + 1
    monkeypatch.setattr(metrics.time, "monotonic", lambda: later)
    text = metrics.render(board.publish("b", metrics.Metrics(worker, "b", 3).families()))
    assert b'replica="b"' in text and b'replica="a"' not in text

"""The application on Ray Serve, on loopback: one Ray session, real engines, first one replica, then
two."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from support.serving import Load, chat, data_url, picture

from fmray.config.serve import ServeConfig
from fmray.serve.app import build
from fmray.serve.replica import open_answerer

KEY = "sk-0123456789abcdef"
HEADERS = {"authorization": f"Bearer {KEY}"}
MARK = "FMRAY_TEST_SESSION"


@dataclass(frozen=True)
class Endpoint:
    url: str
    arguments: dict[str, Any]
    mark: str

    def deploy(self, **changes: Any) -> None:
        """As `serve run fmray.serve.app:build key=value ...` does it: all values are words."""
        words = {key: str(value) for key, value in (self.arguments | changes).items()}
        application = call_user_app_builder_with_args_if_necessary(build, words)
        serve.run(application, name="fmray", route_prefix="/")

    def ask(self, **fields: Any) -> httpx.Response:
        body = chat(data_url(picture()), **fields)
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=60)

    def metric(self, name: str) -> float:
        """Sum over replicas."""
        text = httpx.get(f"{self.url}/metrics", headers=HEADERS, timeout=30).text
        values = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(name + "{")]
        assert values, f"no {name}"
        return sum(float(value) for _, value in values)

    def replicas(self) -> list[int]:
        """Process ids of this session's replicas."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                title = (folder / "cmdline").read_bytes()
                if title.startswith(b"ray::ServeReplica:fmray:replica") and (
                    f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes()
                ):
                    found.append(int(folder.name))
        return found


@pytest.fixture(scope="module")
def endpoint(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("ray")
    keys = folder / "keys.yaml"
    keys.write_text(f"- {{name: alice, key: {KEY}}}\n")
    arguments = {
        "model": str(directory),
        "name": "tiny",
        "keys_file": keys,
        "calibration": folder / "cost.json",
        "calibration_s": 2,
        "min_replicas": 1,
        "max_replicas": 2,
        "cpus": 0.5,
        "threads": 1,
        "max_rows": 4,
        "kv_mib": 16,
        "health_period_s": 1,
        "health_timeout_s": 20,
        "drain_s": 20,
    }
    # Measured once, here, so that replicas start at once.
    open_answerer(ServeConfig.model_validate(arguments), directory).close()
    mark = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, mark)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            made = Endpoint(f"http://127.0.0.1:{port}", arguments, mark)
            made.deploy()
            yield made
        finally:
            serve.shutdown()
            ray.shutdown()


def load_of(endpoint: Endpoint, tokens: int) -> Load:
    """Four clients at full budget."""
    return Load(4, lambda client, number: endpoint.ask(max_tokens=tokens, budget="1"))


def test_the_official_client(endpoint: Endpoint) -> None:
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=KEY, max_retries=0) as client:
        ask = {"model": "tiny", "messages": chat(data_url(picture()))["messages"], "max_tokens": 8}
        whole = client.chat.completions.create(**ask, extra_body={"budget": "0.8", "plan": True})
        cost = whole.model_extra["fmray"]
        assert cost["budget"] == 0.8 and sum(cost["plan"]) == cost["units_on"]
        stream = client.chat.completions.create(**ask, stream=True, extra_body={"budget": "0.8"})
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.choices[0].message.content
        assert chunks[-1].model_extra["fmray"]["units_on"] == cost["units_on"]
        assert [model.id for model in client.models.list()] == ["tiny"]
    stranger = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_health_readiness_and_the_page(endpoint: Endpoint) -> None:
    for path in ("/healthz", "/readyz", "/"):
        assert httpx.get(endpoint.url + path, timeout=30).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(endpoint: Endpoint, stream: bool) -> None:
    before = endpoint.metric("fmray_active_rows")
    body = chat(data_url(picture()), max_tokens=1000, stream=stream)

    def leave() -> None:
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(
                f"{endpoint.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=0.5
            )

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: leave(), range(4)))
    time.sleep(1)
    # Each replica tells its numbers when it is asked, the other one's are up to five seconds old.
    end = time.monotonic() + 12
    while endpoint.metric("fmray_active_rows") > 0:
        assert time.monotonic() < end, "rows are held for clients that left"
        time.sleep(0.5)
    assert before == 0
    assert endpoint.ask(max_tokens=2).status_code == 200


def big(size: int) -> Iterator[bytes]:
    for _ in range(size // 2**20):
        yield b" " * 2**20


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_300_mb(endpoint: Endpoint, chunked: bool) -> None:
    size = 300 * 2**20
    headers = HEADERS | {"content-type": "application/json"}
    if not chunked:
        headers["content-length"] = str(size)
    status = 413
    # The connection is closed while the client still sends: it may see that first.
    with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
        status = httpx.post(
            f"{endpoint.url}/v1/chat/completions", content=big(size), headers=headers, timeout=60
        ).status_code
    assert status == 413
    assert endpoint.ask(max_tokens=2).status_code == 200
    assert len(endpoint.replicas()) == 1, "it did not fall"


def test_hostile_requests_through_the_proxy(endpoint: Endpoint) -> None:
    path = f"{endpoint.url}/v1/chat/completions"
    kind = HEADERS | {"content-type": "application/json"}
    for content in (b"", b"{", b"[" * 10**6, b'{"budget": NaN}', b"\xff\xfe"):
        response = httpx.post(path, content=content, headers=kind)
        assert 400 <= response.status_code < 500 and "error" in response.json()
    for fields in ({"budget": "2"}, {"n": 3}, {"tools": [{}]}, {"deadline_ms": -1}):
        assert endpoint.ask(**fields).status_code == 400
    for url in ("http://169.254.169.254/", "file:///etc/passwd", "data:image/png;base64,AAAA"):
        assert httpx.post(path, json=chat(url), headers=HEADERS).status_code == 400
    assert httpx.post(path, json=chat()).status_code == 401
    assert endpoint.ask(max_tokens=2).status_code == 200


def test_headers_change_no_limit_of_ours(endpoint: Endpoint) -> None:
    tricks = HEADERS | {
        "x-request-timeout-seconds": "100000",
        "x-request-disconnect-disabled": "?1",
        "x-request-id": "a" * 1000,
    }
    body = chat(data_url(picture()), max_tokens=4, deadline_ms=0.001, strict=True)
    response = httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, headers=tricks)
    assert response.status_code == 503
    assert response.json()["error"]["code"] in ("deadline_impossible", "deadline_missed")


def test_a_rolling_update_drops_no_request(endpoint: Endpoint) -> None:
    """Of the only replica, by two."""
    old = set(endpoint.replicas())
    with load_of(endpoint, tokens=30) as load:
        time.sleep(1)
        endpoint.deploy(max_new_tokens=5, min_replicas=2)
        time.sleep(2)
    assert load.failures == [] and len(load.answers) > 20
    end = time.monotonic() + 40
    while old & set(endpoint.replicas()):
        assert time.monotonic() < end, "an old replica is still there"
        time.sleep(0.5)
    assert endpoint.ask().json()["usage"]["completion_tokens"] <= 5, "the new settings hold"


def test_metrics_are_those_of_all_replicas(endpoint: Endpoint) -> None:
    end = time.monotonic() + 30
    while True:
        text = httpx.get(f"{endpoint.url}/metrics", headers=HEADERS, timeout=30).text
        rows = [line for line in text.splitlines() if line.startswith("fmray_active_rows{")]
        if len(rows) == 2:
            return
        assert time.monotonic() < end, rows
        time.sleep(1)


def test_a_replica_killed_under_load_fails_only_what_it_had_in_hand(endpoint: Endpoint) -> None:
    while len(endpoint.replicas()) != 2:
        time.sleep(0.5)
    with load_of(endpoint, tokens=60) as load:
        time.sleep(2)
        killed = time.monotonic()
        victim = endpoint.replicas()[0]
        os.kill(victim, signal.SIGKILL)
        time.sleep(6)
    failed = load.failures
    assert len(failed) <= 4, failed
    for answer in failed:
        assert answer.start <= killed + 1.0 and answer.end - killed < 10, "it was in hand"
        assert answer.status in (500, 503), answer
        assert "Traceback" not in answer.text and "what is in" not in answer.text
    end = time.monotonic() + 60
    while len(endpoint.replicas()) != 2 or victim in endpoint.replicas():
        assert time.monotonic() < end, "the replica did not come back"
        time.sleep(0.5)
    assert all(endpoint.ask(max_tokens=2).status_code == 200 for _ in range(8))


def test_the_builder_s_mistakes_are_one_line(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean max_rows"):
        call_user_app_builder_with_args_if_necessary(
            build, {"model": str(directory), "max_row": "4"}
        )
    with pytest.raises(ValueError, match="is no directory"):
        build(ServeConfig(model=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="models:/NAME@production"):
        ServeConfig(model="models:/a@staging")

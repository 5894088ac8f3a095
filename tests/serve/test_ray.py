"""The application on Ray Serve, on the loopback interface, with real engines.

All tests share one Ray session and one application. The fixtures `endpoint` and `two_replicas`
bring the application to the number of replicas that a test needs, so that each test runs on its
own and in any order; in the order of this file, only one update is needed.
"""

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
from support.serving import Load, chat, data_url, encoded_image, post_and_disconnect, wait_until

from fmray.config.serve import ServeConfig
from fmray.serve.app import build
from fmray.serve.connections import HOOK
from fmray.serve.replica import load_chat_model

KEY = "sk-0123456789abcdef"
HEADERS = {"authorization": f"Bearer {KEY}"}
SESSION = "FMRAY_TEST_SESSION"  # environment variable that identifies this session's processes
START_SECONDS = 120.0  # for a replica to start on a busy machine


@dataclass
class Endpoint:
    """The application of this session."""

    url: str
    settings: dict[str, Any]
    session: str
    replicas: int = 0  # as deployed last

    def deploy(self, replicas: int, **changes: Any) -> None:
        """Deploy with at least so many replicas, as `serve run fmray.serve.app:build` does it."""
        values = self.settings | {"min_replicas": replicas} | changes
        text = {key: str(value) for key, value in values.items()}
        application = call_user_app_builder_with_args_if_necessary(build, text)
        serve.run(application, name="fmray", route_prefix="/")
        self.replicas = replicas

    def require(self, replicas: int) -> None:
        """Wait until exactly so many replicas run and answer; deploy only if it is necessary."""
        if self.replicas != replicas:
            self.deploy(replicas)
        wait_until(lambda: len(self.processes()) == replicas, START_SECONDS, f"{replicas} replicas")
        wait_until(lambda: self.get("/readyz").status_code == 200, START_SECONDS, "readiness")

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=HEADERS, timeout=30)

    def post(self, body: dict[str, Any], timeout: float = 60, **headers: str) -> httpx.Response:
        path = f"{self.url}/v1/chat/completions"
        return httpx.post(path, json=body, headers=HEADERS | headers, timeout=timeout)

    def ask(self, **fields: Any) -> httpx.Response:
        return self.post(chat(data_url(encoded_image()), **fields))

    def samples(self, name: str) -> dict[str, float]:
        """Return the values of a metric by replica."""
        lines = self.get("/metrics").text.splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if line.startswith(f'{name}{{replica="')]
        return {labels.split('"')[1]: float(value) for labels, value in pairs}

    def names(self) -> set[str]:
        """Return the names of the running replicas, as Ray names their actors."""
        prefix = "SERVE_REPLICA::fmray#replica#"
        actors = ray.util.list_named_actors(all_namespaces=True)
        names = [actor["name"] for actor in actors if actor["name"].startswith(prefix)]
        return {name.removeprefix(prefix) for name in names}

    def processes(self) -> set[int]:
        """Return the process ids of the running replicas."""
        pids = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                title = (folder / "cmdline").read_bytes()
                if title.startswith(b"ray::ServeReplica:fmray:replica") and (
                    f"{SESSION}={self.session}".encode() in (folder / "environ").read_bytes()
                ):
                    pids.add(int(folder.name))
        return pids

    def load(self, tokens: int, pause: float) -> Load:
        """Start four clients that send requests at full budget, `pause` seconds apart."""
        return Load(4, lambda client, number: self.ask(max_tokens=tokens, budget="1"), pause)


@pytest.fixture(scope="module")
def session(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Ray and Ray Serve, with nothing deployed."""
    folder = tmp_path_factory.mktemp("ray")
    keys = folder / "keys.yaml"
    keys.write_text(f"- {{name: alice, key: {KEY}}}\n")
    settings = {
        "model": str(directory),
        "name": "tiny",
        "keys_file": keys,
        "calibration": folder / "cost.json",
        "calibration_s": 1,
        "max_replicas": 2,
        "cpus": 0.5,
        "threads": 1,
        "max_rows": 4,
        "kv_mib": 16,
        "health_period_s": 1,
        "health_timeout_s": 20,
        "drain_s": 20,
    }
    # Calibrate once here, so that the replicas find the result.
    load_chat_model(ServeConfig.model_validate(settings), directory).close()
    name = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SESSION, name)
        patch.setenv(*HOOK)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield Endpoint(f"http://127.0.0.1:{port}", settings, name)
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture
def endpoint(session: Endpoint) -> Endpoint:
    """The application with one replica."""
    session.require(1)
    return session


@pytest.fixture
def two_replicas(session: Endpoint) -> Endpoint:
    """The application with two replicas."""
    session.require(2)
    return session


# --- One replica ---


def test_official_client(endpoint: Endpoint) -> None:
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=KEY, max_retries=0) as client:
        messages = chat(data_url(encoded_image()))["messages"]
        request = {"model": "tiny", "messages": messages, "max_tokens": 8}
        answer = client.chat.completions.create(
            **request, extra_body={"budget": "0.8", "plan": True}
        )
        cost = answer.model_extra["fmray"]
        assert cost["budget"] == 0.8 and sum(cost["plan"]) == cost["units_on"]
        stream = client.chat.completions.create(
            **request, stream=True, extra_body={"budget": "0.8"}
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == answer.choices[0].message.content
        assert chunks[-1].model_extra["fmray"]["units_on"] == cost["units_on"]
        assert [model.id for model in client.models.list()] == ["tiny"]
    stranger = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_health_readiness_and_page(endpoint: Endpoint) -> None:
    for path in ("/healthz", "/readyz", "/"):
        assert httpx.get(endpoint.url + path, timeout=30).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_disconnected_clients_free_their_rows(endpoint: Endpoint, stream: bool) -> None:
    def active_rows() -> float:
        return sum(endpoint.samples("fmray_active_rows").values())

    wait_until(lambda: active_rows() == 0, 30, "an idle engine")
    body = chat(data_url(encoded_image()), max_tokens=1000, stream=stream)

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(post_and_disconnect, endpoint.url, body, HEADERS) for _ in range(4)]
        for client in clients:
            client.result()
    wait_until(lambda: active_rows() == 0, 12, "the rows of disconnected clients")
    assert endpoint.ask(max_tokens=2).status_code == 200


def spaces(size: int) -> Iterator[bytes]:
    for _ in range(size // 2**20):
        yield b" " * 2**20


@pytest.mark.parametrize("chunked", [False, True])
def test_body_of_300_mb_is_rejected(endpoint: Endpoint, chunked: bool) -> None:
    before = endpoint.processes()
    size = 300 * 2**20
    headers = HEADERS | {"content-type": "application/json"}
    if not chunked:
        headers["content-length"] = str(size)
    status = 413
    # The server closes the connection while the client sends, which the client may see first.
    with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
        status = httpx.post(
            f"{endpoint.url}/v1/chat/completions", content=spaces(size), headers=headers, timeout=60
        ).status_code
    assert status == 413
    assert endpoint.ask(max_tokens=2).status_code == 200
    assert endpoint.processes() == before, "the replica was restarted"


def test_hostile_requests_through_the_proxy(endpoint: Endpoint) -> None:
    path = f"{endpoint.url}/v1/chat/completions"
    headers = HEADERS | {"content-type": "application/json"}
    for content in (b"", b"{", b"[" * 10**6, b'{"budget": NaN}', b"\xff\xfe"):
        response = httpx.post(path, content=content, headers=headers)
        assert 400 <= response.status_code < 500 and "error" in response.json()
    for fields in ({"budget": "2"}, {"n": 3}, {"tools": [{}]}, {"deadline_ms": -1}):
        assert endpoint.ask(**fields).status_code == 400
    for url in ("http://169.254.169.254/", "file:///etc/passwd", "data:image/png;base64,AAAA"):
        assert endpoint.post(chat(url)).status_code == 400
    assert httpx.post(path, json=chat()).status_code == 401
    assert endpoint.ask(max_tokens=2).status_code == 200


def test_the_proxy_limits_heads_and_reads_no_body_without_a_key(endpoint: Endpoint) -> None:
    headers = {f"x-{index}": "a" for index in range(120)}
    response = httpx.get(f"{endpoint.url}/healthz", headers=headers, timeout=30)
    assert response.status_code == 431, "the proxy did not call the hook"
    assert response.json()["error"]["code"] == "headers_too_large"
    with httpx.Client(base_url=endpoint.url, timeout=30) as client:
        body = spaces(300 * 2**20)  # the connection ends meanwhile
        with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            assert client.post("/healthz", content=body).status_code == 405
        head = client.head("/healthz")
    assert (head.status_code, head.content) == (200, b"")
    assert len(head.headers.get_list("x-request-id")) == 1


def test_headers_do_not_change_limits(endpoint: Endpoint) -> None:
    headers = {
        "x-request-timeout-seconds": "100000",
        "x-request-disconnect-disabled": "?1",
        "x-request-id": "a" * 1000,
    }
    body = chat(data_url(encoded_image()), max_tokens=4, deadline_ms=0.001, strict=True)
    response = endpoint.post(body, **headers)
    assert response.status_code == 503
    assert response.json()["error"]["code"] in ("deadline_impossible", "deadline_missed")


def test_rolling_update_drops_no_request(endpoint: Endpoint) -> None:
    """Two new replicas replace the only one while four clients send requests."""
    old = endpoint.processes()
    with endpoint.load(tokens=30, pause=0.2) as load:
        wait_until(lambda: len(load.answers) >= 8, 30, "answers before the update")
        endpoint.deploy(2, max_new_tokens=5)
        wait_until(lambda: not old & endpoint.processes(), 60, "the old replica to stop")
    assert load.failures == [] and len(load.answers) > 20
    assert endpoint.ask().json()["usage"]["completion_tokens"] <= 5, "the settings did not change"


# --- Two replicas ---


def test_metrics_include_all_replicas(two_replicas: Endpoint) -> None:
    names = two_replicas.names()
    assert len(names) == 2
    wait_until(
        lambda: names <= set(two_replicas.samples("fmray_active_rows")),
        30,
        "both replicas' metrics",
    )


def test_killed_replica_fails_only_its_own_requests(two_replicas: Endpoint) -> None:
    with two_replicas.load(tokens=60, pause=0.02) as load:
        wait_until(lambda: len(load.answers) >= 8, 30, "answers before the kill")
        victim = min(two_replicas.processes())
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)

        def answered_later() -> bool:
            return sum(answer.start > killed + 1.0 for answer in load.answers) >= 16

        wait_until(answered_later, 60, "answers after the kill")

    def replaced() -> bool:
        processes = two_replicas.processes()
        return len(processes) == 2 and victim not in processes

    wait_until(replaced, START_SECONDS, "a replacement of the killed replica")
    assert len(load.failures) <= 4, load.failures
    for answer in load.failures:
        assert answer.start <= killed + 1.0 and answer.end - killed < 10, "it was sent elsewhere"
        assert answer.status in (500, 503), answer
        assert "Traceback" not in answer.text and "what is in" not in answer.text
    assert all(two_replicas.ask(max_tokens=2).status_code == 200 for _ in range(8))


# --- No replica ---


def test_mistakes_of_the_builder_are_one_line(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean max_rows"):
        call_user_app_builder_with_args_if_necessary(
            build, {"model": str(directory), "max_row": "4"}
        )
    with pytest.raises(ValueError, match="is not a directory"):
        build(ServeConfig(model=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="models:/NAME@production"):
        ServeConfig(model="models:/a@staging")

"""Ray's own trouble in one line, its token, and what listens where; no Ray session."""

from __future__ import annotations

import json
import platform
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from fmray.runtime import cluster, exposure


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without token."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


class Head(gcs_service_pb2_grpc.InternalKVGcsServiceServicer):
    """Answers the question for the cluster's versions."""

    def __init__(self, versions: dict[str, str] | None) -> None:
        self.versions = versions

    def InternalKVGet(self, request: Any, context: grpc.ServicerContext) -> Any:
        if self.versions is None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Invalid or missing token")
        return gcs_service_pb2.InternalKVGetReply(value=json.dumps(self.versions).encode())


@contextmanager
def head(versions: dict[str, str] | None) -> Iterator[str]:
    """Run a head node that only knows its versions; None: it asks for a token."""
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        gcs_service_pb2_grpc.add_InternalKVGcsServiceServicer_to_server(Head(versions), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


OURS = {"ray_version": ray.__version__, "python_version": platform.python_version()}


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        (
            None,
            "asks for a token: set RAY_AUTH_MODE=token, with the cluster's token in .*/.ray/auth",
        ),
        (
            OURS | {"ray_version": "2.9.0"},
            r"other versions: Ray 2\.9\.0 there and .* here; install",
        ),
        (OURS | {"python_version": "3.9.1"}, r"other versions: Python 3\.9\.1 there and "),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_line(
    versions: dict[str, str] | None, words: str
) -> None:
    with head(versions) as address, pytest.raises(ValueError, match=words) as caught:
        cluster.find_cluster(address)
    assert "\n" not in str(caught.value)


def test_a_wrong_token_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert "asks for a token" in cluster._refusal("a:1", "UNAUTHENTICATED")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("wrong")
    assert "does not accept the token in" in cluster._refusal("a:1", "UNAUTHENTICATED")


def test_a_cluster_of_the_same_versions_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with head(OURS) as address:
        assert cluster.find_cluster(address) == address
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert cluster.find_cluster(None) == address


def test_a_port_that_is_not_rays_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match=r"though something listens there .*6379"):
            cluster.find_cluster(address)


def test_the_remains_of_a_cluster_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cluster.ray_private, "address_of_this_machine", lambda *_: "127.0.0.1:1", raising=False
    )
    with pytest.raises(ValueError, match="has ended without `ray stop`"):
        cluster.find_cluster(None)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes"),
            r"^RAY_TMPDIR: the path /long/ray is too long .* such as /tmp$",
        ),
        (
            ValueError(
                "The configured object store size (9 GB) exceeds /dev/shm size (1 GB). This"
            ),
            r"^Ray has no room for its object store: .* --shm-size",
        ),
        (PermissionError(13, "Permission denied"), r"^Ray cannot write its folder /long/ray"),
        (
            RuntimeError("first\nsecond"),
            r"^Ray does not start: first \(its logs: /long/ray/session",
        ),
        (RuntimeError(), r"^Ray does not start: RuntimeError \("),
    ],
)
def test_a_ray_that_does_not_start_is_one_line(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/long")

    def init(**options: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # another test's session may run
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "_check_room", lambda _: None)
    with pytest.raises(ValueError, match=words), ExitStack() as stack:
        cluster.connect("local", log_to_driver=False, stack=stack)


def test_no_room_for_objects_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = cluster.shutil.disk_usage(tmp_path)
    free = {"/dev/shm": 0}
    monkeypatch.setattr(
        cluster.shutil,
        "disk_usage",
        lambda path: usage._replace(free=free.get(str(path), 2**20)),
    )
    with pytest.raises(ValueError, match="0 MiB are free in /dev/shm and 1 MiB in"):
        cluster._check_room(tmp_path / "none" / "ray")
    free[str(tmp_path)] = 2**40
    cluster._check_room(tmp_path / "none" / "ray")
    assert "note: /dev/shm has only 0 MiB free" in capsys.readouterr().out


# --- What is open to others ---


def test_a_new_token_and_an_old_one_are_private(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = home / ".ray" / "auth_token"
    exposure.protect_token(create=False)
    assert not file.exists()
    exposure.protect_token(create=True)
    assert file.stat().st_mode & 0o777 == 0o600 and len(file.read_text()) == 64
    token = file.read_text()
    file.chmod(0o644)
    exposure.protect_token(create=True)
    assert file.stat().st_mode & 0o777 == 0o600 and file.read_text() == token
    assert "other users could read Ray's token" in capsys.readouterr().out


def test_no_token_at_an_outside_address_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    exposure.warn_without_token("10.0.0.5:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    exposure.warn_without_token("127.0.0.1:6379")
    assert capsys.readouterr().out == ""
    exposure.warn_without_token("10.0.0.5:6379")
    assert capsys.readouterr().out.startswith("warning: Ray at 10.0.0.5:6379 is reachable from")


def test_listening_addresses_are_judged() -> None:
    ports = {("0.0.0.0", "Ray's raylet"): [2, 1, 1], ("127.0.0.1", "ray::w"): [3], ("::", "a"): [4],
             ("10.0.0.5", "b"): [5], ("8.8.8.8", "c"): [6]}  # fmt: skip
    lines = [str(finding) for finding in exposure.judge(ports, ["10.0.0.5"], no_token=False)]
    assert lines == [
        "ok   ray::w listens on 127.0.0.1, port 3: this machine only",
        "note Ray's raylet listens on 0.0.0.0, port 1, 2: reachable from outside at 10.0.0.5",
        "note b listens on 10.0.0.5, port 5: reachable from outside at 10.0.0.5",
        "note c listens on 8.8.8.8, port 6: reachable from outside at 8.8.8.8; a public address:"
        " close it by a firewall",
        "note a listens on ::, port 4: reachable from outside at 10.0.0.5",
    ]
    failed = exposure.judge(ports, ["10.0.0.5"], no_token=True)
    assert [finding.level for finding in failed] == ["ok", "FAIL", "FAIL", "FAIL", "FAIL"]
    [alone] = exposure.judge({("0.0.0.0", "x"): [1]}, [], no_token=True)
    assert alone.level == "ok"

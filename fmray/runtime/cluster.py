"""Start or join a Ray cluster, and submit job scripts to it.

Whether the workers of a job can be placed on the cluster is checked by `fmray.runtime.placement`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import platform
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmray.config import ClusterConfig
from fmray.runtime import console, exposure, ray_private

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

AGENT_SECONDS = 120  # a new cluster accepts jobs once the agent of its head node is registered
ANSWER_SECONDS = 5
SMALLEST_STORE = 100 * 2**20  # bytes; Ray refuses less than 75 MiB
FOLDER_VARIABLES = ("RAY_TMPDIR", "TMPDIR")  # where Ray puts its folder `ray`; default /tmp


@dataclass(frozen=True)
class Session:
    """A connected Ray cluster."""

    address: str
    dashboard: str | None  # http address that accepts jobs
    on_head_node: bool  # submitted jobs run on this machine


@contextmanager
def start_or_join(cluster: ClusterConfig, log_to_driver: bool = True) -> Iterator[Session]:
    """Connect to `cluster.address`, RAY_ADDRESS or this machine's cluster, else start a cluster.

    A cluster started here has a dashboard, listens on the loopback interface only and ends with the
    context; an existing one stays. Ray secures a new local cluster with a token in the user's home
    (`ray get-auth-token`), where its processes and job clients find it.

    Args:
        log_to_driver: print what workers print here too.

    Raises:
        ValueError: no cluster answers at the address, or Ray cannot start or join; one line.
    """
    import ray

    connected = ray.is_initialized()
    with ExitStack() as stack:
        context = connect(cluster.address, log_to_driver, stack)
        if not connected:
            stack.callback(ray.shutdown)
            exposure.warn_without_token(context.address_info["gcs_address"])
        address, url = context.address_info["gcs_address"], context.dashboard_url
        yield Session(address, f"http://{url}" if url else None, _on_head_node())


def connect(
    address: str | None, log_to_driver: bool, stack: ExitStack, existing: bool = False
) -> Any:
    """Call `ray.init`; its failures are ValueErrors of one line.

    Args:
        address: of the cluster; None for RAY_ADDRESS, this machine's cluster, or a new one.
        stack: undoes what only this connection needs.
        existing: do not start a cluster.

    Raises:
        ValueError: Ray cannot start or join.
    """
    import ray

    if ray.is_initialized():
        return ray.init(ignore_reinit_error=True, log_to_driver=log_to_driver)
    options: dict[str, Any] = {"include_dashboard": True, "log_to_driver": log_to_driver}
    found = None if address == "local" else find_cluster(address)
    if found is None and existing:
        raise NoClusterError("no Ray cluster runs on this machine")
    if found is None:
        _check_room(_ray_folder())
        options |= {"address": "local", "_node_ip_address": exposure.LOOPBACK}
    else:
        options["address"] = found
    if not console.environment():  # otherwise Ray's lines go to the log
        options["logging_level"] = logging.ERROR
    exposure.protect_token(create=found is None)
    if found is None or _answers_on_loopback_only(found):
        stack.enter_context(exposure.loopback_only())
    try:
        context = ray.init(**options)
    except Exception as error:  # Ray raises whatever the reason raised
        ray.shutdown()
        raise ValueError(explained(error, found)) from error
    return context


class NoClusterError(ValueError):
    """No cluster runs on this machine, and none was to be started."""


def find_cluster(address: str | None) -> str | None:
    """Return HOST:PORT of the cluster that `address` or RAY_ADDRESS names, or that runs here.

    Returns:
        None if no address is given and no cluster runs on this machine.

    Raises:
        ValueError: nothing answers there, or not a Ray that this process can join.
    """
    check_answers(address)
    given = address or os.environ.get("RAY_ADDRESS") or None
    if given in (None, "auto"):
        try:
            with _quiet("ray._private.services"):
                given = ray_private.address_of_this_machine(given, None)
        except ConnectionError as error:
            raise NoClusterError(
                "cluster.address: auto: no Ray cluster runs on this machine; start one with"
                " `ray start --head`, or omit it"
            ) from error
        if given is None:
            return None
        if _unreachable(given):
            raise ValueError(
                f"the Ray cluster of this machine, at {given}, has ended without `ray stop`; run"
                " that, or start a new one with cluster.address: local"
            )
        with _quiet("ray._private.authentication.authentication_token_setup"):
            ray_private.use_token_if_available(warn_if_disabled=False)
    check_joinable(given)
    return given


def check_answers(address: str | None) -> None:
    """Raise ValueError if nothing listens at `address` or RAY_ADDRESS; Ray would retry minutes."""
    key = "cluster.address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS")
    if address in (None, "", "auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ValueError(f"{key}: should be HOST:PORT of a Ray head node, not {address!r}")
    if reason := _unreachable(address):
        raise ValueError(
            f"{key}: no Ray cluster answers at {address} ({reason}); start one with"
            " `ray start --head`, or omit it to use this machine"
        )


def _unreachable(address: str) -> str | None:
    """Return why nothing answers at HOST:PORT; None if something does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        return str(error)
    return None


def check_joinable(address: str) -> None:
    """Ask the head node for its versions, to learn whether this process can join.

    Raises:
        ValueError: it asks for a token, has another version of Ray or Python, or is no Ray.
    """
    import grpc

    channel = ray_private.init_grpc_channel(address, [("grpc.enable_http_proxy", 0)])
    request = ray_private.InternalKVGetRequest(namespace=b"cluster", key=b"CLUSTER_METADATA")
    try:
        ask = ray_private.InternalKVGcsServiceStub(channel).InternalKVGet
        reply = ask(request, timeout=ANSWER_SECONDS, wait_for_ready=False)
    except grpc.RpcError as error:
        raise ValueError(_refusal(address, error.code().name)) from error
    finally:
        channel.close()
    if not reply.value:  # a head node that has not written it yet
        return
    theirs = json.loads(reply.value)
    ours = {"ray_version": version("ray"), "python_version": platform.python_version()}
    names = {"ray_version": "Ray", "python_version": "Python"}
    differing = [
        f"{names[key]} {theirs[key]} there and {own} here"
        for key, own in ours.items()
        if theirs.get(key, own) != own
    ]
    if differing:
        raise ValueError(
            f"the Ray cluster at {address} has other versions: {', '.join(differing)};"
            " install the cluster's versions here"
        )


def _refusal(address: str, code: str) -> str:
    """Return why a head node did not answer, given gRPC's status code."""
    if code != "UNAUTHENTICATED":
        return (
            f"no Ray head node answers at {address}, though something listens there ({code}); name"
            " the port that `ray start --head` prints (6379), not the dashboard's (8265)"
        )
    source = exposure.token_file() or "RAY_AUTH_TOKEN"
    if exposure.auth_mode() == "token" and not (isinstance(source, Path) and not source.exists()):
        return (
            f"the Ray cluster at {address} does not accept the token in {source}; put in the token"
            " that `ray get-auth-token` prints on its head node"
        )
    return (
        f"the Ray cluster at {address} asks for a token: set RAY_AUTH_MODE=token, with the"
        f" cluster's token in {source}"
    )


def explained(error: Exception, address: str | None) -> str:
    """Return one line for an error of `ray.init`.

    Args:
        address: of the cluster to join; None if one was started.
    """
    text = str(error)
    line = next(iter(text.strip().splitlines()), "") or type(error).__name__
    if "AF_UNIX path length" in text:
        variable = next((name for name in FOLDER_VARIABLES if os.environ.get(name)), "RAY_TMPDIR")
        return (
            f"{variable}: the path {_ray_folder()} is too long for Ray's sockets (107 bytes with"
            " what Ray adds); set RAY_TMPDIR to a short folder on a local disk, such as /tmp"
        )
    if "exceeds /dev/shm size" in text or "object store memory" in text:
        return (
            f"Ray has no room for its object store: {line}; enlarge /dev/shm (docker: --shm-size)"
        )
    if isinstance(error, PermissionError):
        return (
            f"Ray cannot write its folder {_ray_folder()} ({line}); set RAY_TMPDIR to another one"
        )
    if address is not None:
        return f"the Ray cluster at {address} cannot be joined: {line}"
    return f"Ray does not start: {line} (its logs: {_ray_folder() / 'session_latest' / 'logs'})"


def _ray_folder() -> Path:
    """Return the folder of Ray's sessions, whose sockets and logs it holds."""
    folder = next((os.environ[name] for name in FOLDER_VARIABLES if os.environ.get(name)), "/tmp")
    return Path(folder) / "ray"


def _check_room(folder: Path) -> None:
    """Check that a Ray that starts here has room for its object store.

    Ray keeps it in /dev/shm, or in its own folder, which is slower, if that is too small.

    Raises:
        ValueError: neither has room.
    """
    shm = Path("/dev/shm")
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    shared = shutil.disk_usage(shm).free if shm.is_dir() else 0
    if max(free, shared) < SMALLEST_STORE:
        raise ValueError(
            f"Ray has no room for its object store: {shared >> 20} MiB are free in /dev/shm and"
            f" {free >> 20} MiB in {existing}; enlarge /dev/shm (docker: --shm-size=2g), or set"
            " RAY_TMPDIR to a disk with room"
        )
    if shm.is_dir() and shared < SMALLEST_STORE:
        console.say(
            f"note: /dev/shm has only {shared >> 20} MiB free, so Ray keeps its objects in"
            f" {folder}, which is slower (docker: --shm-size=2g)"
        )


def _answers_on_loopback_only(address: str) -> bool:
    """Return whether a cluster on this machine answers on 127.0.0.1 and not on its other address.

    Ray would replace the first by the second.
    """
    from ray.util import get_node_ip_address

    host, _, port = address.rpartition(":")
    if not exposure.is_loopback(host):
        return False
    return _unreachable(f"{get_node_ip_address()}:{port}") is not None


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Hide a logger's warnings."""
    before = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(before)


def _on_head_node() -> bool:
    """Return whether this process is on the node that runs submitted jobs."""
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    return any(
        node["NodeID"] == node_id and "node:__internal_head__" in node["Resources"]
        for node in ray.nodes()
    )


def submit(session: Session, script: Path, arguments: Sequence[str], submission_id: str) -> int:
    """Run a job script as a Ray job, print its log as it arrives, and return its exit code.

    While a log is open (`console.open_log`), the job's log goes there; only fmray's lines and the
    reason of a failure are shown.

    If jobs run on this machine, the job gets the working directory, the Python and the paths of
    this process. Otherwise it gets a copy of the script's folder as working directory, fmray must
    be installed, and paths in `arguments` are relative to that folder or shared by all nodes.
    When interrupted (ctrl-C), stops the job.

    Raises:
        ValueError: the cluster has no dashboard, so it accepts no jobs.
    """
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    if session.dashboard is None:
        raise ValueError(
            f"the Ray cluster at {session.address} has no dashboard and so accepts no jobs;"
            " start it with one"
        )
    try:
        client = JobSubmissionClient(session.dashboard)
    except (ConnectionError, RuntimeError, RayError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"the dashboard at {session.dashboard}, which accepts jobs, does not answer: {reason}"
        ) from error
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    if session.on_head_node:
        # `env`, as a runtime environment would keep Ray from starting workers in advance
        # with several Ray sessions on a machine, Ray would give the job the address of any of them
        environment = console.environment() | {"RAY_ADDRESS": session.address}
        variables = [f"{name}={value}" for name, value in environment.items()]
        words = ["env", *variables, sys.executable, str(script.resolve()), *arguments]
        entrypoint = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"
        environment = None
    else:
        entrypoint = shlex.join(["python", script.name, *arguments])
        environment = {
            "working_dir": str(script.resolve().parent),
            "env_vars": console.environment(),
        }
    _submit_when_ready(client, entrypoint, environment, submission_id)
    try:
        asyncio.run(_print_log(client, submission_id))
        code = _exit_code(client, submission_id)
        if code != 0 and console.environment():  # otherwise the log has been printed
            console.say(_reason(client.get_job_logs(submission_id)))
        return code
    except BaseException:  # ctrl-C above all: nothing would wait for the job any more
        client.stop_job(submission_id)
        raise


def _submit_when_ready(
    client: JobSubmissionClient, entrypoint: str, environment: dict[str, str] | None, job: str
) -> None:
    """Submit the job, retrying until the cluster's job agent has registered."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            client.submit_job(entrypoint=entrypoint, runtime_env=environment, submission_id=job)
            return
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise ValueError(
                    f"the Ray cluster accepted no job for {AGENT_SECONDS} s: its job agent is not"
                    " running. Another Ray session on this machine may use the agent's port 52365;"
                    " stop it, or set RAY_ADDRESS to use that cluster"
                ) from error
        time.sleep(0.5)


async def _print_log(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def _reason(log: str) -> str:
    """Return the line of a job's log that tells why it failed."""
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("fmray: ")]
    others = [line for line in lines if not line.startswith(console.NOTE)]  # a traceback's end
    return [*others, *errors][-1] if others else "the job wrote no log"


def _exit_code(client: JobSubmissionClient, job: str) -> int:
    """Return the exit code of a job whose log has ended; its status follows within moments."""
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.1)
    info = client.get_job_info(job)
    if info.driver_exit_code is None:
        # the script never ran: the runtime environment failed, or the job's supervisor died
        print(f"fmray: job {job}: {info.status.value}: {info.message}", file=sys.stderr)
        return 1
    return info.driver_exit_code

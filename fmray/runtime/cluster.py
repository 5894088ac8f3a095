"""Start or join a Ray cluster, and submit job scripts to it.

Whether the workers of a job can be placed on the cluster is checked by `fmray.runtime.placement`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fmray.config import ClusterConfig
from fmray.runtime import console

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

AGENT_SECONDS = 120  # a new cluster accepts jobs once the agent of its head node is registered
ANSWER_SECONDS = 5


@dataclass(frozen=True)
class Session:
    """A connected Ray cluster."""

    address: str
    dashboard: str | None  # http address that accepts jobs
    on_head_node: bool  # submitted jobs run on this machine


@contextmanager
def start_or_join(cluster: ClusterConfig, log_to_driver: bool = True) -> Iterator[Session]:
    """Connect to `cluster.address`, RAY_ADDRESS or this machine's cluster, else start a cluster.

    A cluster started here has a dashboard and ends with the context; an existing one stays. Ray
    secures a new local cluster with a token in the user's home (`ray get-auth-token`), where its
    processes and job clients find it.

    Args:
        log_to_driver: print what workers print here too.

    Raises:
        ValueError: no cluster answers at the address.
    """
    import ray

    connected = ray.is_initialized()
    if not connected:
        check_answers(cluster.address)
    context = ray.init(
        address=None if connected else cluster.address,
        include_dashboard=True,
        ignore_reinit_error=True,
        log_to_driver=log_to_driver,
    )
    url = context.dashboard_url
    try:
        yield Session(
            context.address_info["gcs_address"], f"http://{url}" if url else None, _on_head_node()
        )
    finally:
        if not connected:
            ray.shutdown()


def check_answers(address: str | None) -> None:
    """Raise ValueError if nothing listens at `address` or RAY_ADDRESS; Ray would retry minutes."""
    key = "cluster.address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS")
    if address in (None, "", "auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ValueError(f"{key}: should be HOST:PORT of a Ray head node, not {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"{key}: no Ray cluster answers at {address} ({error}); start one with"
            " `ray start --head`, or omit it to use this machine"
        ) from error


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
    from ray.job_submission import JobSubmissionClient

    if session.dashboard is None:
        raise ValueError(
            f"the Ray cluster at {session.address} has no dashboard and so accepts no jobs;"
            " start it with one"
        )
    client = JobSubmissionClient(session.dashboard)
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    if session.on_head_node:
        # `env`, as a runtime environment would keep Ray from starting workers in advance
        variables = [f"{name}={value}" for name, value in console.environment().items()]
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

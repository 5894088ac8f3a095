"""Ray around a job: start or join a cluster, and submit a job script to it.

In: the `cluster` section of a recipe, a script of `jobs/` and its arguments. Out: a `Session` (a
connected Ray) and the exit code of the job. Whether the job can be placed at all is for
`fmray.runtime.placement` to say.
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

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

AGENT_SECONDS = 120  # a new cluster takes jobs once the agent of its head node has registered
ANSWER_SECONDS = 5


@dataclass(frozen=True)
class Session:
    """A connected Ray: `dashboard` is the http address that takes jobs; `here`: they run here."""

    address: str
    dashboard: str | None
    here: bool


@contextmanager
def start_or_join(cluster: ClusterConfig, log_to_driver: bool = True) -> Iterator[Session]:
    """Connect to `cluster.address`, RAY_ADDRESS or this machine's cluster, else start one with a
    dashboard.

    A cluster started here ends with the context; one that was there stays. Ray secures a new local
    cluster with a token in the user's home (`ray get-auth-token`); its own processes and job
    clients find it there.

    Args:
        log_to_driver: what workers print is printed here too.

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
    """Raise ValueError when nothing listens at `address` (or RAY_ADDRESS): Ray tries minutes."""
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
            " `ray start --head`, or leave it out to use this machine"
        ) from error


def _on_head_node() -> bool:
    """Whether this process sits on the node that runs submitted jobs."""
    import ray

    mine = ray.get_runtime_context().get_node_id()
    return any(
        node["NodeID"] == mine and "node:__internal_head__" in node["Resources"]
        for node in ray.nodes()
    )


def submit(session: Session, script: Path, arguments: Sequence[str], submission_id: str) -> int:
    """Run a job script as a Ray job, print its log lines as they come, and return its exit code.

    Where jobs run on this machine, the job has the folder, the Python and the paths of this
    process. Elsewhere it gets a copy of the script's folder as working directory, fmray must be
    installed, and paths in `arguments` are relative to that folder or shared by all nodes.
    Interrupted (ctrl-C), it stops the job first.

    Raises:
        ValueError: the cluster has no dashboard, so it takes no jobs.
    """
    from ray.job_submission import JobSubmissionClient

    if session.dashboard is None:
        raise ValueError(
            f"the Ray cluster at {session.address} has no dashboard and so takes no jobs;"
            " start it with one"
        )
    client = JobSubmissionClient(session.dashboard)
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    if session.here:
        command = shlex.join([sys.executable, str(script.resolve()), *arguments])
        entrypoint, environment = f"cd {shlex.quote(os.getcwd())} && exec {command}", None
    else:
        entrypoint = shlex.join(["python", script.name, *arguments])
        environment = {"working_dir": str(script.resolve().parent)}
    _submit_when_ready(client, entrypoint, environment, submission_id)
    try:
        asyncio.run(_print_log(client, submission_id))
        return _exit_code(client, submission_id)
    except BaseException:  # ctrl-C above all: nobody would be left to wait for the job
        client.stop_job(submission_id)
        raise


def _submit_when_ready(
    client: JobSubmissionClient, entrypoint: str, environment: dict[str, str] | None, job: str
) -> None:
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
                    f"the Ray cluster took no job for {AGENT_SECONDS} s: its job agent does not"
                    " run. Another Ray session on this machine may hold the agent's port 52365;"
                    " stop it, or set RAY_ADDRESS to use that cluster"
                ) from error
        time.sleep(0.5)


async def _print_log(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def _exit_code(client: JobSubmissionClient, job: str) -> int:
    """The exit code of a job whose log has ended; its status follows within moments."""
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.1)
    info = client.get_job_info(job)
    if info.driver_exit_code is None:
        # The script never ran: the runtime environment could not be set up, or the supervisor died.
        print(f"fmray: job {job}: {info.status.value}: {info.message}", file=sys.stderr)
        return 1
    return info.driver_exit_code

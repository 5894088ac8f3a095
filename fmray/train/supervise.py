"""Supervision of a training job: preemption notices in the workers, restarts in the driver.

`fit` runs a training loop under Ray Train and restarts it after a failure, until
`cluster.max_failures` failures in a row have made no new checkpoint. The job then ends with one of
these exit codes: 0 done, 1 gave up, 2 a user's mistake (never retried), 130 ctrl-C, 143 SIGTERM.

fmray decides about every restart, Ray about none, so that all limits and log lines are in one
place. Each attempt gets a new Ray Train controller: when a node dies while the process group
starts, the old controller leaks its placement group and never gets past it.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError, RayError
from ray.train import (
    ControllerError,
    FailureConfig,
    LoggingConfig,
    PreemptionError,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer

from fmray.config import BaseRecipe
from fmray.errors import GaveUp, raised_by_fmray
from fmray.runtime import console, ray_private
from fmray.runtime.run_log import event
from fmray.runtime.tracking import Run
from fmray.train.checkpoint import STORAGE_HOURS
from fmray.train.mirror import Mirror, last_state, open_mirror

PAUSE_SECONDS = 5.0  # before the second restart in a row without a new checkpoint; then 10, 15, ...
LONGEST_PAUSE = 60.0
DRAIN_SECONDS = 30.0  # a drained node leaves the cluster when it is idle
REASON_LENGTH = 300  # characters of a failure's text in the log

# how often rank 0 asks Ray for a preemption notice: as often as Ray's own watcher looks
POLL_SECONDS = float(os.environ.get("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "5"))

Loop = Callable[[dict[str, Any]], dict[str, Any]]


# --- Preemption, in the workers ---


class PreemptionNotice:
    """Notices, on all ranks at the same step, that the workers have to stop soon.

    The reason is a node that Ray drains (a spot machine that is taken back, `ray drain-node`) or
    SIGTERM. A context manager; while open it handles SIGTERM if training runs in the main thread,
    which is the case without Ray workers. In a Ray worker SIGTERM belongs to Ray.

    Polling Ray is a broadcast from rank 0 over an actor and takes milliseconds. Rank 0 therefore
    decides when it is time, and the loop adds `should_poll` to the sum over the ranks that ends
    each step anyway.
    """

    def __init__(self, rank: int) -> None:
        self._rank, self._polled_at = rank, time.monotonic()
        self._terminated = False
        # Ray's workers train in a thread of their own
        self._in_main_thread = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> PreemptionNotice:
        if self._in_main_thread:
            self._previous = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(self, *error: object) -> None:
        if self._in_main_thread:
            signal.signal(signal.SIGTERM, self._previous)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True

    def should_poll(self) -> float:
        """Return 1.0 when it is time to poll, else 0.0; all ranks poll if any rank returns 1.0."""
        due = self._rank == 0 and time.monotonic() - self._polled_at >= POLL_SECONDS
        return float(self._terminated or due)

    def poll(self) -> str | None:
        """Return the reason to stop, or None; collective."""
        self._polled_at = time.monotonic()
        if self._terminated:
            return "received SIGTERM"
        info = ray.train.get_preemption_info()
        if info is None:
            return None
        nodes = ", ".join(node[:8] for node in info.preempted_node_ids)
        return f"node {nodes} (rank {', '.join(map(str, info.preempted_ranks))}) is being drained"


# --- Restarts, in the driver ---


@dataclass(frozen=True)
class Outcome:
    """How a training job ended."""

    values: dict[str, Any]  # what the loop returned on rank 0
    restarts: tuple[str, ...]  # the reason of each restart

    def lines(self) -> list[str]:
        """Return the lines for the job's summary."""
        if not self.restarts:
            return []
        return [f"restarts: {len(self.restarts)} (last: {self.restarts[-1]})"]


def fit(
    recipe: BaseRecipe,
    run_id: str,
    config: dict[str, Any],
    loop: Loop,
    run: Run,
    callbacks: Sequence[UserCallback] = (),
) -> Outcome:
    """Run `loop(config)` on every worker; after a failure, restart from the last checkpoint.

    With `cluster.workers: 0` the loop runs once, in this process.

    Args:
        loop: returns a dict; with the key `preempted` (the reason) if it has stopped early, after
            a checkpoint.
        run: gets the tags `fmray.restarts` and `fmray.last_failure`.

    Raises:
        ValueError: fmray raised it in a worker; or all checkpoints are damaged.
        GaveUp: a worker raised it; or more than `cluster.max_failures` failures in a row without a
            new checkpoint.
        SystemExit: 143, after SIGTERM.
    """
    cluster, run_dir = recipe.cluster, recipe.cluster.storage / run_id
    if cluster.workers == 0:
        values = _trainer(recipe, run_id, config, loop, callbacks).fit().return_value
        if "preempted" in values:
            event(run_dir, f"{values['preempted']}; resume with the same --run-id")
            raise SystemExit(128 + signal.SIGTERM)
        return Outcome(values, ())

    ray_private.check_ray()
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.timeout_s)
    # for a rank that never reports; evaluations and checkpoints of the others may take long
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(STORAGE_HOURS * 3600))
    loop = partial(_mark_mistakes, loop)
    callbacks = [*callbacks, _start_limit(cluster.fewest_workers, cluster.timeout_s)]
    mirror = open_mirror(cluster, run_dir)
    restarts: list[str] = []
    step, failures_in_a_row = _last_step(run_dir, mirror), 0
    while True:
        # one attempt
        trainer = _trainer(recipe, run_id, config, loop, callbacks)
        try:
            with _signals(), _cluster_address():
                values = trainer.fit().return_value
            if "preempted" not in values:
                return Outcome(values, tuple(restarts))
            reason, failed = values["preempted"], False
            _wait_for_drained(time.monotonic() + DRAIN_SECONDS)
        except (TrainingFailedError, RayActorError) as error:
            _raise_final(error)
            reason, failed = failure_reason(error), True
            if isinstance(error, RayActorError):
                _release_reservation(trainer)
            if isinstance(error, WorkerGroupError) and not _is_death(_root_failure(error)[1]):
                print(error, file=sys.stderr)  # with the workers' tracebacks

        # record why it ended, and decide whether to restart
        restarts.append(reason)
        run.tag("fmray.restarts", str(len(restarts)))
        run.tag("fmray.last_failure", reason)
        previous_step, step = step, _last_step(run_dir, mirror)
        failures_in_a_row = int(failed) if step != previous_step else failures_in_a_row + 1
        if failures_in_a_row > cluster.max_failures:
            raise GaveUp(
                f"run {run_id} gave up: {reason}; that was failure {failures_in_a_row} in a row"
                f" without a new checkpoint (cluster.max_failures: {cluster.max_failures}); the"
                f" same --run-id resumes from step {step}"
            )
        attempt = f"attempt {failures_in_a_row + 1} of {cluster.max_failures + 1}"
        event(run_dir, f"{reason}; resuming from step {step} ({attempt})")
        time.sleep(min(PAUSE_SECONDS * max(failures_in_a_row - 1, 0), LONGEST_PAUSE))


def failure_reason(error: Exception) -> str:
    """Return one line about a failure of Ray Train: what happened, to which rank, on which node."""
    if isinstance(error, WorkerGroupError):
        rank, failure = _root_failure(error)
        others = len(error.worker_failures) - 1
        more = f" (and {others} more failed)" if others else ""
        return f"worker {rank} {_describe(failure)}{more}"
    if isinstance(error, PreemptionError):
        ranks = ", ".join(map(str, error.preemption_info.preempted_ranks))
        return f"the node of rank {ranks} was preempted before a checkpoint was written"
    if isinstance(error, ControllerError):
        cause = error.controller_failure
        if isinstance(cause, ray_private.WorkerGroupStartupTimeoutError):
            workers = console.count_of(cause.num_workers, "worker")
            return f"{workers} could not be placed within cluster.timeout_s"
        return f"the workers did not start: {_short(cause)}"
    return f"Ray's training controller died: {_short(error)}"


def _root_failure(error: WorkerGroupError) -> tuple[int, Exception]:
    """Return the (rank, failure) that caused the others: a rank that died, else the lowest one."""
    failures = sorted(error.worker_failures.items())
    return next((item for item in failures if _is_death(item[1])), failures[0])


def _is_death(failure: Exception) -> bool:
    return isinstance(failure, ray_private.WorkerHealthCheckFailedError)


def _describe(failure: Exception) -> str:
    if _is_death(failure):
        cause = failure.health_check_failure
        node, process = (re.search(rf"\b{name}: (\S+)", str(cause)) for name in ("ip", "pid"))
        if node and process:
            return f"died (node {node[1]}, process {process[1]})"
        return f"died: {_short(cause)}"
    return f"raised {_short(failure)}"


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:REASON_LENGTH]


def _release_reservation(trainer: TorchTrainer) -> None:
    """Release the resources that a killed controller has reserved.

    Elastic workers could not be placed until the reservation expires, after three minutes.
    """
    coordinator = ray_private.get_or_create_autoscaling_coordinator
    with suppress(RayError):  # the cluster may be gone too
        ray.get(
            coordinator().cancel_request.remote(f"train-{trainer.train_run_context.run_id}"),
            timeout=DRAIN_SECONDS,
        )


def _wait_for_drained(end: float) -> None:
    """Wait until no node is draining: an elastic group would be sized for its resources too."""
    while ray_private.cluster_state.get_draining_nodes() and time.monotonic() < end:
        time.sleep(0.5)


def _last_step(run_dir: Path, mirror: Mirror | None) -> int:
    newest = last_state(run_dir, mirror)
    return 0 if newest is None else newest[1].step


class _Mistake(Exception):
    """A user's mistake, on its way from a worker to the driver."""


def _mark_mistakes(loop: Loop, config: dict[str, Any]) -> dict[str, Any]:
    """Call `loop(config)` in a worker, and raise fmray's ValueErrors as `_Mistake`.

    A restart would only repeat them. Ray ends the other ranks, which may wait for this one.
    """
    try:
        return loop(config)
    except ValueError as error:
        if not raised_by_fmray(error):
            raise
        raise _Mistake(str(error)) from None


def _raise_final(error: Exception) -> None:
    """Raise ValueError if a worker raised `_Mistake`, and GaveUp if one raised that."""
    for failure in error.worker_failures.values() if isinstance(error, WorkerGroupError) else ():
        if isinstance(failure, _Mistake):
            raise ValueError(str(failure)) from None
        if isinstance(failure, GaveUp):
            raise GaveUp(str(failure)) from None


def _start_limit(workers: int, seconds: float) -> Any:
    """Return a callback that ends the controller when elastic workers cannot be placed in time.

    The controller itself would wait forever.
    """

    class StartLimit(ray_private.ControllerCallback):
        since: float | None = None

        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            """Called after each round of the controller."""
            if not isinstance(current_state, ray_private.InitializingState):
                self.since = None
                return
            self.since = self.since or time.monotonic()
            if time.monotonic() - self.since > seconds:
                raise ray_private.WorkerGroupStartupTimeoutError(workers)
            time.sleep(0.1)  # Ray retries without a pause

    return StartLimit()


@contextmanager
def _signals() -> Iterator[None]:
    """End the job with 143 on SIGTERM and 130 on ctrl-C; Ray would end it with 15 and 0."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit as error:
        if error.code == 0:  # Ray has ended the workers after ctrl-C
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _cluster_address() -> Iterator[None]:
    """Set RAY_ADDRESS to this cluster, in the controller and its helper processes too.

    Ray's cleaner of placement groups outlives a killed controller (that of a stopped trial) and
    looks for a cluster on the machine; where several run, it needs the address.
    """
    previous = os.environ.get("RAY_ADDRESS")
    ray_private.ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        if previous is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = previous


def _trainer(
    recipe: BaseRecipe,
    run_id: str,
    config: dict[str, Any],
    loop: Loop,
    callbacks: Sequence[Any],
) -> TorchTrainer:
    cluster = recipe.cluster
    gpu = cluster.gpus_per_worker > 0
    environment = {} if gpu else {"DS_ACCELERATOR": "cpu"}
    resources = {"CPU": cluster.cpus_per_worker}
    if gpu:
        resources["GPU"] = cluster.gpus_per_worker
    return TorchTrainer(
        loop,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=cluster.timeout_s),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, use_gpu=gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=run_id,
            storage_path=str(cluster.storage),
            callbacks=list(callbacks),
            failure_config=FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
            worker_runtime_env={"env_vars": environment | console.environment()},
            logging_config=LoggingConfig(log_level="CRITICAL"),  # `fit` logs failures
        ),
    )

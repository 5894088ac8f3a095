"""Ray Train under supervision: what fails is said, counted and tried again, but not for ever.

In: a recipe, a run id and the loop of a worker. Out: an `Outcome`, or an exception that
`fmray.cli.exit_code` turns into the job's exit code: 2 a mistake of the user's, which is never
tried again; 1 gave up; 130 interrupted; 143 told to stop (SIGTERM).

Every restart is decided here, none by Ray. A new controller frees what the one before held: a node
that dies while the process group starts leaks its placement group, and a controller that goes on
never gets past it. And all limits and all lines are in one place.
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
from ray._private.state import state as ray_state
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
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
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import InitializingState

from fmray.config import BaseRecipe
from fmray.errors import GaveUp, raised_by_fmray
from fmray.runtime.placement import count_of
from fmray.runtime.run_log import event
from fmray.runtime.tracking import Run
from fmray.train.checkpoint import STORAGE_HOURS
from fmray.train.mirror import Mirror, last_state, open_mirror

# Whether a worker has been told to stop soon: its node is drained, or its process got SIGTERM.
#
# In: Ray's notice of a drain (spot machines that are taken back, `ray drain-node`), and SIGTERM
# where training runs in this process; in a Ray worker SIGTERM is Ray's, and ends it. Out: one line
# for all ranks at the same step, after which they write a checkpoint and return.
#
# Asking Ray is a broadcast from rank 0 over an actor, milliseconds; so rank 0 decides when it is
# time to ask, and says so in the sum over the ranks that ends each step anyway.

# how often Ray's own watcher looks
ASK_SECONDS = float(os.environ.get("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "5"))


class PreemptionNotice:
    """A context manager: it takes SIGTERM while it is open, in a process of one rank."""

    def __init__(self, rank: int) -> None:
        self._rank, self._asked = rank, time.monotonic()
        self._terminated = False
        # Ray's workers train in a thread of their own
        self._alone = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> PreemptionNotice:
        if self._alone:
            self._kept = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(self, *error: object) -> None:
        if self._alone:
            signal.signal(signal.SIGTERM, self._kept)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True

    def should_poll(self) -> float:
        """1.0 on rank 0 when it is time to ask, else 0.0; the ranks call `poll` if any has 1.0."""
        return float(
            self._terminated or (self._rank == 0 and time.monotonic() - self._asked >= ASK_SECONDS)
        )

    def poll(self) -> str | None:
        """Why to stop, or None; every rank must call this."""
        self._asked = time.monotonic()
        if self._terminated:
            return "told to stop (SIGTERM)"
        info = ray.train.get_preemption_info()
        if info is None:
            return None
        nodes = ", ".join(node[:8] for node in info.preempted_node_ids)
        return f"node {nodes} (rank {', '.join(map(str, info.preempted_ranks))}) is drained"


# Ray's own, as are `ray_state` and the coordinator: no other door leads to what is drained, to the
# cause of a failure, to elastic workers that wait for ever for room, and to what they reserve


PAUSE_SECONDS = 5.0  # before the second restart in a row without a new checkpoint; then 10, 15, ...
LONGEST_PAUSE = 60.0
DRAIN_SECONDS = 30.0  # a drained node leaves when it is idle
REASON_LENGTH = 300

Loop = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """values: what rank 0 returned. restarts: why the workers were started again, each time."""

    values: dict[str, Any]
    restarts: tuple[str, ...]

    def lines(self) -> list[str]:
        """Of the job's summary."""
        if not self.restarts:
            return []
        return [f"restarts: {len(self.restarts)}; the last: {self.restarts[-1]}"]


def fit(
    recipe: BaseRecipe,
    run_id: str,
    config: dict[str, Any],
    loop: Loop,
    run: Run,
    callbacks: Sequence[UserCallback] = (),
) -> Outcome:
    """Run `loop(config)` on every worker until it is done; after a failure, from the last
    checkpoint.

    The loop returns a dict, with the key `preempted` where it has stopped early, after a
    checkpoint. `run` gets the tags `fmray.restarts` and `fmray.last_failure`. In this process
    (`cluster.workers: 0`) nothing is tried again.

    Raises:
        ValueError: one that fmray raised in a worker; or no checkpoint is whole.
        GaveUp: `cluster.max_failures` restarts in a row have made no new checkpoint.
        SystemExit: 143, after SIGTERM.
    """
    cluster, run_dir = recipe.cluster, recipe.cluster.storage / run_id
    if cluster.workers == 0:
        values = _trainer(recipe, run_id, config, loop, callbacks).fit().return_value
        if "preempted" in values:
            event(run_dir, f"{values['preempted']}; the same --run-id goes on from there")
            raise SystemExit(128 + signal.SIGTERM)
        return Outcome(values, ())
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.timeout_s)
    # a rank that never reports; evaluations and checkpoints of the others may take long
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(STORAGE_HOURS * 3600))
    carried = partial(_carry, loop)
    watch = [*callbacks, _StartLimit(cluster.fewest_workers, cluster.timeout_s)]
    restarts: list[str] = []
    mirror = open_mirror(cluster, run_dir)
    step, in_a_row = _last_step(run_dir, mirror), 0
    while True:
        trainer = _trainer(recipe, run_id, config, carried, watch)
        try:
            with _signals(), _address():
                values = trainer.fit().return_value
            if "preempted" not in values:
                return Outcome(values, tuple(restarts))
            reason, lost = values["preempted"], False
            _wait_for_drained(time.monotonic() + DRAIN_SECONDS)
        except (TrainingFailedError, RayActorError) as error:
            _raise_mistake(error)
            reason, lost = why(error), True
            if isinstance(error, RayActorError):
                _release(trainer)
            if isinstance(error, WorkerGroupError) and not _died(_first(error)[1]):
                print(error, file=sys.stderr)  # with the workers' tracebacks
        restarts.append(reason)
        run.tag("fmray.restarts", str(len(restarts)))
        run.tag("fmray.last_failure", reason)
        before, step = step, _last_step(run_dir, mirror)
        in_a_row = int(lost) if step != before else in_a_row + 1
        goes_on = f"from step {step}" if step else "from the start"
        if in_a_row > cluster.max_failures:
            raise GaveUp(
                f"run {run_id} gave up: {reason}; that was failure {in_a_row} in a row without a"
                f" new checkpoint (cluster.max_failures: {cluster.max_failures}); the same"
                f" --run-id goes on {goes_on}"
            )
        event(
            run_dir,
            f"{reason}; goes on {goes_on}, try {in_a_row + 1} of {cluster.max_failures + 1}",
        )
        time.sleep(min(PAUSE_SECONDS * max(in_a_row - 1, 0), LONGEST_PAUSE))


def why(error: Exception) -> str:
    """One line for a failure of Ray Train: what happened, to which rank, on which node."""
    if isinstance(error, WorkerGroupError):
        rank, failure = _first(error)
        others = len(error.worker_failures) - 1
        more = f" (and {others} more failed)" if others else ""
        return f"worker {rank} {_what(failure)}{more}"
    if isinstance(error, PreemptionError):
        ranks = ", ".join(map(str, error.preemption_info.preempted_ranks))
        return f"the node of rank {ranks} was taken away before a checkpoint was made"
    if isinstance(error, ControllerError):
        cause = error.controller_failure
        if isinstance(cause, WorkerGroupStartupTimeoutError):
            return f"{count_of(cause.num_workers, 'worker')} found no room within cluster.timeout_s"
        return f"the workers did not start: {_short(cause)}"
    return f"Ray's training controller died: {_short(error)}"


def _first(error: WorkerGroupError) -> tuple[int, Exception]:
    """The rank that failed and how: when one dies, the others fail too, for want of it."""
    found = sorted(error.worker_failures.items())
    return next((item for item in found if _died(item[1])), found[0])


def _died(failure: Exception) -> bool:
    return isinstance(failure, WorkerHealthCheckFailedError)


def _what(failure: Exception) -> str:
    if _died(failure):
        cause = failure.health_check_failure
        node, process = (re.search(rf"\b{name}: (\S+)", str(cause)) for name in ("ip", "pid"))
        if node and process:
            return f"died (node {node[1]}, process {process[1]})"
        return f"died: {_short(cause)}"
    return f"raised {_short(failure)}"


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:REASON_LENGTH]


def _release(trainer: TorchTrainer) -> None:
    """Give back what a controller had reserved that was killed: elastic workers would find no room
    until it expires, after three minutes."""
    with suppress(RayError):  # of a cluster that is going as a whole
        ray.get(
            get_or_create_autoscaling_coordinator().cancel_request.remote(
                f"train-{trainer.train_run_context.run_id}"
            ),
            timeout=DRAIN_SECONDS,
        )


def _wait_for_drained(end: float) -> None:
    """Until no node is being drained: an elastic group would be made for its place too."""
    while ray_state.get_draining_nodes() and time.monotonic() < end:
        time.sleep(0.5)


def _last_step(run_dir: Path, mirror: Mirror | None) -> int:
    newest = last_state(run_dir, mirror)
    return 0 if newest is None else newest[1].step


class _Mistake(Exception):
    """A user's mistake, on its way from a worker to the driver."""


def _carry(loop: Loop, config: dict[str, Any]) -> dict[str, Any]:
    """`loop(config)` in a worker. What a restart would find again is raised as `_Mistake`: Ray ends
    the other ranks, which may wait for this one."""
    try:
        return loop(config)
    except ValueError as error:
        if not raised_by_fmray(error):
            raise
        raise _Mistake(str(error)) from None


def _raise_mistake(error: Exception) -> None:
    for failure in error.worker_failures.values() if isinstance(error, WorkerGroupError) else ():
        if isinstance(failure, _Mistake):
            raise ValueError(str(failure)) from None


class _StartLimit(ControllerCallback):
    """Ends the controller when elastic workers find no room: it would wait for ever."""

    def __init__(self, workers: int, seconds: float) -> None:
        self._workers, self._seconds = workers, seconds
        self._since: float | None = None

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called after each round of the controller."""
        if not isinstance(current_state, InitializingState):
            self._since = None
            return
        self._since = self._since or time.monotonic()
        if time.monotonic() - self._since > self._seconds:
            raise WorkerGroupStartupTimeoutError(self._workers)
        time.sleep(0.1)  # Ray asks again without a pause


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM ends the job with 143, ctrl-C with 130. Ray would end it with 15, and with 0."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

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
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextmanager
def _address() -> Iterator[None]:
    """Ray's cleaner of placement groups outlives a controller that is killed, as a stopped trial's
    is, and looks for its cluster among all on the machine: where there are several, it is told."""
    kept = os.environ.get("RAY_ADDRESS")
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        if kept is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = kept


def _trainer(
    recipe: BaseRecipe,
    run_id: str,
    config: dict[str, Any],
    loop: Loop,
    callbacks: Sequence[UserCallback | ControllerCallback],
) -> TorchTrainer:
    cluster = recipe.cluster
    gpu = cluster.gpus_per_worker > 0
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
            worker_runtime_env={"env_vars": {} if gpu else {"DS_ACCELERATOR": "cpu"}},
            logging_config=LoggingConfig(log_level="CRITICAL"),  # the supervisor says it
        ),
    )

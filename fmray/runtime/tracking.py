"""Experiment tracking with MLflow: one run of fmray is one MLflow run, across all restarts.

Runs are stored in an sqlite file inside the storage folder (no server needed), or on the server
`tracking.uri`.

Training never waits for tracking and never fails because of it. `Run.log` and `Run.artifact` only
queue; a background thread opens the run and writes in batches every two seconds, so a crash loses
at most that much. While the store is unreachable, the thread keeps the queue and retries. The first
failure is logged as a warning; later ones are counted and reported at the end.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fmray.config import BaseRecipe, TrackingConfig
from fmray.runtime.registry import (
    RUN_ID_TAG,
    bounded_requests,
    check_run_id,
    failure_types,
    find_experiment,
    find_run,
    open_client,
    production,
    register,
    shown,
    tracking_uri,
)

if TYPE_CHECKING:  # importing mlflow takes 1.5 s: only when a run is opened
    from mlflow import MlflowClient

__all__ = ["Run", "open_job_run", "open_run", "production", "register", "tracking_uri"]

Status = Literal["FINISHED", "FAILED", "KILLED"]

_FLUSH_SECONDS = 2.0  # between batches: what a crash may lose
_LONGEST_PAUSE = 60.0  # between attempts while the store is unreachable
_FINISH_SECONDS = 60.0  # `finish` waits this long without progress (a locked sqlite takes 20)
_LAST_ATTEMPTS = 2  # of `finish`, one second apart
_METRICS_PER_BATCH = 1000  # MLflow's limits for one request
_PARAMETERS_PER_BATCH = 100
_PARAMETER_LENGTH = 6000
_QUEUE_LENGTH = 200_000  # metrics; some 40 MB

_Point = tuple[str, float, int, int]  # name, value, milliseconds since 1970, step
_logger = logging.getLogger(__name__)


def open_run(
    config: TrackingConfig,
    storage: Path,
    run_id: str,
    parameters: Mapping[str, Any],
    tags: Mapping[str, Any] | None = None,
    parent: str | None = None,
) -> Run:
    """Open the MLflow run of `run_id`, an existing or a new one, without waiting for the store.

    Only one process opens a run (rank 0). With `config.enabled` false the result does nothing.

    Args:
        storage: folder of the sqlite file and, with sqlite, of the artifacts (`mlartifacts/`).
        run_id: fmray's run id, stored in the tag `fmray.run_id`, by which a restart finds the run.
        parameters: logged once; nested mappings get dotted names. If a restart has other values,
            MLflow keeps the first ones and a warning names the difference.
        parent: MLflow run id of the parent, for child runs of a search.

    Raises:
        ValueError: an unusable `tracking.uri` or `run_id`.
    """
    uri = tracking_uri(config, storage)
    check_run_id(run_id)
    labels = {name: str(value) for name, value in (tags or {}).items()}
    labels |= {RUN_ID_TAG: run_id} | ({"mlflow.parentRunId": parent} if parent else {})
    return Run(config, uri, Path(storage).resolve(), run_id, dict(_flat(parameters)), labels)


def open_job_run(
    recipe: BaseRecipe,
    run_id: str,
    job: str | None = None,
    parent: str | None = None,
    enabled: bool = True,
) -> Run:
    """Open the run of a recipe's job, with all settings as parameters; see `open_run`.

    Args:
        job: value of the tag `fmray.job`; None leaves it unchanged (the run of another job).
        parent: MLflow run id of the parent run.
        enabled: False on ranks that do not track.
    """
    config = recipe.tracking if enabled else recipe.tracking.model_copy(update={"enabled": False})
    tags = None if job is None else {"fmray.job": job}
    parameters = recipe.model_dump(mode="json")
    return open_run(config, recipe.cluster.storage, run_id, parameters, tags, parent)


class Run:
    """An open run.

    A context manager, which ends the run as FINISHED, FAILED (an error) or KILLED (an interrupt).
    No method raises, or waits long, because of the store.
    """

    def __init__(
        self,
        config: TrackingConfig,
        uri: str,
        storage: Path,
        run_id: str,
        parameters: dict[str, str],
        tags: dict[str, str],
    ) -> None:
        self.run_id = run_id
        self._config, self._uri, self._storage = config, uri, storage
        self._parameters, self._tags = parameters, tags
        self._metrics: deque[_Point] = deque()
        self._files: deque[tuple[Path, str | None]] = deque()
        self._late_tags: deque[tuple[str, str]] = deque()
        self._lock = threading.Lock()
        self._tried, self._closing = threading.Event(), threading.Event()
        self._wake = threading.Event()  # write now instead of after the pause
        self._status: Status | None = None
        self._mlflow_run_id: str | None = None
        self._ended = self._abandoned = False
        self._failures = self._lost = self._lost_files = 0
        self._last_error = ""
        self._progress = time.monotonic()
        self._thread: threading.Thread | None = None
        if config.enabled:
            # not in the thread: imports that race with the caller's can see incomplete modules
            import mlflow  # noqa: F401

            self._environment = ExitStack()
            self._environment.enter_context(bounded_requests())
            self._thread = threading.Thread(target=self._work, name="fmray-tracking", daemon=True)
            self._thread.start()

    @property
    def mlflow_run_id(self) -> str | None:
        """MLflow's id after the first attempt to open; None if disabled or still unreachable."""
        if self._thread is not None:
            self._tried.wait(_FINISH_SECONDS)
        return self._mlflow_run_id

    def log(self, step: int, **metrics: float) -> None:
        """Queue the metrics of a step, without blocking; with slashes: `**{"train/loss": loss}`."""
        if self._thread is None or self._closing.is_set():
            return
        now = int(time.time() * 1000)
        points = [(_allowed(name), float(value), now, int(step)) for name, value in metrics.items()]
        with self._lock:
            if len(self._metrics) + len(points) > _QUEUE_LENGTH:
                self._lost += len(points)
            else:
                self._metrics.extend(points)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Queue a file, or a folder under its name, for upload; it must exist until `finish`."""
        if self._thread is not None and not self._closing.is_set():
            with self._lock:
                self._files.append((Path(path).resolve(), folder))

    def tag(self, name: str, value: str) -> None:
        """Queue a tag of the run."""
        if self._thread is not None and not self._closing.is_set():
            self._late_tags.append((name, value))

    def flush(self, seconds: float = 5.0) -> None:
        """Write the queued metrics now; return when done, after a failure, or after `seconds`.

        Called before each checkpoint: a run that resumes from it repeats only later metrics, and a
        killed process loses its queue.
        """
        if self._thread is None or self._closing.is_set():
            return
        end, failures = time.monotonic() + seconds, self._failures
        self._wake.set()
        while self._metrics and self._failures == failures and time.monotonic() < end:
            time.sleep(0.02)

    def finish(self, status: Status = "FINISHED") -> None:
        """Write the queue and end the run, in bounded time; a second call does nothing."""
        assert status in ("FINISHED", "FAILED", "KILLED"), status
        if self._thread is None or self._closing.is_set():
            return
        self._status, self._progress = status, time.monotonic()
        self._closing.set()
        self._wake.set()
        while self._thread.is_alive() and time.monotonic() - self._progress < _FINISH_SECONDS:
            self._thread.join(0.2)
        self._abandoned = True
        self._environment.close()
        missing = self._lost + len(self._metrics)
        if missing or self._files or self._lost_files or not self._ended:
            _logger.warning(
                "tracking of run %s is incomplete: %d metrics and %d files not recorded, run %s, "
                "%d failed attempts; last: %s",
                self.run_id,
                missing,
                self._lost_files + len(self._files),
                "ended" if self._ended else "not ended",
                self._failures,
                self._last_error or f"no answer in {_FINISH_SECONDS:.0f} s",
            )
        elif self._failures:
            _logger.info(
                "tracking of run %s is complete after %d failed attempts",
                self.run_id,
                self._failures,
            )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.finish("FINISHED")
        else:
            self.finish("FAILED" if isinstance(error, Exception) else "KILLED")

    # --- In the background thread ---

    def _work(self) -> None:
        """Open the run and write until `finish`; retry with growing pauses."""
        failures = (*failure_types(), ValueError)  # a response that is not JSON
        client: MlflowClient | None = None
        pause, attempts_left = _FLUSH_SECONDS, _LAST_ATTEMPTS
        while not self._ended and not self._abandoned and attempts_left > 0:
            closing = self._closing.is_set()
            try:
                client = client or open_client(self._uri)
                if self._mlflow_run_id is None:
                    self._mlflow_run_id = self._open(client)
                self._write(client, self._mlflow_run_id)
                if closing:
                    client.set_terminated(self._mlflow_run_id, self._status)
                    self._ended = True
                pause = _FLUSH_SECONDS
            except failures as error:
                self._failed(error)
                pause = min(2 * pause, _LONGEST_PAUSE)
                if closing:
                    attempts_left -= 1
                    time.sleep(1.0 if attempts_left else 0.0)
            finally:
                self._tried.set()
            if not self._closing.is_set():
                self._wake.wait(pause)
                self._wake.clear()

    def _open(self, client: MlflowClient) -> str:
        """Find or create the run, log parameters and tags, and return its id; safe to repeat."""
        experiment_id = find_experiment(client, self._config, self._uri, self._storage)
        run = find_run(client, experiment_id, self.run_id)
        if run is None:
            run = client.create_run(experiment_id, tags=self._tags, run_name=self.run_id)
        else:
            client.update_run(run.info.run_id, "RUNNING")
        for name, value in self._tags.items():
            if run.data.tags.get(name) != value:
                client.set_tag(run.info.run_id, name, value)

        from mlflow.entities import Param

        known = run.data.params
        new = [Param(name, value) for name, value in self._parameters.items() if name not in known]
        for start in range(0, len(new), _PARAMETERS_PER_BATCH):
            client.log_batch(run.info.run_id, params=new[start : start + _PARAMETERS_PER_BATCH])
        changed = [
            f"{name} ({known[name]} -> {value})"
            for name, value in self._parameters.items()
            if name in known and known[name] != value
        ]
        if changed:
            _logger.warning(
                "run %s resumes with other parameters, MLflow keeps the first ones: %s",
                self.run_id,
                ", ".join(changed),
            )
        return run.info.run_id

    def _write(self, client: MlflowClient, mlflow_run_id: str) -> None:
        """Write metrics, tags and files; each leaves the queue once it is written."""
        while True:
            with self._lock:
                batch = list(islice(self._metrics, _METRICS_PER_BATCH))
            if not batch:
                break
            self._send(client, mlflow_run_id, batch)
            with self._lock:
                for _ in batch:
                    self._metrics.popleft()
            self._progress = time.monotonic()
        while self._late_tags:
            client.set_tag(mlflow_run_id, *self._late_tags[0])
            self._late_tags.popleft()
        while self._files:
            path, folder = self._files[0]
            if path.is_dir():
                client.log_artifacts(
                    mlflow_run_id, str(path), "/".join(filter(None, (folder, path.name)))
                )
            elif path.is_file():
                client.log_artifact(mlflow_run_id, str(path), folder)
            else:
                self._lost_files += 1
                self._failed(FileNotFoundError(f"artifact {path.name} is missing"))
            self._files.popleft()
            self._progress = time.monotonic()

    def _send(self, client: MlflowClient, mlflow_run_id: str, batch: list[_Point]) -> None:
        """Write a batch of metrics."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        points = [Metric(*point) for point in batch]
        try:
            client.log_batch(mlflow_run_id, metrics=points)
        except MlflowException as error:
            # a rejection (the run was deleted) is permanent: drop the batch
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
                raise
            self._lost += len(batch)
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Count a failure, and log the first one."""
        self._failures += 1
        lines = str(error).strip().splitlines() or [""]
        self._last_error = shown(f"{type(error).__name__}: {lines[0][:300]}")
        if self._failures == 1 and not self._abandoned:
            _logger.warning(
                "tracking of run %s fails, training continues (%s): %s",
                self.run_id,
                shown(self._uri),
                self._last_error,
            )


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted name, text) of nested parameters."""
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield _allowed(f"{prefix}{name}"), str(value)[:_PARAMETER_LENGTH]


def _allowed(name: str) -> str:
    """Replace characters that MLflow rejects in names: one such name would reject a batch."""
    return re.sub(r"[^\w. :/-]", "_", name)

"""A run's folder as its log: what training writes there while it runs, and what `fmray top` reads.

Rank 0 writes `log.jsonl` (metrics by step), `events.jsonl` (resumes, failures, restarts) and
`status.json` (workers and state of the current worker group). `RunReader` turns them into a `View`;
it prints nothing and does not ask Ray.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from fmray.errors import GaveUp
from fmray.runtime import console
from fmray.runtime.files import MANIFEST, dumps, write_atomic, write_json

if TYPE_CHECKING:
    import torch

EVENTS = "events.jsonl"
STATUS_FILE = "status.json"
RECENT = 20  # steps that speeds are computed from
# A run whose workers cannot be asked counts as dead after a silence of so many seconds, or steps.
SILENT_SECONDS = 120.0
SILENT_STEPS = 20

# --- Progress and metrics ---


class Progress:
    """Progress of a training run: step, time left, loss, budget or accuracy, and speed.

    Shows nothing where not `enabled` (ranks other than 0).
    """

    def __init__(self, total: int, start: int, enabled: bool, name: str = "training") -> None:
        self._name, self._total, self._start = name, total, start
        self._began = time.monotonic()
        self._enabled = enabled
        self._reporter = console.Reporter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Report the end of a step."""
        if not self._enabled or (step < self._total and not self._reporter.due()):
            return
        details = [f"loss {metrics['loss']:.4f}"]
        details += [f"{k} {metrics[k]:.2f}" for k in ("budget", "accuracy") if k in metrics]
        for unit in ("tokens", "episodes", "images"):
            if (speed := metrics.get(f"{unit}_per_s")) is not None:
                details.append(f"{speed:.4g} {unit}/s")
        if step < self._total:
            seconds = (time.monotonic() - self._began) / (step - self._start)
            details.insert(0, console.time_left(seconds * (self._total - step)))
        self._reporter.report(
            console.Step(self._name, "step", step, self._total, ", ".join(details))
        )

    def say(self, text: str) -> None:
        """Show a line."""
        if self._enabled:
            console.say(text)


class StepLog:
    """`log.jsonl`: {"step": ..., metric: value, ...} per line.

    A value that is not finite is `null`. A resumed run starts again at an earlier step; lines after
    `keep_until` are removed.
    """

    def __init__(self, path: Path, keep_until: int, enabled: bool) -> None:
        self._file = None
        if not enabled:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [line for line in read_log(path) if line["step"] <= keep_until]
        write_atomic(path, "".join(dumps(line) + "\n" for line in lines), durable=False)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line and flush it."""
        if self._file is not None:
            self._file.write(dumps({"step": step, **metrics}) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a `log.jsonl`, [] if it is missing; None for a value that is not finite.

    A last line that a crash has cut off is ignored.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


# --- Events ---


def event(run_dir: Path, text: str) -> None:
    """Show an event of a run, such as a restart, and append it to `events.jsonl`."""
    console.say(f"{datetime.now():%H:%M:%S} {run_dir.name}: {text}")
    try:
        with (run_dir / EVENTS).open("a", encoding="utf-8") as file:
            file.write(dumps({"time": time.time(), "text": text}) + "\n")
    except OSError as error:  # a full disk, which the event may be about
        console.say(f"{run_dir.name}: cannot write {EVENTS}: {error}")


def _last_event(run_dir: Path) -> tuple[float, str] | None:
    try:
        lines = (run_dir / EVENTS).read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return None
    values = json.loads(lines[-1]) if lines else None
    return (values["time"], values["text"]) if values else None


# --- Status: what a worker group is doing, and in which processes ---


@dataclass(frozen=True)
class Worker:
    """One rank of a worker group."""

    rank: int
    host: str
    node: str | None  #: Ray's node id; None without Ray
    pid: int
    born: int | None  #: when its process started, see `birth`
    cpus: float
    gpu: str | None


@dataclass(frozen=True)
class Status:
    """State of a run's newest worker group.

    Rank 0 writes it when the group starts and when it ends. A killed process writes nothing, so a
    reader compares the workers listed here with the living processes.
    """

    job: str
    state: Literal["running", "ended", "failed"]
    groups: int  #: worker groups so far, this one included
    started: float  #: seconds since 1970
    start: int  #: step at which the group started
    total: int  #: steps of the run
    ray: str | None  #: HOST:PORT of Ray's head node
    workers: tuple[Worker, ...]
    failure: str | None = None  #: why the group failed


def read_status(run_dir: Path) -> Status | None:
    """Load a run's status, None if it has none.

    Raises:
        ValueError: another version of fmray wrote it.
    """
    path = run_dir / STATUS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if set(values) != {field.name for field in fields(Status)}:
        raise ValueError(f"{path} was written by another version of fmray")
    return Status(**values | {"workers": tuple(Worker(**worker) for worker in values["workers"])})


class StatusFile:
    """Context manager that writes `status.json` around a worker group's steps.

    Every rank must open it: the constructor is a collective operation.
    """

    def __init__(
        self,
        run_dir: Path,
        job: str,
        start: int,
        total: int,
        cpus: float,
        device: torch.device,
    ) -> None:
        # imported late: readers of the file need neither
        import ray
        import torch.distributed as dist

        context = ray.get_runtime_context() if ray.is_initialized() else None
        node = context.get_node_id() if context else None
        pid, gpu = os.getpid(), str(device) if device.type != "cpu" else None
        mine = Worker(dist.get_rank(), platform.node(), node, pid, birth(pid), cpus, gpu)
        workers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(workers, mine)
        self._path = run_dir / STATUS_FILE
        self._values: dict[str, Any] | None = None  # None on ranks other than 0
        if mine.rank == 0:
            before = read_status(run_dir)
            groups = 1 + (before.groups if before is not None else 0)
            address = context.gcs_address if context else None
            self._values = asdict(
                Status(job, "running", groups, time.time(), start, total, address, tuple(workers))
            )

    def __enter__(self) -> StatusFile:
        self._write()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._values is not None and self._newer_group() is None:
            self._values["state"] = "ended" if error is None else "failed"
            if error is not None:
                self._values["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self._write()

    def check(self) -> None:
        """Check, before a file of the run is replaced, that this worker group is the newest.

        When the head node is lost, workers on other nodes outlive their job for minutes. They must
        not write into the job that follows.

        Raises:
            GaveUp: on rank 0, another worker group has started.
        """
        if self._values is not None and (newer := self._newer_group()) is not None:
            raise GaveUp(
                f"run {self._path.parent.name}: another job with this --run-id has started (worker"
                f" group {newer}); this one, group {self._values['groups']}, stops"
            )

    def _newer_group(self) -> int | None:
        """Return the number of the group that has written the file since this one, if any."""
        now = read_status(self._path.parent)
        mine = (self._values["groups"], self._values["started"])
        return now.groups if now is not None and (now.groups, now.started) != mine else None

    def _write(self) -> None:
        if self._values is not None:
            write_json(self._path, self._values, durable=False)


def birth(pid: int) -> int | None:
    """Return when a process of this machine started, in clock ticks since boot.

    Together with the pid it identifies a process even after the pid is reused. None if there is no
    such process or no /proc.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    values = text.rpartition(")")[2].split()  # from field 3 on, proc(5)
    return None if values[0] == "Z" else int(values[19])


# --- View: what `fmray top` shows ---

State = Literal["running", "finished", "stopped", "failed", "dead", "silent", "unknown"]


@dataclass(frozen=True)
class WorkerView:
    """A worker and whether it is alive."""

    worker: Worker
    alive: bool | None  #: None: on a machine that cannot be asked


@dataclass(frozen=True)
class View:
    """What is known about a run. Times are in seconds."""

    run: str
    job: str | None
    state: State  #: stopped: ended early, can be resumed; unknown: the run has no status
    why: str | None  #: reason of a failure
    step: int
    total: int | None
    left: float | None  #: estimated time left
    metrics: dict[str, float | None]  #: None: not finite
    speed: tuple[str, float] | None  #: (unit, units per second)
    waiting_share: float | None  #: share of the time spent waiting for data
    checkpoint: tuple[int, float] | None  #: (step, age)
    evaluation: tuple[int, dict[str, float | None]] | None  #: (step, metrics)
    restarts: int
    event: tuple[float, str] | None  #: (seconds since 1970, text)
    quiet: float | None  #: time since the run last wrote anything
    workers: tuple[WorkerView, ...]


class RunReader:
    """Reads a run's folder; each `read` continues where the previous one stopped."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._place = (0, 0)  # inode and offset in log.jsonl
        self._forget()

    def _forget(self) -> None:
        self._steps: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._evaluation: tuple[int, dict[str, Any]] | None = None

    def read(self, living: Collection[tuple[str, int]] | None = None) -> View:
        """Return the current view.

        Args:
            living: (node, pid) of the workers that are alive according to Ray; None: Ray was not
                asked.
        """
        status, now = read_status(self._run_dir), time.time()
        self._read_log()
        workers = tuple(_worker_view(worker, living) for worker in status.workers) if status else ()
        last = dict(self._steps[-1]) if self._steps else {}
        step = int(last.pop("step", status.start if status else 0))
        speeds = [name for name in last if name.endswith("_per_s")]
        written = _newest(self._run_dir / name for name in ("log.jsonl", "status.json", EVENTS))
        view = View(
            run=self._run_dir.name,
            job=status.job if status else None,
            state="unknown",
            why=status.failure if status else None,
            step=step,
            total=status.total if status else None,
            left=None,
            metrics={k: v for k, v in last.items() if k not in {*speeds, "waiting_share"}},
            speed=(speeds[0].removesuffix("_per_s"), self._median(speeds[0])) if speeds else None,
            waiting_share=self._median("waiting_share") if "waiting_share" in last else None,
            checkpoint=_checkpoint(self._run_dir, now),
            evaluation=self._evaluation,
            restarts=status.groups - 1 if status else 0,
            event=_last_event(self._run_dir),
            quiet=now - written if written is not None else None,
            workers=workers,
        )
        if status is None:
            return view
        # log.jsonl is written after each step
        pace = _pace(status, step, _newest([self._run_dir / "log.jsonl"]))
        state = judge(status, step, [worker.alive for worker in workers], view.quiet, pace)
        left = pace * (status.total - step) if pace is not None and state == "running" else None
        return replace(view, state=state, left=left)

    def _median(self, name: str) -> float:
        return median(line[name] for line in self._steps if name in line)

    def _read_log(self) -> None:
        """Read the new lines, or all if a resumed run has replaced the file."""
        try:
            file = (self._run_dir / "log.jsonl").open("rb")
        except FileNotFoundError:
            return
        with file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._place[0]:
                self._forget()
                self._place = (inode, 0)
            file.seek(self._place[1])
            *lines, rest = file.read().split(b"\n")  # the last line may be incomplete
            self._place = (inode, file.tell() - len(rest))
        for text in lines:
            line = json.loads(text)
            if "loss" in line:
                self._steps.append(line)
            else:
                step = int(line.pop("step"))
                self._evaluation = (step, line)


def judge(
    status: Status, step: int, alive: list[bool | None], quiet: float | None, pace: float | None
) -> State:
    """Return the state of a run.

    Args:
        step: the last one it logged.
        alive: for each worker; None: unknown.
        quiet: seconds since it last wrote anything.
        pace: seconds per step.
    """
    if status.state == "ended":
        return "finished" if step >= status.total else "stopped"
    if status.state == "failed":
        return "failed"
    if False in alive:
        return "dead"
    if None not in alive:
        return "running"
    patience = max(SILENT_SECONDS, SILENT_STEPS * (pace or 0.0))
    return "silent" if quiet is not None and quiet > patience else "running"


def _worker_view(worker: Worker, living: Collection[tuple[str, int]] | None) -> WorkerView:
    if living is not None and worker.node is not None:
        return WorkerView(worker, (worker.node, worker.pid) in living)
    if worker.host == platform.node() and worker.born is not None:
        return WorkerView(worker, birth(worker.pid) == worker.born)
    return WorkerView(worker, None)


def _pace(status: Status, step: int, logged: float | None) -> float | None:
    """Return seconds per step of this worker group, evaluations and checkpoints included."""
    if logged is None or step <= status.start:
        return None
    return max(0.0, logged - status.started) / (step - status.start)


def _checkpoint(run_dir: Path, now: float) -> tuple[int, float] | None:
    """Return (step, age) of the newest complete checkpoint."""
    manifests = sorted(run_dir.glob(f"checkpoint-*/{MANIFEST}"))
    if not manifests:
        return None
    made = _newest([manifests[-1]])
    step = int(manifests[-1].parent.name.rpartition("-")[2])
    return (step, now - made) if made is not None else None


def _newest(paths: Iterable[Path]) -> float | None:
    """Return the latest modification time of the files that exist."""
    times = []
    for path in paths:
        try:
            times.append(path.stat().st_mtime)
        except FileNotFoundError:  # not written yet, or an old checkpoint that was just removed
            continue
    return max(times, default=None)

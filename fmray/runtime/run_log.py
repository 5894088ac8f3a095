"""What a run is doing, from what it writes: log, checkpoints, status and events.

In: a run's folder. Out: a `View`, the facts that `fmray top` shows; nothing in here prints or asks
Ray.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from fmray.runtime.files import MANIFEST

if TYPE_CHECKING:
    import torch


# What a run says while it trains: a bar or lines on rank 0, and `log.jsonl`.
#
# In: metrics by step. Out: a bar (a moving one on a terminal, a line every few seconds in the log
# of a job), and a JSON-lines file in the run's folder that stays right when a run resumes from an
# earlier step; beside it `events.jsonl`, for what happens to the run.

EVENTS = "events.jsonl"
LINE_SECONDS = 10.0
BAR_WIDTH = 24


class Progress:
    """Loss, budget or accuracy, and tokens or episodes a second as training goes on.

    Silent where not `enabled` (ranks other than 0).
    """

    def __init__(self, total: int, start: int, enabled: bool) -> None:
        self._total = total
        self._start, self._began = start, time.monotonic()
        self._enabled = enabled
        self._said = 0.0
        self._bar: tqdm | None = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """One step is done."""
        if not self._enabled:
            return
        shown = {"loss": f"{metrics['loss']:.4f}"}
        for name in ("budget", "accuracy"):
            if name in metrics:
                shown[name] = f"{metrics[name]:.2f}"
        for name in ("tokens", "episodes", "images"):
            if f"{name}_per_s" in metrics:
                shown[f"{name}/s"] = f"{metrics[f'{name}_per_s']:.4g}"
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        elif step in (1, self._total) or time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            self.say(self._line(step) + "  " + "  ".join(f"{k} {v}" for k, v in shown.items()))

    def _line(self, step: int) -> str:
        done = BAR_WIDTH * step // self._total
        left = (time.monotonic() - self._began) / (step - self._start) * (self._total - step)
        bar = "#" * done + "." * (BAR_WIDTH - done)
        minutes, seconds = divmod(int(left), 60)
        return f"[{bar}] {step}/{self._total}, {minutes}:{seconds:02d} left"

    def say(self, text: str) -> None:
        """One line, above the bar where there is one."""
        if self._enabled:
            tqdm.write(text) if self._bar is not None else print(text, flush=True)


class StepLog:
    """`log.jsonl`: {"step": ..., metric: value, ...} per line.

    Lines after `keep_until` are from a lost future.
    """

    def __init__(self, path: Path, keep_until: int, enabled: bool) -> None:
        self._file = None
        if not enabled:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(path) if line["step"] <= keep_until]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line; it is on disk when this returns."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")


def event(run_dir: Path, text: str) -> None:
    """One line for what happens to a run beside its steps; printed, and kept in `events.jsonl`."""
    print(f"{datetime.now():%H:%M:%S} {run_dir.name}: {text}", flush=True)
    try:
        with (run_dir / EVENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "text": text}) + "\n")
    except OSError as error:  # a full disk, which may be what the line is about
        print(f"{run_dir.name}: {EVENTS} cannot be written: {error}", flush=True)


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a `log.jsonl`; [] where there is none.

    A last line cut off by a crash is left out.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


# What a run says of itself for those who look at it from outside: `status.json`.
#
# In: what a worker group sets out to do, on which processes. Out: the file in the run's folder,
# written by rank 0 when the group begins and when it ends. A process that is killed writes nothing:
# what the file says of it is compared with what lives (`fmray top`).

STATUS_FILE = "status.json"


@dataclass(frozen=True)
class Worker:
    """One rank. node: Ray's id of it, None without Ray. born: of its process, see `birth`."""

    rank: int
    host: str
    node: str | None
    pid: int
    born: int | None
    cpus: float
    gpu: str | None


@dataclass(frozen=True)
class Status:
    """started: seconds since 1970; start, total: steps; groups: of workers so far, this one
    included; ray: HOST:PORT of its head. failure: of a group that has failed."""

    job: str
    state: Literal["running", "ended", "failed"]
    groups: int
    started: float
    start: int
    total: int
    ray: str | None
    workers: tuple[Worker, ...]
    failure: str | None = None


def read_status(run_dir: Path) -> Status | None:
    """None where there is none. Raises ValueError for one of another fmray."""
    path = run_dir / STATUS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if set(values) != {field.name for field in fields(Status)}:
        raise ValueError(f"{path} was written by another version of fmray")
    return Status(**values | {"workers": tuple(Worker(**worker) for worker in values["workers"])})


class StatusFile:
    """A context manager around the steps of a worker group; every rank must open it."""

    def __init__(
        self,
        run_dir: Path,
        job: str,
        start: int,
        total: int,
        cpus: float,
        device: torch.device,
    ) -> None:
        # those who only read the file have no use for them
        import ray
        import torch.distributed as dist

        context = ray.get_runtime_context() if ray.is_initialized() else None
        node = context.get_node_id() if context else None
        pid, gpu = os.getpid(), str(device) if device.type != "cpu" else None
        mine = Worker(dist.get_rank(), platform.node(), node, pid, birth(pid), cpus, gpu)
        workers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(workers, mine)
        self._path = run_dir / STATUS_FILE
        self._values: dict[str, Any] | None = None
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
        if self._values is not None and self._newer() is None:
            self._values["state"] = "ended" if error is None else "failed"
            if error is not None:
                self._values["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self._write()

    def check(self) -> None:
        """Before something of the run is replaced. When the head node is lost, workers on other
        nodes outlive their job for minutes, and must not write into the next one.

        Raises RuntimeError on rank 0 where another worker group has begun.
        """
        if self._values is not None and (newer := self._newer()) is not None:
            raise RuntimeError(
                f"worker group {newer} of run {self._path.parent.name} has begun; this one,"
                f" {self._values['groups']}, writes no more"
            )

    def _newer(self) -> int | None:
        """The group that has written the file since this one did."""
        now = read_status(self._path.parent)
        mine = (self._values["groups"], self._values["started"])
        return now.groups if now is not None and (now.groups, now.started) != mine else None

    def _write(self) -> None:
        if self._values is not None:
            partial = self._path.with_name(f".{self._path.name}.partial")
            partial.write_text(json.dumps(self._values, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, self._path)


def birth(pid: int) -> int | None:
    """When a process of this machine began, in ticks since the machine's start; None where there is
    no such process, or no /proc. With it a process is told from a later one of the same number."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    values = text.rpartition(")")[2].split()  # from field 3 on, proc(5)
    return None if values[0] == "Z" else int(values[19])


RECENT = 20  # steps that speeds are taken over
SILENT_SECONDS = 120.0  # at least, before a run that nobody can ask is taken for dead
SILENT_STEPS = 20


@dataclass(frozen=True)
class Seen:
    """A worker, and whether it lives; None: it runs where we cannot look."""

    worker: Worker
    alive: bool | None


@dataclass(frozen=True)
class View:
    """state: `running`, `finished`, `stopped` (it goes on from there), `failed`, `dead`, `silent`,
    `unknown` (of a run without a status). Times are in seconds; share: of waiting for data.

    speed: (unit, units a second). evaluation: (step, metrics). checkpoint: (step, age).
    """

    run: str
    job: str | None
    state: Literal["running", "finished", "stopped", "failed", "dead", "silent", "unknown"]
    why: str | None
    step: int
    total: int | None
    left: float | None
    metrics: dict[str, float]
    speed: tuple[str, float] | None
    waiting_share: float | None
    checkpoint: tuple[int, float] | None
    evaluation: tuple[int, dict[str, float]] | None
    restarts: int
    event: tuple[float, str] | None
    quiet: float | None
    workers: tuple[Seen, ...]


class RunReader:
    """Reads what has been added to a run's folder since it was last asked."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._place = (0, 0)  # inode and offset
        self._forget()

    def _forget(self) -> None:
        self._steps: deque[dict[str, float]] = deque(maxlen=RECENT)
        self._evaluation: tuple[int, dict[str, float]] | None = None

    def read(self, living: Collection[tuple[str, int]] | None = None) -> View:
        """living: (node, pid) of the workers that Ray says live; None: it was not asked."""
        status, now = read_status(self._run_dir), time.time()
        self._read_log()
        seen = tuple(_seen(worker, living) for worker in status.workers) if status else ()
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
            workers=seen,
        )
        if status is None:
            return view
        # log.jsonl is written after each step
        pace = _pace(status, step, _newest([self._run_dir / "log.jsonl"]))
        state = judge(status, step, [worker.alive for worker in seen], view.quiet, pace)
        left = pace * (status.total - step) if pace is not None and state == "running" else None
        return replace(view, state=state, left=left)

    def _median(self, name: str) -> float:
        return median(line[name] for line in self._steps if name in line)

    def _read_log(self) -> None:
        """A run that goes on from an earlier step writes another file in the old one's place."""
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
            *lines, rest = file.read().split(b"\n")  # the last one may still be written
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
) -> Literal["running", "finished", "stopped", "failed", "dead", "silent"]:
    """What state a run is in, from what it says and who lives. pace: seconds a step."""
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


def _seen(worker: Worker, living: Collection[tuple[str, int]] | None) -> Seen:
    if living is not None and worker.node is not None:
        return Seen(worker, (worker.node, worker.pid) in living)
    if worker.host == platform.node() and worker.born is not None:
        return Seen(worker, birth(worker.pid) == worker.born)
    return Seen(worker, None)


def _pace(status: Status, step: int, logged: float | None) -> float | None:
    """Seconds a step of this worker group, evaluations and checkpoints included."""
    if logged is None or step <= status.start:
        return None
    return max(0.0, logged - status.started) / (step - status.start)


def _checkpoint(run_dir: Path, now: float) -> tuple[int, float] | None:
    """(step, age) of the newest one that was completed."""
    found = sorted(run_dir.glob(f"checkpoint-*/{MANIFEST}"))
    if not found:
        return None
    made = _newest([found[-1]])
    step = int(found[-1].parent.name.rpartition("-")[2])
    return (step, now - made) if made is not None else None


def _last_event(run_dir: Path) -> tuple[float, str] | None:
    try:
        lines = (run_dir / EVENTS).read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return None
    values = json.loads(lines[-1]) if lines else None
    return (values["time"], values["text"]) if values else None


def _newest(paths: Iterable[Path]) -> float | None:
    """When the last of the files that are there was written."""
    times = []
    for path in paths:
        try:
            times.append(path.stat().st_mtime)
        except FileNotFoundError:  # not yet, or an old checkpoint that has just gone
            continue
    return max(times, default=None)

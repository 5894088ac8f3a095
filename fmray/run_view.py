"""What a run is doing, from what it writes: log, checkpoints, status and events.

In: a run's folder. Out: a `View`, the facts that `fmray top` shows; nothing in here prints or asks
Ray.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

from fmray.train.manifest import MANIFEST
from fmray.train.progress import EVENTS
from fmray.train.status import Status, Worker, birth, read_status

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

"""What a run says of itself for those who look at it from outside: `status.json`.

In: what a worker group sets out to do, on which processes. Out: the file in the run's folder,
written by rank 0 when the group begins and when it ends. A process that is killed writes nothing:
what the file says of it is compared with what lives (`fmray top`).
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

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

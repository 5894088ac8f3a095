"""A training on machines that fail: submitted, watched, and compared with an undisturbed one.

`Training` tells the current step and the workers' processes and, at the end, the cost of the fault.
`Watch` reads `log.jsonl` while it grows: a step number that decreases shows a restart.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlflow
import pytest
from support.machines import ROOT, Job, Machine, Machines, until
from support.training import ADAPTIVE, load_recipe

from fmray.runtime.registry import RUN_ID_TAG
from fmray.runtime.run_log import read_log

STEPS, INTERVAL = 24, 4
TOLERANCE = 1e-4  # relative: the order of sums depends on workers and restarts
OF_RAY = r"::(\w+Agent|_AutoscalingCoordinatorActor|IDLE)\b"
MEGABITS = 16  # of a link: a step takes a fraction of a second, long enough for faults
WORKER = "ray::RayTrainWorker"
FINISH_SECONDS = 900


class Watch:
    """Follows the steps in the log of a run."""

    def __init__(self, log: Path) -> None:
        self._log = log
        #: (time, step) at each change.
        self.marks: list[tuple[float, int]] = [(time.monotonic(), 0)]
        #: Number of steps that each restart repeats.
        self.repeated: list[int] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    @property
    def step(self) -> int:
        """The last step in the log."""
        return self.marks[-1][1]

    def _look(self) -> None:
        last_state = None
        while not self._over.wait(0.02):
            with contextlib.suppress(FileNotFoundError):
                status = self._log.stat()
                state = (status.st_ino, status.st_size, status.st_mtime_ns)
                if state == last_state:
                    continue
                last_state = state
            step = max((int(line["step"]) for line in read_log(self._log)), default=0)
            if step != self.step:
                if step < self.step:
                    self.repeated.append(self.step - step)
                self.marks.append((time.monotonic(), step))

    @property
    def furthest(self) -> int:
        """The highest step so far."""
        return max(step for _, step in self.marks)

    def recovered(self, fault: float) -> float:
        """Return the seconds from the fault to the end of the longest time without a new step.

        Some more steps may be completed before a fault has an effect.
        """
        furthest, moments = 0, [fault]
        for at, step in self.marks:
            if step > furthest and at > fault:
                moments.append(at)
            furthest = max(furthest, step)
        _, end = max(((b - a, b) for a, b in pairwise(moments)), default=(0.0, fault))
        return end - fault

    def close(self) -> None:
        """Stop reading."""
        self._over.set()
        self._thread.join()


@dataclass
class Training:
    """A run, submitted once, and again after a head node was lost."""

    machines: Machines
    run_id: str
    storage: Path
    recipe: Path
    database: Path
    steps: int = STEPS
    jobs: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watch = Watch(self.log)
        self.fault = 0.0
        self.submit()

    @property
    def log(self) -> Path:
        """The log of its steps."""
        return self.storage / self.run_id / "log.jsonl"

    @property
    def job(self) -> Job:
        """The last submission."""
        return self.jobs[-1]

    def submit(self) -> None:
        """Run the job script on the head."""
        command = [sys.executable, str(ROOT / "jobs" / "train_adallava.py")]
        command += ["--config", str(self.recipe), "--run-id", self.run_id]
        self.jobs.append(self.machines.run(command, f"{self.run_id}-{len(self.jobs)}"))

    def until_step(self, step: int, seconds: float = 600) -> None:
        """Wait for a step; the first call marks the time of the fault."""
        until(lambda: self.watch.step >= step or self._ended(), seconds, f"step {step}")
        assert self.watch.step < self.steps, "too late for a fault"
        self.fault = self.fault or time.monotonic()

    def said(self) -> str:
        """Return the output of all submissions."""
        return "".join(job.text() for job in self.jobs)

    def starts(self) -> int:
        """Return how often workers have started, or failed to start."""
        return self.said().count(" ranks, each ") + self.said().count("the workers did not start")

    def until_restarted(self, starts: int, seconds: float) -> None:
        """Wait for more than `starts` starts, and then for a new step or the end."""
        until(lambda: self.starts() > starts or self._over(), seconds, "a restart")
        furthest = self.watch.furthest
        until(lambda: self.watch.step > furthest or self._over(), seconds, f"step {furthest + 1}")

    def _over(self) -> bool:
        return self.job.process.poll() is not None

    def until_said(self, text: str, seconds: float = 600) -> None:
        """Wait for a text in the job's output."""
        until(lambda: text in self.job.text() or self._ended(), seconds, repr(text))

    def _ended(self) -> bool:
        code = self.job.process.poll()
        assert code is None, f"the job ended with {code}: ...{self.job.text()[-6000:]}"
        return False

    def trainers(self) -> list[tuple[Machine, int]]:
        """Return (machine, process id) of the workers; rank 0, which writes the log, is first."""
        workers = [(m, pid) for m in self.machines.machines for pid in m.find(WORKER)]
        return sorted(workers, key=lambda worker: not self._writes(worker[1]))

    def _writes(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return str(self.log) in {os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir()}
        return False

    def far_machine(self) -> Machine:
        """Return a machine that trains and is not the head."""
        return next(m for m, _ in self.trainers() if m is not self.machines.head)

    def finish(self, seconds: float = FINISH_SECONDS) -> list[float]:
        """Wait until the job succeeds; return the loss of each step."""
        code = self.job.wait(seconds)
        assert code == 0, f"the job ended with {code}: ...{self.job.text()[-6000:]}"
        self.watch.close()
        lines = [line for line in read_log(self.log) if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, self.steps + 1))
        return [line["loss"] for line in lines]

    def leaves_nothing(self) -> None:
        """Assert that no placement group or process remains, and one finished MLflow run."""

        def busy() -> list[str]:
            titles = [t for m in self.machines.machines for t in m.pids().values()]
            # except a node's agents, Ray Data's actor, and idle workers
            return [t for t in titles if t.startswith("ray::") and not re.search(OF_RAY, t)]

        until(lambda: not self.machines.placement_groups(), 120, "the removal of placement groups")
        with contextlib.suppress(AssertionError):
            until(lambda: not busy(), 120, "the job's processes to end")
        assert busy() == []
        client = mlflow.MlflowClient(f"sqlite:///{self.database}")
        experiments = [e.experiment_id for e in client.search_experiments()]
        [run] = client.search_runs(experiments, f"tags.`{RUN_ID_TAG}` = '{self.run_id}'")
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert {point.step for point in history} == set(range(1, self.steps + 1))


def write_recipe(
    path: Path, store: Path, storage: Path, database: Path, steps: int = STEPS, **changes: Any
) -> Path:
    """Write the recipe of a tiny training on two workers, with a checkpoint every four steps."""
    cluster = {"workers": 2, "cpus_per_worker": 1, "timeout_s": 60} | changes.pop("cluster", {})
    tracking = {"enabled": True, "uri": f"sqlite:///{database}"} | changes.pop("tracking", {})
    train = {
        "steps": steps,
        "global_batch": 24,
        "micro_batch": 4,
        "eval_rows": 4,
        "eval_budgets": (1.0,),
        "checkpoint_every": INTERVAL,
    }
    loaded = load_recipe(
        store,
        storage,
        adaptive=ADAPTIVE,
        zero={"stage": 2},
        train=train | changes.pop("train", {}),
        cluster=cluster,
        tracking=tracking,
        **changes,
    )
    path.write_text(loaded.dump(), encoding="utf-8")
    return path


def same(losses: list[float], wanted: list[float]) -> None:
    """Assert that the losses are equal within the tolerance, step by step."""
    assert losses == pytest.approx(wanted, rel=TOLERANCE)

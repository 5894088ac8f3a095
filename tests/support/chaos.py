"""A training on machines that break: it is submitted, watched, and compared with one at rest.

In: `Machines`, a store, a storage folder. Out: a `Training`: where it is, who trains, and, when it
is over, what the fault has cost. `Watch` reads `log.jsonl` as it grows: what a restart takes back
is seen as a step number that falls.
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
TOLERANCE = 1e-4  # relative: two workers or three, resumed or not, sum in another order
OF_RAY = r"::(\w+Agent|_AutoscalingCoordinatorActor|IDLE)\b"
MEGABITS = 16  # of a link: a step takes a fraction of a second, and faults have time to happen
WORKER = "ray::RayTrainWorker"
FINISH_SECONDS = 900


class Watch:
    """The steps of a run's log, as they come.

    repeated: how many steps each restart took back. marks: (time, step) at each change.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self.marks: list[tuple[float, int]] = [(time.monotonic(), 0)]
        self.repeated: list[int] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    @property
    def step(self) -> int:
        """The last one in the log."""
        return self.marks[-1][1]

    def _look(self) -> None:
        seen = None
        while not self._over.wait(0.02):
            with contextlib.suppress(FileNotFoundError):
                status = self._log.stat()
                if seen == (seen := (status.st_ino, status.st_size, status.st_mtime_ns)):
                    continue
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
        """Seconds from the fault to the end of the longest time without a step that had not been
        done before: some more may be done before a fault is felt."""
        furthest, moments = 0, [fault]
        for at, step in self.marks:
            if step > furthest and at > fault:
                moments.append(at)
            furthest = max(furthest, step)
        _, end = max(((b - a, b) for a, b in pairwise(moments)), default=(0.0, fault))
        return end - fault

    def close(self) -> None:
        """Read no more."""
        self._over.set()
        self._thread.join()


@dataclass
class Training:
    """One run id; submitted once, or again after a head node was lost."""

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
        """Of its steps."""
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
        """Wait for it; what follows, the first time, is the fault."""
        until(lambda: self.watch.step >= step or self._ended(), seconds, f"step {step}")
        assert self.watch.step < self.steps, "too late for a fault"
        self.fault = self.fault or time.monotonic()

    def said(self) -> str:
        """What all submissions have printed."""
        return "".join(job.text() for job in self.jobs)

    def starts(self) -> int:
        """How often workers began, or did not come that far."""
        return self.said().count(" ranks, each ") + self.said().count("the workers did not start")

    def until_restarted(self, starts: int, seconds: float) -> None:
        """Wait for more than so many `starts`, and then for a step that is new, or the end."""
        until(lambda: self.starts() > starts or self._over(), seconds, "a restart")
        furthest = self.watch.furthest
        until(lambda: self.watch.step > furthest or self._over(), seconds, f"step {furthest + 1}")

    def _over(self) -> bool:
        return self.job.process.poll() is not None

    def until_said(self, text: str, seconds: float = 600) -> None:
        """Wait for a line of the job."""
        until(lambda: text in self.job.text() or self._ended(), seconds, repr(text))

    def _ended(self) -> bool:
        code = self.job.process.poll()
        assert code is None, f"it ended with {code}: ...{self.job.text()[-6000:]}"
        return False

    def trainers(self) -> list[tuple[Machine, int]]:
        """Where the workers are, and their process ids; rank 0, which writes the log, is first."""
        found = [(m, pid) for m in self.machines.machines for pid in m.find(WORKER)]
        return sorted(found, key=lambda place: not self._writes(place[1]))

    def _writes(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return str(self.log) in {os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir()}
        return False

    def far_machine(self) -> Machine:
        """One that trains and is not the head."""
        return next(m for m, _ in self.trainers() if m is not self.machines.head)

    def finish(self, seconds: float = FINISH_SECONDS) -> list[float]:
        """Wait for a good end; the losses, one a step."""
        code = self.job.wait(seconds)
        assert code == 0, f"it ended with {code}: ...{self.job.text()[-6000:]}"
        self.watch.close()
        lines = [line for line in read_log(self.log) if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, self.steps + 1))
        return [line["loss"] for line in lines]

    def leaves_nothing(self) -> None:
        """No placement group, no process of the job, on any machine; one MLflow run, ended."""

        def busy() -> list[str]:
            titles = [t for m in self.machines.machines for t in m.pids().values()]
            # a node's agents, Ray Data's one actor, and what Ray keeps for the next job
            return [t for t in titles if t.startswith("ray::") and not re.search(OF_RAY, t)]

        until(lambda: not self.machines.placement_groups(), 120, "placement groups to go")
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
    """A YAML file of a tiny training on two workers, with a checkpoint every four steps."""
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
    """Equal within the tolerance, step by step."""
    assert losses == pytest.approx(wanted, rel=TOLERANCE)

"""Faults of a training on three machines, two of which train.

After each fault: the job has succeeded, its losses are those of an undisturbed training, it has
repeated at most the steps since the last checkpoint, it is one MLflow run, and no process is left.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from support.chaos import INTERVAL, MEGABITS, Training, same
from support.machines import Machines, until

Train = Callable[..., Training]
Figure = Callable[[str], None]


def survived(
    training: Training, calm: list[float], figure: Figure, restarts: int = 1, most: int = INTERVAL
) -> None:
    """Assert what holds after every fault; `most`: steps repeated by a restart."""
    same(training.finish(), calm)
    training.leaves_nothing()
    assert training.starts() > 1, "the fault had no effect"
    watch = training.watch
    assert len(watch.repeated) <= restarts and max(watch.repeated, default=0) <= most
    figure(f"recovered in {watch.recovered(training.fault):.1f} s, repeated {watch.repeated}")


def test_the_worker_of_rank_0_is_killed(
    machines: Machines, train: Train, calm: list[float], figure: Figure
) -> None:
    training = train("worker")
    training.until_step(INTERVAL + 2)
    os.kill(training.trainers()[0][1], signal.SIGKILL)
    survived(training, calm, figure)


def test_a_raylet_is_killed(
    machines: Machines, train: Train, calm: list[float], figure: Figure
) -> None:
    training = train("raylet")
    training.until_step(INTERVAL + 2)
    training.far_machine().kill_raylet()
    survived(training, calm, figure)


def test_a_node_is_disconnected_and_returns(
    machines: Machines, train: Train, calm: list[float], figure: Figure
) -> None:
    """The worker on it keeps running for a while, and must do no harm."""
    training = train("cut")
    training.until_step(INTERVAL + 2)
    away = training.far_machine()
    away.link(up=False)
    training.until_step(INTERVAL + 4)
    away.link(up=True)
    survived(training, calm, figure)


def test_a_node_is_drained(
    machines: Machines, train: Train, calm: list[float], figure: Figure
) -> None:
    """The workers save a checkpoint at once, so that no step is repeated."""
    training = train("drained")
    training.until_step(INTERVAL + 2)
    machines.drain(training.far_machine(), seconds=300)
    survived(training, calm, figure, most=0)
    assert "is being drained: checkpoint at step" in training.job.text()


def test_a_node_is_killed_while_the_workers_start(
    machines: Machines, train: Train, calm: list[float], figure: Figure
) -> None:
    training = train("startup")
    until(lambda: len(training.trainers()) == 2, 600, "two workers")
    training.fault = time.monotonic()
    training.far_machine().kill_raylet()
    survived(training, calm, figure, most=0)


def test_a_node_is_added(
    machines: Machines, train: Train, calm: list[float], figure: Figure
) -> None:
    late = machines.machines[-1]
    late.kill_all()
    until(lambda: len(machines.nodes()) == 2, 180, "Ray to notice that the node is missing")
    training = train("added", cluster={"workers": [2, 3]})
    training.until_step(INTERVAL + 2)
    machines.cap(1)  # Ray looks for new nodes once a minute
    machines.start_ray(late)
    training.until_said("3 ranks, each 2 passes")
    machines.cap(MEGABITS)
    survived(training, calm, figure)


def test_the_head_is_lost_and_the_job_is_submitted_again(
    machines: Machines, train: Train, calm: list[float], figure: Figure
) -> None:
    training = train("head")
    training.until_step(INTERVAL + 2)
    machines.head.lose_power()
    others = machines.machines[1:]
    # Ray needs minutes to notice that a machine does not answer
    orphans = until(lambda: not any(m.find("ray::") for m in others), 400, "the orphans to end")
    machines.mend()
    training.submit()
    survived(training, calm, figure)
    figure(f"workers without a head ended after {orphans:.1f} s")


def test_a_checkpoint_is_truncated(
    machines: Machines, train: Train, calm: list[float], figure: Figure
) -> None:
    """The previous checkpoint is used, so the interval between them is repeated too."""
    training = train("truncated")
    training.until_step(2 * INTERVAL + 2)
    os.kill(training.trainers()[-1][1], signal.SIGKILL)
    newest = max((training.storage / "truncated").glob("checkpoint-*"))
    shard = max(newest.rglob("*optim_states.pt"))
    os.truncate(shard, shard.stat().st_size // 2)
    survived(training, calm, figure, most=2 * INTERVAL)
    assert f"{newest.name}: " in training.job.text()

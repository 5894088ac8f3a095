"""Whether a job can be placed: what Ray would otherwise wait for without a word.

In: a recipe and the machines of a cluster. Out: `Finding`s, each one plain line, a failure with the
setting that would be right. No Ray in here but in `machines_of_cluster`: the rules are tested on
made-up machines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fmray.config import AdaLlavaRecipe, BaseRecipe, ClusterConfig

EPSILON = 1e-6  # Ray counts in ten-thousandths; 3 x 0.1 must fit into 0.3


@dataclass(frozen=True)
class Machine:
    """What Ray may use of one node."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Finding:
    """One line: `ok`, `note` or `FAIL`, and why."""

    level: Literal["ok", "note", "FAIL"]
    text: str

    def __str__(self) -> str:
        return f"{self.level:<4} {self.text}"


def machines_of_cluster() -> list[Machine]:
    """The living nodes of the connected cluster."""
    import ray

    return [
        Machine(
            node["NodeManagerHostname"],
            float(node["Resources"].get("CPU", 0)),
            float(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def preflight(recipe: BaseRecipe, machines: Sequence[Machine]) -> list[Finding]:
    """Whether the workers of `recipe` find room on `machines`, and what is left for Ray Data."""
    cluster = recipe.cluster
    if cluster.workers == 0:
        return [
            Finding("ok", "cluster.workers: 0 trains in one process; there is nothing to place")
        ]
    fewest = cluster.fewest_workers
    wanted = f"{count_of(fewest, 'worker')} of {resources(cluster)}"
    cpus, gpus = sum(m.cpus for m in machines), sum(m.gpus for m in machines)
    have = f"{count_of(len(machines), 'node')} with {cpus:g} CPUs and {gpus:g} GPUs"
    room, left = place(cluster, machines)
    if room < fewest:
        text = f"{wanted} cannot be placed on {have}: there is room for {room}"
        return [Finding("FAIL", text + _what_would_do(recipe, machines))]
    findings = [Finding("ok", f"{wanted} can be placed on {have}")]
    if left < cluster.data_cpus - EPSILON:
        text = (
            f"the workers leave {left:g} CPUs for Ray Data and cluster.data_cpus is"
            f" {cluster.data_cpus:g}: data tasks would wait for ever"
        )
        findings.append(Finding("FAIL", text + _what_would_do(recipe, machines)))
    else:
        findings.append(Finding("ok", f"{left:g} CPUs are left for Ray Data and the driver"))
    return findings


def place(cluster: ClusterConfig, machines: Sequence[Machine]) -> tuple[int, float]:
    """(how many workers there is room for, CPUs that the fewest of them leave for tasks).

    A worker sits on one machine whole, and machines are filled one after another, as Ray Train's
    default strategy (PACK) does. A task needs its CPU on one machine too: two halves do not make
    one.
    """
    room, remaining, left = 0, cluster.fewest_workers, 0.0
    for machine in machines:
        here = math.floor(machine.cpus / cluster.cpus_per_worker + EPSILON)
        if cluster.gpus_per_worker:
            here = min(here, math.floor(machine.gpus / cluster.gpus_per_worker + EPSILON))
        room += here
        placed = min(here, remaining)
        remaining -= placed
        free = machine.cpus - placed * cluster.cpus_per_worker
        if free >= min(1.0, cluster.data_cpus) - EPSILON:
            left += free
    return room, left


def _what_would_do(recipe: BaseRecipe, machines: Sequence[Machine]) -> str:
    """The setting with which the job can be placed: fewer CPUs a worker, else fewer workers."""
    cluster = recipe.cluster
    share = (sum(m.cpus for m in machines) - cluster.data_cpus) / cluster.fewest_workers
    changes: list[dict[str, float]] = [
        {"cpus_per_worker": cpus}
        for cpus in (math.floor(share * 20) / 20, 0.5, 0.25)
        if 0 < cpus < cluster.cpus_per_worker
    ]
    changes += [
        {"workers": workers}
        for workers in range(cluster.fewest_workers - 1, 0, -1)
        if _divides(recipe, workers)
    ]
    for change in changes:
        changed = cluster.model_copy(update=change)
        room, left = place(changed, machines)
        if room >= changed.fewest_workers and left >= cluster.data_cpus - EPSILON:
            [(key, value)] = change.items()
            return f"; cluster.{key}: {value:g} would do"
    return ""


def _divides(recipe: BaseRecipe, workers: int) -> bool:
    """Whether the work of a step divides over so many workers."""
    train = recipe.train
    if isinstance(recipe, AdaLlavaRecipe):
        return train.global_batch % (workers * train.micro_batch) == 0
    return train.episodes_per_step % workers == 0


def resources(cluster: ClusterConfig) -> str:
    gpus = f" and {cluster.gpus_per_worker:g} GPU" if cluster.gpus_per_worker else ""
    return f"{cluster.cpus_per_worker:g} CPU{gpus}"


def count_of(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


# How many trials run at once: what a trial takes, against what the machines have.
#
# In: the `cluster` section of the base recipe and the machines. Out: a number, and why. Trials that
# were started beyond it would wait for each other's workers for ever.


def concurrency(cluster: ClusterConfig, machines: Sequence[Machine]) -> tuple[int, str]:
    """(trials at once, one line that says why).

    A trial takes its workers, each on one machine, and its `data_cpus` beside them; one with
    `workers: 0` takes what a worker would, and nothing beside it.

    Raises ValueError where there is no room for a trial.
    """
    workers = max(cluster.fewest_workers, 1)
    beside = cluster.data_cpus if cluster.workers else 0.0
    taken = f"{count_of(workers, 'worker')} of {resources(cluster)}"
    if beside:
        taken += f" and {beside:g} CPU beside"
    cpus, gpus = sum(m.cpus for m in machines), sum(m.gpus for m in machines)
    have = f"{count_of(len(machines), 'node')} with {cpus:g} CPUs and {gpus:g} GPUs"
    trials = 0
    while _fit(trials + 1, workers, beside, cluster, machines):
        trials += 1
    if not trials:
        raise ValueError(
            f"cluster: a trial takes {taken}, and there is no room for one on {have}; lower"
            " cluster.workers or cluster.cpus_per_worker of the base recipe (base_set)"
        )
    return trials, f"{count_of(trials, 'trial')} at once: each takes {taken}, of {have}"


def _fit(
    trials: int, workers: int, beside: float, cluster: ClusterConfig, machines: Sequence[Machine]
) -> bool:
    room, left = place(cluster.model_copy(update={"workers": trials * workers}), machines)
    return room >= trials * workers and left >= trials * beside - EPSILON

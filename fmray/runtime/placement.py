"""Check that the workers of a job, or the trials of a search, can be placed on a cluster.

Ray would wait forever, without a message, for resources that it does not have. A failure names the
setting that would fit. Only `machines_of_cluster` uses Ray, so the rules are tested on invented
machines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fmray.config import AdaLlavaRecipe, BaseRecipe, ClusterConfig
from fmray.runtime.console import count_of

EPSILON = 1e-6  # Ray counts in ten-thousandths; 3 x 0.1 must fit into 0.3


@dataclass(frozen=True)
class Machine:
    """The resources of a node that Ray may use."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Finding:
    """One line of a check: `ok`, `note` or `FAIL`, and why."""

    level: Literal["ok", "note", "FAIL"]
    text: str

    def __str__(self) -> str:
        return f"{self.level:<4} {self.text}"


def machines_of_cluster() -> list[Machine]:
    """Return the living nodes of the connected cluster."""
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
    """Check that the workers of `recipe` fit on `machines` and leave CPUs for Ray Data."""
    cluster = recipe.cluster
    if cluster.workers == 0:
        return [Finding("ok", "cluster.workers: 0 trains in this process; nothing to place")]
    fewest = cluster.fewest_workers
    wanted = f"{count_of(fewest, 'worker')} of {resources(cluster)}"
    cpus, gpus = sum(m.cpus for m in machines), sum(m.gpus for m in machines)
    have = f"{count_of(len(machines), 'node')} with {cpus:g} CPUs and {gpus:g} GPUs"
    room, left = place(cluster, machines)
    if room < fewest:
        text = f"{wanted} cannot be placed on {have}: there is room for {room}"
        return [Finding("FAIL", text + _suggestion(recipe, machines))]
    findings = [Finding("ok", f"{wanted} can be placed on {have}")]
    if left < cluster.data_cpus - EPSILON:
        text = (
            f"the workers leave {left:g} CPUs for Ray Data and cluster.data_cpus is"
            f" {cluster.data_cpus:g}: data tasks would wait forever"
        )
        findings.append(Finding("FAIL", text + _suggestion(recipe, machines)))
    else:
        findings.append(Finding("ok", f"{left:g} CPUs remain for Ray Data and the driver"))
    return findings


def place(cluster: ClusterConfig, machines: Sequence[Machine]) -> tuple[int, float]:
    """Return (number of workers that fit, CPUs that the fewest workers leave for tasks).

    A worker fits on one machine or not at all, and machines are filled one after another, as in Ray
    Train's default strategy (PACK). A task needs its CPU on one machine too: two halves do not
    count.
    """
    room, remaining, left = 0, cluster.fewest_workers, 0.0
    for machine in machines:
        fitting = math.floor(machine.cpus / cluster.cpus_per_worker + EPSILON)
        if cluster.gpus_per_worker:
            fitting = min(fitting, math.floor(machine.gpus / cluster.gpus_per_worker + EPSILON))
        room += fitting
        placed = min(fitting, remaining)
        remaining -= placed
        free = machine.cpus - placed * cluster.cpus_per_worker
        if free >= min(1.0, cluster.data_cpus) - EPSILON:
            left += free
    return room, left


def _suggestion(recipe: BaseRecipe, machines: Sequence[Machine]) -> str:
    """Return the setting that would fit: fewer CPUs per worker, else fewer workers; or ''."""
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
            return f"; cluster.{key}: {value:g} would fit"
    return ""


def _divides(recipe: BaseRecipe, workers: int) -> bool:
    """Return whether `workers` divide the work of a step evenly."""
    train = recipe.train
    if isinstance(recipe, AdaLlavaRecipe):
        return train.global_batch % (workers * train.micro_batch) == 0
    return train.episodes_per_step % workers == 0


def resources(cluster: ClusterConfig) -> str:
    """Return the resources of a worker as text, such as "2 CPU and 1 GPU"."""
    gpus = f" and {cluster.gpus_per_worker:g} GPU" if cluster.gpus_per_worker else ""
    return f"{cluster.cpus_per_worker:g} CPU{gpus}"


# --- Trials of a search ---


def concurrency(cluster: ClusterConfig, machines: Sequence[Machine]) -> tuple[int, str]:
    """Return (number of concurrent trials, one line that explains it).

    A trial needs its workers, each on one machine, and `data_cpus`; with `workers: 0` it needs the
    resources of one worker. More trials would wait forever for each other's workers.

    Raises:
        ValueError: not even one trial fits.
    """
    workers = max(cluster.fewest_workers, 1)
    data_cpus = cluster.data_cpus if cluster.workers else 0.0
    taken = f"{count_of(workers, 'worker')} of {resources(cluster)}"
    if data_cpus:
        taken += f" and {data_cpus:g} CPU for data"
    cpus, gpus = sum(m.cpus for m in machines), sum(m.gpus for m in machines)
    have = f"{count_of(len(machines), 'node')} with {cpus:g} CPUs and {gpus:g} GPUs"
    trials = 0
    while _fit(trials + 1, workers, data_cpus, cluster, machines):
        trials += 1
    if not trials:
        raise ValueError(
            f"cluster: a trial needs {taken}, which does not fit on {have}; lower"
            " cluster.workers or cluster.cpus_per_worker of the base recipe (base_set)"
        )
    return trials, f"{count_of(trials, 'trial')} at once: each needs {taken}, of {have}"


def _fit(
    trials: int, workers: int, data_cpus: float, cluster: ClusterConfig, machines: Sequence[Machine]
) -> bool:
    room, left = place(cluster.model_copy(update={"workers": trials * workers}), machines)
    return room >= trials * workers and left >= trials * data_cpus - EPSILON

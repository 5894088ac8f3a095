"""How many trials run at once: what a trial takes, against what the machines have.

In: the `cluster` section of the base recipe and the machines. Out: a number, and why. Trials that
were started beyond it would wait for each other's workers for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

from fmray.config import ClusterConfig
from fmray.preflight import EPSILON, Machine, count_of, place, resources


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

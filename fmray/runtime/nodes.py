"""Whether the nodes of a cluster can work together: folders, versions and clocks, measured on each.

In: folders that a recipe names, on a connected cluster. Out: `Finding`s, each one plain line. Each
node really writes a file to each folder and reads the one of the node that asks; what is found
there is judged by `judge`, which knows no Ray.
"""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fmray.config import BaseRecipe
from fmray.runtime.cluster import start_or_join
from fmray.runtime.placement import Finding, machines_of_cluster, preflight

PACKAGES = ("fmray", "ray", "torch", "deepspeed", "transformers", "timm", "pyarrow")
ANSWER_SECONDS = 60  # the start of a process included
POLL_SECONDS = "0.5"  # how often Ray Train's controller collects reports; a report waits for it
CLOCK_SECONDS = 5.0  # logs of several nodes read in order, and tokens not expired


@dataclass(frozen=True)
class NodeReport:
    """What a node says of itself.

    versions: by package, None where it is missing. clock: seconds its clock is ahead of that of the
    node that asks. blind: what is wrong with folders there, by their key.
    """

    node: str
    versions: dict[str, str | None]
    clock: float
    blind: dict[str, str]


def check_nodes(folders: Mapping[str, Path]) -> list[Finding]:
    """Ask every living node. One that does not answer within a minute, or dies, is only noted: Ray
    takes it out of the cluster before long, and work goes on without it.

    Args:
        folders: by the recipe's key; they are there, and can be written here.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token = f".probe-{uuid.uuid4().hex}"
    nodes = {node["NodeID"]: _name(node) for node in ray.nodes() if node["Alive"]}
    ask = ray.remote(num_cpus=0, max_retries=0)(_report)
    findings, reports = [], []
    deadline = time.monotonic() + ANSWER_SECONDS
    try:
        for folder in folders.values():
            (folder / f"{token}-asks").touch()
        waiting = {
            ask.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(name, dict(folders), token): name
            for node, name in nodes.items()
        }
        while waiting:
            # one at a time: its clock is compared at the moment that it answers
            done, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            now = time.time()
            if not done:
                break
            name = waiting.pop(done[0])
            try:
                found, clock = ray.get(done[0])
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                findings.append(Finding("note", f"node {name} cannot run a task: {reason}"))
                continue
            missing = {
                key: wrong
                for key, folder in folders.items()
                if key not in found.blind and (wrong := _unseen(folder / f"{token}-{name}"))
            }
            reports.append(NodeReport(name, found.versions, clock - now, found.blind | missing))
    finally:
        for folder in folders.values():
            for path in folder.glob(f"{token}-*"):
                with suppress(FileNotFoundError):
                    path.unlink()
    findings += [
        Finding("note", f"node {name} did not answer within {ANSWER_SECONDS} s")
        for name in waiting.values()
    ]
    here = NodeReport("here", _versions(), 0.0, {})
    return findings + judge(here, reports, folders)


def judge(
    here: NodeReport, reports: Sequence[NodeReport], folders: Mapping[str, Path]
) -> list[Finding]:
    """What is wrong with nodes beside the one that asks, a line each; one line where nothing is."""
    findings = []
    for report in reports:
        for package, wanted in here.versions.items():
            if (found := report.versions.get(package)) != wanted:
                findings.append(
                    Finding(
                        "FAIL",
                        f"node {report.node} has {package} {found or 'not installed'}, and"
                        f" {wanted or 'it is not installed'} here; use one image or environment",
                    )
                )
        if abs(report.clock) > CLOCK_SECONDS:
            way = "ahead" if report.clock > 0 else "behind"
            findings.append(
                Finding(
                    "FAIL",
                    f"node {report.node}: its clock is {abs(report.clock):.0f} s {way}; let NTP"
                    " set it",
                )
            )
        findings += [
            Finding(
                "FAIL",
                f"node {report.node}: {key} {folders[key]} {wrong}; it must be one folder on all"
                " nodes",
            )
            for key, wrong in report.blind.items()
        ]
    if findings:
        return findings
    spread = max((abs(report.clock) for report in reports), default=0.0)
    seen = " and ".join(folders) or "no folder in common"
    text = f"{len(reports)} nodes see {seen}, have the same packages and clocks {spread:.1f} s"
    return [Finding("ok", f"{text} apart at most")]


def _report(node: str, folders: dict[str, Path], token: str) -> tuple[NodeReport, float]:
    """On the node: (what it finds, its clock at the end)."""
    blind = {}
    for key, folder in folders.items():
        wrong = _unseen(folder / f"{token}-asks")
        if wrong is None:
            try:
                (folder / f"{token}-{node}").touch()
            except OSError as error:
                wrong = f"cannot be written there ({error.strerror})"
        if wrong is not None:
            blind[key] = wrong
    return NodeReport(node, _versions(), 0.0, blind), time.time()


def _unseen(path: Path) -> str | None:
    """What is wrong where a file that another node wrote is not seen."""
    try:
        path.read_text(encoding="utf-8")
    except OSError as error:
        return f"does not show what another node wrote there ({error.strerror})"
    return None


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _name(node: dict[str, object]) -> str:
    """Two raylets may share a machine: a piece of the id tells them apart."""
    return f"{node['NodeManagerHostname']}-{str(node['NodeID'])[:6]}"


@contextmanager
def session(recipe: BaseRecipe) -> Iterator[None]:
    """A Ray that has room for the recipe's workers, on nodes that can work together.

    Raises:
        ValueError: the workers would wait forever for resources that Ray does not have, or a node
            has other packages, another clock or another storage folder.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    # with stdout redirected, Ray's patched print repeats each line
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    cluster = recipe.cluster
    with start_or_join(cluster):
        machines = machines_of_cluster()
        findings = preflight(recipe, machines)
        if len(machines) > 1:
            shared = {} if cluster.mirror else {"cluster.storage": cluster.storage}
            nodes = check_nodes(shared)
            print("\n".join(map(str, nodes)), flush=True)
            findings += nodes
        if failures := [finding.text for finding in findings if finding.level == "FAIL"]:
            raise ValueError("; ".join(failures))
        yield

"""Check that the nodes of a cluster can work together: shared folders, versions and clocks.

A task on each node writes a file to each folder and reads the file of this process. `judge`
compares the reports and does not use Ray.
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
from fmray.runtime.console import say
from fmray.runtime.placement import Finding, machines_of_cluster, preflight

PACKAGES = ("fmray", "ray", "torch", "deepspeed", "transformers", "timm", "pyarrow")
ANSWER_SECONDS = 60  # includes the start of a process
POLL_SECONDS = "0.5"  # how often Ray Train's controller collects reports; a report waits for it
CLOCK_SECONDS = 5.0  # keeps logs of several nodes in order, and tokens valid


@dataclass(frozen=True)
class NodeReport:
    """What a node reports about itself."""

    node: str
    versions: dict[str, str | None]  # by package; None if it is missing
    clock: float  # seconds ahead of the checking node
    folder_faults: dict[str, str]  # what is wrong with a folder, by the recipe's key


def check_nodes(folders: Mapping[str, Path]) -> list[Finding]:
    """Check every living node.

    A node that dies, or does not answer within a minute, is only noted: Ray removes it from the
    cluster before long, and work continues without it.

    Args:
        folders: by the recipe's key; they exist and are writable on this node.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token = f".probe-{uuid.uuid4().hex}"
    nodes = {node["NodeID"]: _name(node) for node in ray.nodes() if node["Alive"]}
    report = ray.remote(num_cpus=0, max_retries=0)(_report)
    findings, reports = [], []
    deadline = time.monotonic() + ANSWER_SECONDS
    try:
        # a report task on each node
        for folder in folders.values():
            (folder / f"{token}-driver").touch()
        waiting = {
            report.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(name, dict(folders), token): name
            for node, name in nodes.items()
        }
        while waiting:
            # one at a time: a clock is compared at the moment of the answer
            done, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            now = time.time()
            if not done:
                break
            name = waiting.pop(done[0])
            try:
                node_report, clock = ray.get(done[0])
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                findings.append(Finding("note", f"node {name} cannot run a task: {reason}"))
                continue
            # the file that the node has written must be visible here
            faults = dict(node_report.folder_faults)
            for key, folder in folders.items():
                if key not in faults and (fault := _invisible(folder / f"{token}-{name}")):
                    faults[key] = fault
            reports.append(NodeReport(name, node_report.versions, clock - now, faults))
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
    """Compare the reports of nodes with this one's: a finding per difference, or a single `ok`."""
    findings = []
    for report in reports:
        for package, wanted in here.versions.items():
            if (installed := report.versions.get(package)) != wanted:
                findings.append(
                    Finding(
                        "FAIL",
                        f"node {report.node}: {package} is {installed or 'not installed'}, but"
                        f" {wanted or 'not installed'} on this node; use the same image or"
                        " environment on all nodes",
                    )
                )
        if abs(report.clock) > CLOCK_SECONDS:
            way = "ahead" if report.clock > 0 else "behind"
            findings.append(
                Finding(
                    "FAIL",
                    f"node {report.node}: its clock is {abs(report.clock):.0f} s {way}; synchronise"
                    " it with NTP",
                )
            )
        findings += [
            Finding(
                "FAIL",
                f"node {report.node}: {key} {folders[key]} {fault}; it must be the same folder"
                " on all nodes",
            )
            for key, fault in report.folder_faults.items()
        ]
    if findings:
        return findings
    spread = max((abs(report.clock) for report in reports), default=0.0)
    shared = " and ".join(folders) or "no folder"
    text = f"{len(reports)} nodes share {shared}, have the same packages, and their clocks differ"
    return [Finding("ok", f"{text} by {spread:.1f} s at most")]


def _report(node: str, folders: dict[str, Path], token: str) -> tuple[NodeReport, float]:
    """Run on a node: return (report, time of its clock at the end)."""
    faults = {}
    for key, folder in folders.items():
        fault = _invisible(folder / f"{token}-driver")
        if fault is None:
            try:
                (folder / f"{token}-{node}").touch()
            except OSError as error:
                fault = f"is not writable ({error.strerror})"
        if fault is not None:
            faults[key] = fault
    return NodeReport(node, _versions(), 0.0, faults), time.time()


def _invisible(path: Path) -> str | None:
    """Return a fault if a file that another node wrote cannot be read here."""
    try:
        path.read_text(encoding="utf-8")
    except OSError as error:
        return f"does not show a file that another node wrote ({error.strerror})"
    return None


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _name(node: dict[str, object]) -> str:
    """Return host name and start of the id: several raylets may share a machine."""
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
            say("\n".join(map(str, nodes)))
            findings += nodes
        if failures := [finding.text for finding in findings if finding.level == "FAIL"]:
            raise ValueError("; ".join(failures))
        yield

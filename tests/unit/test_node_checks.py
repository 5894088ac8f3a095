"""Findings about nodes that differ, on invented reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fmray.runtime.nodes import NodeReport, judge

FOLDERS = {"cluster.storage": Path("/shared/runs"), "data.store": Path("/shared/store")}
HERE = NodeReport("here", {"Python": "3.11.9", "ray": "2.60.0", "timm": None}, 0.0, {})
SAME = " use the same image or environment on all nodes"
NODES = [replace(HERE, node=name) for name in ("a", "b", "c")]


def test_equal_nodes_are_a_single_finding() -> None:
    [finding] = judge(HERE, [*NODES, replace(HERE, node="d", clock=-0.4)], FOLDERS)
    assert finding.level == "ok"
    assert finding.text == (
        "4 nodes share cluster.storage and data.store, have the same packages, and their clocks"
        " differ by 0.4 s at most"
    )


@pytest.mark.parametrize(
    "changes, text",
    [
        (
            {"versions": HERE.versions | {"ray": "2.59.1"}},
            "node b: ray is 2.59.1, but 2.60.0 on this node;" + SAME,
        ),
        (
            {"versions": {"Python": "3.11.9", "timm": None}},
            "node b: ray is not installed, but 2.60.0 on this node;" + SAME,
        ),
        (
            {"versions": HERE.versions | {"timm": "1.0"}},
            "node b: timm is 1.0, but not installed on this node;" + SAME,
        ),
        ({"clock": 61.4}, "node b: its clock is 61 s ahead; synchronise it with NTP"),
        ({"clock": -7.0}, "node b: its clock is 7 s behind; synchronise it with NTP"),
        (
            {"folder_faults": {"cluster.storage": "is not writable (Read-only file system)"}},
            "node b: cluster.storage /shared/runs is not writable (Read-only file system);"
            " it must be the same folder on all nodes",
        ),
    ],
)
def test_the_node_that_differs_is_named(changes: dict, text: str) -> None:
    reports = [NODES[0], replace(NODES[1], **changes), NODES[2]]
    [finding] = judge(HERE, reports, FOLDERS)
    assert (finding.level, finding.text) == ("FAIL", text)


def test_every_difference_is_a_finding() -> None:
    wrong = replace(
        HERE, node="a", clock=9.0, folder_faults={"data.store": "is missing"}, versions={}
    )
    assert len(judge(HERE, [wrong, NODES[1]], FOLDERS)) == 2 + 2  # timm is missing on both

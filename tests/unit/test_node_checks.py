"""What is said of nodes that do not fit together, on made-up reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fmray.runtime.nodes import NodeReport, judge

FOLDERS = {"cluster.storage": Path("/shared/runs"), "data.store": Path("/shared/store")}
HERE = NodeReport("here", {"Python": "3.11.9", "ray": "2.60.0", "timm": None}, 0.0, {})
NODES = [replace(HERE, node=name) for name in ("a", "b", "c")]


def test_equal_nodes_are_said_once() -> None:
    [finding] = judge(HERE, [*NODES, replace(HERE, node="d", clock=-0.4)], FOLDERS)
    assert finding.level == "ok"
    assert finding.text == (
        "4 nodes see cluster.storage and data.store, have the same packages and clocks 0.4 s apart"
        " at most"
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"versions": HERE.versions | {"ray": "2.59.1"}},
            "node b has ray 2.59.1, and 2.60.0 here; use one image or environment",
        ),
        (
            {"versions": {"Python": "3.11.9", "timm": None}},
            "node b has ray not installed, and 2.60.0 here; use one image or environment",
        ),
        (
            {"versions": HERE.versions | {"timm": "1.0"}},
            "node b has timm 1.0, and it is not installed here; use one image or environment",
        ),
        ({"clock": 61.4}, "node b: its clock is 61 s ahead; let NTP set it"),
        ({"clock": -7.0}, "node b: its clock is 7 s behind; let NTP set it"),
        (
            {"blind": {"cluster.storage": "cannot be written there (Read-only file system)"}},
            "node b: cluster.storage /shared/runs cannot be written there (Read-only file system);"
            " it must be one folder on all nodes",
        ),
    ],
)
def test_the_node_that_differs_is_named(changes: dict, said: str) -> None:
    reports = [NODES[0], replace(NODES[1], **changes), NODES[2]]
    [finding] = judge(HERE, reports, FOLDERS)
    assert (finding.level, finding.text) == ("FAIL", said)


def test_all_that_is_wrong_is_said() -> None:
    wrong = replace(HERE, node="a", clock=9.0, blind={"data.store": "is not there"}, versions={})
    assert len(judge(HERE, [wrong, NODES[1]], FOLDERS)) == 2 + 2  # timm is missing on both

"""A process that queries Ray's GCS; it needs the cluster's token in its environment from the start.

Reads lines `nodes`, `groups` or `drain NODE_ID SECONDS`, and answers each with a line of JSON.
Needs RAY_ADDRESS. Ends with its input, or when the GCS is unreachable.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from ray._private.state import GlobalState
from ray._raylet import GcsClient, GcsClientOptions
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION


def living_nodes(state: GlobalState) -> list[dict[str, Any]]:
    """Return id, address and whether it is draining, of each living node."""
    draining = state.get_draining_nodes()
    return [
        {
            "id": node["NodeID"],
            "address": node["NodeManagerAddress"],
            "draining": node["NodeID"] in draining,
        }
        for node in state.node_table()
        if node["Alive"]
    ]


def placement_groups(state: GlobalState) -> list[dict[str, Any]]:
    """Return id and state of the placement groups that are not removed."""
    return [
        {"id": name, "state": group["state"]}
        for name, group in state.placement_group_table().items()
        if group["state"] != "REMOVED"
    ]


def drain(node: str, seconds: str) -> list[str]:
    """Drain a node as `ray drain-node` does; return the reason of a rejection, or nothing."""
    deadline = int((time.time() + float(seconds)) * 1000)
    client = GcsClient(address=os.environ["RAY_ADDRESS"])
    accepted, reason = client.drain_node(
        node, DRAIN_NODE_REASON_PREEMPTION, "the machine is taken back", deadline
    )
    return [] if accepted else [reason]


def main() -> None:
    """Answer requests until the input ends."""
    state = GlobalState()
    options = GcsClientOptions.create(os.environ["RAY_ADDRESS"], None, True, False)
    state._initialize_global_state(options)
    for line in sys.stdin:
        match line.split():
            case ["nodes"]:
                answer: list[Any] = living_nodes(state)
            case ["groups"]:
                answer = placement_groups(state)
            case ["drain", node, seconds]:
                answer = drain(node, seconds)
            case _:
                raise ValueError(f"{line!r} is not nodes, groups or drain NODE_ID SECONDS")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

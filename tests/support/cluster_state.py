"""A process that asks Ray's GCS: it needs the cluster's token in its environment from the start.

In: lines `nodes`, `groups` or `drain NODE_ID SECONDS`; RAY_ADDRESS. Out: a line of JSON for each.
Ended by the end of its input, or by a GCS that is gone.
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
    """id, address and whether it is drained."""
    drained = state.get_draining_nodes()
    return [
        {
            "id": node["NodeID"],
            "address": node["NodeManagerAddress"],
            "draining": node["NodeID"] in drained,
        }
        for node in state.node_table()
        if node["Alive"]
    ]


def placement_groups(state: GlobalState) -> list[dict[str, Any]]:
    """id and state of those that were not removed."""
    return [
        {"id": name, "state": group["state"]}
        for name, group in state.placement_group_table().items()
        if group["state"] != "REMOVED"
    ]


def drain(node: str, seconds: str) -> list[str]:
    """As `ray drain-node` does it; why it was refused, or nothing."""
    deadline = int((time.time() + float(seconds)) * 1000)
    client = GcsClient(address=os.environ["RAY_ADDRESS"])
    accepted, why = client.drain_node(
        node, DRAIN_NODE_REASON_PREEMPTION, "the machine is taken back", deadline
    )
    return [] if accepted else [why]


def main() -> None:
    """Answer until the input ends."""
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
                raise ValueError(f"{line!r} is none of nodes, groups and drain NODE_ID SECONDS")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

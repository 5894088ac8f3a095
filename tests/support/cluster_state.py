"""A process that answers what Ray's GCS knows: it needs the cluster's token in its environment.

In: lines `nodes` or `groups`; RAY_ADDRESS. Out: a line of JSON for each. Ended by the end of its
input, or by a GCS that is gone.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions


def living_nodes(state: GlobalState) -> list[dict[str, Any]]:
    """id, address and whether it is drained."""
    return [
        {
            "id": node["NodeID"],
            "address": node["NodeManagerAddress"],
            "draining": node["NodeID"] in state.get_draining_nodes(),
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


def main() -> None:
    """Answer until the input ends."""
    state = GlobalState()
    options = GcsClientOptions.create(os.environ["RAY_ADDRESS"], None, True, False)
    state._initialize_global_state(options)
    for line in sys.stdin:
        answer = living_nodes if line.strip() == "nodes" else placement_groups
        print(json.dumps(answer(state)), flush=True)


if __name__ == "__main__":
    main()

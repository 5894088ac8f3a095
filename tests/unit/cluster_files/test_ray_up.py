"""The files of `ray up`, by Ray's own schema and its own preparation, as far as it runs offline."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start
from support.cluster_files import RAY_UP

NAMES = ["aws", "gcp", "local"]
TOKEN = "~/.ray/auth_token"


def config(name: str) -> dict[str, Any]:
    [path] = [path for path in RAY_UP if path.stem == name]
    return yaml.safe_load(path.read_text())


def check(written: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of it. Raises for what Ray refuses, and for what we promise."""
    prepared = prepare_config(copy.deepcopy(written))
    validate_config(prepared)
    docker = prepared["docker"]
    options = " ".join(docker["run_options"])
    assert "--env RAY_AUTH_MODE=token" in options, "no token mode"
    assert prepared["file_mounts"].get(TOKEN) == TOKEN, "the token is not copied to the nodes"
    assert "--volume /shared:/shared" in options, "the storage is not in the container"
    # Ray's defaults for a cloud install a nightly Ray over the image's
    assert not prepared["setup_commands"] + prepared["head_setup_commands"], "installs something"
    [command] = [c for c in prepared["head_start_ray_commands"] if "ray start" in c]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in command
    flags = parsed(command)
    assert flags["head"] and flags["dashboard_host"] == "127.0.0.1", "an open dashboard"
    [command] = [c for c in prepared["worker_start_ray_commands"] if "ray start" in c]
    assert parsed(command)["address"] == f"$RAY_HEAD_IP:{flags['port']}"
    return prepared


def parsed(command: str) -> dict[str, Any]:
    """The flags of a `ray start`, by its own parser."""
    words = command.partition("ray start ")[2].split()
    return start.make_context("ray start", words).params


@pytest.mark.parametrize("name", NAMES)
def test_ray_takes_it_and_it_is_closed(name: str) -> None:
    check(config(name))


def test_there_is_one_for_each_kind() -> None:
    assert [path.stem for path in RAY_UP] == NAMES


def test_cloud_workers_are_spot_machines_and_heads_are_not() -> None:
    nodes = {name: check(config(name))["available_node_types"] for name in ("aws", "gcp")}
    market = {
        "aws": lambda node: node.get("InstanceMarketOptions", {}).get("MarketType") == "spot",
        "gcp": lambda node: node.get("scheduling", {}).get("provisioningModel") == "SPOT",
    }
    for name, types in nodes.items():
        spot = {kind: market[name](node["node_config"]) for kind, node in types.items()}
        assert spot == {"head": False, "gpu8": True}
        assert (types["gpu8"]["min_workers"], types["gpu8"]["max_workers"]) == (1, 8)


def test_aws_makes_no_group_that_is_open_to_all() -> None:
    types = config("aws")["available_node_types"].values()
    assert all(node["node_config"]["SecurityGroupIds"] for node in types)


def test_local_grows_by_its_addresses() -> None:
    written = config("local")
    assert check(written)["max_workers"] == 0
    written["provider"]["worker_ips"] = [f"192.0.2.{last}" for last in range(11, 18)]
    prepared = check(written)
    [node] = prepared["available_node_types"].values()
    assert (node["min_workers"], node["max_workers"], prepared["max_workers"]) == (7, 7, 7)


def _without_token_mode(written: dict[str, Any]) -> None:
    written["docker"]["run_options"].remove("--env RAY_AUTH_MODE=token")


def _open_dashboard(written: dict[str, Any]) -> None:
    commands = written["head_start_ray_commands"]
    written["head_start_ray_commands"] = [c.replace("127.0.0.1", "0.0.0.0") for c in commands]


def _no_such_flag(written: dict[str, Any]) -> None:
    written["worker_start_ray_commands"][-1] += " --no-such-flag"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(idle_timeout=5), "idle_timeout"),
        (lambda c: c["docker"].update(images="x"), "images"),
        (lambda c: c["available_node_types"]["gpu8"].update(min_workers="8"), "'8' is not of type"),
        (lambda c: c["available_node_types"]["gpu8"].update(min_workers=9), "max_workers"),
        (lambda c: c.update(head_node_type="header"), "head_node_type"),
        (lambda c: c.pop("setup_commands"), "installs something"),
        (lambda c: c.pop("file_mounts"), "token is not copied"),
        (_without_token_mode, "no token mode"),
        (_open_dashboard, "open dashboard"),
        (_no_such_flag, "no-such-flag"),
    ],
)
def test_a_broken_copy_is_caught(change: Callable[[dict[str, Any]], object], said: str) -> None:
    written = config("aws")
    change(written)
    with pytest.raises(Exception, match=said) as caught:
        check(written)
    assert not isinstance(caught.value, KeyError | TypeError | AttributeError)


def test_the_schema_is_rays(tmp_path: Path) -> None:
    """The oracle above is the installed one, and it refuses unknown fields."""
    with pytest.raises(jsonschema.ValidationError, match="no_such_field"):
        validate_config({**prepare_config(config("gcp")), "no_such_field": 1})

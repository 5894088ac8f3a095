"""Everything else in cluster/: `ray up` files, versions, the image, what a job carries, secrets.

Commands in the code blocks of docs/cluster.md are parsed by the programs that they call.
"""

from __future__ import annotations

import copy
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from mlflow.cli import cli as mlflow_cli
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray._private.runtime_env.packaging import _get_excludes
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.job.cli import job_cli_group
from ray.runtime_env import RuntimeEnv
from ray.scripts import scripts as ray_scripts
from support.cluster_files import (
    CLUSTER,
    KUBERAY,
    RAY_UP,
    ROOT,
    documents,
    pod_templates,
    ray_cluster,
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
PAGE = ROOT / "docs" / "cluster.md"
TEXTS = {path: path.read_text() for path in sorted([*CLUSTER.rglob("*"), PAGE]) if path.is_file()}
BLOCKS = re.findall(r"(?ms)^```bash\n(.*?)^```$", TEXTS[PAGE])
SHELL = re.sub(r"(?m)(?:^|\s)#.*$", "", "\n".join(BLOCKS).replace("\\\n", " "))  # no comments
PODS = [pod for path in KUBERAY for item in documents(path) for _, pod in pod_templates(item)]
CONTAINERS = [container for pod in PODS for container in pod["spec"]["containers"]]


# --- ray up ---

TOKEN = "~/.ray/auth_token"
by_file = pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)


def config(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "ray_up" / f"{name}.yaml").read_text())


def prepared(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what `ray up` makes of a file, validated by Ray's own schema."""
    result = prepare_config(copy.deepcopy(settings))
    validate_config(result)
    return result


@by_file
def test_ray_up_file_is_valid_and_closed(path: Path) -> None:
    result = prepared(yaml.safe_load(path.read_text()))
    options = " ".join(result["docker"]["run_options"])
    assert "--env RAY_AUTH_MODE=token" in options and "--volume /shared:/shared" in options
    assert result["file_mounts"][TOKEN] == TOKEN
    # Ray's defaults for clouds would install a nightly Ray over the image's.
    assert not result["setup_commands"] + result["head_setup_commands"]
    [command] = [c for c in result["head_start_ray_commands"] if "ray start" in c]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in command
    head = ray_start(command)
    assert head["head"] and head["dashboard_host"] == "127.0.0.1"
    [command] = [c for c in result["worker_start_ray_commands"] if "ray start" in c]
    assert ray_start(command)["address"] == f"$RAY_HEAD_IP:{head['port']}"


def ray_start(command: str) -> dict[str, Any]:
    """Return the options of a `ray start`, parsed by Ray."""
    words = command.partition("ray start ")[2].split()
    return ray_scripts.start.make_context("ray start", words).params


def test_rays_schema_rejects_unknown_keys() -> None:
    with pytest.raises(jsonschema.ValidationError, match="no_such_field"):
        prepared({**config("gcp"), "no_such_field": 1})


SPOT: dict[str, Callable[[dict[str, Any]], bool]] = {
    "aws": lambda node: node.get("InstanceMarketOptions", {}).get("MarketType") == "spot",
    "gcp": lambda node: node.get("scheduling", {}).get("provisioningModel") == "SPOT",
}


@pytest.mark.parametrize("cloud", SPOT)
def test_cloud_workers_are_spot_machines_and_heads_are_not(cloud: str) -> None:
    types = prepared(config(cloud))["available_node_types"]
    spot = {name: SPOT[cloud](node["node_config"]) for name, node in types.items()}
    assert spot == {"head": False, "gpu8": True}
    assert (types["gpu8"]["min_workers"], types["gpu8"]["max_workers"]) == (1, 8)


def test_aws_security_group_is_not_created_by_ray() -> None:
    """Ray's own group opens port 22 to everybody."""
    types = config("aws")["available_node_types"].values()
    assert all(node["node_config"]["SecurityGroupIds"] for node in types)


def test_local_cluster_grows_by_its_addresses() -> None:
    settings = config("local")
    assert prepared(settings)["max_workers"] == 0
    settings["provider"]["worker_ips"] = [f"192.0.2.{last}" for last in range(11, 18)]
    [node] = prepared(settings)["available_node_types"].values()
    assert (node["min_workers"], node["max_workers"]) == (7, 7)


# --- Commands of docs/cluster.md ---


def test_ray_accepts_the_commands() -> None:
    lines = [line for line in SHELL.splitlines() if line.startswith("ray ")]
    assert lines
    for line in lines:
        words = shlex.split(line.replace("$CLUSTER", "cluster/ray_up/aws.yaml"))[1:]
        words = [word for word in words if word not in ("&", ">", "/dev/null")]
        group: Any = ray_scripts.cli
        if words[0] == "job":
            group, words = job_cli_group, words[1:]
        name, command, rest = group.resolve_command(click.Context(group), words)
        command.make_context(name, rest)  # raises click.UsageError


def test_mlflow_accepts_the_commands() -> None:
    """Those of the page and of the heads of `ray up`."""
    lines = re.findall(r"mlflow server ([^'\"#&|]*)", SHELL)
    for path in RAY_UP:
        commands = yaml.safe_load(path.read_text())["head_start_ray_commands"]
        [line] = [c.partition("mlflow server ")[2] for c in commands if "mlflow server" in c]
        lines.append(re.sub(r"\$\(python.*?'\)", "10.0.0.1", line).partition(" >")[0])
    assert len(lines) > len(RAY_UP)
    for line in lines:
        options = mlflow_cli.commands["server"].make_context("server", line.split()).params
        assert options["backend_store_uri"] == "sqlite:////shared/mlflow/mlflow.db"
        assert options["artifacts_destination"] == "/shared/mlflow/artifacts"
        assert options["host"] in ("127.0.0.1", "10.0.0.1")


def test_commands_create_the_secrets_that_the_manifests_use() -> None:
    created: dict[str, set[str]] = {}
    for name, rest in re.findall(r"create secret generic (\S+) (.*(?:\n[\w-]+=.*)*)", SHELL):
        keys = re.findall(r"--from-file=([\w.-]+)", rest) + re.findall(r"\n([\w-]+)=", rest)
        created[name] = set(keys)
    used: dict[str, set[str]] = {"ray-token": {"auth_token"}, "endpoint-keys": {"keys.yaml"}}
    for container in CONTAINERS:
        for entry in container.get("env", []):
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                used.setdefault(reference["name"], set()).add(reference["key"])
    assert created == used


# --- Versions and the image ---


def wrong_versions(texts: dict[Path, str]) -> list[str]:
    """Return each file that names another version than pyproject.toml and the Dockerfile."""
    [ray] = re.findall(r"^ARG RAY_VERSION=(\S+)$", texts[CLUSTER / "Dockerfile"], re.M)
    image = f"fmray:{PROJECT['version']}-ray{ray}"
    pattern = r"rayVersion: (\S+)|Ray (\d+\.\d+\.\d+)|\bray\S*==(\d[\d.]*)"
    wrong = []
    for path, text in texts.items():
        versions = {"".join(match) for match in re.findall(pattern, text)}
        images = set(re.findall(r"fmray:[\w.-]+", text))
        wrong += [f"{path.name}: {name}" for name in sorted(versions - {ray} | images - {image})]
    return wrong


def test_versions_agree() -> None:
    [ray] = re.findall(r"^ARG RAY_VERSION=(\S+)$", DOCKERFILE, re.M)
    [(base, digits)] = re.findall(r"^FROM (\S+):\$\{RAY_VERSION\}-py(\S+)$", DOCKERFILE, re.M)
    user = re.findall(r"^USER (\S+)$", DOCKERFILE, re.M)[-1]
    [wanted] = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "ray"]
    assert wanted.specifier.contains(ray)
    python = SpecifierSet(PROJECT["requires-python"])
    oldest = next(f"3.{minor}" for minor in range(99) if python.contains(f"3.{minor}"))
    assert (base, f"{digits[0]}.{digits[1:]}") == ("rayproject/ray", oldest)
    assert '"ray==${RAY_VERSION}"' in DOCKERFILE
    assert wrong_versions(TEXTS) == []

    # Every machine and pod runs this image as its user.
    image = f"fmray:{PROJECT['version']}-ray{ray}"
    for path in RAY_UP:
        docker = yaml.safe_load(path.read_text())["docker"]
        assert docker["image"] == image and not {"head_image", "worker_image"} & docker.keys()
    assert {container["image"] for container in CONTAINERS} == {image, "postgres:17"}
    users = {
        pod["spec"]["securityContext"]["runAsUser"]
        for pod in PODS
        if any(container["image"] == image for container in pod["spec"]["containers"])
    }
    assert users == {int(user)} and user != "0"
    clusters = [ray_cluster(item) for path in KUBERAY for item in documents(path)]
    assert {cluster["rayVersion"] for cluster in clusters if cluster} == {ray}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rayVersion: 2.60.0", "rayVersion: 2.59.0", "rayjob.yaml: 2.59.0"),
        ("fmray:0.1.0-ray2.60.0", "fmray:latest", "gcp.yaml: fmray:latest"),
        ("ray[default]==2.60.0", "ray[default]==2.60.1", "cluster.md: 2.60.1"),
    ],
)
def test_another_version_is_found(old: str, new: str, message: str) -> None:
    assert message in wrong_versions({path: text.replace(old, new) for path, text in TEXTS.items()})


def test_docker_build_context_has_only_what_is_copied() -> None:
    patterns = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    copied = {words.split()[-2] for words in re.findall(r"^COPY (.*)$", DOCKERFILE, re.M)}
    assert patterns[0] == "*"
    assert {pattern[1:] for pattern in patterns if pattern.startswith("!")} == copied


# --- What a submitted job carries ---


def test_jobs_carry_the_code_and_nothing_large_or_private() -> None:
    settings = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())
    assert set(RuntimeEnv(**settings)) == {"working_dir", "excludes"}
    is_excluded = _get_excludes(ROOT, settings["excludes"])

    def left_out(name: str) -> bool:
        path = Path(name)
        return any(is_excluded(ROOT / part) for part in [path, *path.parents] if str(part) != ".")

    code = [
        str(path.relative_to(ROOT))
        for folder in ("fmray", "jobs", "tune_spaces", "cluster")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".yaml", ".html")
    ]
    assert "fmray/data/ingest.py" in code
    assert [name for name in code if left_out(name)] == []
    other = [
        ".git/config", "data/train.json", "runs/a/checkpoint_1/x", "fmray-quickstart/mlflow.db",
        "mine/checkpoint_000010/zero.bin", "model.safetensors", "keys/server.pem", ".env",
    ]  # fmt: skip
    assert [name for name in other if not left_out(name)] == []


# --- Secrets ---

SECRET = re.compile(
    r"\bAKIA[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9]{16,}|-----BEGIN"
    r"|\b[0-9a-f]{32,}\b|\b[A-Za-z0-9+/]{40,}={0,2}(?![\w/.])"
)


def test_files_contain_no_secrets() -> None:
    assert SECRET.search("key: AKIA" + "A" * 16)
    assert [path.name for path, text in TEXTS.items() if SECRET.search(text)] == []
    assert not [i for path in KUBERAY for i in documents(path) if i["kind"] == "Secret"]
    for container in CONTAINERS:
        for entry in container.get("env", []):
            if re.search("PASSWORD|SECRET|TOKEN|_KEY", entry["name"]):
                assert "valueFrom" in entry, entry["name"]

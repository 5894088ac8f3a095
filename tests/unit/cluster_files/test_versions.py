"""One version of everything: pyproject.toml, the Dockerfile, and every file that names an image."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray._private.runtime_env.packaging import _get_excludes
from ray.runtime_env import RuntimeEnv
from support.cluster_files import (
    CLUSTER,
    KUBERAY,
    RAY_UP,
    ROOT,
    documents,
    objects,
    pod_templates,
    ray_cluster,
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
PAGE = ROOT / "docs" / "cluster.md"
TEXTS = {path: path.read_text() for path in sorted([*CLUSTER.rglob("*"), PAGE]) if path.is_file()}
OTHER_IMAGES = {"postgres:17"}


def dockerfile(text: str) -> dict[str, str]:
    """Versions and user of a Dockerfile of one stage."""
    [ray] = re.findall(r"^ARG RAY_VERSION=(\S+)$", text, re.M)
    [(base, python)] = re.findall(r"^FROM (\S+):\$\{RAY_VERSION\}-py(\S+)$", text, re.M)
    return {
        "ray": ray,
        "base": base,
        "python": f"{python[0]}.{python[1:]}",
        "user": re.findall(r"^USER (\S+)$", text, re.M)[-1],
        "pinned": str('"ray==${RAY_VERSION}"' in text),
    }


def disagreements(made: dict[str, str], texts: dict[Path, str]) -> list[str]:
    """Every place that has another version than pyproject.toml and the Dockerfile."""
    said = []
    [wanted] = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "ray"]
    if not wanted.specifier.contains(made["ray"]):
        said.append(f"Dockerfile: Ray {made['ray']} is not {wanted.specifier}")
    if made["python"] != _oldest_python():
        said.append(f"Dockerfile: Python {made['python']} is not {_oldest_python()}")
    image = f"fmray:{PROJECT['version']}-ray{made['ray']}"
    named = r"rayVersion: (\S+)|Ray (\d+\.\d+\.\d+)|\bray\S*==(\d[\d.]*)"
    for path, text in texts.items():
        found = {f"Ray {''.join(match)}" for match in re.findall(named, text)}
        found |= set(re.findall(r"fmray:[\w.-]+", text))
        right = {image, f"Ray {made['ray']}"}
        said += [f"{path.name}: {one} is not {image}" for one in sorted(found - right)]
    return said


def _oldest_python() -> str:
    asked = SpecifierSet(PROJECT["requires-python"])
    return next(f"3.{minor}" for minor in range(99) if asked.contains(f"3.{minor}"))


def test_versions_agree() -> None:
    made = dockerfile(DOCKERFILE)
    assert disagreements(made, TEXTS) == []
    assert made["pinned"] == "True" and made["base"] == "rayproject/ray"
    assert made["user"].isdigit() and made["user"] != "0"


def test_every_pod_and_machine_has_the_image() -> None:
    image = f"fmray:{PROJECT['version']}-ray{dockerfile(DOCKERFILE)['ray']}"
    for path in RAY_UP:
        written = yaml.safe_load(path.read_text())["docker"]
        assert written["image"] == image and not {"head_image", "worker_image"} & written.keys()
    images = {
        container["image"]
        for path in KUBERAY
        for item in documents(path)
        for _, template in pod_templates(item)
        for container in template["spec"]["containers"]
    }
    assert images == {image} | OTHER_IMAGES
    users = {
        template["spec"]["securityContext"]["runAsUser"]
        for kind in ("RayCluster", "RayJob", "RayService", "Deployment")
        for item in objects(kind)
        for _, template in pod_templates(item)
    }
    assert users == {int(dockerfile(DOCKERFILE)["user"])}
    for kind in ("RayCluster", "RayJob", "RayService"):
        [item] = objects(kind)
        cluster = ray_cluster(item)
        assert cluster is not None and cluster["rayVersion"] == dockerfile(DOCKERFILE)["ray"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("RAY_VERSION=2.60.0", "RAY_VERSION=2.50.0", "2.50.0 is not"),
        ("RAY_VERSION=2.60.0", "RAY_VERSION=2.61.0", "is not fmray:0.1.0-ray2.61.0"),
        ("-py311", "-py312", "Python 3.12 is not 3.11"),
        ("rayVersion: 2.60.0", "rayVersion: 2.59.0", "rayjob.yaml: Ray 2.59.0"),
        ("fmray:0.1.0-ray2.60.0", "fmray:latest", "gcp.yaml: fmray:latest"),
        ("ray[default]==2.60.0", "ray[default]==2.60.1", "cluster.md: Ray 2.60.1"),
    ],
)
def test_another_version_is_caught(old: str, new: str, said: str) -> None:
    assert any(old in text for text in TEXTS.values())
    texts = {path: text.replace(old, new) for path, text in TEXTS.items()}
    found = disagreements(dockerfile(texts[CLUSTER / "Dockerfile"]), texts)
    assert any(said in line for line in found), found


def test_the_build_sees_what_it_copies_and_no_more() -> None:
    lines = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    copied = {words.split()[-2] for words in re.findall(r"^COPY (.*)$", DOCKERFILE, re.M)}
    assert lines[0] == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied


# -- what a submitted job takes along --------------------------------------------------------------


def runtime_env() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())


def left_out(patterns: list[str], name: str) -> bool:
    """As Ray decides it while it packs the working directory."""
    excluded = _get_excludes(ROOT, patterns)
    path = Path(name)
    return any(excluded(ROOT / part) for part in [path, *path.parents] if str(part) != ".")


def test_ray_takes_the_runtime_environment() -> None:
    made = RuntimeEnv(**runtime_env())
    assert set(made) == {"working_dir", "excludes"}


def test_a_job_takes_the_code_along_and_leaves_the_rest() -> None:
    patterns = runtime_env()["excludes"]
    code = [
        str(path.relative_to(ROOT))
        for folder in ("fmray", "jobs", "tune_spaces", "cluster")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".yaml", ".html")
    ]
    assert len(code) > 100
    assert [name for name in code if left_out(patterns, name)] == []
    for name in (
        ".git/config",
        "data/train.json",
        "runs/a/checkpoint_1/x",
        "mine/checkpoint_000010/zero.bin",
        "fmray-quickstart/mlflow.db",
        "model.safetensors",
        "keys/server.pem",
        ".env",
    ):
        assert left_out(patterns, name), name


def test_a_pattern_that_takes_code_away_is_caught() -> None:
    assert left_out(["data"], "fmray/data/ingest.py")
    assert not left_out(["/data"], "fmray/data/ingest.py")


# -- secrets ---------------------------------------------------------------------------------------

SECRETS = re.compile(
    r"\bAKIA[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9]{16,}|-----BEGIN"
    r"|\b[0-9a-f]{32,}\b|\b[A-Za-z0-9+/]{40,}={0,2}(?![\w/.])"
)


def test_no_file_holds_a_secret() -> None:
    for path, text in TEXTS.items():
        assert not SECRETS.search(text), path.name
    assert not [path for path in KUBERAY if any(i["kind"] == "Secret" for i in documents(path))]
    for path in KUBERAY:
        for item in documents(path):
            for _, template in pod_templates(item):
                for container in template["spec"]["containers"]:
                    for entry in container.get("env", []):
                        secret = re.search("PASSWORD|SECRET|TOKEN|_KEY", entry["name"])
                        assert not secret or "valueFrom" in entry, entry["name"]


@pytest.mark.parametrize("text", ["x: " + "0123456789abcdef" * 4, "k: AKIA" + "A" * 16])
def test_a_secret_is_caught(text: str) -> None:
    assert SECRETS.search(text)

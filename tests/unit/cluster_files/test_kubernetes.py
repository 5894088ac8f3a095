"""KubeRay manifests: KubeRay's schemas, Kubernetes' rules, network policies, and what they run.

The oracles are KubeRay's CustomResourceDefinitions (in shared/schemas), Ray Serve's schema, fmray's
own recipes and settings, and the semantics of NetworkPolicy.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from support.cluster_files import (
    CLUSTER,
    KUBERAY,
    ROOT,
    Object,
    Peer,
    allowed,
    custom_resource,
    documents,
    objects,
    pod_templates,
    ray_cluster,
    refusals,
    the,
)

from fmray.config import AdaLlavaRecipe, load
from fmray.runtime.placement import Machine, preflight
from fmray.serve.app import build

RAY_KINDS = ["RayCluster", "RayJob", "RayService"]
OBJECTS = [item for path in KUBERAY for item in documents(path)]
TEMPLATES = [(item, role, pod) for item in OBJECTS for role, pod in pod_templates(item)]
CONTAINERS = [container for _, _, pod in TEMPLATES for container in pod["spec"]["containers"]]
RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}

by_kind = pytest.mark.parametrize("kind", RAY_KINDS)


def cluster_of(kind: str) -> Object:
    cluster = ray_cluster(the(kind))
    assert cluster is not None
    return cluster


def worker_group(item: Object) -> Object:
    cluster = ray_cluster(item)
    assert cluster is not None
    return cluster["workerGroupSpecs"][0]


def worker_limits(kind: str) -> Object:
    pod = worker_group(the(kind))["template"]
    return pod["spec"]["containers"][0]["resources"]["limits"]


# --- KubeRay's objects ---


@pytest.fixture(scope="session")
def definitions(real_data: Path) -> Path:
    """The folder of KubeRay's CustomResourceDefinitions."""
    folder = real_data.parent / "schemas" / "kuberay"
    if not folder.is_dir():
        pytest.skip("no schemas/kuberay next to FMRAY_TEST_DATA")
    return folder


@by_kind
def test_object_is_valid_for_kuberay(kind: str, definitions: Path) -> None:
    assert refusals(the(kind), custom_resource(definitions, kind)) == []
    # KubeRay derives the names of services and pods from it.
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", the(kind)["metadata"]["name"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda item: item["spec"].update(entryPoint="x"), "entryPoint"),
        (lambda item: worker_group(item).update(replicas="1"), "'1' is not of type 'integer'"),
        (lambda item: worker_group(item).pop("template"), "'template' is a required property"),
    ],
)
def test_schema_rejects_mistakes(
    change: Callable[[Object], object], message: str, definitions: Path
) -> None:
    item = json.loads(json.dumps(the("RayJob")))  # a copy without shared YAML anchors
    change(item)
    [error] = refusals(item, custom_resource(definitions, "RayJob"))
    assert message in error


@by_kind
def test_clusters_use_token_shared_storage_and_limits(kind: str) -> None:
    cluster = cluster_of(kind)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    for role, pod in pod_templates(the(kind)):
        # Ray counts limits, while Kubernetes places pods by requests.
        for container in pod["spec"]["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
        claims = [v.get("persistentVolumeClaim") for v in pod["spec"].get("volumes", [])]
        assert role == "submitter" or {"claimName": "shared"} in claims
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert not set(group["rayStartParams"]) & {"num-cpus", "num-gpus", "memory"}


# --- The training job ---


def test_retries_use_the_same_run_id() -> None:
    job, data = the("RayJob")["spec"], the("ConfigMap")["data"]
    assert job["backoffLimit"] > 0 and job["shutdownAfterJobFinishes"]
    [command] = [line for line in data["train.sh"].splitlines() if "--run-id" in line]
    assert "--run-id llava15-7b" in command and "$" not in command
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "training", "configMap": {"name": "training"}} in head["volumes"]
    [mount] = [m for m in head["containers"][0]["volumeMounts"] if m["name"] == "training"]
    assert job["entrypoint"] == f"bash {mount['mountPath']}/train.sh"
    assert f"cp {mount['mountPath']}/recipe.yaml jobs/recipes/mine.yaml " in data["train.sh"]
    assert command.count("--config jobs/recipes/mine.yaml ") == 1
    scripts = re.findall(r"jobs/\w+\.py", data["train.sh"])
    assert len(scripts) == 2 and all((ROOT / script).is_file() for script in scripts)


@pytest.mark.parametrize(("nodes", "workers", "micro_batch"), [(1, 8, 4), (8, 64, 2)])
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_job_fits_its_cluster(
    kind: str, nodes: int, workers: int, micro_batch: int, tmp_path: Path
) -> None:
    """In both sizes, and not on a node less."""
    recipes = shutil.copytree(ROOT / "jobs" / "recipes", tmp_path / "recipes")
    (recipes / "mine.yaml").write_text(the("ConfigMap")["data"]["recipe.yaml"])
    size = [f"cluster.workers={workers}", f"train.micro_batch={micro_batch}"]
    recipe = load(recipes / "mine.yaml", size, (AdaLlavaRecipe,)).recipe
    assert recipe.cluster.storage.is_relative_to("/shared")
    assert recipe.data.store.is_relative_to("/shared")
    limits = worker_limits(kind)
    worker = Machine("worker", float(limits["cpu"]), float(limits["nvidia.com/gpu"]))
    head_cpus = float(cluster_of(kind)["headGroupSpec"]["rayStartParams"]["num-cpus"])
    machines = [Machine("head", head_cpus, 0.0)] + [worker] * nodes
    assert [f.text for f in preflight(recipe, machines) if f.level == "FAIL"] == []
    assert any(f.level == "FAIL" for f in preflight(recipe, machines[:-1]))
    assert worker_group(the(kind))["maxReplicas"] >= nodes


# --- The endpoint ---


def serve_config() -> dict[str, Any]:
    return yaml.safe_load(the("RayService")["spec"]["serveConfigV2"])


def test_endpoint_settings_are_valid() -> None:
    config = serve_config()
    [app] = ServeDeploySchema.model_validate(config).applications
    assert set(config) <= set(ServeDeploySchema.model_fields)  # Ray accepts unknown keys
    assert app.import_path == f"{build.__module__}:{build.__name__}"
    [parameter] = inspect.signature(build).parameters.values()
    settings = parameter.annotation.model_validate(app.args)
    assert settings.require_keys
    assert config["http_options"]["request_timeout_s"] > settings.request_timeout_s


def test_endpoint_equals_serve_yaml_except_for_the_cluster() -> None:
    kubernetes, machines = serve_config(), yaml.safe_load((CLUSTER / "serve.yaml").read_text())
    [app], [other] = kubernetes["applications"], machines["applications"]
    settings, others = app.pop("args"), other.pop("args")
    assert {key for key in settings | others if settings.get(key) != others.get(key)} == {
        "storage", "tracking_uri", "keys_file", "require_keys",
        "max_replicas", "cpus", "gpus", "dtype", "kv_mib",
    }  # fmt: skip
    kubernetes["http_options"].pop("host"), machines["http_options"].pop("host")
    assert kubernetes == machines


def test_replicas_fit_during_an_update() -> None:
    """One GPU per replica, and room for the extra replicas of a rolling update."""
    item, settings = the("RayService"), serve_config()["applications"][0]["args"]
    limits = worker_limits("RayService")
    assert float(limits["cpu"]) >= settings["cpus"]
    assert float(limits["nvidia.com/gpu"]) == settings["gpus"] == 1
    surge = max(1, math.ceil(settings["max_replicas"] * settings["surge_percent"] / 100))
    assert settings["max_replicas"] + surge == worker_group(item)["maxReplicas"]
    for _, pod in pod_templates(item):
        [volume] = [v for v in pod["spec"]["volumes"] if v["name"] == "keys"]
        assert volume["secret"]["secretName"] == "endpoint-keys"
        paths = [Path(m["mountPath"]) for m in pod["spec"]["containers"][0]["volumeMounts"]]
        assert Path(settings["keys_file"]).parent in paths


# --- Rules of Kubernetes that no schema states ---


def test_every_object_is_in_the_namespace() -> None:
    for item in OBJECTS:
        assert item["kind"] == "Namespace" or item["metadata"]["namespace"] == "fmray"


def test_pods_meet_the_restricted_security_standard() -> None:
    labels = the("Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for _, _, pod in TEMPLATES:
        spec = pod["spec"]
        context = spec["securityContext"]
        assert context["runAsNonRoot"] and context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert not any("hostPath" in volume for volume in spec.get("volumes", []))
    assert all(container["securityContext"] == RESTRICTED for container in CONTAINERS)
    for kind in ("RayCluster", "RayService"):  # KubeRay adds a sidecar to the head
        assert cluster_of(kind)["autoscalerOptions"]["securityContext"] == RESTRICTED


def test_workloads_select_their_pods_and_have_probes() -> None:
    for item in objects("Deployment") + objects("StatefulSet"):
        spec = item["spec"]
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"].items() <= labels.items()
        for container in spec["template"]["spec"]["containers"]:
            assert set(container["resources"]) == {"requests", "limits"}
            assert {"readinessProbe", "livenessProbe"} <= set(container)


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_services_and_probes_use_declared_ports(path: Path) -> None:
    pods = [pod for item in documents(path) for role, pod in pod_templates(item) if role == "pod"]
    for service in (item for item in documents(path) if item["kind"] == "Service"):
        selector = service["spec"]["selector"].items()
        [pod] = [pod for pod in pods if selector <= pod["metadata"]["labels"].items()]
        [container] = pod["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            port = container.get(probe, {}).get("httpGet", {}).get("port")
            assert port is None or port in ports


def test_mounts_volumes_and_claims_match() -> None:
    claims = {item["metadata"]["name"]: item for item in objects("PersistentVolumeClaim")}
    assert claims["shared"]["spec"]["accessModes"] == ["ReadWriteMany"]
    for item, _, pod in TEMPLATES:
        volumes = pod["spec"].get("volumes", [])
        names = {volume["name"] for volume in volumes}
        names |= {c["metadata"]["name"] for c in item["spec"].get("volumeClaimTemplates", [])}
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= names
        for volume in volumes:
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or claim in claims


# --- Network policies ---

BASE = CLUSTER / "kuberay" / "base.yaml"
MLFLOW = [CLUSTER / "kuberay" / f"mlflow_{kind}.yaml" for kind in ("sqlite", "postgres")]


def ray_pods(kind: str) -> dict[str, Peer]:
    """Return a pod for each role of an object, with the label that KubeRay adds to Ray's pods."""
    pods = {}
    for role, template in pod_templates(the(kind)):
        labels = dict(template.get("metadata", {}).get("labels", {}))
        if role != "submitter":
            labels["ray.io/is-ray-node"] = "yes"
        pods[role] = Peer("fmray", labels)
    return pods


JOB, ENDPOINT = ray_pods("RayJob"), ray_pods("RayService")
HEAD, WORKER, SUBMITTER = JOB["head"], JOB["worker"], JOB["submitter"]
REPLICA = ENDPOINT["worker"]
SERVER = Peer("fmray", {"app.kubernetes.io/name": "mlflow"})
DATABASE = Peer("fmray", {"app.kubernetes.io/name": "postgres"})
OPERATOR = Peer("kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"})
INGRESS = Peer("ingress-nginx")
OUTSIDE = Peer("outside")
DNS = Peer("kube-system", {"k8s-app": "kube-dns"})
# Not trusted: a pod of another namespace that copies our labels, and an unrelated pod of ours
STRANGER = Peer("default", {"ray.io/is-ray-node": "yes", "app.kubernetes.io/name": "mlflow"})
NEIGHBOUR = Peer("fmray", {"app.kubernetes.io/name": "other"})

GCS, DASHBOARD, SERVE = 6379, 8265, 8000
NEEDED = [
    (WORKER, HEAD, GCS),
    (WORKER, HEAD, DASHBOARD),
    (HEAD, WORKER, 52365),  # the dashboard's agent
    (HEAD, WORKER, 10002),  # a worker process
    (WORKER, WORKER, 41234),  # torch's rendezvous, NCCL
    (SUBMITTER, HEAD, DASHBOARD),
    (OPERATOR, HEAD, DASHBOARD),
    (OPERATOR, ENDPOINT["head"], SERVE),
    (INGRESS, REPLICA, SERVE),
    (HEAD, SERVER, 5000),
    (WORKER, SERVER, 5000),
    (REPLICA, SERVER, 5000),
    (SERVER, DATABASE, 5432),
    (HEAD, OUTSIDE, 443),
    *((source, DNS, 53) for source in (HEAD, WORKER, SUBMITTER, SERVER)),
]
FORBIDDEN = [
    (INGRESS, REPLICA, DASHBOARD),
    (INGRESS, REPLICA, GCS),
    (INGRESS, WORKER, SERVE),  # of a cluster without an endpoint
    (OPERATOR, HEAD, GCS),
    (SUBMITTER, HEAD, GCS),
    (SUBMITTER, SERVER, 5000),
    (HEAD, DATABASE, 5432),
    (DATABASE, HEAD, DASHBOARD),
    (SERVER, HEAD, DASHBOARD),
    (HEAD, OUTSIDE, 80),
    (SUBMITTER, OUTSIDE, 443),
    (NEIGHBOUR, OUTSIDE, 443),
    (STRANGER, NEIGHBOUR, 80),
    *(
        (source, target, port)
        for source in (STRANGER, NEIGHBOUR)
        for target, port in (
            (HEAD, GCS),
            (HEAD, DASHBOARD),
            (WORKER, 10002),
            (REPLICA, SERVE),  # listens on 0.0.0.0
            (SERVER, 5000),  # listens on 0.0.0.0
            (DATABASE, 5432),
        )
    ),
]


@pytest.mark.parametrize("mlflow", MLFLOW, ids=lambda path: path.stem)
def test_only_needed_connections_are_open(mlflow: Path) -> None:
    policies = objects("NetworkPolicy", [BASE, mlflow])
    has_database = any(policy["metadata"]["name"] == "postgres" for policy in policies)
    for connection in NEEDED:
        if has_database or DATABASE not in connection:
            assert allowed(policies, *connection), connection
    for connection in FORBIDDEN:
        assert not allowed(policies, *connection), connection


def test_only_kubernetes_files_listen_on_all_addresses() -> None:
    """0.0.0.0 appears only in files whose pods the policies above protect."""
    files = {p for p in CLUSTER.rglob("*") if p.is_file() and "0.0.0.0" in p.read_text()}
    assert files == {*MLFLOW, CLUSTER / "kuberay" / "rayservice.yaml"}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([], False),
        ([{}], True),
        ([{"from": [{"podSelector": {}}]}], False),  # own namespace only
        ([{"from": [{"namespaceSelector": {}}]}], True),
        (
            [{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"a": "x"}}}]}],
            False,
        ),
        ([{"from": [{"namespaceSelector": {}}], "ports": [{"protocol": "TCP", "port": 1}]}], False),
    ],
)
def test_policies_are_evaluated_as_kubernetes_does(rules: list[Object], expected: bool) -> None:
    """The cases of the NetworkPolicy reference."""
    source, target = Peer("there", {"a": "b"}), Peer("here", {"c": "d"})

    def policy(namespace: str, selector: Object, rules: list[Object]) -> Object:
        return {
            "metadata": {"namespace": namespace},
            "spec": {"podSelector": selector, "policyTypes": ["Ingress"], "ingress": rules},
        }

    assert allowed([], source, target, 80)
    assert allowed([policy("here", {"matchLabels": {"c": "e"}}, [])], source, target, 80)
    assert allowed([policy("here", {}, rules)], source, target, 80) is expected
    assert allowed([policy("here", {}, rules), policy("here", {}, [{}])], source, target, 80)

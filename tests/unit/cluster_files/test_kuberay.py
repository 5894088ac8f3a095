"""The KubeRay manifests: by KubeRay's own definitions, the endpoint's own model, and the rules of
Kubernetes that no schema says."""

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
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema
from support.cluster_files import (
    KUBERAY,
    ROOT,
    Object,
    custom_resource,
    documents,
    objects,
    one,
    pod_templates,
    ray_cluster,
    refusals,
)

from fmray.config import AdaLlavaRecipe, load
from fmray.runtime.placement import Machine, preflight
from fmray.serve.app import build

RAY_KINDS = ["RayCluster", "RayJob", "RayService"]
OBJECTS = [item for path in KUBERAY for item in documents(path)]
README = (ROOT / "docs" / "cluster.md").read_text()


@pytest.fixture(scope="session")
def definitions(real_data: Path) -> Path:
    """KubeRay's CustomResourceDefinitions, beside the test data."""
    folder = real_data.parent / "schemas" / "kuberay"
    if not folder.is_dir():
        pytest.skip("there are no KubeRay definitions beside FMRAY_TEST_DATA")
    return folder


def promises(item: Object) -> list[str]:
    """What we promise of a Ray object and no schema asks for."""
    cluster = ray_cluster(item)
    assert cluster is not None
    said = []
    if cluster.get("authOptions") != {"mode": "token", "secretName": "ray-token"}:
        said.append("no token")
    for role, template in pod_templates(item):
        for container in template["spec"]["containers"]:
            asked = container["resources"]
            if asked["requests"] != asked["limits"]:
                said.append(f"{role}: Ray counts limits, Kubernetes places requests")
        claims = [v.get("persistentVolumeClaim") for v in template["spec"].get("volumes", [])]
        if role != "submitter" and {"claimName": "shared"} not in claims:
            said.append(f"{role}: no shared storage")
    for group in cluster["workerGroupSpecs"]:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            said.append(f"{group['groupName']}: replicas are out of bounds")
        if set(group["rayStartParams"]) & {"num-cpus", "num-gpus", "memory"}:
            said.append(f"{group['groupName']}: Ray is told other resources than Kubernetes")
    return said


@pytest.mark.parametrize("kind", RAY_KINDS)
def test_an_api_server_takes_it(kind: str, definitions: Path) -> None:
    item = one(kind)
    assert refusals(item, custom_resource(definitions, kind)) == []
    assert promises(item) == []
    # KubeRay's own rule: it makes names of Services and pods from it
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", item["metadata"]["name"])


def _first_worker(item: Object) -> Object:
    return ray_cluster(item)["workerGroupSpecs"][0]


def _worker_container(item: Object) -> Object:
    return _first_worker(item)["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("kind", RAY_KINDS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda i: i["spec"].update(entryPoint="x"), "entryPoint"),
        (lambda i: _worker_container(i).update(images="x"), "images"),
        (lambda i: _first_worker(i).update(replicas="1"), "'1' is not of type 'integer'"),
        (lambda i: _first_worker(i).pop("template"), "'template' is a required property"),
        (lambda i: _worker_container(i)["resources"]["limits"].update(cpu=[1]), "limits.cpu"),
        (lambda i: ray_cluster(i)["authOptions"].update(mode="none"), "'none' is not one of"),
        (
            lambda i: _worker(i)["containers"].append(dict(_worker_container(i))),
            "a second item with {'name': 'ray-worker'}",
        ),
    ],
)
def test_the_api_server_would_refuse_it(
    kind: str, change: Callable[[Object], object], said: str, definitions: Path
) -> None:
    item = _copy(one(kind))
    change(item)
    found = refusals(item, custom_resource(definitions, kind))
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize("kind", RAY_KINDS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda i: ray_cluster(i).pop("authOptions"), "no token"),
        (lambda i: _worker_container(i)["resources"]["requests"].update(cpu="1"), "Ray counts"),
        (lambda i: _worker(i).pop("volumes"), "no shared storage"),
        (lambda i: _first_worker(i).update(replicas=1000), "out of bounds"),
        (lambda i: _first_worker(i)["rayStartParams"].update({"num-cpus": "1"}), "Ray is told"),
    ],
)
def test_a_broken_promise_is_caught(
    kind: str, change: Callable[[Object], object], said: str
) -> None:
    item = _copy(one(kind))
    change(item)
    [found] = promises(item)
    assert said in found


def _copy(item: Object) -> Object:
    """Without the parts that YAML's anchors make several places share."""
    return json.loads(json.dumps(item))


def _first_worker(item: Object) -> Object:
    cluster = ray_cluster(item)
    assert cluster is not None
    return cluster["workerGroupSpecs"][0]


def _worker(item: Object) -> Object:
    return _first_worker(item)["template"]["spec"]


def _worker_container(item: Object) -> Object:
    return _worker(item)["containers"][0]


# -- the job -------------------------------------------------------------------------------------


def test_a_retry_is_the_same_run() -> None:
    """The command has a run id and nothing that changes from one try to the next."""
    job, data = one("RayJob")["spec"], one("ConfigMap")["data"]
    assert job["backoffLimit"] > 0 and job["shutdownAfterJobFinishes"]
    [command] = [line for line in data["train.sh"].splitlines() if "train_adallava" in line]
    assert "--run-id llava15-7b" in command and "$" not in command
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "training", "configMap": {"name": "training"}} in head["volumes"]
    [mount] = [m for m in head["containers"][0]["volumeMounts"] if m["name"] == "training"]
    script = f"{mount['mountPath']}/train.sh"
    assert job["entrypoint"] == f"bash {script}"
    recipe = "jobs/recipes/mine.yaml"
    assert f"cp {mount['mountPath']}/recipe.yaml {recipe} " in data["train.sh"]
    assert command.count(f"--config {recipe} ") == 1


def _machines(item: Object, nodes: int) -> list[Machine]:
    """What Ray sees: the head with the CPUs that it is told, the workers with their limits."""
    cluster = ray_cluster(item)
    limits = _worker_container(item)["resources"]["limits"]
    worker = Machine("worker", float(limits["cpu"]), float(limits["nvidia.com/gpu"]))
    head = float(cluster["headGroupSpec"]["rayStartParams"]["num-cpus"])
    return [Machine("head", head, 0.0)] + [worker] * nodes


@pytest.mark.parametrize(("nodes", "workers", "micro_batch"), [(1, 8, 4), (8, 64, 2)])
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_both_sizes_can_be_placed(
    kind: str, nodes: int, workers: int, micro_batch: int, tmp_path: Path
) -> None:
    recipes = shutil.copytree(ROOT / "jobs" / "recipes", tmp_path / "recipes")
    path = recipes / "mine.yaml"
    path.write_text(one("ConfigMap")["data"]["recipe.yaml"])
    size = [f"cluster.workers={workers}", f"train.micro_batch={micro_batch}"]
    recipe = load(path, size, (AdaLlavaRecipe,)).recipe
    if nodes == 1:
        assert recipe == load(path).recipe
    assert recipe.cluster.storage.is_relative_to("/shared")
    assert recipe.data.store.is_relative_to("/shared")
    findings = preflight(recipe, _machines(one(kind), nodes))
    assert [f.text for f in findings if f.level == "FAIL"] == []
    short = preflight(recipe, _machines(one(kind), nodes)[:-1])
    assert any(f.level == "FAIL" for f in short)
    assert _first_worker(one(kind))["maxReplicas"] >= nodes


# -- the endpoint --------------------------------------------------------------------------------

# what a cluster needs to have otherwise than cluster/serve.yaml, and nothing else
OTHERS = {
    "storage",
    "tracking_uri",
    "keys_file",
    "require_keys",
    "max_replicas",
    "cpus",
    "gpus",
    "dtype",
    "kv_mib",
}


def serve_config() -> dict[str, Any]:
    return yaml.safe_load(one("RayService")["spec"]["serveConfigV2"])


def test_the_endpoint_is_the_recipes() -> None:
    written, recipe = (
        serve_config(),
        yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text()),
    )
    [app], [same] = written.pop("applications"), recipe.pop("applications")
    arguments, expected = app.pop("args"), same.pop("args")
    assert {k for k in arguments.keys() | expected if arguments.get(k) != expected.get(k)} == OTHERS
    assert app == same
    assert written.pop("http_options").pop("host") == "0.0.0.0"
    options = recipe.pop("http_options")
    assert serve_config()["http_options"] == {**options, "host": "0.0.0.0"}
    assert written == recipe


def test_ray_serve_and_the_application_take_it() -> None:
    written = serve_config()
    deployed = ServeDeploySchema.model_validate(written)
    assert set(written) <= set(ServeDeploySchema.model_fields)  # Ray lets unknown ones through
    [app] = deployed.applications
    assert app.import_path == f"{build.__module__}:{build.__name__}"
    [parameter] = inspect.signature(build).parameters.values()
    settings = parameter.annotation.model_validate(app.args)
    assert settings.require_keys
    assert written["http_options"]["request_timeout_s"] > settings.request_timeout_s
    with pytest.raises(ValidationError, match="did you mean max_rows"):
        parameter.annotation.model_validate({**app.args, "max_row": 8})


def test_the_endpoints_replicas_have_room() -> None:
    """All of them, and while updating those that come before the old ones go; a GPU each."""
    item, arguments = one("RayService"), serve_config()["applications"][0]["args"]
    limits = _worker_container(item)["resources"]["limits"]
    assert float(limits["cpu"]) >= arguments["cpus"]
    assert float(limits["nvidia.com/gpu"]) == arguments["gpus"] == 1
    for replicas, pods in ((arguments["max_replicas"], 8), (51, 64)):
        extra = max(1, math.ceil(replicas * arguments["surge_percent"] / 100))
        assert replicas + extra == pods
    assert _first_worker(item)["maxReplicas"] == 8
    for _, template in pod_templates(item):
        [volume] = [v for v in template["spec"]["volumes"] if v["name"] == "keys"]
        assert volume["secret"]["secretName"] == "endpoint-keys"
        mounts = template["spec"]["containers"][0]["volumeMounts"]
        assert Path(arguments["keys_file"]).parent in [Path(m["mountPath"]) for m in mounts]


# -- what no schema says ---------------------------------------------------------------------------


def test_every_object_is_in_the_namespace() -> None:
    for item in OBJECTS:
        meta = item["metadata"]
        assert item["kind"] == "Namespace" or meta["namespace"] == "fmray", meta["name"]
    names = [(i["kind"], i["metadata"]["name"]) for i in OBJECTS]
    repeated = {name for name in names if names.count(name) > 1}
    # MLflow is there twice, for one or the other
    assert repeated <= {(kind, "mlflow") for kind in ("Deployment", "Service", "NetworkPolicy")}


def unrestricted(template: Object) -> list[str]:
    """Where a pod breaks the Pod Security Standard `restricted`, which the namespace enforces."""
    spec, said = template["spec"], []
    context = spec.get("securityContext", {})
    if not context.get("runAsNonRoot") or context.get("runAsUser", 0) == 0:
        said.append("runs as root")
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        said.append("no seccomp profile")
    if {"hostNetwork", "hostPID", "hostIPC"} & set(spec):
        said.append("uses the host's namespaces")
    if any("hostPath" in volume for volume in spec.get("volumes", [])):
        said.append("mounts the host's files")
    said += [
        f"{container['name']} may gain rights"
        for container in spec["containers"]
        if container.get("securityContext") != RESTRICTED
    ]
    return said


RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_no_pod_has_more_rights_than_it_needs() -> None:
    level = one("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert level == "restricted"
    templates = [template for item in OBJECTS for _, template in pod_templates(item)]
    assert len(templates) == 10
    assert [unrestricted(template) for template in templates] == [[]] * 10
    for kind in ("RayCluster", "RayService"):  # the sidecar that KubeRay adds to the head
        assert ray_cluster(one(kind))["autoscalerOptions"]["securityContext"] == RESTRICTED


def test_a_pod_with_rights_is_caught() -> None:
    broken = {
        "spec": {
            "hostNetwork": True,
            "volumes": [{"name": "x", "hostPath": {"path": "/"}}],
            "securityContext": {"runAsNonRoot": True, "runAsUser": 0},
            "containers": [{"name": "a", "securityContext": {"privileged": True}}],
        }
    }
    assert len(unrestricted(broken)) == 5


def test_workloads_select_their_own_pods() -> None:
    for item in objects("Deployment") + objects("StatefulSet"):
        spec = item["spec"]
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"].items() <= labels.items()
        for container in spec["template"]["spec"]["containers"]:
            assert {"requests", "limits"} == set(container["resources"])
            assert {"readinessProbe", "livenessProbe"} <= set(container)


def test_services_and_probes_reach_a_port_that_is_there() -> None:
    workloads = objects("Deployment") + objects("StatefulSet")
    for path in KUBERAY:
        inside = documents(path)
        for service in (i for i in inside if i["kind"] == "Service"):
            pods = [
                w["spec"]["template"]
                for w in inside
                if w in workloads
                and service["spec"]["selector"].items()
                <= w["spec"]["template"]["metadata"]["labels"].items()
            ]
            assert len(pods) == 1, service["metadata"]["name"]
            [container] = pods[0]["spec"]["containers"]
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            for port in service["spec"]["ports"]:
                assert ports[port["targetPort"]] == port["port"]
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                asked = container.get(probe, {}).get("httpGet", {}).get("port")
                assert asked is None or asked in ports


def test_volumes_and_mounts_agree() -> None:
    claims = {item["metadata"]["name"] for item in objects("PersistentVolumeClaim")}
    for item in OBJECTS:
        own = {c["metadata"]["name"] for c in item.get("spec", {}).get("volumeClaimTemplates", [])}
        for _, template in pod_templates(item):
            volumes = template["spec"].get("volumes", [])
            names = {volume["name"] for volume in volumes} | own
            for container in template["spec"]["containers"]:
                assert {m["name"] for m in container.get("volumeMounts", [])} <= names
            for volume in volumes:
                claim = volume.get("persistentVolumeClaim", {}).get("claimName")
                assert claim is None or claim in claims
    [shared] = [i for i in objects("PersistentVolumeClaim") if i["metadata"]["name"] == "shared"]
    assert shared["spec"]["accessModes"] == ["ReadWriteMany"]


def _made_by_readme() -> dict[str, set[str]]:
    """secret -> its keys, as the page's commands make them."""
    made = {}
    for name, rest in re.findall(r"create secret generic (\S+) (.*(?:\n[\w-]+=.*)*)", README):
        words = re.findall(r"--from-file=([\w.-]+)", rest) + re.findall(r"\n([\w-]+)=", rest)
        made[name] = set(words)
    return made


def test_secrets_are_those_that_the_page_makes() -> None:
    made = _made_by_readme()
    assert {"ray-token", "endpoint-keys", "mlflow"} == set(made)
    assert made["ray-token"] == {"auth_token"}  # KubeRay's name for it
    used = set()
    for item in OBJECTS:
        for _, template in pod_templates(item):
            for container in template["spec"]["containers"]:
                for entry in container.get("env", []):
                    reference = entry.get("valueFrom", {}).get("secretKeyRef")
                    if reference:
                        used.add((reference["name"], reference["key"]))
    assert used and all(key in made[name] for name, key in used)
    assert {key for name, key in used if name == "mlflow"} == made["mlflow"]

"""The files of `cluster/`, and what an API server and a network plugin would make of them.

In: YAML of the checkout and KubeRay's CustomResourceDefinitions. Out: the objects, the mistakes
that an API server would refuse (unknown fields too, which it drops in silence), and whether
NetworkPolicies let one pod speak to another.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
RAY_UP = sorted((CLUSTER / "ray_up").glob("*.yaml"))

Object = dict[str, Any]


@functools.cache
def documents(path: Path) -> tuple[Object, ...]:
    """The objects of a file, shared by all who ask: copy one before you change it."""
    return tuple(yaml.safe_load_all(path.read_text()))


def objects(kind: str, paths: list[Path] = KUBERAY) -> list[Object]:
    """All objects of one kind; at least one, so that no test passes for want of them."""
    found = [item for path in paths for item in documents(path) if item["kind"] == kind]
    assert found, f"no {kind} in cluster/kuberay"
    return found


def one(kind: str) -> Object:
    [found] = objects(kind)
    return found


def pod_templates(item: Object) -> Iterator[tuple[str, Object]]:
    """(role, template) of every pod that an object makes: head, worker, submitter or pod."""
    spec = item.get("spec", {})
    if item["kind"] in ("Deployment", "StatefulSet"):
        yield "pod", spec["template"]
    if "submitterPodTemplate" in spec:
        yield "submitter", spec["submitterPodTemplate"]
    cluster = ray_cluster(item)
    if cluster is not None:
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield "worker", group["template"]


def ray_cluster(item: Object) -> Object | None:
    """The RayClusterSpec in a RayCluster, RayJob or RayService; None in other kinds."""
    keys = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
    if item["kind"] == "RayCluster":
        return item["spec"]
    return item["spec"][keys[item["kind"]]] if item["kind"] in keys else None


# -- CustomResourceDefinitions ---------------------------------------------------------------------


@functools.cache
def custom_resource(folder: Path, kind: str) -> Object:
    """The strict JSON Schema of `ray.io/v1` KIND."""
    path = folder / f"ray.io_{kind.lower()}s.yaml"
    definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    [version] = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    assert version["served"] and definition["spec"]["names"]["kind"] == kind
    return _strict(version["schema"]["openAPIV3Schema"])


def _strict(schema: Any, top: bool = True) -> Any:
    """A structural schema as JSON Schema that refuses what the API server would prune."""
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for key in ("properties", "items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            made[key] = (
                {name: _strict(child, False) for name, child in schema[key].items()}
                if key == "properties"
                else _strict(schema[key], False)
            )
    if top:  # the API server knows an object's own metadata without being told
        made["properties"]["metadata"] = {"type": "object", "required": ["name", "namespace"]}
        made["required"] = ["apiVersion", "kind", "metadata", "spec"]
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and "additionalProperties" not in schema and not open_ended:
        made["additionalProperties"] = False
    if schema.get("nullable"):
        made = {"anyOf": [made, {"type": "null"}]}
    return made


def refusals(item: Object, schema: Object) -> list[str]:
    """What an API server with field validation would say, one line a mistake."""
    errors = jsonschema.Draft202012Validator(schema).iter_errors(item)
    said = [f"{error.json_path}: {error.message}" for error in errors]
    return said + list(_repeated_keys(item, schema, "$"))


def _repeated_keys(value: Any, schema: Object, path: str) -> Iterator[str]:
    """Lists of type map: no two items with the same key, such as containers of one name."""
    if isinstance(value, dict):
        for name, child in value.items():
            if name in schema.get("properties", {}):
                yield from _repeated_keys(child, schema["properties"][name], f"{path}.{name}")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        keys = schema.get("x-kubernetes-list-map-keys")
        seen = set()
        for index, child in enumerate(value):
            if keys and isinstance(child, dict):
                defaults = schema["items"].get("properties", {})
                key = tuple(child.get(k, defaults.get(k, {}).get("default")) for k in keys)
                if key in seen:
                    yield f"{path}[{index}]: a second item with {dict(zip(keys, key, strict=True))}"
                seen.add(key)
            yield from _repeated_keys(child, schema["items"], f"{path}[{index}]")


# -- NetworkPolicies -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A pod: its namespace's name and its labels; or an address outside, without labels."""

    namespace: str
    labels: Mapping[str, str] = field(default_factory=dict)


def allowed(policies: list[Object], source: Peer, target: Peer, port: int) -> bool:
    """Whether policies let `source` open a TCP connection to `port` of `target`.

    As Kubernetes says it: a pod that no policy selects for a direction is open in it; else some
    rule of some policy that selects it has to match. Both directions have to agree. No named ports.
    """
    return all(
        _direction(policies, own, other, port, way)
        for own, other, way in ((target, source, "Ingress"), (source, target, "Egress"))
    )


def _direction(policies: list[Object], own: Peer, other: Peer, port: int, way: str) -> bool:
    selecting = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == own.namespace
        and way in policy["spec"]["policyTypes"]
        and _selects(policy["spec"]["podSelector"], own.labels)
    ]
    if not selecting:
        return True
    key, side = ("ingress", "from") if way == "Ingress" else ("egress", "to")
    return any(
        _names(rule.get(side), own, other)
        and ("ports" not in rule or {"protocol": "TCP", "port": port} in rule["ports"])
        for spec in selecting
        for rule in spec.get(key, [])
    )


def _names(peers: list[Object] | None, own: Peer, other: Peer) -> bool:
    if peers is None:
        return True
    for peer in peers:
        if "ipBlock" in peer:
            continue  # of pods, policies speak by label
        namespace = {"kubernetes.io/metadata.name": other.namespace}
        if "namespaceSelector" in peer:
            near = _selects(peer["namespaceSelector"], namespace)
        else:
            near = own.namespace == other.namespace
        if near and _selects(peer.get("podSelector", {}), other.labels):
            return True
    return False


def _selects(selector: Object, labels: Mapping[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, "this reads matchLabels only"
    return selector.get("matchLabels", {}).items() <= labels.items()

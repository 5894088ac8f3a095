"""The Kubernetes objects of cluster/, checked as an API server and a network plugin would.

Loads the objects, validates them against KubeRay's CustomResourceDefinitions (unknown fields are
errors too, which an API server drops silently), and evaluates NetworkPolicies between two pods.
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
    """Return the objects of a file; they are cached, so copy one before changing it."""
    return tuple(yaml.safe_load_all(path.read_text()))


def objects(kind: str, paths: list[Path] = KUBERAY) -> list[Object]:
    """Return all objects of a kind; an error if there is none."""
    items = [item for path in paths for item in documents(path) if item["kind"] == kind]
    assert items, f"no {kind} in cluster/kuberay"
    return items


def the(kind: str) -> Object:
    """Return the only object of a kind."""
    [item] = objects(kind)
    return item


def pod_templates(item: Object) -> Iterator[tuple[str, Object]]:
    """Yield (role, template) of each pod of an object: head, worker, submitter or pod."""
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
    """Return the RayClusterSpec of a RayCluster, RayJob or RayService, else None."""
    keys = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
    if item["kind"] == "RayCluster":
        return item["spec"]
    return item["spec"][keys[item["kind"]]] if item["kind"] in keys else None


# --- CustomResourceDefinitions ---


@functools.cache
def custom_resource(folder: Path, kind: str) -> Object:
    """Return the JSON Schema of a kind of `ray.io/v1`, without unknown fields."""
    path = folder / f"ray.io_{kind.lower()}s.yaml"
    definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    [version] = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    assert version["served"] and definition["spec"]["names"]["kind"] == kind
    return _strict(version["schema"]["openAPIV3Schema"])


def _strict(schema: Any, top: bool = True) -> Any:
    """Return a structural schema as JSON Schema that rejects what an API server would prune."""
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
    if top:  # metadata is not in the definition: the API server knows it
        made["properties"]["metadata"] = {"type": "object", "required": ["name", "namespace"]}
        made["required"] = ["apiVersion", "kind", "metadata", "spec"]
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and "additionalProperties" not in schema and not open_ended:
        made["additionalProperties"] = False
    if schema.get("nullable"):
        made = {"anyOf": [made, {"type": "null"}]}
    return made


def refusals(item: Object, schema: Object) -> list[str]:
    """Return the errors of an API server with field validation, one line each."""
    errors = jsonschema.Draft202012Validator(schema).iter_errors(item)
    lines = [f"{error.json_path}: {error.message}" for error in errors]
    return lines + list(_repeated_keys(item, schema, "$"))


def _repeated_keys(value: Any, schema: Object, path: str) -> Iterator[str]:
    """Yield repeated items of lists of type map, such as two containers of one name."""
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


# --- NetworkPolicies ---


@dataclass(frozen=True)
class Peer:
    """A pod with its namespace and labels, or an address outside the cluster, without labels."""

    namespace: str
    labels: Mapping[str, str] = field(default_factory=dict)


def allowed(policies: list[Object], source: Peer, target: Peer, port: int) -> bool:
    """Return whether policies let `source` open a TCP connection to `port` of `target`.

    A pod that no policy selects for a direction is open in it; otherwise a rule of a policy that
    selects it has to match. Both directions have to allow the connection. No named ports.
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
            continue  # pods are selected by labels
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

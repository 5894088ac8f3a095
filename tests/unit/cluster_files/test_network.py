"""Who may speak to whom on Kubernetes: what Ray, MLflow and the endpoint need, and nobody else.

The policies are evaluated as Kubernetes defines them, on pods with the labels that the manifests
and KubeRay give them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.cluster_files import (
    CLUSTER,
    KUBERAY,
    Object,
    Peer,
    allowed,
    documents,
    objects,
    one,
    pod_templates,
)

BASE = CLUSTER / "kuberay" / "base.yaml"
MLFLOW = [CLUSTER / "kuberay" / f"mlflow_{kind}.yaml" for kind in ("sqlite", "postgres")]


def ray_pods(kind: str) -> dict[str, Peer]:
    """role -> a pod of the object, with the label that KubeRay adds to Ray's."""
    found = {}
    for role, template in pod_templates(one(kind)):
        labels = dict(template.get("metadata", {}).get("labels", {}))
        if role != "submitter":
            labels["ray.io/is-ray-node"] = "yes"
        found[role] = Peer("fmray", labels)
    return found


JOB, ENDPOINT = ray_pods("RayJob"), ray_pods("RayService")
HEAD, WORKER, SUBMITTER = JOB["head"], JOB["worker"], JOB["submitter"]
SERVED = ENDPOINT["worker"]
SERVER = Peer("fmray", {"app.kubernetes.io/name": "mlflow"})
DATABASE = Peer("fmray", {"app.kubernetes.io/name": "postgres"})
OPERATOR = Peer("kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"})
INGRESS = Peer("ingress-nginx")
STRANGER = Peer("default", {"ray.io/is-ray-node": "yes", "app.kubernetes.io/name": "mlflow"})
NEIGHBOUR = Peer("fmray", {"app.kubernetes.io/name": "other"})
NAMES = Peer("kube-system", {"k8s-app": "kube-dns"})

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
    (INGRESS, SERVED, SERVE),
    (HEAD, SERVER, 5000),
    (WORKER, SERVER, 5000),
    (SERVED, SERVER, 5000),
    (SERVER, DATABASE, 5432),
    (HEAD, Peer("outside"), 443),
    *((source, NAMES, 53) for source in (HEAD, WORKER, SUBMITTER, SERVER)),
]
REFUSED = [
    (INGRESS, SERVED, DASHBOARD),
    (INGRESS, SERVED, GCS),
    (INGRESS, WORKER, SERVE),  # of a cluster that serves nothing
    (OPERATOR, HEAD, GCS),
    (SUBMITTER, HEAD, GCS),
    (SUBMITTER, SERVER, 5000),
    (HEAD, DATABASE, 5432),
    (DATABASE, HEAD, DASHBOARD),
    (SERVER, HEAD, DASHBOARD),
    (HEAD, Peer("outside"), 80),
    (SUBMITTER, Peer("outside"), 443),
    (NEIGHBOUR, Peer("outside"), 443),
    (STRANGER, NEIGHBOUR, 80),
    *(
        (source, target, port)
        for source in (STRANGER, NEIGHBOUR)
        for target, port in (
            (HEAD, GCS),
            (HEAD, DASHBOARD),
            (WORKER, 10002),
            (SERVED, SERVE),
            (SERVER, 5000),
            (DATABASE, 5432),
        )
    ),
]


def policies(paths: list[Path]) -> list[Object]:
    return objects("NetworkPolicy", paths)


@pytest.fixture(params=MLFLOW, ids=lambda path: path.stem)
def applied(request: pytest.FixtureRequest) -> list[Object]:
    """The policies of a namespace with one of the two MLflow servers."""
    return policies([BASE, request.param])


def test_what_is_needed_is_open_and_the_rest_is_closed(applied: list[Object]) -> None:
    with_database = any(p["metadata"]["name"] == "postgres" for p in applied)
    for source, target, port in NEEDED:
        if DATABASE not in (source, target) or with_database:
            assert allowed(applied, source, target, port), (source, target, port)
    for source, target, port in REFUSED:
        assert not allowed(applied, source, target, port), (source, target, port)


def test_every_declared_port_is_reached_by_somebody() -> None:
    """Each containerPort of a manifest is one that some needed connection goes to."""
    reached = {port for _, _, port in NEEDED}
    for path in KUBERAY:
        for item in documents(path):
            for _, template in pod_templates(item):
                for container in template["spec"]["containers"]:
                    ports = {port["containerPort"] for port in container.get("ports", [])}
                    assert ports <= reached, (path.name, ports)


@pytest.mark.parametrize("name", ["deny", "dns", "ray", "submitter", "endpoint", "mlflow"])
def test_each_policy_is_needed(name: str) -> None:
    """Without any one of them, something is closed that has to be open, or the other way round."""
    rest = [p for p in policies([BASE, MLFLOW[1]]) if p["metadata"]["name"] != name]
    open_now = [allowed(rest, *connection) for connection in NEEDED]
    closed_now = [not allowed(rest, *connection) for connection in REFUSED]
    assert not all(open_now + closed_now)


def test_listening_everywhere_is_behind_a_policy() -> None:
    """0.0.0.0 stands in Kubernetes' files only, for pods that refuse strangers on that port."""
    behind = {"rayservice.yaml": (SERVED, SERVE)} | {p.name: (SERVER, 5000) for p in MLFLOW}
    seen = set()
    for path in sorted(CLUSTER.rglob("*")):
        if path.is_file() and re.search(r"0\.0\.0\.0", path.read_text()):
            seen.add(path.name)
            target, port = behind[path.name]
            own = policies([BASE, path] if path in MLFLOW else [BASE])
            assert not allowed(own, STRANGER, target, port)
            assert not allowed(own, NEIGHBOUR, target, port)
    assert seen == set(behind)


def _plain(namespace: str, selector: Object, rules: list[Object]) -> Object:
    return {
        "metadata": {"namespace": namespace},
        "spec": {"podSelector": selector, "policyTypes": ["Ingress"], "ingress": rules},
    }


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
        ([{"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}], False),
    ],
)
def test_the_evaluation_is_kubernetes(rules: list[Object], expected: bool) -> None:
    """Cases that the reference of NetworkPolicy spells out."""
    source, target = Peer("there", {"a": "b"}), Peer("here", {"c": "d"})
    assert allowed([], source, target, 80)
    assert allowed([_plain("here", {"matchLabels": {"c": "e"}}, [])], source, target, 80)
    assert allowed([_plain("there", {}, [])], source, target, 80)
    assert allowed([_plain("here", {}, rules)], source, target, 80) is expected
    either = [_plain("here", {}, rules), _plain("here", {}, [{}])]
    assert allowed(either, source, target, 80)


Change = Callable[[Object], object]


@pytest.mark.parametrize(
    ("name", "change", "connection"),
    [
        ("ray", lambda s: s["ingress"][0].pop("from"), (STRANGER, HEAD, DASHBOARD)),
        ("ray", lambda s: s["ingress"][0].update(ports=[{"port": 6379}]), (WORKER, WORKER, 41234)),
        ("endpoint", lambda s: s["ingress"][0].pop("ports"), (INGRESS, SERVED, DASHBOARD)),
        ("endpoint", lambda s: s["ingress"].clear(), (INGRESS, SERVED, SERVE)),
    ],
)
def test_a_broken_policy_is_caught(
    name: str, change: Change, connection: tuple[Peer, Peer, int]
) -> None:
    whole = policies([BASE, MLFLOW[0]])
    broken = [
        {**p, "spec": _changed(p["spec"], change)} if p["metadata"]["name"] == name else p
        for p in whole
    ]
    assert allowed(whole, *connection) != allowed(broken, *connection)


def _changed(spec: Object, change: Change) -> Object:
    made = copy.deepcopy(spec)
    change(made)
    return made

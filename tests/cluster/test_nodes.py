"""The checks of a cluster's nodes, on two raylets of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from fmray.config import AdaLlavaRecipe, ClusterConfig
from fmray.runtime import nodes as node_checks
from fmray.runtime.nodes import check_nodes, session

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def two_nodes(no_ray_cluster: None) -> Iterator[None]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    yield
    ray.shutdown()
    cluster.shutdown()


def test_nodes_of_one_machine_fit_together(tmp_path: Path) -> None:
    [finding] = check_nodes({"cluster.storage": tmp_path})
    assert finding.level == "ok"
    assert finding.text.startswith("2 nodes share cluster.storage, have the same packages")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_nodes_do_not_share_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path is relative to the working directory, which differs between processes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    findings = check_nodes({"cluster.storage": Path("runs")})
    assert [finding.level for finding in findings] == ["FAIL", "FAIL"]
    for finding in findings:
        assert "cluster.storage runs does not show a file that another node wrote" in finding.text
    assert not list((tmp_path / "runs").iterdir())


def test_a_node_with_other_packages_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = ClusterConfig(storage=tmp_path, workers=1, cpus_per_worker=0.5, data_cpus=0.5)
    recipe = AdaLlavaRecipe(name="two", cluster=cluster)
    with session(recipe):
        assert "2 nodes share cluster.storage" in capsys.readouterr().out
    monkeypatch.setattr(node_checks, "_versions", lambda: {"ray": "0.1"})
    differences = r"node .*: ray is 2\..*, but 0\.1 on this node; .*; node "
    with pytest.raises(ValueError, match=differences), session(recipe):
        pass

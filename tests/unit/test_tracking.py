"""Tracking without a store: invalid settings, disabled tracking, and what an import costs."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fmray.config import TrackingConfig
from fmray.runtime.tracking import open_run, tracking_uri

SQLITE = TrackingConfig()


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://host",
        "file:///runs",
        "./runs",
        "http://",
        "http://[::1",
        "sqlite://",
        "databricks",
        "",
    ],
)
def test_an_unknown_store_is_an_error(uri, tmp_path):
    with pytest.raises(ValueError, match=r"tracking\.uri: .* is not a tracking store; use http://"):
        open_run(TrackingConfig(uri=uri), tmp_path, "job", {})


def test_the_uri_is_that_of_the_recipe_or_sqlite_in_the_storage_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(SQLITE, Path("runs")) == f"sqlite:///{tmp_path.resolve()}/runs/mlflow.db"
    for uri in ("http://host:5000", "https://host/mlflow", "sqlite:///other.db"):
        assert tracking_uri(TrackingConfig(uri=uri), tmp_path) == uri


@pytest.mark.parametrize("run_id", ["", "it's", "a b", "a/b", "x\ny"])
def test_a_run_id_that_breaks_the_search_is_an_error(run_id, tmp_path):
    with pytest.raises(ValueError, match="run id"):
        open_run(SQLITE, tmp_path, run_id, {})


def test_importing_tracking_does_not_import_mlflow():
    heavy = "{'mlflow', 'sqlalchemy'}"
    code = f"import fmray.runtime.tracking, sys; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_disabled_tracking_does_nothing(tmp_path):
    config = TrackingConfig(enabled=False)
    with open_run(config, tmp_path / "storage", "job", {"lr": 1}) as run:
        run.log(1, loss=1.0)
        run.artifact(tmp_path)
    assert run.mlflow_run_id is None
    assert list(tmp_path.iterdir()) == []
    assert not [t for t in threading.enumerate() if t.name == "fmray-tracking"]

"""Fixtures of the endpoint's tests: a tiny model directory, and an application in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.serving import ScriptedWorker, make_answerer, make_app, make_model_directory

from fmray.serve.replica import Answerer


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers, three of them switchable."""
    return make_model_directory(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture
def worker() -> ScriptedWorker:
    return ScriptedWorker()


@pytest.fixture
def answerer(directory: Path, worker: ScriptedWorker) -> Answerer:
    return make_answerer(directory, worker)


@pytest.fixture
def app(answerer: Answerer) -> Any:
    return make_app(answerer)


@pytest.fixture
def build_app(directory: Path) -> Callable[..., Any]:
    """Makes applications with other settings."""

    def build(worker: ScriptedWorker, keys: Any = None, **settings: Any) -> Any:
        return make_app(make_answerer(directory, worker, keys, **settings))

    return build

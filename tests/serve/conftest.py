"""Fixtures of the endpoint's tests: a tiny model directory and web applications around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.serving import ScriptedWorker, make_app, make_chat_model, make_model_directory

from fmray.serve.replica import ChatModel


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers, three of which are units."""
    return make_model_directory(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture
def worker() -> ScriptedWorker:
    return ScriptedWorker()


@pytest.fixture
def chat_model(directory: Path, worker: ScriptedWorker) -> ChatModel:
    return make_chat_model(directory, worker)


@pytest.fixture
def app(chat_model: ChatModel) -> Any:
    return make_app(chat_model)


@pytest.fixture
def build_app(directory: Path) -> Callable[..., Any]:
    """Return a function that makes applications with other workers, keys and settings."""

    def build(worker: ScriptedWorker, keys: Any = None, **settings: Any) -> Any:
        return make_app(make_chat_model(directory, worker, keys, **settings))

    return build

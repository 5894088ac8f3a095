"""Fixtures of the endpoint's tests: a tiny model directory and web applications around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving import ScriptedWorker, make_app, make_chat_model, make_model_directory

from fmray.serve.image_pool import ImagePool
from fmray.serve.replica import ChatModel


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers, three of which are units."""
    return make_model_directory(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="session")
def images() -> Iterator[ImagePool]:
    """The processes that decode images, shared by the replicas of all tests."""
    pool = ImagePool(processes=2, seconds=20.0, memory_mib=1536, max_waiting=100)
    yield pool
    pool.close()


@pytest.fixture
def worker() -> ScriptedWorker:
    return ScriptedWorker()


@pytest.fixture
def chat_model(directory: Path, worker: ScriptedWorker, images: ImagePool) -> ChatModel:
    return make_chat_model(directory, worker, images=images)


@pytest.fixture
def app(chat_model: ChatModel) -> Any:
    return make_app(chat_model)


@pytest.fixture
def build_app(directory: Path, images: ImagePool) -> Callable[..., Any]:
    """Return a function that makes applications with other workers, keys and settings."""

    def build(worker: ScriptedWorker, keys: Any = None, **settings: Any) -> Any:
        return make_app(make_chat_model(directory, worker, keys, images, **settings))

    return build

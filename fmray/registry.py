"""The model registry of MLflow: register a trained model, find the one in production.

In: a `TrackingConfig`, the storage folder, a model name and an exported safetensors directory. Out:
a version, or the local directory of the version with the alias `production`. Unlike the tracking of
a run, which never stops training, these answer a question and raise when they cannot.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from fmray.config import TrackingConfig
from fmray.mlflow_store import (
    RUN_ID_TAG,
    TrackingError,
    bounded_requests,
    check_run_id,
    failure_types,
    find_experiment,
    find_run,
    open_client,
    shown,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

PRODUCTION = "production"


def register(config: TrackingConfig, storage: Path, name: str, model_dir: Path, run_id: str) -> str:
    """Register a safetensors directory as a new version of `name`, and make it `production`.

    With sqlite the version refers to the directory where it is, so that must stay; an http server
    gets a copy, as artifact `model` of the run `run_id`. Returns the version.

    Raises:
        ValueError: tracking is off, a bad name, no safetensors in the directory; for http, an
            unknown run.
        TrackingError: the registry did not answer or refused.
    """
    uri = _registry_uri(config, storage, name)
    check_run_id(run_id)
    directory = Path(model_dir).resolve()
    if not any(directory.rglob("*.safetensors")):
        raise ValueError(
            f"cannot register {model_dir} as {name!r}: no safetensors file in it; "
            "give an exported model directory"
        )
    with _registry(uri, f"registering {name!r}") as client:
        with bounded_requests():  # first, so that a dead server is seen at once; uploads take long
            run = find_run(
                client, find_experiment(client, config, uri, Path(storage).resolve()), run_id
            )
            if run is None and not uri.startswith("sqlite:"):
                raise ValueError(
                    f"cannot register {name!r}: no run {run_id!r} in experiment "
                    f"{config.experiment!r} of {shown(uri)}; open a run with that id first"
                )
            _create_registered_model(client, name)
        if uri.startswith("sqlite:"):
            source = directory.as_uri()
        else:
            client.log_artifacts(run.info.run_id, str(directory), "model")
            source = f"{run.info.artifact_uri}/model"
        version = client.create_model_version(
            name,
            source,
            run.info.run_id if run else None,
            tags={RUN_ID_TAG: run_id},
            await_creation_for=None,
        )
        client.set_registered_model_alias(name, PRODUCTION, version.version)
    return str(version.version)


def production(config: TrackingConfig, storage: Path, name: str) -> Path:
    """Return the local directory of the version with alias `production`.

    From an http server it is fetched once, into `models/` of the storage folder.

    Raises:
        ValueError: tracking is off, no such model or alias, or the directory it points to is gone.
        TrackingError: the registry did not answer, or the download broke off.
    """
    from mlflow.exceptions import MlflowException

    uri = _registry_uri(config, storage, name)
    with _registry(uri, f"looking up {name!r}") as client:
        with bounded_requests():
            try:
                version = client.get_model_version_by_alias(name, PRODUCTION)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                raise ValueError(
                    f"no {PRODUCTION} version of model {name!r} in {shown(uri)}; register one first"
                ) from error
            source = client.get_model_version_download_uri(name, version.version)
        if source.startswith("file:"):
            directory = Path(url2pathname(urlsplit(source).path))
            if not directory.is_dir():
                raise ValueError(
                    f"model {name!r} version {version.version}: its directory {directory} is gone; "
                    "register it again"
                )
            return directory
        # The time of creation tells apart equal versions of different servers.
        folder = Path(storage).resolve() / "models" / name
        target = folder / f"{version.version}-{version.creation_timestamp}"
        if not target.is_dir():
            import mlflow

            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
                fetched = mlflow.artifacts.download_artifacts(
                    artifact_uri=source, dst_path=f"{temporary}/model", tracking_uri=uri
                )
                if not any(Path(fetched).rglob("*.safetensors")):
                    raise TrackingError(
                        f"version {version.version} of {name!r} at {shown(uri)} is empty"
                    )
                os.replace(fetched, target)
        return target


@contextmanager
def _registry(uri: str, doing: str) -> Iterator[MlflowClient]:
    try:
        yield open_client(uri)
    except failure_types() as error:
        reason = shown(f"{type(error).__name__}: {error}")
        raise TrackingError(f"{doing} in {shown(uri)} failed: {reason}") from error


def _registry_uri(config: TrackingConfig, storage: Path, name: str) -> str:
    if not config.enabled:
        raise ValueError("tracking.enabled is false: there is no model registry; set it to true")
    if not re.fullmatch(r"\w[\w. -]*", name):
        raise ValueError(
            f"model name {name!r}: use letters, digits, space, '.', '_' and '-', a letter first"
        )
    return tracking_uri(config, storage)


def _create_registered_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise

"""MLflow's store and model registry: register a trained model, find the one in production.

A registered version refers to an exported safetensors directory; the alias `production` marks the
one that the endpoint serves. Unlike the tracking of a run, which never stops training, these
functions raise when the store fails. `tracking.py` uses the store functions too.
"""

from __future__ import annotations

import logging
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
from fmray.runtime import files

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_ID_TAG = "fmray.run_id"
PRODUCTION = "production"

# MLflow retries a dead server for four minutes and prints a line for each run and upload. These are
# set only while a request or run is open (a run retries by itself) and if the user has not set them
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class TrackingError(RuntimeError):
    """The store or registry failed; the message says at what and where."""


# --- The store ---


def tracking_uri(config: TrackingConfig, storage: Path) -> str:
    """Return the MLflow URI: `tracking.uri`, or `mlflow.db` in the storage folder.

    `mlflow ui --backend-store-uri` accepts it.

    Raises:
        ValueError: `tracking.uri` is neither `http(s)://host...` nor `sqlite:///file`.
    """
    if config.uri is None:
        return f"sqlite:///{Path(storage).resolve() / 'mlflow.db'}"
    try:
        parts = urlsplit(config.uri)
        usable = (
            bool(parts.hostname)
            if parts.scheme in ("http", "https")
            else bool(parts.path.strip("/"))
        )
    except ValueError:  # such as an unclosed [ in the host
        usable = False
    if not usable or parts.scheme not in ("http", "https", "sqlite"):
        raise ValueError(
            f"tracking.uri: {shown(config.uri)!r} is not a tracking store; use http://host:port, "
            "https://host, sqlite:///path/to/mlflow.db, or omit it for sqlite in the storage folder"
        )
    return config.uri


def open_client(uri: str) -> MlflowClient:
    """Return a client that logs neither migrations nor tracebacks."""
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    # prints a traceback for each database error; the caller gets the error and reports it
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def find_experiment(client: MlflowClient, config: TrackingConfig, uri: str, storage: Path) -> str:
    """Find or create the experiment; return its id.

    With sqlite its artifacts are in the storage folder, else the server decides.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is not None and experiment.lifecycle_stage == "deleted":
        raise MlflowException(
            f"the experiment {config.experiment!r} was deleted: set tracking.experiment to another"
            f" name, or restore it with `MLFLOW_TRACKING_URI={shown(uri)} mlflow experiments"
            f" restore --experiment-id {experiment.experiment_id}`"
        )
    if experiment is not None:
        return experiment.experiment_id
    location = (storage / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
    try:
        return client.create_experiment(config.experiment, artifact_location=location)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        # another process was faster
        return client.get_experiment_by_name(config.experiment).experiment_id


def find_run(client: MlflowClient, experiment_id: str, run_id: str) -> Run | None:
    """Return the first MLflow run of fmray's `run_id`, or None."""
    runs = client.search_runs(
        [experiment_id],
        f"tags.`{RUN_ID_TAG}` = '{run_id}'",
        max_results=1,
        order_by=["attributes.start_time ASC"],
    )
    return runs[0] if runs else None


def failure_types() -> tuple[type[Exception], ...]:
    """Return the exceptions of a store that is unreachable, locked, damaged or not MLflow."""
    from alembic.util.exc import CommandError
    from google.protobuf.json_format import ParseError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # OSError covers files, sockets and requests
    return (MlflowException, SQLAlchemyError, CommandError, ParseError, OSError)


@contextmanager
def bounded_requests() -> Iterator[None]:
    """Set `_ENVIRONMENT` in the process environment while the block runs."""
    added = [name for name in _ENVIRONMENT if name not in os.environ]
    os.environ.update({name: _ENVIRONMENT[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def check_run_id(run_id: str) -> None:
    """Raise ValueError for a run id that cannot be searched for."""
    if not re.fullmatch(r"[\w.:@+-]+", run_id):
        raise ValueError(f"run id {run_id!r}: use letters, digits and any of . _ : @ + -")


def shown(text: str) -> str:
    """Return the text without user names and passwords in its URIs."""
    return re.sub(r"//[^/@\s]*@", "//", text)


# --- The model registry ---


def register(config: TrackingConfig, storage: Path, name: str, model_dir: Path, run_id: str) -> str:
    """Register a safetensors directory as a version of `name`, and give it the alias `production`.

    With sqlite the version refers to the directory, which must stay in place; an http server gets a
    copy, as artifact `model` of the run `run_id`.

    Returns:
        The version.

    Raises:
        ValueError: tracking is disabled, the name is invalid, the directory has no safetensors, or
            (http) the run is unknown.
        TrackingError: the registry failed or rejected the request.
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
        with bounded_requests():  # before the upload, so that a dead server fails fast
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
        ValueError: tracking is disabled, the model or alias does not exist, or the directory is
            missing.
        TrackingError: the registry failed, or the download was interrupted.
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
                run = version.tags.get(RUN_ID_TAG, "RUN")
                raise ValueError(
                    f"model {name!r} version {version.version}: its directory {directory} is"
                    f" missing; if the run was moved, `fmray models register {run} {name} --storage"
                    f" {storage}`, with the folder that has the run, registers it where it is"
                )
            return directory
        # the creation time distinguishes equal versions of different servers
        folder = Path(storage).resolve() / "models" / name
        target = folder / f"{version.version}-{version.creation_timestamp}"
        if not target.is_dir():
            import mlflow

            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
                fetched = Path(
                    mlflow.artifacts.download_artifacts(
                        artifact_uri=source, dst_path=f"{temporary}/model", tracking_uri=uri
                    )
                )
                if not any(fetched.rglob("*.safetensors")):
                    raise TrackingError(
                        f"version {version.version} of {name!r} at {shown(uri)} is empty"
                    )
                for path in fetched.rglob("*"):
                    files.sync(path)
                if not target.is_dir():  # another process may have been faster
                    files.replace_folder(fetched, target)
        return target


@contextmanager
def _registry(uri: str, doing: str) -> Iterator[MlflowClient]:
    """Yield a client, and raise the store's errors as TrackingError."""
    try:
        yield open_client(uri)
    except failure_types() as error:
        reason = shown(f"{type(error).__name__}: {error}")
        raise TrackingError(f"{doing} in {shown(uri)} failed: {reason}") from error


def _registry_uri(config: TrackingConfig, storage: Path, name: str) -> str:
    if not config.enabled:
        raise ValueError("tracking.enabled is false, so there is no model registry; set it to true")
    if not re.fullmatch(r"\w[\w. -]*", name):
        raise ValueError(
            f"model name {name!r}: use letters, digits, space, '.', '_', '-'; start with a letter"
        )
    return tracking_uri(config, storage)


def _create_registered_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise

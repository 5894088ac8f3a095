"""The MLflow store: where it is, how it is reached, and what it raises when it is not.

In: a `TrackingConfig` and the storage folder. Out: a URI, a quiet client with bounded waits, the
experiment and the run of an fmray run id. Used by `tracking.py` (a run) and `registry.py` (models).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fmray.config import TrackingConfig

if TYPE_CHECKING:  # importing mlflow takes 1.5 s: only those who use a store pay
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_ID_TAG = "fmray.run_id"

# MLflow would retry a dead server for four minutes, and print a line for each run and upload. Set
# only for as long as it is needed (a run retries by itself), and where the user has not set it.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class TrackingError(RuntimeError):
    """The store or registry could not do what was asked; the message says what and where."""


def tracking_uri(config: TrackingConfig, storage: Path) -> str:
    """Return the MLflow URI: `tracking.uri`, or `mlflow.db` in the storage folder.

    It is what `mlflow ui --backend-store-uri` takes.

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
            f"tracking.uri: {shown(config.uri)!r} is no tracking store; use http://host:port, "
            "https://host, sqlite:///path/to/mlflow.db, or leave it out for sqlite in the storage"
        )
    return config.uri


def open_client(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    # It prints a traceback for each database error; the error also reaches us, and is told once.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def find_experiment(client: MlflowClient, config: TrackingConfig, uri: str, storage: Path) -> str:
    """Find or create the experiment.

    With sqlite its artifacts live in the storage folder, else where the server says.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is not None:
        return experiment.experiment_id
    location = (storage / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
    try:
        return client.create_experiment(config.experiment, artifact_location=location)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return client.get_experiment_by_name(
            config.experiment
        ).experiment_id  # another process was faster


def find_run(client: MlflowClient, experiment_id: str, run_id: str) -> Run | None:
    found = client.search_runs(
        [experiment_id],
        f"tags.`{RUN_ID_TAG}` = '{run_id}'",
        max_results=1,
        order_by=["attributes.start_time ASC"],
    )
    return found[0] if found else None


def failure_types() -> tuple[type[Exception], ...]:
    """What a store that is away, locked, broken or no MLflow at all raises."""
    from alembic.util.exc import CommandError
    from google.protobuf.json_format import ParseError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # OSError covers files, sockets and requests.
    return (MlflowException, SQLAlchemyError, CommandError, ParseError, OSError)


@contextmanager
def bounded_requests() -> Iterator[None]:
    added = [name for name in _ENVIRONMENT if name not in os.environ]
    os.environ.update({name: _ENVIRONMENT[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def check_run_id(run_id: str) -> None:
    if not re.fullmatch(r"[\w.:@+-]+", run_id):
        raise ValueError(f"run id {run_id!r}: use letters, digits and any of . _ : @ + -")


def shown(text: str) -> str:
    """The text with no user name and password in its URIs."""
    return re.sub(r"//[^/@\s]*@", "//", text)

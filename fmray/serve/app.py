"""The Ray Serve application: `serve run fmray.serve.app:build model=...`.

`build` takes a `ServeConfig`, which Ray makes from the command line or from the `args:` of a config
file. Each replica holds the model, its engine and the web application, so that a request makes one
hop. A registered name is resolved once, in `build`, so that all replicas serve the same version. To
deploy the version that is now in production, change `release`: Ray Serve replaces the replicas
one after the other.
"""

# No `from __future__ import annotations`: Ray reads the config's class from `build`'s annotation.

import asyncio
import gc
import logging
import os
from pathlib import Path

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from fmray.config.serve import ServeConfig
from fmray.runtime.exposure import bind_replica
from fmray.serve.keys import load_keys
from fmray.serve.metrics import Metrics, MetricsBoard, render

_logger = logging.getLogger("fmray.serve")
_PUBLISH_SECONDS = 5.0


@serve.ingress()
class Replica:
    """A `ChatModel` and its web application. Healthy while the model answers questions."""

    _model = None  # the destructor also runs after the constructor has failed
    _publishing: asyncio.Task[None] | None = None

    def __init__(
        self, settings: ServeConfig, directory: str, board: DeploymentHandle | None
    ) -> None:
        from fmray.serve.replica import load_chat_model

        bind_replica()
        self._model = load_chat_model(settings, Path(directory))
        gc.collect()
        gc.freeze()  # keeps the garbage collector from scanning the model between two tokens
        self._name = serve.get_replica_context().replica_tag
        units = self._model.model.layout.num_units
        self._metrics = Metrics(self._model.worker, self._name, units)
        self._board = board

    async def __serve_build_asgi_app__(self):
        """Return the web application; Ray calls this after the constructor."""
        from fmray.serve.routes import create_app

        if self._board is not None:
            self._publishing = asyncio.create_task(self._publish_forever())
        return create_app(self._model, self._metrics, self._exposition)

    async def check_health(self) -> None:
        """Ask the model a question; if it fails (RuntimeError), Ray replaces the replica."""
        await self._model.check_health()

    async def _exposition(self) -> bytes:
        if self._board is not None:
            try:
                return render(await self._publish())
            except (RayError, RayServeException) as error:
                _logger.warning(
                    "metrics of the other replicas are unavailable: %s", type(error).__name__
                )
        return self._metrics.exposition()

    async def _publish(self):
        return await self._board.publish.remote(self._name, self._metrics.families())

    async def _publish_forever(self) -> None:
        while True:
            await asyncio.sleep(_PUBLISH_SECONDS)
            try:
                await self._publish()
            except (RayError, RayServeException) as error:
                _logger.warning(
                    "metrics of this replica were not published: %s", type(error).__name__
                )

    async def __del__(self) -> None:
        """Stop the replica. Ray has waited for the running requests before it calls this."""
        if self._publishing is not None:
            self._publishing.cancel()
        if self._model is not None:
            await asyncio.to_thread(self._model.close)


class Board(MetricsBoard):
    """`MetricsBoard` as a deployment."""

    def __init__(self) -> None:
        bind_replica()
        super().__init__()


def build(settings: ServeConfig) -> serve.Application:
    """Return the application with these settings.

    Raises:
        ValueError: If the model does not exist or the keys cannot be read.
    """
    directory = find_directory(settings)
    if not load_keys(settings.keys_file).open:
        # A replica that does not find the keys, on another node, must not serve without them.
        settings = settings.model_copy(update={"require_keys": True})
    board = None
    if settings.max_replicas > 1:
        board = (
            serve.deployment(Board, name="board")
            .options(num_replicas=1, ray_actor_options={"num_cpus": 0})
            .bind()
        )
    target = settings.target_ongoing_requests or float(settings.max_rows)
    replica = serve.deployment(Replica, name="replica").options(
        max_ongoing_requests=settings.max_ongoing_requests
        or settings.max_rows + settings.max_queue,
        max_queued_requests=settings.max_queued_requests,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "initial_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": target,
        },
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_surge_percent=settings.surge_percent,
        health_check_period_s=settings.health_period_s,
        health_check_timeout_s=settings.health_timeout_s,
        graceful_shutdown_timeout_s=settings.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=LoggingConfig(enable_access_log=False),
    )
    return replica.bind(settings, str(directory), board)


def find_directory(settings: ServeConfig) -> Path:
    """Return the directory of the model, or of the registry's production version.

    Raises:
        ValueError: If it does not exist.
    """
    name = settings.registered_name
    if name is None:
        directory = Path(settings.model).expanduser().resolve()
        if not directory.is_dir():
            raise ValueError(
                f"model: {settings.model!r} is not a directory; set a model directory or "
                "models:/NAME@production"
            )
        return directory
    from fmray.config import TrackingConfig
    from fmray.runtime.tracking import production

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    return production(TrackingConfig(uri=settings.tracking_uri), settings.storage, name)

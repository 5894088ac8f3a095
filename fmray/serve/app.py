"""The Ray Serve application: `serve run fmray.serve.app:build model=...`.

In: a `ServeConfig` (Ray makes it of the words or of the `args:` of a config file). Out: a Serve
application: replicas that each hold the model, its engine and the whole web side, so that a request
makes one hop. A name in the registry is looked up once, here, so that all replicas serve the same
version; deploying with another `release` takes the version that is then in production, one replica
after the other.
"""

# No `from __future__ import annotations`: Ray reads the class off the builder's annotation.

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
from fmray.serve.keys import load_keys
from fmray.serve.metrics import Board, Metrics, render

_logger = logging.getLogger("fmray.serve")
_PUBLISH_SECONDS = 5.0


@serve.ingress()
class Replica:
    """One replica: an `Answerer` and its web side. Healthy while its model answers questions."""

    _answerer = None  # where the constructor failed, the destructor runs all the same
    _publishing: asyncio.Task[None] | None = None

    def __init__(
        self, settings: ServeConfig, directory: str, board: DeploymentHandle | None
    ) -> None:
        from fmray.serve.replica import open_answerer

        self._answerer = open_answerer(settings, Path(directory))
        gc.collect()
        gc.freeze()  # else the collector walks the whole model again and again, between two tokens
        self._name = serve.get_replica_context().replica_tag
        units = self._answerer.model.layout.num_units
        self._metrics = Metrics(self._answerer.worker, self._name, units)
        self._board = board

    async def __serve_build_asgi_app__(self):
        """Called by Ray once the constructor is through."""
        from fmray.serve.routes import create_app

        if self._board is not None:
            self._publishing = asyncio.create_task(self._publish_for_ever())
        return create_app(self._answerer, self._metrics, self._exposition)

    async def check_health(self) -> None:
        """A real question through the engine; raises RuntimeError, and Ray replaces the replica."""
        await self._answerer.check()

    async def _exposition(self) -> bytes:
        if self._board is not None:
            try:
                return render(await self._publish())
            except (RayError, RayServeException) as error:
                _logger.warning("the board of metrics is away: %s", type(error).__name__)
        return self._metrics.exposition()

    async def _publish(self):
        return await self._board.publish.remote(self._name, self._metrics.families())

    async def _publish_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_PUBLISH_SECONDS)
            try:
                await self._publish()
            except (RayError, RayServeException) as error:
                _logger.warning("metrics of this replica were not shared: %s", type(error).__name__)

    async def __del__(self) -> None:
        """Ray has waited for the running requests by now."""
        if self._publishing is not None:
            self._publishing.cancel()
        if self._answerer is not None:
            await asyncio.to_thread(self._answerer.close)


def build(settings: ServeConfig) -> serve.Application:
    """The application of these settings.

    Raises ValueError for a model that is not there or keys that cannot be read.
    """
    directory = find_directory(settings)
    if not load_keys(settings.keys_file).open:
        # A replica on another node, or in a cluster started elsewhere, must not be open by mistake.
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
    """The directory of the model: as given, or of the registry's production version.

    Raises ValueError when there is none.
    """
    name = settings.registered_name
    if name is None:
        directory = Path(settings.model).expanduser().resolve()
        if not directory.is_dir():
            raise ValueError(
                f"model: {settings.model!r} is no directory; give one, or models:/NAME@production"
            )
        return directory
    from fmray.config import TrackingConfig
    from fmray.runtime.tracking import production

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    return production(TrackingConfig(uri=settings.tracking_uri), settings.storage, name)

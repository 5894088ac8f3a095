"""`fmray serve`: run the endpoint on this machine.

Starts a Ray Serve application, or with `--local` the same web application in this process without
Ray, and serves until ctrl-C, which lets running answers finish. Keys come from a file or the
environment, never from the command line, which other users can read. On a cluster use
`serve deploy cluster/serve.yaml`.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import threading
from pathlib import Path

from pydantic import ValidationError

from fmray.commands.ask import MODEL, STORAGE
from fmray.config.arguments import add_overrides
from fmray.config.serve import ALIAS, REGISTRY, ServeConfig
from fmray.config.yaml_file import Entry, explain, override
from fmray.errors import ConfigError
from fmray.serve.keys import VARIABLE, load_keys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fmray serve`."""
    parser.add_argument(
        "model",
        nargs="?",
        default=MODEL,
        help="directory of an adaptive model, or the registered name of one, which serves its "
        f"production version (default {MODEL}, made by the quickstart)",
    )
    parser.add_argument(
        "--storage", type=Path, default=STORAGE, help=f"folder of the registry (default {STORAGE})"
    )
    parser.add_argument(
        "--uri", default=None, help="MLflow server (default: sqlite in the storage folder)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine only")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--keys-file",
        type=Path,
        default=None,
        help=f"YAML file of bearer keys (default: {VARIABLE})",
    )
    add_overrides(parser, "max_rows=4")
    parser.add_argument(
        "--local",
        action="store_true",
        help="serve in this process, without Ray: one replica, no restarts",
    )


def run(options: argparse.Namespace) -> int:
    """Serve until interrupted."""
    settings = settings_of(options)
    if not _is_loopback(options.host) and load_keys(settings.keys_file).open:
        raise ValueError(
            f"--host {options.host} is reachable from other machines, but there are no keys; set "
            f"--keys-file or {VARIABLE}, or use 127.0.0.1"
        )
    if options.local:
        return _serve_in_process(settings, options.host, options.port)
    return _serve_on_ray(settings, options.host, options.port)


def settings_of(options: argparse.Namespace) -> ServeConfig:
    """Return the settings that the command line asks for.

    Raises:
        ConfigError: one line with the setting and what is wrong with it.
    """
    model = options.model
    if not model.startswith(REGISTRY) and not Path(model).is_dir() and "/" not in model:
        model = f"{REGISTRY}{model}{ALIAS}"
    words = {
        "model": model,
        "storage": str(options.storage),
        "tracking_uri": options.uri,
        "keys_file": options.keys_file and str(options.keys_file),
    }
    origin = "command line"
    tree = Entry({key: Entry(value, origin) for key, value in words.items()}, origin)
    tree = override(tree, options.overrides)
    try:
        return ServeConfig.model_validate(tree.plain())
    except ValidationError as error:
        raise ConfigError(explain(error, ServeConfig, tree)) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _serve_in_process(settings: ServeConfig, host: str, port: int) -> int:
    """Serve with uvicorn."""
    import uvicorn

    from fmray.serve.app import find_directory
    from fmray.serve.connections import KEEP_ALIVE_S, LimitedProtocol
    from fmray.serve.metrics import Metrics
    from fmray.serve.replica import load_chat_model
    from fmray.serve.routes import create_app

    model = load_chat_model(settings, find_directory(settings))
    metrics = Metrics(model.worker, "local", model.model.layout.num_units)

    async def exposition() -> bytes:
        return metrics.exposition()

    _print_address(settings, host, port)
    try:
        uvicorn.run(
            create_app(model, metrics, exposition),
            host=host,
            port=port,
            http=LimitedProtocol,
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(settings.drain_s) or None,
        )
    finally:
        model.close()
    return 0


def _serve_on_ray(settings: ServeConfig, host: str, port: int) -> int:
    """Serve with Ray Serve, on the cluster of RAY_ADDRESS or one started here."""
    from ray import serve

    from fmray.config import ClusterConfig
    from fmray.runtime.cluster import start_or_join
    from fmray.serve.app import build
    from fmray.serve.connections import HOOK

    application = build(settings)
    os.environ.setdefault(*HOOK)  # for the proxy of a cluster that is started here
    stopped = threading.Event()
    with start_or_join(ClusterConfig()):
        try:
            serve.start(
                http_options={
                    "host": host,
                    "port": port,
                    # Above fmray's own timeout, which responds in JSON: for a replica that hangs.
                    "request_timeout_s": settings.request_timeout_s + 10,
                }
            )
            serve.run(application, name="fmray", route_prefix="/")
            _print_address(settings, host, port)
            for kind in (signal.SIGINT, signal.SIGTERM):
                signal.signal(kind, lambda *_: stopped.set())
            while not stopped.wait(1.0):
                pass
        finally:
            serve.shutdown()
    return 0


def _print_address(settings: ServeConfig, host: str, port: int) -> None:
    print(f"http://{host}:{port}/  (model {settings.public_name!r}; ctrl-C stops)", flush=True)

"""Private names of Ray and DeepSpeed, imported on first use: the only module that may name them.

Ray and DeepSpeed may rename them in any minor version, so pyproject.toml pins both packages to the
minor versions of `TESTED`. A missing name raises one line that states the installed and the tested
version. Importing this module imports neither package.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fmray.errors import ConfigError

if TYPE_CHECKING:
    from deepspeed.checkpoint.ds_to_universal import main as convert_to_universal
    from deepspeed.comm.comm import cdb as deepspeed_backend
    from deepspeed.ops import __compatible_ops__ as deepspeed_compatible_ops
    from deepspeed.runtime.zero.utils import is_zero_param
    from ray._private import ray_constants
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available as use_token_if_available,
    )
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.services import get_ray_address_from_environment as address_of_this_machine
    from ray._private.state import state as cluster_state
    from ray.core.generated.gcs_service_pb2 import InternalKVGetRequest
    from ray.core.generated.gcs_service_pb2_grpc import InternalKVGcsServiceStub
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )
    from ray.serve._private import replica as serve_replica
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
    from ray.train.v2._internal.exceptions import (
        WorkerGroupStartupTimeoutError,
        WorkerHealthCheckFailedError,
    )
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2._internal.execution.controller.state import InitializingState

__all__ = [
    "ENV_VARS_TO_PROPAGATE",
    "TESTED",
    "ControllerCallback",
    "InitializingState",
    "InternalKVGcsServiceStub",
    "InternalKVGetRequest",
    "WorkerGroupStartupTimeoutError",
    "WorkerHealthCheckFailedError",
    "address_of_this_machine",
    "check_ray",
    "cluster_state",
    "convert_to_universal",
    "deepspeed_backend",
    "deepspeed_compatible_ops",
    "get_or_create_autoscaling_coordinator",
    "init_grpc_channel",
    "is_zero_param",
    "ray_constants",
    "serve_replica",
    "use_token_if_available",
]

#: The minor versions that pyproject.toml pins.
TESTED = {"ray": "2.60", "deepspeed": "0.19"}

#: Name here -> (module, name there).
NAMES = {
    # Lists draining nodes: no public API does.
    "cluster_state": ("ray._private.state", "state"),
    # Ray's switch for a cluster on the loopback interface, read at each start.
    "ray_constants": ("ray._private", "ray_constants"),
    # Finds a cluster on this machine, as `ray.init` does.
    "address_of_this_machine": ("ray._private.services", "get_ray_address_from_environment"),
    # Asks a head node one question: `ray.init` retries half a minute before it fails.
    "init_grpc_channel": ("ray._private.grpc_utils", "init_grpc_channel"),
    "InternalKVGcsServiceStub": (
        "ray.core.generated.gcs_service_pb2_grpc",
        "InternalKVGcsServiceStub",
    ),
    "InternalKVGetRequest": ("ray.core.generated.gcs_service_pb2", "InternalKVGetRequest"),
    # Opens a port on all addresses for calls from other deployments.
    "serve_replica": ("ray.serve._private", "replica"),
    # Uses a token that lies in the user's home, as `ray.init` does for a cluster on this machine.
    "use_token_if_available": (
        "ray._private.authentication.authentication_token_setup",
        "maybe_enable_token_auth_if_token_available",
    ),
    # Holds the resources that elastic workers have reserved.
    "get_or_create_autoscaling_coordinator": (
        "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator",
        "get_or_create_autoscaling_coordinator",
    ),
    # Names of the environment variables that reach the controller and its helpers.
    "ENV_VARS_TO_PROPAGATE": ("ray.train.v2._internal.constants", "ENV_VARS_TO_PROPAGATE"),
    # Causes of failures: Ray's public errors only contain them.
    "WorkerGroupStartupTimeoutError": (
        "ray.train.v2._internal.exceptions",
        "WorkerGroupStartupTimeoutError",
    ),
    "WorkerHealthCheckFailedError": (
        "ray.train.v2._internal.exceptions",
        "WorkerHealthCheckFailedError",
    ),
    # Observes the controller, which waits forever when elastic workers find no room.
    "ControllerCallback": ("ray.train.v2._internal.execution.callback", "ControllerCallback"),
    "InitializingState": (
        "ray.train.v2._internal.execution.controller.state",
        "InitializingState",
    ),
    # Command-line program without a function in the public API.
    "convert_to_universal": ("deepspeed.checkpoint.ds_to_universal", "main"),
    # DeepSpeed's process group; None until DeepSpeed takes over torch's.
    "deepspeed_backend": ("deepspeed.comm.comm", "cdb"),
    # Which compiled operations DeepSpeed may build.
    "deepspeed_compatible_ops": ("deepspeed.ops", "__compatible_ops__"),
    # Whether ZeRO-3 partitions a parameter.
    "is_zero_param": ("deepspeed.runtime.zero.utils", "is_zero_param"),
}


def __getattr__(name: str) -> Any:
    """Return the private object that `NAMES` lists under `name`.

    Raises:
        ConfigError: the installed Ray or DeepSpeed does not have it.
    """
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = NAMES[name]
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        package = module.partition(".")[0]
        tested = TESTED[package]
        raise ConfigError(
            f"{package} {version(package)} has no {module}.{attribute}, which fmray needs; fmray is"
            f' tested with {package} {tested}: pip install "{package}=={tested}.*"'
        ) from error


def check_ray() -> None:
    """Import every private name of Ray, to fail before a job starts and not at its first failure.

    Raises:
        ConfigError: one is missing.
    """
    for name, (module, _) in NAMES.items():
        if module.startswith("ray."):
            __getattr__(name)

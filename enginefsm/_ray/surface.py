"""The part of Ray's private surface that enginefsm reads, checked before anything relies on it.

Ray may change private names in any release. A name that is gone gives one error, at the import of enginefsm or at
`adopt`, and no AttributeError in the middle of a bringup.
"""

from __future__ import annotations

import importlib
from typing import Any

import ray
from ray.actor import ActorHandle, ActorMethod

from enginefsm.errors import UnsupportedRayError

TESTED = ("2.47.1", "2.48.0", "2.55.1", "2.57.1", "2.60.0")
"""The releases of Ray that the tests were run with, oldest first."""

# Modules and what is read of them. Each exists in all of `TESTED`.
_OF_MODULES = {
    "ray._private.worker": ("_global_node", "global_worker.actors", "global_worker.mode"),
    "ray._private.state": ("jobs",),
    "ray.actor": ("_ActorClassMethodMetadata._cache",),
    "ray.core.generated.gcs_pb2": (
        "ActorTableData.ActorState.Name", "ActorTableData.PID_FIELD_NUMBER", "ActorTableData.NODE_ID_FIELD_NUMBER",
        "ActorTableData.END_TIME_FIELD_NUMBER", "ActorTableData.DEATH_CAUSE_FIELD_NUMBER",
    ),
    "ray.core.generated.common_pb2": ("ActorDiedErrorContext.Reason.Name",),
    "ray._raylet": (
        "GcsClient", "Config.grpc_client_keepalive_time_ms", "Config.grpc_client_keepalive_timeout_ms",
    ),
}  # fmt: skip
_OF_HANDLES = (
    "_ray_actor_id.hex", "_ray_actor_id.job_id", "_ray_actor_creation_function_descriptor.class_name",
    "_ray_is_cross_language", "_ray_max_task_retries", "_ray_method_max_task_retries",
)  # fmt: skip
# `_tensor_transport` is not here: Ray has it from 2.48 on (`handles.is_plain`).
_OF_METHODS = ("_num_returns", "_is_generator", "_decorator", "_signature", "_method_name")


def check_modules() -> None:
    """Raise UnsupportedRayError if this Ray's modules lack a private name that enginefsm reads."""
    for module, names in _OF_MODULES.items():
        try:
            holder = importlib.import_module(module)
        except ImportError:
            raise _unsupported(module) from None
        _check(module, holder, names)


def check_handle(handle: ActorHandle[Any]) -> None:
    """Raise UnsupportedRayError if this Ray's actor handles lack a private name that enginefsm reads."""
    _check("ray.actor.ActorHandle", handle, _OF_HANDLES)


def check_method(method: ActorMethod) -> None:
    """Raise UnsupportedRayError if the methods of this Ray's handles lack a private name that enginefsm reads."""
    _check("ray.actor.ActorMethod", method, _OF_METHODS)


def _check(owner: str, holder: object, names: tuple[str, ...]) -> None:
    for name in names:
        found = holder
        for part in name.split("."):
            if not hasattr(found, part):
                raise _unsupported(f"{owner}.{name}")
            found = getattr(found, part)


def _unsupported(missing: str) -> UnsupportedRayError:
    return UnsupportedRayError(
        f"This enginefsm cannot work with Ray {ray.__version__}, which lacks {missing}. It was tested with Ray "
        f"{TESTED[0]} to {TESTED[-1]}. Install a newer enginefsm, or one of the tested releases of Ray."
    )

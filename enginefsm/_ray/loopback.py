"""A Ray of this process's own that listens on loopback only, and prints nothing of its workers: for the demo."""

from __future__ import annotations

import os

from ray._private import ray_constants
from ray._private import worker as ray_worker

from enginefsm._ray import surface


def stay_on_loopback() -> None:
    """Make the next `ray.init(_node_ip_address="127.0.0.1")` of this process listen on loopback only.

    Ray on Linux turns 127.0.0.1 into the host's address and listens on all addresses, except where it believes that it
    cannot form a cluster. It reads that from the variable in the processes that it starts, and from the constant here.

    Raises:
        UnsupportedRayError: This Ray has no such switch, and would listen on all addresses.
    """
    surface.require("ray._private.ray_constants", "ENABLE_RAY_CLUSTER")
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def print_nothing_of_workers() -> None:
    """Keep Ray from printing a paragraph for each worker that dies, which it does with `log_to_driver=False` too."""
    surface.require("ray._private.worker", "print_to_stdstream")
    ray_worker.print_to_stdstream = _drop


def _drop(*_: object, **__: object) -> None:
    pass

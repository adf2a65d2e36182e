"""Ray clusters of one node, on loopback."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from unittest import mock

import ray

import enginefsm
from enginefsm._ray import keepalive

_TESTS = Path(__file__).parents[1]
WORKERS_PATH = os.pathsep.join(str(path) for path in (_TESTS, *sorted(_TESTS.iterdir())) if path.is_dir())
"""The PYTHONPATH of workers, which import the tests' actor classes by the names that pytest gives the test files."""

SOURCE = Path(enginefsm.__file__).parents[1]
WITH_ENGINEFSM = f"{SOURCE}{os.pathsep}{WORKERS_PATH}"
"""The same for workers that import enginefsm, the one that is tested, too."""


def _start():
    for tries_left in (1, 0):
        try:
            ray.init(
                address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                _node_ip_address="127.0.0.1",
            )  # fmt: skip
        except Exception:  # Ray gives its processes 30 s, and says that it has in several ways
            ray.shutdown()
            if not tries_left:
                raise
        else:
            return


@contextlib.contextmanager
def local_ray(**settings):
    """A Ray cluster of one node, with `settings` in its processes' environment."""
    environment = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray on Linux takes 127.0.0.1 for the host's own address; with this, and the patch below, it stays on loopback.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "PYTHONPATH": WORKERS_PATH,
        **keepalive.VARIABLES,
        **settings,
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        with mock.patch("ray._private.ray_constants.ENABLE_RAY_CLUSTER", new=False):
            _start()
            yield
    finally:
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

"""A Ray of the demo's own: on loopback, with nothing that a bringup does not need, and gone afterwards."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import ray
from ray._private import ray_constants

_END_TIMEOUT_S = 10.0


@contextmanager
def local_ray() -> Iterator[None]:
    """Run a Ray for the time of the block. At its end every process that it left below this one is ended."""
    os.environ.update(
        RAY_AUTH_MODE="disabled",  # nobody else can reach it
        RAY_USAGE_STATS_ENABLED="0",
        # Ray on Linux turns 127.0.0.1 into the host's address and listens on all of them. This switch of its own keeps
        # it on loopback: the variable for the processes that it starts, the constant for this one, which has read it.
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    )
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        ray.init(
            address="local",
            num_cpus=1,  # how many workers are started in advance; the engines ask for none
            num_gpus=0,
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
        yield
    finally:
        with _uninterrupted():
            _end()


def _end() -> None:
    below = psutil.Process().children(recursive=True)
    ray.shutdown()
    # The engines' servers end by themselves when their actors do, a moment later. An interrupt in the middle of
    # ray.init() leaves processes that ray.shutdown() does not know of.
    _, left = psutil.wait_procs(below, timeout=_END_TIMEOUT_S)
    for process in left:
        process.kill()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a second Ctrl-C wait: what is done here ends soon, and cut short it would leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

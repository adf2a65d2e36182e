"""The demo's own Ray: on loopback, without the parts that a bringup does not need. It ends with the demo."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import ray

from enginefsm._ray import keepalive, loopback

_END_TIMEOUT_S = 10.0


@contextmanager
def local_ray() -> Iterator[None]:
    """Run a Ray for the time of the block. At the end kill each process that Ray leaves below this one.

    A Ctrl-C while Ray starts takes effect once Ray has started: a Ray that is half started does not end in good order.
    """
    os.environ.update(
        RAY_AUTH_MODE="disabled",  # nobody else can reach it
        RAY_USAGE_STATS_ENABLED="0",
        **keepalive.VARIABLES,
    )
    loopback.stay_on_loopback()
    loopback.print_nothing_of_workers()  # get() names the engine that died
    try:
        with _sigint_held():
            ray.init(
                address="local",
                num_cpus=1,  # the number of workers that Ray starts in advance; engines ask for no CPU
                num_gpus=0,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _node_ip_address="127.0.0.1",
            )
        # Ray's own handler aborts the process without ending its engines.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield
    finally:
        with _sigint_held():
            _end()


def _end() -> None:
    below = psutil.Process().children(recursive=True)
    ray.shutdown()
    # The engines' servers end by themselves, a moment after their actors.
    _, left = psutil.wait_procs(below, timeout=_END_TIMEOUT_S)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def _sigint_held() -> Iterator[None]:
    """Let a Ctrl-C take effect after the block."""
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupted.is_set():
            raise KeyboardInterrupt

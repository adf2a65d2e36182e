"""Word of Ray's shutdown beforehand, for threads that call Ray.

Ray ends the process, with exit code 1 and no exception, when a thread is in a call of Ray's while another thread runs
`ray.shutdown()` ("The core worker has already been shutdown ... The process will exit"). Whoever keeps such a thread
has to end it first, and Ray has no hook for that: so `ray.shutdown` is wrapped, once there is someone to be told.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import ray

_lock = threading.Lock()
_told: list[Callable[[], object]] = []


def tell_before(act: Callable[[], object]) -> None:
    """Have `act` called, once, before Ray is shut down by `ray.shutdown()`."""
    with _lock:
        _told.append(act)
        if not hasattr(ray.shutdown, "_enginefsm_wraps"):
            ray.shutdown = _wrapped(ray.shutdown)


def forget(act: Callable[[], object]) -> None:
    """Have `act` not called any more."""
    with _lock:
        if act in _told:
            _told.remove(act)


def _wrapped(shutdown: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(shutdown)
    def tell_and_shut_down(*args: Any, **kwargs: Any) -> None:
        with _lock:
            told, _told[:] = list(_told), []
        try:
            for act in told:
                act()
        finally:
            shutdown(*args, **kwargs)

    tell_and_shut_down._enginefsm_wraps = shutdown  # type: ignore[attr-defined]
    return tell_and_shut_down

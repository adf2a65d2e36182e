"""Word of the end beforehand, while Ray can still be called: for who has something to send, and threads that call Ray.

There are three ends in good order:

- `ray.shutdown()`. Ray ends the process, with exit code 1 and no exception, when a thread is in a call of Ray's
  meanwhile ("The core worker has already been shutdown ... The process will exit"). Such a thread has to end first, and
  Ray has no hook for that: so `ray.shutdown` is wrapped, once there is someone to be told.
- The end of an actor that Ray lets end (`exit_actor()`, the last handle gone): Ray calls its `__ray_shutdown__`. When
  its atexit handlers run, Ray cannot be called any more, and to try ends the process before the rest of them.
- The end of any other interpreter: atexit.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import ray

from enginefsm._ray import this_process

LEAVE_S = 10.0
"""How long an end waits for threads that are in calls of Ray: as long as a hub takes to start on a busy machine."""

_lock = threading.Lock()
_told: list[Callable[[], Callable[[], object] | None]] = []  # gives whom to call, or None once that one is gone
_left = threading.Condition()
_in_ray: list[int] = []  # the threads that are


def tell_before(act: Callable[[], object]) -> None:
    """Have `act` called, once, before the end. It must not raise. A method keeps nobody alive for that."""
    with _lock:
        _told[:] = [told for told in _told if told() is not None]
        _told.append(weakref.WeakMethod(act) if isinstance(act, types.MethodType) else lambda: act)
        if getattr(ray.shutdown, "__name__", "") != _MARK:
            ray.shutdown = _first_tell(ray.shutdown)
        actor = this_process.actor_instance()
        if actor is None:
            atexit.unregister(_tell)
            atexit.register(_tell)
        elif getattr(getattr(actor, "__ray_shutdown__", None), "__name__", "") != _MARK:
            with contextlib.suppress(AttributeError):  # an actor with slots: its end goes untold
                actor.__ray_shutdown__ = _first_tell(getattr(actor, "__ray_shutdown__", None))


def forget(act: Callable[[], object]) -> None:
    """Have `act` not called any more."""
    with _lock:
        _told[:] = [told for told in _told if told() not in (None, act)]


@contextlib.contextmanager
def calling_ray() -> Iterator[None]:
    """What a thread does here calls Ray: the end waits for it, `LEAVE_S` seconds at most."""
    with _left:
        _in_ray.append(threading.get_ident())
    try:
        yield
    finally:
        with _left:
            _in_ray.remove(threading.get_ident())
            _left.notify_all()


def _tell() -> None:
    with _lock:
        told, _told[:] = list(_told), []
    for act in (gives() for gives in told):
        if act is not None:
            act()
    with _left:
        _left.wait_for(lambda: not _in_ray, LEAVE_S)


_MARK = "enginefsm_tells_first"


def _first_tell(end: Callable[..., Any] | None) -> Callable[..., Any]:
    def enginefsm_tells_first(*args: Any, **kwargs: Any) -> Any:
        try:
            _tell()
        finally:
            result = None if end is None else end(*args, **kwargs)
        return result

    if end is not None:
        functools.update_wrapper(enginefsm_tells_first, end)
    enginefsm_tells_first.__name__ = _MARK
    return enginefsm_tells_first

"""A call to those who have something to send before Ray cannot be called any more.

A monitor has its last events to send, and its threads may be in calls of Ray. Both have to end before Ray does. There
are three ends in good order:

- `ray.shutdown()`. If a thread is in a call of Ray at that moment, Ray ends the process with exit code 1 and without an
  exception ("The core worker has already been shutdown ... The process will exit"). Ray has no hook for that, so this
  module wraps `ray.shutdown` as soon as somebody wants to be told.
- Ray lets an actor end, by `exit_actor()` or because nobody holds a handle any more. From Ray 2.50 on it calls the
  actor's `__ray_shutdown__` first, which this module sets. Up to Ray 2.49 nothing is called while Ray still works, so
  nobody is told: JSONL logs, files and push gateways get no word of the end, and the hub asks the GCS how the actor
  ended (`control_plane.actors_ended_in_good_order`). When the actor's atexit handlers run, a call of Ray ends the
  process before the remaining handlers.
- Any other interpreter ends: atexit.
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
"""How long an end waits for threads that call Ray. A hub takes about as long to start on a busy machine."""

_lock = threading.Lock()
_told: list[Callable[[], Callable[[], object] | None]] = []  # each gives a function to call, or None once it is gone
_left = threading.Condition()
_in_ray: list[int] = []  # the ids of the threads that call Ray


def tell_before(act: Callable[[], object]) -> None:
    """Call `act` once before the end. It must not raise. A bound method is held weakly."""
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
            with contextlib.suppress(AttributeError):  # an actor with __slots__: nobody is told of its end
                actor.__ray_shutdown__ = _first_tell(getattr(actor, "__ray_shutdown__", None))


def forget(act: Callable[[], object]) -> None:
    """Do not call `act` any more."""
    with _lock:
        _told[:] = [told for told in _told if told() not in (None, act)]


@contextlib.contextmanager
def calling_ray() -> Iterator[None]:
    """Make the end wait until this thread leaves the block, which calls Ray; for `LEAVE_S` seconds at most."""
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

"""Refuses bad arguments of `adopt` and `watch` before they change anything. The messages say what to pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ray.actor import ActorHandle, ActorMethod

from enginefsm._calls.calls import LaunchedIf
from enginefsm._engine.proxy import OWN_NAMES, Engine, managed
from enginefsm._ray import handles as _ray_handles
from enginefsm._ray import surface

_RESERVED_LABELS = frozenset({"run", "engine", "state", "incarnation", "actor_id"})


def check_adopted(
    handle: Any, name: str, launch: str, launched_if: LaunchedIf | None, labels: Mapping[str, object]
) -> None:
    """Raise TypeError or ValueError if `EngineMonitor.adopt` cannot take these arguments."""
    if isinstance(handle, Engine):
        raise TypeError(f"{handle!r} is adopted already; adopt() takes the actor's handle")
    if not isinstance(handle, ActorHandle):
        raise TypeError(f"adopt() takes the handle that Engine.remote(...) gave, not {type(handle).__name__}")
    surface.check_handle(handle)
    if _ray_handles.is_cross_language(handle):
        raise TypeError(f"{handle!r} is not a Python actor: no Python call can be sent to it")
    if _ray_handles.is_asyncio(handle) and not _ray_handles.is_monitored(handle):
        raise TypeError(
            f"{handle!r} is an asyncio actor, and its class lacks the method through which calls are sent; "
            f"create it from ray.remote(enginefsm.monitored(cls)) instead"
        )
    if not isinstance(name, str) or not name:
        raise ValueError(f"an engine's name is a text that is not empty, not {name!r}")
    for role, method in (("launch method", launch), ("launched_if", launched_if)):
        if isinstance(method, str):
            _check_method(handle, method, role)
            if method in OWN_NAMES:
                raise ValueError(f"{method!r} cannot be the {role}: an engine has that name for itself")
    taken = _RESERVED_LABELS.intersection(labels)
    if taken:
        raise ValueError(f"labels that enginefsm sets itself cannot be given: {', '.join(sorted(taken))}")


def check_watched(
    monitor: object, groups: Sequence[Sequence[Engine]], probe: str, address: str | None, on_dead: object
) -> None:
    """Raise TypeError or ValueError if `monitor.watch` cannot take these arguments."""
    if not groups or not all(groups):
        raise ValueError("watch() takes one engine or more, and no empty sequence of actors")
    if on_dead is not None and not callable(on_dead):
        raise TypeError(f"on_dead is called with each verdict; {on_dead!r} cannot be called")
    if inspect.iscoroutinefunction(on_dead):
        raise TypeError(
            f"on_dead is called on a thread, where nobody would await {on_dead!r}: pass a plain function. It can hand "
            f"a coroutine to an event loop with asyncio.run_coroutine_threadsafe()"
        )
    for engine in (engine for group in groups for engine in group):
        if not isinstance(engine, Engine):
            raise TypeError(f"watch() takes what adopt() gave, alone or in sequences, not {engine!r}")
        if managed(engine).awaiter is not monitor:
            raise ValueError(f"{engine!r} is an engine of another monitor: watch it there")
        _check_method(engine.handle, probe, "probe")
        if address is not None:
            _check_method(engine.handle, address, "address")


def _check_method(handle: ActorHandle[Any], method: str, role: str) -> None:
    if not isinstance(getattr(handle, str(method), None), ActorMethod):
        known = ", ".join(sorted(m for m in dir(handle) if not m.startswith("_")))
        raise ValueError(f"{handle!r} has no method {method!r} to be its {role}; it has: {known}")
    surface.check_method(getattr(handle, method))
    if not _ray_handles.is_plain(getattr(handle, method), {}):
        raise ValueError(f"{method!r} cannot be the {role}: it does not return one plain value")

"""Asyncio actors as engines: the class to give to Ray."""

from __future__ import annotations

import inspect
import types
from typing import Any, TypeVar

from enginefsm._calls import actor_side as _actorside
from enginefsm._ray.handles import CARRIER, is_coroutine_method

C = TypeVar("C", bound=type)


def monitored(cls: C) -> C:
    """Return the class to make an asyncio actor of, for an engine: `ray.remote(enginefsm.monitored(cls))`.

    Ray awaits only methods of the actor's class. So the returned class has one method more than `cls`, through which
    `adopt` and calls reach the others. Its name, module and docstring are those of `cls`, which is not changed. It is
    sent to the actor by value, and needs no enginefsm there.

    A class without coroutine methods is returned as it is. `adopt` takes its actors already, and one coroutine method
    would make Ray run all its methods on an event loop.

    Raises TypeError if `cls` is not a class, or is an actor class already.
    """
    if not isinstance(cls, type):
        raise TypeError(
            f"monitored() takes the class itself, before ray.remote: ray.remote(enginefsm.monitored(cls)), not {cls!r}"
        )
    if CARRIER in vars(cls) or not inspect.getmembers(cls, is_coroutine_method):
        return cls
    members = {
        CARRIER: _actorside.carry,
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    made: Any = types.new_class(cls.__name__, (cls,), exec_body=lambda body: body.update(members))
    return made  # type: ignore[no-any-return]

"""Asyncio actors as engines: the class that Ray is given."""

from __future__ import annotations

import inspect
import types
from typing import Any, TypeVar

from enginefsm._calls import actor_side as _actorside
from enginefsm._ray.handles import CARRIER, is_coroutine_method

C = TypeVar("C", bound=type)


def monitored(cls: C) -> C:
    """The class to make an asyncio actor of, for an engine: `ray.remote(enginefsm.monitored(cls))`.

    Ray awaits nothing that is not a method of the actor's class. So the class given back has, besides all that `cls`
    has, one method more, by which `adopt` and calls reach the others. Its name, module and text are those of `cls`,
    which is not changed; it is sent to the actor by value, and needs no enginefsm there.

    A class without coroutine methods is given back as it is: `adopt` takes its actors already, and one coroutine
    method would have Ray run all of them on an event loop.

    Raises TypeError when `cls` is not a class, or is an actor class already.
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

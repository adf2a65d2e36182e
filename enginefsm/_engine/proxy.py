"""The engine that users hold. It stands in for the actor's handle, and has two names of its own."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping
from typing import Any

from ray.actor import ActorHandle, ActorMethod

from enginefsm._calls.calls import EngineMethod
from enginefsm._engine.managed import ManagedEngine
from enginefsm.fsm.incarnations import Incarnation
from enginefsm.fsm.states import EngineState, Reason


class EngineFsm:
    """A read-only view of one engine's state machine."""

    __slots__ = ("_managed",)

    def __init__(self, managed: ManagedEngine) -> None:
        self._managed = managed

    @property
    def name(self) -> str:
        """The name under which the engine was adopted."""
        return self._managed.name

    @property
    def labels(self) -> Mapping[str, str]:
        """The labels with which the engine was adopted."""
        return self._managed.labels

    @property
    def incarnation(self) -> int:
        """How many actors have had this name, this one included."""
        return self._managed.incarnation

    @property
    def state(self) -> EngineState:
        """The engine's present state."""
        return self._managed.state

    @property
    def reason(self) -> Reason:
        """Why the engine entered its state."""
        return self._managed.reason

    @property
    def detail(self) -> str:
        """What happened when the engine entered its state, in one line, such as the text of an exception."""
        return self._managed.detail

    @property
    def since(self) -> float:
        """When the engine entered its state, in seconds since the epoch."""
        return self._managed.since

    def history(self) -> list[Incarnation]:
        """Return the incarnations of the name and their ends, oldest first, this one last."""
        return self._managed.history()

    def describe(self) -> str:
        """Return the engine in one line: name, labels, incarnation, state, the time in each state, and the detail."""
        return self._managed.describe()

    def __repr__(self) -> str:
        return f"<{self.describe()}>"


class Engine:
    """An engine actor under a monitor. Use it as you use the actor's handle.

    An engine has two names of its own, `fsm` and `handle`. Every other name is the actor's. If the actor itself has a
    method `fsm` or `handle`, call that method through `engine.handle`.

    An engine pickles as the plain `ActorHandle`, equals it, and has the same hash.
    """

    __slots__ = ("__weakref__", "fsm", "handle")

    fsm: EngineFsm
    """The engine's state, and why it is in that state."""
    handle: ActorHandle[Any]
    """The plain handle, for functions that take only that, such as `ray.kill`."""

    def __init__(self, managed: ManagedEngine) -> None:
        self.fsm = EngineFsm(managed)
        self.handle = managed.handle
        managed.proxy = weakref.ref(self)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.handle, name)
        return EngineMethod(managed(self), attribute, {}) if isinstance(attribute, ActorMethod) else attribute

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.handle)})

    def __repr__(self) -> str:
        return repr(managed(self))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Engine):
            return bool(self.handle == other.handle)
        return bool(self.handle == other) if isinstance(other, ActorHandle) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.handle)

    def __reduce__(self) -> tuple[Any, ...]:
        # A receiver may not have enginefsm, so it gets the handle itself. Ray counts the handle when it is pickled.
        return operator.itemgetter(0), ((self.handle,),)


OWN_NAMES = frozenset({"fsm", "handle"})


def proxy(one: ManagedEngine) -> Engine:
    """Return the engine of a record. If the program still holds that object, return the same one."""
    held: Engine | None = one.proxy()
    return Engine(one) if held is None else held


def managed(engine: Engine) -> ManagedEngine:
    """Return the record behind an engine. The library reads and moves it."""
    return engine.fsm._managed

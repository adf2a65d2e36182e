"""The engine that users hold: a stand-in for the actor's handle, with two names of its own."""

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
    """The state machine of one engine, to read."""

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
        """Where the engine is now."""
        return self._managed.state

    @property
    def reason(self) -> Reason:
        """Why the engine is there."""
        return self._managed.reason

    @property
    def detail(self) -> str:
        """What happened when the engine got there, in one line: the text of the exception, say."""
        return self._managed.detail

    @property
    def since(self) -> float:
        """Since when the engine is there, in seconds since the epoch."""
        return self._managed.since

    def history(self) -> list[Incarnation]:
        """Return what became of each incarnation of the name, oldest first, this one last."""
        return self._managed.history()

    def describe(self) -> str:
        """Return the engine in one line: name, labels, incarnation, state, the time in each state, and the detail."""
        return self._managed.describe()

    def __repr__(self) -> str:
        return f"<{self.describe()}>"


class Engine:
    """An engine actor under a monitor, used as the actor's handle is used.

    An engine has two names of its own. Every other name is the actor's, whatever its methods are called. An actor's
    method that is itself called `fsm` or `handle` is reached through `engine.handle`.

    An engine pickles as the plain `ActorHandle`, equals it, and hashes as it does.
    """

    __slots__ = ("__weakref__", "fsm", "handle")

    fsm: EngineFsm
    """Where the engine is and why."""
    handle: ActorHandle[Any]
    """The plain handle, for functions that take nothing else (`ray.kill`)."""

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
        # A receiver that knows nothing of enginefsm gets the handle itself. Ray counts the handle as it passes.
        return operator.itemgetter(0), ((self.handle,),)


OWN_NAMES = frozenset({"fsm", "handle"})


def proxy(one: ManagedEngine) -> Engine:
    """Return the engine of a record: the object that the program holds, if it still holds it."""
    held: Engine | None = one.proxy()
    return Engine(one) if held is None else held


def managed(engine: Engine) -> ManagedEngine:
    """Return the record behind an engine, which the library reads and moves."""
    return engine.fsm._managed

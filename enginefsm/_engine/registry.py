"""The engines of a monitor, by actor and by name. The histories of released engines are kept by name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.actor import ActorHandle

from enginefsm._calls.calls import Awaiter, LaunchedIf
from enginefsm._engine.managed import ManagedEngine
from enginefsm._engine.proxy import Engine, managed
from enginefsm._ray import handles as _ray_handles
from enginefsm.errors import RestartCapError
from enginefsm.fsm.incarnations import FIRST, Incarnation, Lineage
from enginefsm.fsm.states import EngineRecord, EngineState, Reason, Transition
from enginefsm.policy import RestartCap


class EngineRegistry:
    """The engines of one monitor. Thread-safe.

    Args:
        emit: Takes each transition. It must not block.
        restart_cap: How often an engine that died may be replaced. None sets no limit.
    """

    def __init__(self, emit: Callable[[Transition], None], restart_cap: RestartCap | None) -> None:
        self._emit = emit
        self._restart_cap = restart_cap
        self._lock = threading.Lock()  # guards the three below
        self._engines: dict[str, Engine] = {}  # by actor id
        self._by_name: dict[str, Engine] = {}  # the newest incarnation
        self._released: dict[str, Lineage] = {}  # by name, where the newest incarnation was released

    def adopt(
        self,
        handle: ActorHandle[Any],
        name: str,
        launch: str,
        launched_if: LaunchedIf | None,
        labels: Mapping[str, str],
        awaiter: Awaiter,
    ) -> Engine:
        """Return the engine of an actor. If the actor is not adopted yet, create a new incarnation of the name.

        Raises ValueError or RestartCapError as `EngineMonitor.adopt` does. In that case it changes nothing.
        """
        actor_id = _ray_handles.actor_id(handle)
        with self._lock:
            known = self._engines.get(actor_id)
            if known is not None:
                if known.fsm.name != name:
                    raise ValueError(f"this actor is adopted as {known.fsm.name!r}; it cannot be {name!r} as well")
                return known
            namesake = self._by_name.get(name)
            if namesake is not None and namesake.fsm.state is not EngineState.DEAD:
                raise ValueError(
                    f"there is a living engine {name!r} ({namesake.fsm.state}) with another actor: choose another "
                    f"name, or release() that engine if this one replaces it"
                )
            lineage, now = self._lineage(name), time.monotonic()
            if self._restart_cap is not None and lineage.out_since is not None:
                wait_s = self._restart_cap.allows_in_s(lineage.restarted_at, now)
                if wait_s > 0:
                    raise RestartCapError(name, lineage.past, self._restart_cap, wait_s)
            lineage = lineage.restarted(now, self._restart_cap)
            record = EngineRecord(
                name, labels, lineage.next_incarnation, now, time.time(), lineage.out_since, f"actor {actor_id}"
            )
            engine = Engine(ManagedEngine(handle, record, launch, launched_if, self._emit, awaiter, lineage))
            self._engines[actor_id] = self._by_name[name] = engine
            self._released.pop(name, None)
            if namesake is not None:
                self._engines.pop(managed(namesake).actor_id, None)
            self._emit(record.first_step())
            return engine

    def release(self, engine: Engine) -> None:
        """Release an engine, which is dead from then on. Keep the history of its name."""
        one = managed(engine)
        with self._lock:
            one.step(Reason.RELEASED, "release() was called")
            if _is(self._engines.get(one.actor_id), one):  # else the actor was adopted again
                del self._engines[one.actor_id]
            if _is(self._by_name.get(one.name), one):
                del self._by_name[one.name]
                self._released[one.name] = one.lineage_after()

    def may_restart(self, name: str) -> bool:
        """Return whether the cap allows one more restart of a name now."""
        cap = self._restart_cap
        with self._lock:
            return cap is None or cap.allows_in_s(self._lineage(name).restarted_at, time.monotonic()) <= 0

    def history(self, name: str) -> list[Incarnation]:
        """Return the incarnations of a name and their ends, oldest first."""
        with self._lock:
            engine = self._by_name.get(name)
            return list(self._lineage(name).past) if engine is None else engine.fsm.history()

    def held(self) -> list[Engine]:
        """Return the engines, the dead included, except those that were released or replaced."""
        with self._lock:
            return list(self._engines.values())

    def newest(self, name: str) -> Engine | None:
        """Return the newest engine of a name, even if it is dead, or None if there is none."""
        with self._lock:
            return self._by_name.get(name)

    def engines(self) -> list[ManagedEngine]:
        """Return the records of `held`."""
        return [managed(engine) for engine in self.held()]

    def engine(self, name: str) -> ManagedEngine | None:
        """Return the record of `newest`."""
        engine = self.newest(name)
        return None if engine is None else managed(engine)

    def of_actor(self, actor_id: str) -> ManagedEngine | None:
        """Return the record of the engine whose actor has this id (hex)."""
        with self._lock:
            engine = self._engines.get(actor_id)
        return None if engine is None else managed(engine)

    def _lineage(self, name: str) -> Lineage:
        """Return the lineage that the next incarnation of a name continues. The caller holds the lock."""
        engine = self._by_name.get(name)
        return self._released.get(name, FIRST) if engine is None else managed(engine).lineage_after()


def _is(engine: Engine | None, one: ManagedEngine) -> bool:
    return engine is not None and managed(engine) is one

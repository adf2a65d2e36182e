"""The monitor: which engines there are, and the one place from which they are adopted, awaited and released."""

from __future__ import annotations

import asyncio
import collections
import functools
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, overload

from ray import ObjectRef
from ray.actor import ActorHandle

from enginefsm import _ends, _ray_handles
from enginefsm.awaiting import Wait
from enginefsm.blocking import wait_blocking
from enginefsm.calls import Awaited, Call
from enginefsm.engine import MonitoredEngine, Probe
from enginefsm.events import Event, Listener
from enginefsm.export import FLUSH_S, Exporter, Exports, from_environment
from enginefsm.lane import Lane
from enginefsm.looping import pace, wait_on_loop
from enginefsm.metrics import FleetMetrics, MetricsServer
from enginefsm.policy import RetryPolicy
from enginefsm.states import EngineRecord, EngineState, Reason, Transition

logger = logging.getLogger("enginefsm")

_RESERVED_LABELS = frozenset({"run", "engine", "state", "incarnation", "actor_id"})


class EngineMonitor:
    """A fleet of engines: adopts their actors, awaits their calls, and tells listeners of every transition.

    Thread-safe. Listeners are called one event at a time, in order, outside every lock; one that raises is logged
    and counted, and costs the fleet nothing else. One that blocks, blocks whoever moved the engine (who awaits on an
    event loop waits 2 s for it, and the loop not at all): a listener that has something slow to do hands it to a thread
    of its own, as the exporters do.

    Args:
        run: The name of the training run, on every metric.
        policy: By default, `RetryPolicy()`.
        listeners: Called with every event.
        export: The exporters (see `enginefsm.export`), which begin with the first engine; None for what the
            environment variable `ENGINEFSM_EXPORT` says, by default the hub.

    Raises ValueError when `ENGINEFSM_EXPORT` is asked, and cannot be understood.
    """

    def __init__(
        self,
        run: str = "",
        policy: RetryPolicy | None = None,
        listeners: Iterable[Listener] = (),
        export: Iterable[Exporter] | None = (),
    ) -> None:
        self.run = run
        """The name of the training run, on every metric."""
        self.policy = policy or RetryPolicy()
        self._engines: dict[str, MonitoredEngine] = {}  # by actor id
        self._by_name: dict[str, MonitoredEngine] = {}  # the newest incarnation
        self._incarnations: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()  # around the three above
        self._events: collections.deque[Event] = collections.deque()
        self._deliverer: dict[str, int] = {}  # the thread that hands events to listeners, if one does
        self._is_delivering = False
        self._heard = 0  # how many listeners have heard the event that is being delivered
        self._delivered = threading.Condition()
        # For event loops: what takes its time, what listeners do, and the wait for exporters, which keep nothing up.
        self._doing, self._delivering, self._flushing = Lane("doing"), Lane("listeners"), Lane("flush")
        self._deliver_patiently = functools.partial(self._deliver, FLUSH_S)
        self.metrics = FleetMetrics(run, self.engines)
        """What Prometheus is told."""
        self._listeners: list[Listener] = [_log, self.metrics, *listeners]
        for listener in self._listeners:
            self.metrics.expect_listener(listener)
        self._exporters = from_environment() if export is None else list(export)
        self._exports: Exports | None = None
        self.closed = False
        """Whether it has ended what it exported."""

    def adopt(
        self, handle: ActorHandle[Any], *, name: str, launch: str = "init", probe: Probe | None = None, **labels: object
    ) -> MonitoredEngine:
        """Take an engine actor under this monitor.

        Args:
            handle: The actor. Adopting it again under the same name gives the same engine.
            name: Unique among the living of this monitor; the successor of a dead or released engine is a new
                incarnation of the name.
            launch: The method whose outcome says whether the engine launched.
            probe: For those who call `launch` on the plain handle: a method of the actor, by name, or a function of
                the actor instance, that says whether the launch succeeded. Asked when the plain reference is lost.
            labels: Shown wherever the engine is named. `model`, `worker_type` and `node` are labels of the metrics.

        Raises:
            TypeError: `handle` is not the handle of a Python actor, or it is an asyncio actor's without `monitored`.
            ValueError: There is no such launch method or probe, the name is another living engine's, or the actor
                is adopted under another name.
        """
        self._check(handle, name, launch, probe, labels)
        actor_id = _ray_handles.actor_id(handle)
        self._begin_exports()
        with self._lock:
            known = self._engines.get(actor_id)
            if known is not None:
                if known.name != name:
                    raise ValueError(f"this actor is adopted as {known.name!r} already; it cannot be {name!r} as well")
                return known
            namesake = self._by_name.get(name)
            if namesake is not None and namesake.state is not EngineState.DEAD:
                raise ValueError(
                    f"there is a living engine {name!r} ({namesake.state}) with another actor: choose another name, "
                    f"or release() that engine if this one replaces it"
                )
            self._incarnations[name] += 1
            texts = {key: str(value) for key, value in labels.items()}
            record = EngineRecord(name, texts, self._incarnations[name], time.monotonic(), time.time())
            engine = MonitoredEngine(handle, record, launch, probe, self._events.append, owner=self)
            self._engines[actor_id] = self._by_name[name] = engine
            if namesake is not None:
                self._engines.pop(namesake.actor_id, None)
            self._events.append(record.first_step())
        self.metrics.expect_calls(texts, launch)
        self._deliver_here_or_aside()
        return engine

    def release(self, engine: MonitoredEngine) -> None:
        """Let go of an engine that is being shut down or replaced: it is dead to the monitor, its series go away.

        The actor is not touched. Its name and its actor may be adopted again. Releasing twice does nothing.
        """
        with self._lock:
            engine.step(Reason.RELEASED)
            if self._engines.get(engine.actor_id) is engine:  # else its actor was adopted again
                del self._engines[engine.actor_id]
            if self._by_name.get(engine.name) is engine:
                del self._by_name[engine.name]
        self._deliver_here_or_aside()

    def engines(self) -> list[MonitoredEngine]:
        """The engines of this monitor, the dead included, but for those released or replaced."""
        with self._lock:
            return list(self._engines.values())

    def engine(self, name: str) -> MonitoredEngine | None:
        """The newest engine of that name, dead or not; None when there is none, or it was released."""
        with self._lock:
            return self._by_name.get(name)

    @overload
    def get(self, calls: Call | ObjectRef[Any], timeout: float | None = None) -> Any: ...

    @overload
    def get(self, calls: Sequence[Call | ObjectRef[Any]], timeout: float | None = None) -> list[Any]: ...

    def get(self, calls: Call | ObjectRef[Any] | Sequence[Call | ObjectRef[Any]], timeout: float | None = None) -> Any:
        """Wait for calls as `ray.get` does, but bear with engines that are unavailable for a time.

        A call whose engine became unavailable is submitted again, to the same actor, within the policy's bounds,
        and gives what it gave the first time; its method does not run twice. Any other failure is raised at once,
        while other calls are still out: Ray's own exception, with a note that names the engine.

        Args:
            calls: What `engine.method.remote(...)` gave, or plain ObjectRefs of adopted actors; one, or several.
            timeout: In seconds. The same calls may be awaited again afterwards.

        Returns:
            The value, or the list of values in the order of `calls`.

        Raises:
            RetryExhaustedError: An engine could not be reached within the policy's bounds.
            LaunchDeadlineError: The policy's `launch_deadline_s` has passed for an engine that is launched here.
            ray.exceptions.GetTimeoutError: `timeout` has passed; it names what is still waited for.
            ray.exceptions.RayError: What Ray raised for the first call that failed.
            TypeError, ValueError: Something in `calls` cannot be awaited here; nothing was.
        """
        several = isinstance(calls, Sequence)
        awaited = [self._awaited(one) for one in _given(calls, timeout)]
        try:
            values = wait_blocking(self._wait(), awaited, timeout, self._deliver)
        except Exception:
            self._flush_terminal()
            raise
        self._deliver(patience_s=FLUSH_S)
        results = [values[one] for one in awaited]
        return results if several else results[0]

    @overload
    async def gather(self, calls: Call | ObjectRef[Any], timeout: float | None = None) -> Any: ...

    @overload
    async def gather(self, calls: Sequence[Call | ObjectRef[Any]], timeout: float | None = None) -> list[Any]: ...

    async def gather(
        self, calls: Call | ObjectRef[Any] | Sequence[Call | ObjectRef[Any]], timeout: float | None = None
    ) -> Any:
        """Wait for calls as `get` does, on the running event loop, which goes on meanwhile.

        Takes, gives and raises what `get` does. Cancelling it leaves the calls as a timeout does: they may be awaited
        again. Listeners are called on a thread of the monitor's.
        """
        several = isinstance(calls, Sequence)
        turn, awaited = pace(), []
        for one in _given(calls, timeout):
            await turn()
            awaited.append(self._awaited(one))
        try:
            values = await wait_on_loop(self._wait(), awaited, timeout, self._deliver_aside, self._doing)
        except Exception:
            await self._flushing.run(self._flush_terminal, FLUSH_S)
            raise
        except asyncio.CancelledError:
            self._deliver_aside()
            raise
        if self._events:
            await self._delivering.run(self._deliver_patiently, FLUSH_S)
        results = [values[one] for one in awaited]
        return results if several else results[0]

    def add_listener(self, listener: Listener) -> None:
        """Have `listener` called with every event from now on."""
        self.metrics.expect_listener(listener)
        self._listeners.append(listener)

    def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Wait until the exporters have everything up to now, `timeout_s` seconds at most; says whether they have."""
        exports = self._exports
        return exports is None or exports.flush(timeout_s)

    def close(self, timeout_s: float = FLUSH_S) -> None:
        """End in good order: exporters are given what is left, `timeout_s` seconds at most, and that this is the end.

        Engines and their actors are not touched. What happens to them afterwards is not exported. Called by itself
        when Ray is shut down or the interpreter ends, or, in an actor, when Ray lets the actor end; not when the
        process is killed, as Ray does to the actors of a job that ends. Closing twice does nothing.
        """
        with self._lock:
            exports, self._exports, self._exporters = self._exports, None, []
        if exports is None:
            return
        self.closed = True
        _ends.forget(self.close)
        self.metrics.stopped()
        exports.close(timeout_s)

    def serve_metrics(self, port: int, addr: str = "127.0.0.1") -> MetricsServer:
        """Serve this monitor's metrics at `http://addr:port/metrics` from a thread; port 0 picks a free one.

        Raises OSError when the address cannot be bound.
        """
        return self.metrics.serve(port, addr)

    def _begin_exports(self) -> None:
        with self._lock:
            if self._exports is not None or not self._exporters:
                return
            self._exports = Exports(self._exporters, self)
            self._listeners.extend(self._exports.outboxes)
        _ends.tell_before(self.close)

    def _flush_terminal(self) -> None:
        """Before an exception leaves: listeners, and what is behind exporters, know of the ends of engines.

        Or time is up: 2 s for all of it.
        """
        until = time.monotonic() + FLUSH_S
        self._deliver(patience_s=FLUSH_S)
        if self._exports is not None:
            self._exports.flush(max(0.0, until - time.monotonic()), terminal_only=True)

    def _check(self, handle: Any, name: str, launch: str, probe: Probe | None, labels: dict[str, object]) -> None:
        if isinstance(handle, MonitoredEngine):
            raise TypeError(f"{handle!r} is adopted already; adopt() takes the actor's handle")
        if not isinstance(handle, ActorHandle):
            raise TypeError(f"adopt() takes the handle that Engine.remote(...) gave, not {type(handle).__name__}")
        if _ray_handles.is_cross_language(handle):
            raise TypeError(f"{handle!r} is not a Python actor: no Python call can be sent to it")
        if _ray_handles.is_asyncio(handle) and not _ray_handles.is_monitored(handle):
            raise TypeError(
                f"{handle!r} is an asyncio actor, on which a remembered call cannot run; "
                f"create it from ray.remote(enginefsm.monitored(cls)) instead"
            )
        if not isinstance(name, str) or not name:
            raise ValueError(f"an engine's name is a text that is not empty, not {name!r}")
        for role, method in (("launch method", launch), ("probe", probe)):
            if not isinstance(method, str):
                continue
            found = getattr(handle, method, None)
            if found is None:
                known = ", ".join(sorted(m for m in dir(handle) if not m.startswith("_")))
                raise ValueError(f"{handle!r} has no method {method!r} to be its {role}; it has: {known}")
            if hasattr(MonitoredEngine, method):
                raise ValueError(f"{method!r} cannot be the {role}: a MonitoredEngine has that name for itself")
            if not _ray_handles.is_plain(found, {}):
                raise ValueError(f"{method!r} cannot be the {role}: it does not return one plain value")
        taken = _RESERVED_LABELS.intersection(labels)
        if taken:
            raise ValueError(f"labels that enginefsm sets itself cannot be given: {', '.join(sorted(taken))}")

    def _awaited(self, one: Any) -> Awaited:
        if isinstance(one, Call):
            if one.engine.owner is not self:
                raise ValueError(f"{one!r} is of an engine of another monitor: await it there")
            return one
        if not isinstance(one, ObjectRef):
            raise TypeError(f"get() takes calls and ObjectRefs, not {type(one).__name__}")
        actor_id = _ray_handles.actor_id_of(one)
        with self._lock:
            engine = None if actor_id is None else self._engines.get(actor_id)
        if engine is None:
            raise ValueError(
                f"{one!r} is not of an engine that this monitor has adopted: adopt() its actor first, or use ray.get"
            )
        return engine.plain_ref(one)

    def _wait(self) -> Wait:
        return Wait(self.policy, self.engines, self._events.append)

    def _deliver_aside(self) -> None:
        """Have the events handed to the listeners by another thread than this one."""
        if self._events:
            self._delivering.ask(self._deliver_patiently)

    def _deliver_here_or_aside(self) -> None:
        """Hand the events to the listeners; if this is an event loop's thread, have another do so in the next turn."""
        loop = asyncio._get_running_loop()
        if loop is None:
            self._deliver()
        else:
            loop.call_soon(self._deliver_aside)

    def _deliver(self, patience_s: float = 0.0) -> None:
        """Hand the events to the listeners; if another thread is at it, leave them to it, or wait for it so long."""
        me, until = threading.get_ident(), time.monotonic() + patience_s
        while self._events:
            # Atomic, and safe against an interrupt at any point: what this thread has claimed, it may claim again.
            if self._deliverer.setdefault("thread", me) == me:
                if self._is_delivering:
                    return  # a listener has moved an engine: its event comes when the present one is delivered
                try:
                    self._is_delivering = True
                    self._deliver_all()
                finally:
                    self._is_delivering = False
                    self._deliverer.pop("thread", None)
                    with self._delivered:
                        self._delivered.notify_all()
            else:
                with self._delivered:
                    if not self._delivered.wait_for(self._may_deliver, until - time.monotonic()):
                        return

    def _may_deliver(self) -> bool:
        return not self._events or "thread" not in self._deliverer

    def _deliver_all(self) -> None:
        # An interrupt in a listener loses no event to the next one: the count of those that have heard it is kept.
        while self._events:
            if self._heard < len(self._listeners):
                self._heard += 1
                self._call(self._listeners[self._heard - 1], self._events[0])
            else:
                self._heard = 0
                self._events.popleft()

    def _call(self, listener: Listener, event: Event) -> None:
        try:
            listener(event)
        except Exception:  # a listener is not ours, and must not end a bringup
            logger.exception("listener %r failed on an event of engine %s", listener, event.engine)
            self.metrics.listener_failed(listener)


def _given(calls: Any, timeout: float | None) -> list[Any]:
    if timeout is not None and timeout < 0:
        raise ValueError(f"timeout is a number of seconds, 0 or more, or None, not {timeout!r}")
    return list(calls) if isinstance(calls, Sequence) else [calls]


def _log(event: Event) -> None:
    if not isinstance(event, Transition):
        return
    level = {EngineState.UNAVAILABLE: logging.WARNING, EngineState.DEAD: logging.ERROR}.get(
        event.to_state, logging.INFO
    )
    if event.reason is Reason.RELEASED:
        level = logging.INFO
    logger.log(
        level, "engine %s is %s: %s (after %.1f s %s)",
        event.engine, event.to_state, event.reason, event.spent_s, event.from_state or "",
    )  # fmt: skip

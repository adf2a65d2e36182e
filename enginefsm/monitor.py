"""The monitor: which engines there are, and the one place from which they are adopted, awaited and released."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

from ray import ObjectRef
from ray.actor import ActorHandle

from enginefsm._calls.calls import Awaited, Call, LaunchedIf
from enginefsm._engine.checks import check_adopted, check_watched
from enginefsm._engine.launch_stages import LaunchStages
from enginefsm._engine.proxy import Engine, managed
from enginefsm._engine.registry import EngineRegistry
from enginefsm._ray import ends as _ends
from enginefsm._ray import handles as _ray_handles
from enginefsm._ray import keepalive
from enginefsm._wait.lane import Lane
from enginefsm._wait.loops import pace, wait_on_loop
from enginefsm._wait.threads import wait_blocking
from enginefsm._wait.wait import Wait
from enginefsm.events import Event, Listener
from enginefsm.export import FLUSH_S, Exporter, Exports, from_environment
from enginefsm.export.delivery import Delivery
from enginefsm.fsm.incarnations import Incarnation
from enginefsm.fsm.states import EngineState, Reason, Transition
from enginefsm.fsm.verdicts import VerdictHeld, VerdictLimits
from enginefsm.health.checker import Settings, WatchContext
from enginefsm.health.monitor import HealthMonitor, Verdict
from enginefsm.metrics.collector import FleetMetrics, MetricsServer
from enginefsm.policy import RestartCap, RetryPolicy, check_seconds

logger = logging.getLogger("enginefsm")

STAGE_S = 0.5  # how long an exception waits to be told how far launches are


class EngineMonitor:
    """A fleet of engines: adopts their actors, awaits their calls, and tells listeners of every transition.

    Thread-safe. Listeners are called one event at a time, in order, outside every lock; one that raises is logged
    and counted, and costs the fleet nothing else. One that blocks, blocks whoever moved the engine (who awaits on an
    event loop waits 2 s for it at most, and the loop not at all): a listener that has something slow to do hands it to
    a thread of its own, as the exporters do.

    Args:
        run: The name of the training run, on every metric.
        policy: By default, `RetryPolicy()`.
        listeners: Called with every event.
        export: The exporters (see `enginefsm.export`), which begin with the first engine; None for what the
            environment variable `ENGINEFSM_EXPORT` says, by default the hub.
        restart_cap: How often an engine that died may be replaced; None for as often as you like.

    Raises ValueError when `ENGINEFSM_EXPORT` is asked, and cannot be understood.
    """

    def __init__(
        self,
        *,
        run: str = "",
        policy: RetryPolicy | None = None,
        listeners: Iterable[Listener] = (),
        export: Iterable[Exporter] | None = (),
        restart_cap: RestartCap | None = None,
    ) -> None:
        self.run = run
        """The name of the training run, on every metric."""
        self.policy = policy or RetryPolicy()
        self.restart_cap = restart_cap
        self._lock = threading.Lock()  # around the watches and the exports
        # For event loops, which neither what takes its time nor the wait for exporters is to keep up.
        self._doing, self._flushing = Lane("doing"), Lane("flush")
        self._watches: list[HealthMonitor] = []
        self._limits = VerdictLimits()
        self._delivery = Delivery([_log], lambda listener: self.metrics.listener_failed(listener))
        self._registry = EngineRegistry(self._delivery.put, restart_cap)
        self.metrics = FleetMetrics(run, self._registry.engines, self._limits.held)
        """What Prometheus is told."""
        self.stages = LaunchStages(self._registry.engines)
        """How far Ray says that launches are."""
        self._delivery.listeners += [self.metrics, *listeners]
        for listener in self._delivery.listeners:
            self.metrics.expect_listener(listener)
        self._exporters = from_environment() if export is None else list(export)
        self._exports: Exports | None = None
        self._has_begun = False
        self.closed = False
        """Whether it has ended: its watches, and what it exported."""

    def adopt(
        self,
        handle: ActorHandle[Any],
        *,
        name: str,
        launch: str = "init",
        launched_if: LaunchedIf | None = None,
        **labels: object,
    ) -> Engine:
        """Take an engine actor under this monitor.

        Args:
            handle: The actor. Adopting it again under the same name gives the same engine.
            name: Unique among the living engines of this monitor. The successor of a dead or released engine is a new
                incarnation of the name.
            launch: The method whose outcome says whether the engine launched.
            launched_if: For a `launch` that is called on the plain handle: a method of the actor, by name, or a
                function of the actor instance, that says whether the launch succeeded. The monitor calls it if the
                plain reference is lost. If it returns a falsy value or raises, the launch counts as unfinished and it
                is called again.
            labels: Shown wherever the engine is named. `model`, `worker_type` and `node` are labels of the metrics.

        Raises:
            TypeError: `handle` is not the handle of a Python actor, or it is an asyncio actor's without `monitored`.
            ValueError: There is no such method, the name is another living engine's, or the actor is adopted under
                another name.
            RestartCapError: The name has had as many restarts as `restart_cap` allows. Nothing has changed. Call
                `may_restart` before you create the actor.
        """
        check_adopted(handle, name, launch, launched_if, labels)
        self._begin()
        texts = {key: str(value) for key, value in labels.items()}
        engine = self._registry.adopt(handle, name, launch, launched_if, texts, self)
        self.metrics.expect_calls(engine.fsm.labels, launch)
        self._delivery.deliver_here_or_aside()
        if keepalive.would_warn():
            self.stages.look(0)  # its answer tells which nodes engines are on
        return engine

    def release(self, engine: Engine) -> None:
        """Let go of an engine that is being shut down or replaced: it is dead to the monitor, its series go away.

        The actor is not touched. Its name and its actor may be adopted again. Releasing twice does nothing.
        """
        self._registry.release(engine)
        self._delivery.deliver_here_or_aside()

    def may_restart(self, name: str) -> bool:
        """Return whether `restart_cap` allows the engine of that name, dead or about to be, one more restart now.

        Call it before you spend anything on a new actor. True if there is no cap or the name is not known.
        """
        return self._registry.may_restart(name)

    def history(self, name: str) -> list[Incarnation]:
        """Return what became of each incarnation of a name, oldest first, the present one last.

        The newest `INCARNATIONS_KEPT` (16) are kept. The list is empty if the name is not known.
        """
        return self._registry.history(name)

    def engines(self) -> list[Engine]:
        """Return the engines of this monitor, the dead included, except those that were released or replaced."""
        return self._registry.held()

    def engine(self, name: str) -> Engine | None:
        """Return the newest engine of a name, dead or not, or None if there is none or it was released."""
        return self._registry.newest(name)

    @overload
    def get(self, calls: Call | ObjectRef[Any], *, timeout: float | None = None) -> Any: ...

    @overload
    def get(self, calls: Sequence[Call | ObjectRef[Any]], *, timeout: float | None = None) -> list[Any]: ...

    def get(
        self, calls: Call | ObjectRef[Any] | Sequence[Call | ObjectRef[Any]], *, timeout: float | None = None
    ) -> Any:
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
            values = wait_blocking(self._wait(timeout), awaited, self._delivery.deliver, self._ask_stages)
        except Exception:
            self._flush_terminal()
            raise
        self._delivery.deliver(patience_s=FLUSH_S)
        results = [values[one] for one in awaited]
        return results if several else results[0]

    async def gather(self, *calls: Call | ObjectRef[Any], timeout: float | None = None) -> list[Any]:
        """Wait for calls as `get` does, on the running event loop, which goes on meanwhile.

        Return their values in order, as `asyncio.gather` does. Raise what `get` raises. Cancelling it leaves the calls
        as a timeout does: they may be awaited again. Listeners are called on a thread of the monitor's.
        """
        turn, awaited = pace(), []
        for one in _given(calls, timeout):
            await turn()
            awaited.append(self._awaited(one))
        try:
            values = await wait_on_loop(
                self._wait(timeout), awaited, self._delivery.deliver_aside, self._ask_stages, self._doing
            )
        except Exception:
            await self._flushing.run(self._flush_terminal, FLUSH_S)
            raise
        except asyncio.CancelledError:
            self._delivery.deliver_aside()
            raise
        await self._delivery.delivered()
        return [values[one] for one in awaited]

    def watch(
        self,
        engines: Iterable[Engine | Sequence[Engine]],
        *,
        probe: str = "health_generate",
        interval_s: float = 10.0,
        timeout_s: float = 30.0,
        failure_threshold: int = 3,
        first_wait_s: float = 0.0,
        on_dead: Callable[[Verdict], object] | None = None,
        address: str | None = None,
    ) -> HealthMonitor:
        """Probe engines that have launched, in the background, and tell of those that are dead or are to be given up.

        An engine that cannot be reached, is silent or fails is `unavailable`, and comes back by itself. It is given
        up (`retry_exhausted`) after `failure_threshold` failures in a row; a break of the connection is no failure,
        nor is silence while the server answers: those end with the policy's `budget_s`. While most engines are
        unavailable at once, none is given up. Of an engine that has not launched, a death alone is noticed.

        Args:
            engines: Engines of this monitor. Several actors with one server are a sequence, node 0 first: they are
                probed each, and end together. Names are watched: the next incarnation is probed once it has launched.
            probe: A method of the actors, which says whether all is well: what is false, or raises, is a failure. It
                is given `timeout_s` if it has a parameter `timeout` or `timeout_s`.
            interval_s: From one probe of an engine to its next, at most.
            timeout_s: How long a probe, or the server, may take to answer.
            failure_threshold: Failures in a row after which an engine is given up.
            first_wait_s: How long no probe is sent, after the start and after each `resume`.
            on_dead: Called with each `Verdict`, one at a time, on a thread of its own. One that raises is logged and
                counted; of one that keeps others waiting for more than a minute, that is logged.
            address: A method of the actors that gives the server's base URL. The server is then asked as well, by
                `GET /health`: that it answers at all, though the actor is silent, keeps the engine; that it does not
                serve, though the actor answers, is a failure. SGLang answers 503 while its scheduler is held, as in
                a weight update: have `timeout_s` above the 20 s that this takes it.

        Raises:
            TypeError, ValueError: An argument makes no sense, an engine is not of this monitor, or is watched already,
                or has no such method. Nothing is watched then.
        """
        groups = [list(one) if isinstance(one, Sequence) else [one] for one in engines]
        settings = Settings(probe, interval_s, timeout_s, failure_threshold, first_wait_s, address)
        check_watched(self, groups, probe, address, on_dead)
        if on_dead is not None:
            self.metrics.expect_listener(on_dead)
        context = WatchContext(
            self._registry.engine, self.policy, self._limits, self._delivery.put, self._delivery.deliver,
            self._delivery.deliver_aside, self.metrics.listener_failed,
        )  # fmt: skip
        with self._lock:
            self._watches = [watch for watch in self._watches if not watch.stopped]
            taken = {name for watch in self._watches for name in watch.names}
            for engine in (engine for group in groups for engine in group):
                if engine.fsm.name in taken:
                    raise ValueError(f"engine {engine.fsm.name!r} is watched already: stop() that health monitor first")
                taken.add(engine.fsm.name)
            records = [[managed(engine) for engine in group] for group in groups]
            watch = HealthMonitor(context, records, settings, on_dead)
            self._watches.append(watch)
        return watch

    def add_listener(self, listener: Listener) -> None:
        """Have `listener` called with every event from now on."""
        self.metrics.expect_listener(listener)
        self._delivery.listeners.append(listener)

    def flush(self, *, timeout_s: float = FLUSH_S) -> bool:
        """Wait until the exporters have everything up to now, `timeout_s` seconds at most; says whether they have."""
        exports = self._exports
        return exports is None or exports.flush(timeout_s)

    def close(self, *, timeout_s: float = FLUSH_S) -> None:
        """End in good order: nothing is watched any more; exporters are given what is left, and that this is the end.

        Either takes `timeout_s` seconds at most. Engines and their actors are not touched. What happens to them
        afterwards is not exported. Called by itself when Ray is shut down or the interpreter ends, or, in an actor,
        when Ray lets the actor end; not when the process is killed, as Ray does to the actors of a job that ends.
        Closing twice does nothing.
        """
        with self._lock:
            exports, self._exports, self._exporters = self._exports, None, []
            watches, self._watches = self._watches, []
        for watch in watches:
            watch.stop(timeout_s)
        self.closed = True
        _ends.forget(self.close)
        if exports is None:
            return
        self.metrics.stopped()
        exports.close(timeout_s)
        for outbox in exports.outboxes:
            self._delivery.listeners.remove(outbox)

    def serve_metrics(self, port: int, *, addr: str = "127.0.0.1") -> MetricsServer:
        """Serve this monitor's metrics at `http://addr:port/metrics` from a thread; port 0 picks a free one.

        Raises OSError when the address cannot be bound.
        """
        return self.metrics.serve(port, addr)

    def _begin(self) -> None:
        """With the first engine, begin to export, and have the end told."""
        with self._lock:
            if self._has_begun:
                return
            if self._exporters:
                self._exports = Exports(self._exporters, ExportedFleet(self))
                self._delivery.listeners.extend(self._exports.outboxes)
            self._has_begun = True
        _ends.tell_before(self.close)

    def _flush_terminal(self) -> None:
        """Before an exception leaves: listeners, and what is behind exporters, know of the ends of engines.

        Or time is up: 2 s for all of it.
        """
        until = time.monotonic() + FLUSH_S
        self._delivery.deliver(patience_s=FLUSH_S)
        if self._exports is not None:
            self._exports.flush(max(0.0, until - time.monotonic()), terminal_only=True)

    def _awaited(self, one: Any) -> Awaited:
        if isinstance(one, Call):
            if one.engine.awaiter is not self:
                raise ValueError(f"{one!r} is of an engine of another monitor: await it there")
            return one
        if not isinstance(one, ObjectRef):
            raise TypeError(f"get() takes calls and ObjectRefs, not {type(one).__name__}")
        actor_id = _ray_handles.actor_id_of(one)
        engine = None if actor_id is None else self._registry.of_actor(actor_id)
        if engine is None:
            raise ValueError(
                f"{one!r} is not of an engine that this monitor has adopted: adopt() its actor first, or use ray.get"
            )
        return engine.plain_ref(one)

    def _wait(self, timeout_s: float | None) -> Wait:
        return Wait(self.policy, self._registry.engines, self._delivery.put, timeout_s, time.monotonic())

    def _ask_stages(self) -> None:
        self.stages.look(STAGE_S)


class ExportedFleet:
    """A monitor, as exporters see it."""

    def __init__(self, monitor: EngineMonitor) -> None:
        self.run = monitor.run
        self.metrics = monitor.metrics
        self.stages = monitor.stages
        self.engines = monitor._registry.engines
        self.engine = monitor._registry.engine


def _given(calls: Any, timeout: float | None) -> list[Any]:
    if timeout is not None:
        check_seconds("timeout", timeout)
    return list(calls) if isinstance(calls, Sequence) else [calls]


def _log(event: Event) -> None:
    if isinstance(event, VerdictHeld):
        logger.info("the verdict on engine %s is held: %s", event.engine, event.why)
    if not isinstance(event, Transition):
        return
    level = {EngineState.UNAVAILABLE: logging.WARNING, EngineState.DEAD: logging.ERROR}.get(
        event.to_state, logging.INFO
    )
    if event.reason is Reason.RELEASED:
        level = logging.INFO
    detail = f": {event.detail}" if event.detail else ""
    spent = f" (after {event.spent_s:.1f} s {event.from_state})" if event.from_state else ""
    logger.log(level, "engine %s is %s: %s%s%s", event.engine, event.to_state, event.reason, detail, spent)

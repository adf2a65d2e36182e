"""Bounded recovery and named failure for fleets of SGLang engines on Ray.

The functions of this module act on the process's monitor. `EngineMonitor` is the object behind them: it has the same
methods, for programs that want more than one.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

from ray import ObjectRef
from ray.actor import ActorHandle

from enginefsm._calls.asyncio_actors import monitored
from enginefsm._calls.calls import Call, LaunchedIf
from enginefsm._engine.proxy import Engine, EngineFsm
from enginefsm._ray.keepalive import runtime_env
from enginefsm.errors import (
    ActorRestartedError,
    LaunchDeadlineError,
    RestartCapError,
    RetryExhaustedError,
    UnsupportedRayError,
)
from enginefsm.events import CallOutcome, Event, HealthChecked, Listener, WatchBegan
from enginefsm.export import FLUSH_S, Exporter
from enginefsm.fsm.incarnations import Incarnation
from enginefsm.fsm.outcomes import Outcome, classify
from enginefsm.fsm.states import EngineState, LaunchStage, Reason, Transition
from enginefsm.fsm.verdicts import Finding, ServerAnswer, VerdictHeld
from enginefsm.health.monitor import HealthMonitor, Verdict
from enginefsm.metrics.collector import MetricsServer
from enginefsm.monitor import EngineMonitor
from enginefsm.policy import RestartCap, RetryPolicy

__all__ = [
    "ActorRestartedError",
    "Call",
    "CallOutcome",
    "Engine",
    "EngineFsm",
    "EngineMonitor",
    "EngineState",
    "Event",
    "Exporter",
    "Finding",
    "HealthChecked",
    "HealthMonitor",
    "Incarnation",
    "LaunchDeadlineError",
    "LaunchStage",
    "LaunchedIf",
    "Listener",
    "MetricsServer",
    "Outcome",
    "Reason",
    "RestartCap",
    "RestartCapError",
    "RetryExhaustedError",
    "RetryPolicy",
    "ServerAnswer",
    "Transition",
    "UnsupportedRayError",
    "Verdict",
    "VerdictHeld",
    "WatchBegan",
    "add_listener",
    "adopt",
    "classify",
    "close",
    "configure",
    "default_monitor",
    "engine",
    "engines",
    "flush",
    "gather",
    "get",
    "history",
    "may_restart",
    "monitored",
    "release",
    "runtime_env",
    "serve_metrics",
    "watch",
]

_lock = threading.Lock()
_monitor: EngineMonitor | None = None
_make_monitor: Callable[[], EngineMonitor] = functools.partial(EngineMonitor, export=None)


def configure(
    *,
    run: str = "",
    policy: RetryPolicy | None = None,
    listeners: Sequence[Listener] = (),
    export: Iterable[Exporter] | None = None,
    restart_cap: RestartCap | None = None,
) -> EngineMonitor:
    """Set up the process's monitor. `EngineMonitor` describes the arguments.

    Without `export` the environment variable `ENGINEFSM_EXPORT` names the exporters, and the hub is the default.

    Raises RuntimeError if the present monitor has engines, because it would lose them. Raises ValueError if
    `ENGINEFSM_EXPORT` is read and has no meaning.
    """
    global _monitor, _make_monitor
    with _lock:
        if _monitor is not None and _monitor.engines() and not _monitor.closed:
            raise RuntimeError("configure() comes before the first adopt(); the monitor has engines already")
        if _monitor is not None:
            _monitor.close()
        make = functools.partial(
            EngineMonitor,
            run=run,
            policy=policy,
            listeners=listeners,
            export=None if export is None else list(export),
            restart_cap=restart_cap,
        )
        _monitor, _make_monitor = make(), make
        return _monitor


def default_monitor() -> EngineMonitor:
    """Return the process's monitor. After it is closed, as `ray.shutdown()` does, the next `adopt` makes a new one."""
    return _present_monitor(anew=False)


def _present_monitor(*, anew: bool) -> EngineMonitor:
    global _monitor
    with _lock:
        if _monitor is None or (anew and _monitor.closed):
            _monitor = _make_monitor()
        return _monitor


def adopt(
    handle: ActorHandle[Any],
    *,
    name: str,
    launch: str = "init",
    launched_if: LaunchedIf | None = None,
    **labels: object,
) -> Engine:
    """Take an engine actor under the process's monitor. See `EngineMonitor.adopt`."""
    return _present_monitor(anew=True).adopt(handle, name=name, launch=launch, launched_if=launched_if, **labels)


def release(engine: Engine) -> None:
    """Let go of an engine. See `EngineMonitor.release`."""
    default_monitor().release(engine)


def may_restart(name: str) -> bool:
    """Return whether the restart cap allows one more restart of a name. See `EngineMonitor.may_restart`."""
    return default_monitor().may_restart(name)


def history(name: str) -> list[Incarnation]:
    """Return what became of each incarnation of a name. See `EngineMonitor.history`."""
    return default_monitor().history(name)


def engines() -> list[Engine]:
    """Return the engines of the process's monitor. See `EngineMonitor.engines`."""
    return default_monitor().engines()


def engine(name: str) -> Engine | None:
    """Return the newest engine of a name. See `EngineMonitor.engine`."""
    return default_monitor().engine(name)


@overload
def get(calls: Call | ObjectRef[Any], *, timeout: float | None = None) -> Any: ...


@overload
def get(calls: Sequence[Call | ObjectRef[Any]], *, timeout: float | None = None) -> list[Any]: ...


def get(calls: Call | ObjectRef[Any] | Sequence[Call | ObjectRef[Any]], *, timeout: float | None = None) -> Any:
    """Wait for calls and bear with engines that are unavailable for a time. See `EngineMonitor.get`."""
    return default_monitor().get(calls, timeout=timeout)


async def gather(*calls: Call | ObjectRef[Any], timeout: float | None = None) -> list[Any]:
    """Wait for calls on the running event loop, which goes on meanwhile. See `EngineMonitor.gather`."""
    return await default_monitor().gather(*calls, timeout=timeout)


def watch(
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
    """Check the health of engines in the background and report those that are dead. See `EngineMonitor.watch`."""
    return default_monitor().watch(
        engines,
        probe=probe,
        interval_s=interval_s,
        timeout_s=timeout_s,
        failure_threshold=failure_threshold,
        first_wait_s=first_wait_s,
        on_dead=on_dead,
        address=address,
    )


def add_listener(listener: Listener) -> None:
    """Call a listener with every event from now on. See `EngineMonitor.add_listener`."""
    default_monitor().add_listener(listener)


def serve_metrics(port: int, *, addr: str = "127.0.0.1") -> MetricsServer:
    """Serve the metrics of the process's monitor. See `EngineMonitor.serve_metrics`."""
    return default_monitor().serve_metrics(port, addr=addr)


def flush(*, timeout_s: float = FLUSH_S) -> bool:
    """Wait until the exporters have everything up to now. See `EngineMonitor.flush`."""
    return default_monitor().flush(timeout_s=timeout_s)


def close(*, timeout_s: float = FLUSH_S) -> None:
    """End watches and exports in good order. See `EngineMonitor.close`."""
    default_monitor().close(timeout_s=timeout_s)

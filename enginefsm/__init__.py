"""Bounded recovery and named failure for fleets of SGLang engines on Ray.

The functions of this module act on one monitor for the process; `EngineMonitor` is for those who want more.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

from ray import ObjectRef
from ray.actor import ActorHandle

from enginefsm._calls.asyncio_actors import monitored
from enginefsm._calls.calls import Call
from enginefsm._engine.engine import MonitoredEngine, Probe
from enginefsm.errors import ActorRestartedError, LaunchDeadlineError, RestartCapError, RetryExhaustedError
from enginefsm.events import CallOutcome, Event, Listener
from enginefsm.export import Exporter
from enginefsm.fsm.incarnations import Incarnation
from enginefsm.fsm.outcomes import Outcome, classify
from enginefsm.fsm.states import EngineState, LaunchStage, Reason, Transition
from enginefsm.health.monitor import HealthMonitor, Verdict
from enginefsm.metrics.collector import MetricsServer
from enginefsm.monitor import EngineMonitor
from enginefsm.policy import RestartCap, RetryPolicy

__all__ = [
    "ActorRestartedError",
    "Call",
    "CallOutcome",
    "EngineMonitor",
    "EngineState",
    "Event",
    "HealthMonitor",
    "Incarnation",
    "LaunchDeadlineError",
    "LaunchStage",
    "Listener",
    "MonitoredEngine",
    "Outcome",
    "Reason",
    "RestartCap",
    "RestartCapError",
    "RetryExhaustedError",
    "RetryPolicy",
    "Transition",
    "Verdict",
    "adopt",
    "classify",
    "configure",
    "default_monitor",
    "gather",
    "get",
    "monitored",
    "release",
    "serve_metrics",
    "watch",
]

_lock = threading.Lock()
_monitor: EngineMonitor | None = None
_make_monitor: Callable[[], EngineMonitor] = functools.partial(EngineMonitor, export=None)


def configure(
    run: str = "",
    policy: RetryPolicy | None = None,
    listeners: Sequence[Listener] = (),
    export: Iterable[Exporter] | None = None,
    restart_cap: RestartCap | None = None,
) -> EngineMonitor:
    """Set up the process's monitor; without it there is one with the defaults. See `EngineMonitor` for the arguments.

    By default it exports as the environment variable `ENGINEFSM_EXPORT` says, to the hub if that says nothing.

    Raises RuntimeError when the present one has engines already: they would be lost to it. Raises ValueError when
    `ENGINEFSM_EXPORT` is asked, and cannot be understood.
    """
    global _monitor, _make_monitor
    with _lock:
        if _monitor is not None and _monitor.engines() and not _monitor.closed:
            raise RuntimeError("configure() comes before the first adopt(); the monitor has engines already")
        if _monitor is not None:
            _monitor.close()
        export = None if export is None else list(export)
        make = functools.partial(EngineMonitor, run, policy, listeners, export, restart_cap)
        _monitor, _make_monitor = make(), make
        return _monitor


def default_monitor() -> EngineMonitor:
    """The process's monitor. Once it is closed, as it is by `ray.shutdown()`, the next adopt() begins another."""
    return _present_monitor(anew=False)


def _present_monitor(*, anew: bool) -> EngineMonitor:
    global _monitor
    with _lock:
        if _monitor is None or (anew and _monitor.closed):
            _monitor = _make_monitor()
        return _monitor


def adopt(
    handle: ActorHandle[Any], *, name: str, launch: str = "init", probe: Probe | None = None, **labels: object
) -> MonitoredEngine:
    """Take an engine actor under the process's monitor; see `EngineMonitor.adopt`."""
    return _present_monitor(anew=True).adopt(handle, name=name, launch=launch, probe=probe, **labels)


def release(engine: MonitoredEngine) -> None:
    """Let go of an engine; see `EngineMonitor.release`."""
    default_monitor().release(engine)


@overload
def get(calls: Call | ObjectRef[Any], timeout: float | None = None) -> Any: ...


@overload
def get(calls: Sequence[Call | ObjectRef[Any]], timeout: float | None = None) -> list[Any]: ...


def get(calls: Call | ObjectRef[Any] | Sequence[Call | ObjectRef[Any]], timeout: float | None = None) -> Any:
    """Wait for calls, bearing with engines that are unavailable for a time; see `EngineMonitor.get`."""
    return default_monitor().get(calls, timeout)


@overload
async def gather(calls: Call | ObjectRef[Any], timeout: float | None = None) -> Any: ...


@overload
async def gather(calls: Sequence[Call | ObjectRef[Any]], timeout: float | None = None) -> list[Any]: ...


async def gather(calls: Call | ObjectRef[Any] | Sequence[Call | ObjectRef[Any]], timeout: float | None = None) -> Any:
    """Wait for calls on the running event loop, which goes on meanwhile; see `EngineMonitor.gather`."""
    return await default_monitor().gather(calls, timeout)


def serve_metrics(port: int, addr: str = "127.0.0.1") -> MetricsServer:
    """Serve the process's monitor's metrics; see `EngineMonitor.serve_metrics`."""
    return default_monitor().serve_metrics(port, addr)


def watch(
    engines: Iterable[MonitoredEngine | Sequence[MonitoredEngine]],
    probe: str = "health_generate",
    interval_s: float = 10.0,
    timeout_s: float = 30.0,
    failure_threshold: int = 3,
    first_wait_s: float = 0.0,
    on_dead: Callable[[Verdict], object] | None = None,
    url: str | None = None,
) -> HealthMonitor:
    """Probe engines in the background, and tell of those that are dead; see `EngineMonitor.watch`."""
    return default_monitor().watch(
        engines, probe, interval_s, timeout_s, failure_threshold, first_wait_s, on_dead, url
    )  # fmt: skip

"""Turns the monitor's events into Prometheus metrics. Each monitor has a registry of its own.

The collector keeps the counters and histograms. It reads the gauges of single engines from the engines at each scrape,
because keeping them would cost several kB an engine.
"""

from __future__ import annotations

import collections
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Protocol
from wsgiref.simple_server import WSGIServer

import ray
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from enginefsm._engine.managed import EngineSnapshot
from enginefsm.events import CallOutcome, Event, HealthChecked, WatchBegan
from enginefsm.fsm.outcomes import Outcome
from enginefsm.fsm.states import EDGES, GIVEN_UP, EngineState, Reason, Transition
from enginefsm.fsm.verdicts import HELD, Decision, Finding, ServerAnswer
from enginefsm.metrics.counters import Counts, Durations

GROUP = ("run", "model", "worker_type")
ENGINE = (*GROUP, "engine")

# A stand-in launches in a second. Loading and compiling may take an hour.
LAUNCH_BUCKETS_S = (1, 2, 5, 10, 20, 30, 60, 120, 180, 300, 600, 900, 1200, 1800, 2700, 3600)
# Ray reports a break after 1.3 s at the least. The default budget and gRPC's 301 s are near the upper end.
UNAVAILABLE_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
PROBE_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300)

REAWAIT_RESULTS = ("answered", "unavailable", "failed")
PHASES = ("in_progress", "succeeded", "failed")

PER_ENGINE: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "engine_state": ("1 for the state that the engine is in.", (*ENGINE, "state")),
    "engine_state_since_timestamp_seconds": ("When the engine entered its state.", ENGINE),
    "engine_reason": ("1 for the reason why the engine is unavailable or dead.", (*ENGINE, "reason")),
    "engine_info": ("The engine's actor.", (*ENGINE, "node", "actor_id", "incarnation")),
    "retry_exhausted_timestamp_seconds": ("When the engine was given up, its bounds spent.", (*ENGINE, "reason")),
}
"""The gauges of single engines: the help text and labels of each."""
WITH_REASON = frozenset({EngineState.UNAVAILABLE, EngineState.DEAD})
"""The states in which an engine has a reason gauge. In a healthy fleet these gauges cost nothing."""


class EngineView(Protocol):
    """An engine, as a scrape reads it."""

    def snapshot(self) -> EngineSnapshot: ...  # noqa: D102


class FleetMetrics(Collector):
    """Listens to a monitor and serves Prometheus. Its `registry` holds no other collector."""

    def __init__(
        self,
        run: str,
        engines: Callable[[], Sequence[EngineView]],
        held: Callable[[], Mapping[Decision, int]] = dict,
    ) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._run = run
        self._engines = engines
        self.verdicts_held = held
        """Returns how many verdicts of the health monitor are held, by the reason for which they are held."""
        self._groups: set[tuple[str, str, str]] = set()
        self._methods: set[tuple[str, str, str, str]] = set()
        self._stopped_at_s = 0.0

        def counter(name: str, text: str, labels: Sequence[str]) -> Counts:
            return Counts(f"enginefsm_{name}", text, labels)

        def histogram(name: str, text: str, labels: Sequence[str], buckets_s: Sequence[float]) -> Durations:
            return Durations(f"enginefsm_{name}_seconds", text, labels, buckets_s)

        self._transitions = counter(
            "transitions", "Steps of engines between states.", (*GROUP, "from_state", "to_state", "reason")
        )
        self._outcomes = counter("outcomes", "What came of submissions of calls.", (*GROUP, "method", "outcome"))
        self._reawaits = counter(
            "reawaits", "What came of calls submitted again after their engine was unavailable.",
            (*GROUP, "method", "result"),
        )  # fmt: skip
        self._exhausted = counter("retry_exhausted", "Engines given up, their bounds spent.", (*GROUP, "reason"))
        self._export_errors = counter(
            "export_errors", "Failures of exporters, and events that a listener failed on.", ("run", "sink")
        )
        self._events_dropped = counter(
            "events_dropped", "Events that an exporter never got: too many were waiting for it.", ("run", "sink")
        )
        self._launch_duration = histogram(
            "launch_duration", "From adoption to the end of the launch method.", GROUP, LAUNCH_BUCKETS_S
        )
        self._unavailable_duration = histogram(
            "unavailable_duration", "How long engines were unavailable.", GROUP, UNAVAILABLE_BUCKETS_S
        )
        self._replacement_duration = histogram(
            "replacement_duration", "From an engine's death until an engine of its name was ready again.",
            GROUP, LAUNCH_BUCKETS_S,
        )  # fmt: skip
        self._probe_duration = histogram(
            "probe_duration", "From a probe to its outcome.", (*GROUP, "result"), PROBE_BUCKETS_S
        )
        self._health_checks = counter(
            "health_checks", "Checks of actors by the health monitor, and what their servers said.",
            (*GROUP, "actor", "server"),
        )  # fmt: skip
        self._kept: tuple[Collector, ...] = (
            self._transitions, self._outcomes, self._reawaits, self._exhausted, self._export_errors,
            self._events_dropped, self._launch_duration, self._unavailable_duration,
            self._replacement_duration, self._probe_duration, self._health_checks,
        )  # fmt: skip
        self.registry.register(self)

    def __call__(self, event: Event) -> None:
        """Count one event."""
        group = self._group(event.labels)
        if isinstance(event, Transition):
            self._count_transition(group, event)
        elif isinstance(event, CallOutcome):
            self._count_outcome(group, event)
        elif isinstance(event, HealthChecked):
            self._health_checks.add(*group, event.finding, event.server)
            if event.outcome is not None and event.took_s is not None:
                self._probe_duration.observe(event.took_s, *group, event.outcome)
        elif isinstance(event, WatchBegan):
            for finding in Finding:
                for server in ServerAnswer:
                    self._health_checks.begin(*group, finding, server)

    def _group(self, labels: Mapping[str, str]) -> tuple[str, str, str]:
        return self._run, labels.get("model", ""), labels.get("worker_type", "")

    def _count_transition(self, group: tuple[str, str, str], step: Transition) -> None:
        if group not in self._groups:
            self._groups.add(group)
            self._begin_at_zero(group)
        self._transitions.add(*group, step.from_state or "", step.to_state, step.reason)
        if step.first_ready:
            self._launch_duration.observe(step.age_s, *group)
        if step.replaced_after_s is not None:
            self._replacement_duration.observe(step.replaced_after_s, *group)
        if step.from_state is EngineState.UNAVAILABLE:
            self._unavailable_duration.observe(step.spent_s, *group)
        if step.reason in GIVEN_UP:
            self._exhausted.add(*group, step.reason)

    def _count_outcome(self, group: tuple[str, str, str], event: CallOutcome) -> None:
        self._begin_method_at_zero(group, event.method)
        self._outcomes.add(*group, event.method, event.outcome)
        if event.attempt:
            self._reawaits.add(*group, event.method, _reawait_result(event.outcome))
        if event.probe:
            self._probe_duration.observe(event.took_s, *group, event.outcome)

    def _begin_at_zero(self, group: tuple[str, str, str]) -> None:
        """Begin a group's counters at 0. Prometheus sees no increase in a counter that begins at 1."""
        self._transitions.begin(*group, "", EngineState.LAUNCHING, Reason.ADOPTED)
        for reason, (sources, dest) in EDGES.items():
            for source in sources:
                self._transitions.begin(*group, source, dest, reason)
        for reason in GIVEN_UP:
            self._exhausted.begin(*group, reason)
        self._launch_duration.begin(*group)
        self._unavailable_duration.begin(*group)
        self._replacement_duration.begin(*group)

    def _begin_method_at_zero(self, group: tuple[str, str, str], method: str) -> None:
        if (*group, method) not in self._methods:
            self._methods.add((*group, method))
            for outcome in Outcome:
                self._outcomes.begin(*group, method, outcome)
            for result in REAWAIT_RESULTS:
                self._reawaits.begin(*group, method, result)

    def expect_calls(self, labels: Mapping[str, str], method: str) -> None:
        """Begin the counters of a method's outcomes at 0, for engines with these labels."""
        self._begin_method_at_zero(self._group(labels), method)

    def expect_listener(self, listener: object) -> None:
        """Begin the counter of a listener's failures at 0."""
        self._export_errors.begin(self._run, _sink(listener))

    def listener_failed(self, listener: object) -> None:
        """Count a listener that raised."""
        self._export_errors.add(self._run, _sink(listener))

    def expect_exporter(self, sink: str) -> None:
        """Begin the counters of an exporter's failures and of its dropped events at 0."""
        self._export_errors.begin(self._run, sink)
        self._events_dropped.begin(self._run, sink)

    def exporter_failed(self, sink: str) -> None:
        """Count a failure of an exporter."""
        self._export_errors.add(self._run, sink)

    def event_dropped(self, sink: str) -> None:
        """Count an event that was dropped before the exporter got it."""
        self._events_dropped.add(self._run, sink)

    @property
    def stopped_at_s(self) -> float:
        """When the monitor ended in good order, in seconds since the epoch. 0 if it has not ended so."""
        return self._stopped_at_s

    def stopped(self) -> None:
        """Note that the monitor ends now, in good order."""
        self._stopped_at_s = time.time()

    def serve(self, port: int, addr: str) -> MetricsServer:
        """Serve the registry over HTTP. See `EngineMonitor.serve_metrics`."""
        return MetricsServer(*start_http_server(port, addr, self.registry))

    def describe(self) -> Iterable[Metric]:
        """Return nothing. The registry holds no other collector that could use the same names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics for a scrape."""
        yield from self.collect_counts()
        yield from self._collect_engines()
        run: tuple[str, ...] = (self._run,)
        yield from monitor_gauges({run: time.time()}, {run: self._stopped_at_s}, {(*run, *versions()): 1.0})
        yield held_gauge({run: self.verdicts_held()})

    def collect_counts(self) -> Iterator[Metric]:
        """Yield the counters and histograms of the monitor's life. Those of several monitors can be added up."""
        for kept in self._kept:
            yield from kept.collect()

    def _collect_engines(self) -> Iterator[Metric]:
        state: dict[tuple[str, ...], float] = {}
        since: dict[tuple[str, ...], float] = {}
        reasons: dict[tuple[str, ...], float] = {}
        info: dict[tuple[str, ...], float] = {}
        exhausted: dict[tuple[str, ...], float] = {}
        expected: collections.Counter[tuple[str, ...]] = collections.Counter()
        bringups: dict[str, list[EngineSnapshot]] = {}
        for engine in [one.snapshot() for one in self._engines()]:
            group = self._group(engine.labels)
            key = (*group, engine.engine)
            state |= {(*key, one): float(one is engine.state) for one in EngineState}
            since[key] = engine.since_s
            info[*key, engine.labels.get("node", ""), engine.actor_id, str(engine.incarnation)] = 1.0
            if engine.state in WITH_REASON:
                reasons[*key, engine.reason] = 1.0
            if engine.reason in GIVEN_UP:
                exhausted[*key, engine.reason] = engine.since_s
            expected[group] += 1
            bringups.setdefault(group[1], []).append(engine)
        for name, values in (
            ("engine_state", state),
            ("engine_state_since_timestamp_seconds", since),
            ("engine_reason", reasons),
            ("engine_info", info),
            ("retry_exhausted_timestamp_seconds", exhausted),
        ):
            text, labels = PER_ENGINE[name]
            yield _gauge(name, text, labels, values)
        yield from bringup_gauges(expected, {(self._run, model): phase(of) for model, of in bringups.items()})


def bringup_gauges(
    expected: Mapping[tuple[str, ...], float], phases: Mapping[tuple[str, ...], str]
) -> Iterator[Metric]:
    """Yield the gauges of bringups: the number of engines of each group, and the phase of each (run, model)."""
    yield _gauge("engines_expected", "Engines adopted and not released.", GROUP, expected)
    values = {(*key, one): float(one == now_in) for key, now_in in phases.items() for one in PHASES}
    yield _gauge("bringup_phase", "1 for the phase that the bringup is in.", ("run", "model", "phase"), values)


def monitor_gauges(
    heartbeat: Mapping[tuple[str, ...], float],
    stopped: Mapping[tuple[str, ...], float],
    info: Mapping[tuple[str, ...], float],
) -> Iterator[Metric]:
    """Yield the gauges of monitors: heartbeat and end of each (run,), and 1 for each (run, version, ray_version)."""
    yield _gauge("monitor_heartbeat_timestamp_seconds", "When the monitor was last alive.", ("run",), heartbeat)
    text = "When the monitor ended in good order; 0 while it has not."
    yield _gauge("monitor_stopped_timestamp_seconds", text, ("run",), stopped)
    yield _gauge("monitor_info", "The monitor's versions.", ("run", "version", "ray_version"), info)


def held_gauge(held: Mapping[tuple[str, ...], Mapping[Any, int]]) -> Metric:
    """Return the gauge of held verdicts: one value for each (run,) and reason for which verdicts are held."""
    values = {(*run, why): float(of.get(why, 0)) for run, of in held.items() for why in HELD}
    return _gauge("verdicts_held", "Verdicts of the health monitor that are due, and held.", ("run", "why"), values)


@functools.cache
def versions() -> tuple[str, str]:
    """Return the versions of enginefsm and of Ray."""
    return version("enginefsm"), ray.__version__


def _gauge(name: str, text: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]) -> Metric:
    family = GaugeMetricFamily(f"enginefsm_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


class LaunchView(Protocol):
    """An engine, as the phase of its bringup depends on it."""

    @property
    def state(self) -> EngineState: ...  # noqa: D102
    @property
    def ever_ready(self) -> bool: ...  # noqa: D102


def phase(engines: Iterable[LaunchView]) -> str:
    """Return the phase of a bringup.

    It is "failed" if an engine died before it was ever ready, and "succeeded" if all engines have been ready.
    """
    never_ready = [engine for engine in engines if not engine.ever_ready]
    if any(engine.state is EngineState.DEAD for engine in never_ready):
        return "failed"
    return "in_progress" if never_ready else "succeeded"


def _sink(listener: object) -> str:
    return str(getattr(listener, "__name__", type(listener).__name__))


def _reawait_result(outcome: Outcome) -> str:
    if outcome is Outcome.ACTOR_UNAVAILABLE:
        return "unavailable"
    return "answered" if outcome in (Outcome.SUCCEEDED, Outcome.METHOD_FAILED) else "failed"


class MetricsServer:
    """An HTTP server of metrics that runs in a thread."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._server.server_port

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

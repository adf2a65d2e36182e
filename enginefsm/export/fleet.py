"""The hub's table: the engines and counts of every monitor that reports to it, as metrics text and as JSON.

This module uses no Ray, starts no threads and opens no sockets. A manager is a monitor, known by its id. A manager
numbers its reports, and the report with the highest number wins. A report that comes twice or late changes nothing.

Metrics text. The metrics have the names and labels of `enginefsm.metrics`.
    The hub adds up the counters and histograms of all managers of a run.
    If several managers of a run have an engine of one name and group, the hub shows the engine that moved last.
    A group is a run, a model and a worker type. A manager has ended if it stopped or was silent for `SILENT_S`.
    The successor of a manager that ended is a manager of the same run whose first report came after the other's last.
    When a successor has engines of a group, the hub no longer shows the earlier manager's engines of that group.
    The heartbeat of a run is the newest among its managers that have not stopped and have no successor. If there are
    none, it is the newest among those without a successor.
    The run's end is 0 until all managers without a successor have stopped. If one manager of many vanishes, its `state`
    in the JSON shows that.
    Ray kills the actors of a job that ends. So if a manager in an actor falls silent and its job has ended, the hub
    counts the manager as stopped.

JSON. `GET /api/v1/fleet` returns all runs, and `?run=NAME` selects one. All times are in seconds, and points in time
are seconds since the epoch. Later releases may add fields. They remove none under the same `version`.
    {"version": 1,
     "now_s": 1763830000.0,
     "hub": {"address": "http://127.0.0.1:9400" or null while it cannot listen, "problem": null or why it cannot serve,
             "started_s": ..., "pid": 1, "node_ip": "...", "linger_s": 1800.0, "enginefsm": "0.1.0",
             "file_sd": "/tmp/ray/..." or "" if the hub writes none},
     "runs": [                          # by name
       {"run": "glm-rl",
        "state": "alive" | "silent" | "stopped",                             # silent: one of its managers is
        "heartbeat_s": ..., "stopped_s": null or ...,
        "phases": {"glm-4.6": "in_progress" | "succeeded" | "failed"},      # by model
        "counts": {"launching": 0, "ready": 7, "unavailable": 0, "dead": 1},
        "managers": [                   # in the order of their first reports
          {"manager": "9f0c...", "host": "node-1", "pid": 4242, "version": "0.1.0", "ray_version": "2.60.0",
           "started_s": ..., "heartbeat_s": ..., "heard_s_ago": 1.2, "stopped_s": null or ...,
           "state": "alive" | "silent" | "stopped" | "replaced",            # replaced: it has a successor
           "python": "3.11.7" or null,
           "silent_link_s": 20.0 or null,   # how soon its Ray notices a silent link; -1: never (see keepalive)
           "engines": 8}],
        "engines": [                    # by name
          {"engine": "default/regular/0", "model": "glm-4.6", "worker_type": "regular", "node": "node-1",
           "labels": {...},             # all labels that adopt() was given
           "state": "unavailable", "reason": "actor_unavailable", "since_s": ..., "in_state_s": 12.3,
           "spent_s": {"launching": 63.2, "ready": 511.0},                  # in the states that it left
           "incarnation": 2, "actor_id": "...", "ever_ready": true, "manager": "9f0c...",
           "max_task_retries": 0 or null,   # the actor's: how often Ray itself repeats a method that was cut off
           "stage": null or how far its launch is, as "waiting for resources" (see `LaunchStage`),
           "past": [                    # its earlier incarnations, at most the newest 16, oldest first
             {"incarnation": 1, "actor_id": "...", "reason": "actor_died", "adopted_s": ..., "ready_s": null or ...,
              "dead_s": ...}]}]}]}
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NotRequired, Required, TypedDict

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from enginefsm._engine.managed import EngineSnapshot
from enginefsm.fsm.states import GIVEN_UP, EngineState
from enginefsm.metrics.collector import (
    GROUP,
    PER_ENGINE,
    WITH_REASON,
    bringup_gauges,
    held_gauge,
    monitor_gauges,
    phase,
)

PROTOCOL = 1
Owner = Literal["job", "actor"]
"""What a manager in an actor ends with, by its field in a report."""

SILENT_S = 15.0
"""A manager that sent no report for so long is silent. This is three heartbeats."""

Labels = tuple[tuple[str, str], ...]
Counts = list[tuple[str, str, str, list[tuple[str, Labels, float]]]]
"""Metric families: each has a name, a help text, a type and samples."""
Key = tuple[str, str, str, str]
"""The run, model, worker_type and engine."""
Group = tuple[str, str, str]


class Row(TypedDict):
    """One engine in a report."""

    engine: str
    labels: dict[str, str]
    state: str
    reason: str
    since_s: float
    spent_s: dict[str, float]
    incarnation: int
    actor_id: str
    ever_ready: bool
    stage: NotRequired[str | None]
    max_task_retries: NotRequired[int]
    past: NotRequired[list[dict[str, Any]]]


class Report(TypedDict, total=False):
    """A manager's report. It has plain values only, because the hub may run another version of enginefsm."""

    protocol: Required[int]
    run: Required[str]
    manager: Required[str]
    seq: Required[int]
    full: Required[bool]
    """Whether `rows` holds all of the manager's engines. If not, it holds those that changed."""
    rows: Required[list[Row]]
    gone: Required[list[str]]
    """The names of engines that the manager no longer has."""
    counts: Required[Counts]
    held: dict[str, int]
    """How many verdicts of the health monitor are held, by the reason for which they are held."""
    job: Required[str]
    """The Ray job of the actor that the manager runs in. Ray kills the actor when that job's driver ends.

    "" if the manager runs in a driver."""
    actor: str
    """The id (hex) of the actor that the manager runs in; "" if the manager runs in a driver."""
    started_s: Required[float]
    heartbeat_s: Required[float]
    stopped_s: Required[float]
    host: Required[str]
    pid: Required[int]
    version: Required[str]
    ray_version: Required[str]
    python: str
    silent_link_s: float


class Answer(TypedDict):
    """The hub's answer to a report."""

    known: bool
    """Whether the hub took the report. If it does not know the manager, it needs a full report first."""
    problem: str | None
    """Why the hub cannot serve what it has; None if it can."""


def row(snapshot: EngineSnapshot) -> Row:
    """Return the row of one engine."""
    return {
        "engine": snapshot.engine,
        "labels": dict(snapshot.labels),
        "state": snapshot.state.value,
        "reason": snapshot.reason.value,
        "since_s": snapshot.since_s,
        "spent_s": {state.value: seconds for state, seconds in snapshot.spent_s.items()},
        "incarnation": snapshot.incarnation,
        "actor_id": snapshot.actor_id,
        "ever_ready": snapshot.ever_ready,
        "stage": None if snapshot.stage is None else snapshot.stage.value,
        "past": [one._asdict() | {"reason": None if one.reason is None else one.reason.value} for one in snapshot.past],
    }


def counts(metrics: Iterable[Metric]) -> Counts:
    """Return counters and histograms as plain values."""
    return [
        (
            metric.name, metric.documentation, metric.type,
            [(sample.name, tuple(sample.labels.items()), sample.value) for sample in metric.samples],
        )
        for metric in metrics
    ]  # fmt: skip


class FleetTable:
    """The engines of all managers. Thread-safe.

    Args:
        clock: Returns the monotonic time.
        wall: Returns the seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self._clock = clock
        self._wall = wall
        self._lock = threading.Lock()  # guards all fields below
        self._managers: dict[str, _Manager] = {}
        self._bygone: dict[str, tuple[str, Counts]] = {}  # the run and counts of managers that were forgotten
        self._heard_at = clock()
        self._revision = 0  # of the engines: it grows when one of them changes
        self._text: tuple[object, str] = (None, "")

    def accept(self, report: Report) -> bool:
        """Take in a report. Return False if it is not a full report and its manager is unknown.

        Raises ValueError if the report has another protocol.
        """
        if report["protocol"] != PROTOCOL:
            raise ValueError(
                f"this hub takes reports of protocol {PROTOCOL}, not {report['protocol']}: "
                f"another version of enginefsm ({report.get('version')}) shares the cluster"
            )
        entries = [_Entry.of(report["run"], one) for one in report["rows"]]
        with self._lock:
            now = self._clock()
            manager = self._managers.get(report["manager"])
            if manager is None:
                if not report["full"]:
                    return False
                manager = self._managers[report["manager"]] = _Manager(report, now)
                self._bygone.pop(manager.id, None)
            elif report["seq"] <= manager.report["seq"]:
                return True
            self._heard_at = manager.heard_at = now
            if manager.update(report, entries):
                self._revision += 1
            return True

    def silent_for_s(self) -> float:
        """Return the seconds since the last report of any manager, or since the table was made if none came."""
        with self._lock:
            return self._clock() - self._heard_at

    def silent(self, owner: Owner) -> set[str]:
        """Return the ids of the jobs, or actors, whose managers are in an actor, are silent and did not say why."""
        with self._lock:
            return {known for manager in self._gone_silent() if (known := manager.report.get(owner, ""))}

    def end(self, owner: Owner, ended: Mapping[str, float]) -> None:
        """Mark the silent managers in these jobs, or actors, as stopped, at the time given for each id.

        Ray calls an actor's `__ray_shutdown__` from 2.50 on. Before that, a manager in an actor that ends in good order
        falls silent.
        """
        with self._lock:
            for manager in self._gone_silent():
                if (known := manager.report.get(owner, "")) in ended:
                    manager.report = {**manager.report, "stopped_s": ended[known]}

    def _gone_silent(self) -> list[_Manager]:
        return [one for one in self._managers.values() if not one.report["stopped_s"] and self._has_ended(one)]

    def forget(self, after_s: float) -> None:
        """Forget managers that sent no report for `after_s`. Keep their counts while their run goes on."""
        with self._lock:
            old = [one for one in self._managers.values() if self._clock() - one.heard_at >= after_s]
            for manager in old:
                del self._managers[manager.id]
                self._bygone[manager.id] = manager.run, manager.report["counts"]
            if old:
                self._revision += 1
                going_on = {manager.run for manager in self._managers.values()}
                self._bygone = {id_: (run, of) for id_, (run, of) in self._bygone.items() if run in going_on}

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        with self._lock:
            by_run = self._by_run()
            counted = [manager.report["counts"] for manager in self._managers.values()]
            counted += [of for _, of in self._bygone.values()]
            given_way = self._given_way(by_run)
            of_monitors = _Families(self._monitor_gauges(by_run))
            based_on = (self._revision, given_way)
            shown = None if self._text[0] == based_on else list(self._shown(given_way))
        metrics = generate_latest(_Families(_as_metrics(_total(counted)))) + generate_latest(of_monitors)
        if shown is not None:
            self._text = (based_on, _engines_text(shown))
        return metrics + self._text[1].encode()

    def as_json(self, run: str | None = None) -> dict[str, Any]:
        """Return everything but the counts, as the module's docstring says. If `run` is given, select that run."""
        with self._lock:
            by_run = {name: of for name, of in self._by_run().items() if run in (None, name)}
            entries = collections.defaultdict(list)
            for manager, entry in self._shown(self._given_way(by_run)):
                entries[manager.run].append((manager, entry))
            runs = [self._run_json(name, managers, entries[name]) for name, managers in sorted(by_run.items())]
        return {"version": 1, "now_s": self._wall(), "runs": runs}

    def _by_run(self) -> dict[str, list[_Manager]]:
        by_run: dict[str, list[_Manager]] = {}
        for manager in self._managers.values():
            by_run.setdefault(manager.run, []).append(manager)
        return by_run

    def _has_ended(self, manager: _Manager) -> bool:
        return bool(manager.report["stopped_s"]) or self._clock() - manager.heard_at >= SILENT_S

    def _given_way(self, by_run: Mapping[str, list[_Manager]]) -> frozenset[tuple[str, Group]]:
        """Return the groups that a successor took over, each with the id of the earlier manager."""
        return frozenset(
            (manager.id, group)
            for managers in by_run.values()
            for manager in managers
            if len(managers) > 1 and self._has_ended(manager)
            for group in manager.groups
            if any(other.follows(manager) and group in other.groups for other in managers)
        )

    def _shown(self, given_way: frozenset[tuple[str, Group]]) -> Iterator[tuple[_Manager, _Entry]]:
        """Return the engines to show: one for each key."""
        newest: dict[Key, tuple[_Manager, _Entry]] = {}
        for manager in self._managers.values():
            for entry in manager.entries.values():
                if given_way and (manager.id, entry.group) in given_way:
                    continue
                rival = newest.get(entry.key)
                if rival is None or rival[1].row["since_s"] <= entry.row["since_s"]:
                    newest[entry.key] = (manager, entry)
        return iter(newest.values())

    def _current(self, managers: list[_Manager]) -> list[_Manager]:
        """Return the managers that have no successor."""
        return [
            manager
            for manager in managers
            if not (self._has_ended(manager) and any(other.follows(manager) for other in managers))
        ]

    def _run_times(self, managers: list[_Manager]) -> tuple[float, float]:
        """Return the heartbeat and the end of a run. The end is 0 while the run goes on."""
        current = self._current(managers)
        going = [manager.report["heartbeat_s"] for manager in current if not manager.report["stopped_s"]]
        if going:
            return max(going), 0.0
        return (
            max(manager.report["heartbeat_s"] for manager in current),
            max(manager.report["stopped_s"] for manager in current),
        )

    def _monitor_gauges(self, by_run: Mapping[str, list[_Manager]]) -> list[Metric]:
        times = {(run,): self._run_times(managers) for run, managers in by_run.items()}
        gauges = monitor_gauges(
            {run: heartbeat_s for run, (heartbeat_s, _) in times.items()},
            {run: stopped_s for run, (_, stopped_s) in times.items()},
            {
                (run, manager.report["version"], manager.report["ray_version"]): 1.0
                for run, managers in by_run.items()
                for manager in managers
            },
        )
        held: dict[tuple[str, ...], Mapping[str, int]] = {
            (run,): self._held(managers) for run, managers in by_run.items()
        }
        return [*gauges, held_gauge(held)]

    def _held(self, managers: list[_Manager]) -> dict[str, int]:
        """Return how many verdicts are held, by reason. Managers that ended hold none."""
        held = collections.Counter[str]()
        for manager in managers:
            if not self._has_ended(manager):
                held.update(manager.report.get("held", {}))
        return held

    def _run_json(self, run: str, managers: list[_Manager], shown: list[tuple[_Manager, _Entry]]) -> dict[str, Any]:
        heartbeat_s, stopped_s = self._run_times(managers)
        current = self._current(managers)
        silent = any(self._has_ended(manager) for manager in current)
        models: dict[str, list[_Entry]] = {}
        for _, entry in shown:
            models.setdefault(entry.key[1], []).append(entry)
        states = collections.Counter(entry.row["state"] for _, entry in shown)
        return {
            "run": run,
            "state": "stopped" if stopped_s else "silent" if silent else "alive",
            "heartbeat_s": heartbeat_s,
            "stopped_s": stopped_s or None,
            "phases": {model: phase(entries) for model, entries in sorted(models.items())},
            "counts": {state.value: states[state.value] for state in EngineState},
            "managers": [self._manager_json(manager, current) for manager in managers],
            "engines": [
                _engine_json(manager, entry, self._wall())
                for manager, entry in sorted(shown, key=lambda one: one[1].key)
            ],
        }

    def _manager_json(self, manager: _Manager, current: list[_Manager]) -> dict[str, Any]:
        report = manager.report
        state = "silent" if self._has_ended(manager) else "alive"
        state = "stopped" if report["stopped_s"] else state
        return {
            "manager": manager.id,
            **{key: report[key] for key in ("host", "pid", "version", "ray_version", "started_s", "heartbeat_s")},
            "python": report.get("python"),  # a manager of another version may not report it
            "silent_link_s": report.get("silent_link_s"),
            "heard_s_ago": self._clock() - manager.heard_at,
            "stopped_s": report["stopped_s"] or None,
            "state": state if manager in current else "replaced",
            "engines": len(manager.entries),
        }


class _Manager:
    def __init__(self, report: Report, now: float) -> None:
        self.id = report["manager"]
        self.run = report["run"]
        self.report = report
        self.first_heard_at = self.heard_at = now
        self.entries: dict[str, _Entry] = {}
        self.groups: set[Group] = set()

    def follows(self, other: _Manager) -> bool:
        """Return whether the first report of this manager came after the last of `other`."""
        return self is not other and self.first_heard_at >= other.heard_at

    def update(self, report: Report, entries: list[_Entry]) -> bool:
        """Take in a newer report. Return whether any engine changed."""
        changed = bool(entries or report["gone"] or report["full"])
        if report["full"]:
            self.entries.clear()
        for name in report["gone"]:
            self.entries.pop(name, None)
        for entry in entries:
            self.entries[entry.row["engine"]] = entry
        if changed:
            self.groups = {entry.group for entry in self.entries.values()}
        self.report = {**report, "rows": []}  # `entries` has them
        return changed


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """One engine of one manager, with its lines of metrics text."""

    key: Key
    group: Group
    row: Row
    lines: tuple[str, str, str, str, str]
    """The text for each family of `PER_ENGINE`, in that order."""

    @property
    def state(self) -> EngineState:
        return EngineState(self.row["state"])

    @property
    def ever_ready(self) -> bool:
        return self.row["ever_ready"]

    @staticmethod
    def of(run: str, row: Row) -> _Entry:
        group = run, row["labels"].get("model", ""), row["labels"].get("worker_type", "")
        labels = ",".join(
            f'{name}="{_escaped(value)}"'
            for name, value in zip((*GROUP, "engine"), (*group, row["engine"]), strict=True)
        )
        since = f"{row['since_s']:.3f}"
        states = "".join(
            f'enginefsm_engine_state{{{labels},state="{state}"}} {int(state == row["state"])}\n'
            for state in EngineState
        )
        entered = f"enginefsm_engine_state_since_timestamp_seconds{{{labels}}} {since}\n"
        reason = ""
        if row["state"] in WITH_REASON:
            reason = f'enginefsm_engine_reason{{{labels},reason="{_escaped(row["reason"])}"}} 1\n'
        info = (
            f'enginefsm_engine_info{{{labels},node="{_escaped(row["labels"].get("node", ""))}",'
            f'actor_id="{_escaped(row["actor_id"])}",incarnation="{row["incarnation"]}"}} 1\n'
        )
        exhausted = ""
        if row["reason"] in GIVEN_UP:
            exhausted = f'enginefsm_retry_exhausted_timestamp_seconds{{{labels},reason="{row["reason"]}"}} {since}\n'
        return _Entry((*group, row["engine"]), group, row, (states, entered, reason, info, exhausted))


class _Families(Collector):
    """Wraps metrics so that `generate_latest` accepts them."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _escaped(value: str) -> str:
    if "\\" in value or "\n" in value or '"' in value:
        return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return value


def _engines_text(shown: list[tuple[_Manager, _Entry]]) -> str:
    parts = []
    for place, (name, (text, _)) in enumerate(PER_ENGINE.items()):
        parts.append(f"# HELP enginefsm_{name} {text}\n# TYPE enginefsm_{name} gauge\n")
        parts += [entry.lines[place] for _, entry in shown]
    expected = collections.Counter[tuple[str, ...]](entry.group for _, entry in shown)
    models: dict[tuple[str, ...], list[_Entry]] = {}
    for _, entry in shown:
        models.setdefault(entry.key[:2], []).append(entry)
    gauges = bringup_gauges(expected, {key: phase(entries) for key, entries in models.items()})
    return "".join(parts) + generate_latest(_Families(gauges)).decode()


def _total(several: list[Counts]) -> Counts:
    """Return the sum of counters and histograms, sample by sample."""
    if len(several) == 1:
        return several[0]
    families: dict[str, tuple[str, str]] = {}
    totals: dict[str, dict[tuple[str, Labels], float]] = {}
    for name, text, kind, samples in itertools.chain.from_iterable(several):
        families[name] = text, kind
        total = totals.setdefault(name, {})
        for sample, labels, value in samples:
            total[sample, labels] = total.get((sample, labels), 0.0) + value
    return [
        (name, *families[name], [(sample, labels, value) for (sample, labels), value in total.items()])
        for name, total in totals.items()
    ]


def _as_metrics(counted: Counts) -> Iterator[Metric]:
    for name, text, kind, samples in counted:
        metric = Metric(name, text, kind)
        for sample, labels, value in samples:
            metric.add_sample(sample, dict(labels), value)
        yield metric


def _engine_json(manager: _Manager, entry: _Entry, now_s: float) -> dict[str, Any]:
    row = entry.row
    return {
        "engine": row["engine"],
        "model": entry.key[1],
        "worker_type": entry.key[2],
        "node": row["labels"].get("node", ""),
        "labels": row["labels"],
        "state": row["state"],
        "reason": row["reason"],
        "since_s": row["since_s"],
        "in_state_s": max(0.0, now_s - row["since_s"]),
        "spent_s": row["spent_s"],
        "incarnation": row["incarnation"],
        "actor_id": row["actor_id"],
        "ever_ready": row["ever_ready"],
        "manager": manager.id,
        "max_task_retries": row.get("max_task_retries"),
        "stage": row.get("stage"),  # a manager of another version may not report it
        "past": row.get("past", []),
    }

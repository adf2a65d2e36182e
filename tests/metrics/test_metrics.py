"""The monitor's metrics, read as Prometheus reads them; and how events reach whoever listens."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support.bare_handles import bare_handle

import enginefsm
from enginefsm import CallOutcome, EngineMonitor, EngineState, Outcome, Reason, Transition, WatchBegan
from enginefsm._engine.managed import EngineSnapshot
from enginefsm.metrics.collector import FleetMetrics

G = ("run", "model", "worker_type")
E = (*G, "engine")

# Section 4 of the design, as far as one process knows it. A histogram's buckets have `le` besides.
EXPECTED = {
    "engine_state": ("gauge", {*E, "state"}),
    "engine_state_since_timestamp_seconds": ("gauge", {*E}),
    "engine_reason": ("gauge", {*E, "reason"}),
    "engine_info": ("gauge", {*E, "node", "actor_id", "incarnation"}),
    "transitions": ("counter", {*G, "from_state", "to_state", "reason"}),
    "outcomes": ("counter", {*G, "method", "outcome"}),
    "reawaits": ("counter", {*G, "method", "result"}),
    "launch_duration_seconds": ("histogram", {*G}),
    "unavailable_duration_seconds": ("histogram", {*G}),
    "replacement_duration_seconds": ("histogram", {*G}),
    "probe_duration_seconds": ("histogram", {*G, "result"}),
    "retry_exhausted": ("counter", {*G, "reason"}),
    "retry_exhausted_timestamp_seconds": ("gauge", {*E, "reason"}),
    "engines_expected": ("gauge", {*G}),
    "bringup_phase": ("gauge", {"run", "model", "phase"}),
    "monitor_heartbeat_timestamp_seconds": ("gauge", {"run"}),
    "monitor_stopped_timestamp_seconds": ("gauge", {"run"}),
    "monitor_info": ("gauge", {"run", "version", "ray_version"}),
    "export_errors": ("counter", {"run", "sink"}),
    "events_dropped": ("counter", {"run", "sink"}),
    "health_checks": ("counter", {*G, "actor", "server"}),
    "verdicts_held": ("gauge", {"run", "why"}),
}


@dataclasses.dataclass
class Engine:
    """What metrics see of an engine."""

    name: str = "e"
    labels: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"model": "tiny", "worker_type": "regular", "node": "n1"}
    )
    state: EngineState = EngineState.LAUNCHING
    state_since: float = 1000.5
    reason: Reason = Reason.ADOPTED
    actor_id: str = "abc"
    incarnation: int = 1
    ever_ready: bool = False

    def snapshot(self):
        return EngineSnapshot(
            self.name, self.labels, self.incarnation, self.actor_id, self.state, self.reason, self.state_since, {},
            self.ever_ready, stage=None, past=(),
        )  # fmt: skip


class Fleet:
    """Metrics, the engines that they look at, and what they are told."""

    def __init__(self, run="run"):
        self.engines = [Engine()]
        self.metrics = FleetMetrics(run, lambda: self.engines)

    def step(self, from_state, to_state, reason, *, spent_s=0.0, age_s=0.0, first_ready=False):
        self.metrics(
            Transition("e", self.engines[0].labels, 1, from_state, to_state, reason, spent_s, age_s, 1.0, first_ready)
        )

    def outcome(self, outcome, *, method="init", attempt=0, took_s=0.0, probe=False):
        self.metrics(CallOutcome("e", self.engines[0].labels, method, outcome, attempt, took_s, probe, 1, 0.0))

    def launch(self):
        self.step(None, EngineState.LAUNCHING, Reason.ADOPTED)

    def families(self):
        return {family.name: family for family in families(self.metrics)}

    def value(self, name, **labels):
        return value(self.metrics, name, **labels)


def families(metrics):
    return list(text_string_to_metric_families(generate_latest(metrics.registry).decode()))


def value(metrics, name, **labels):
    """The one sample of that name with these labels among its own; None if there is none."""
    samples = [
        sample.value
        for family in families(metrics)
        for sample in family.samples
        if sample.name == f"enginefsm_{name}" and labels.items() <= sample.labels.items()
    ]
    assert len(samples) <= 1, f"{name}{labels} is {len(samples)} samples"
    return samples[0] if samples else None


@pytest.fixture
def fleet():
    return Fleet()


@pytest.fixture
def fleet_in_trouble(fleet):
    """A fleet of which there is something to tell by each metric."""
    fleet.launch()
    fleet.step(EngineState.LAUNCHING, EngineState.UNAVAILABLE, Reason.ACTOR_UNAVAILABLE)
    fleet.outcome(Outcome.SUCCEEDED, attempt=1, probe=True)
    fleet.step(EngineState.UNAVAILABLE, EngineState.DEAD, Reason.RETRY_EXHAUSTED)
    fleet.metrics.listener_failed(print)
    fleet.metrics.expect_exporter("hub")
    fleet.metrics(WatchBegan("e", fleet.engines[0].labels, 1, 0.0))
    fleet.engines = [Engine(state=EngineState.DEAD, reason=Reason.RETRY_EXHAUSTED)]
    return fleet


def test_every_metric_of_the_design_is_there_with_its_type_and_no_other(fleet_in_trouble):
    types = {name.removeprefix("enginefsm_"): family.type for name, family in fleet_in_trouble.families().items()}

    assert types == {name: type_ for name, (type_, _) in EXPECTED.items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_metric_has_the_labels_of_the_design_and_no_other(fleet_in_trouble, name):
    samples = fleet_in_trouble.families()[f"enginefsm_{name}"].samples

    assert samples
    assert {frozenset(sample.labels) - {"le"} for sample in samples} == {frozenset(EXPECTED[name][1])}
    assert {sample.labels["run"] for sample in samples} == {"run"}


def test_no_series_tells_when_it_was_created(fleet_in_trouble):
    text = generate_latest(fleet_in_trouble.metrics.registry).decode()

    assert "_created" not in text


def test_every_metric_says_what_it_is(fleet_in_trouble):
    assert all(family.documentation for family in fleet_in_trouble.families().values())


# --- what is counted ---


def unwell(event):
    raise OSError("disk full")


def test_counters_stand_at_nought_before_anything_happens(fleet):
    fleet.launch()
    fleet.metrics.expect_calls(fleet.engines[0].labels, "init")
    fleet.metrics.expect_listener(unwell)

    assert fleet.value("transitions_total", reason="adopted") == 1
    assert fleet.value("transitions_total", from_state="launching", to_state="dead", reason="actor_died") == 0
    assert fleet.value("transitions_total", from_state="unavailable", to_state="ready") == 0
    assert fleet.value("retry_exhausted_total", reason="retry_exhausted") == 0
    assert fleet.value("retry_exhausted_total", reason="launch_deadline") == 0
    assert fleet.value("export_errors_total", sink="unwell") == 0
    assert [fleet.value("outcomes_total", method="init", outcome=outcome) for outcome in Outcome] == [0] * len(Outcome)
    for result in ("answered", "unavailable", "failed"):
        assert fleet.value("reawaits_total", method="init", result=result) == 0
    assert fleet.value("launch_duration_seconds_count") == 0
    assert fleet.value("unavailable_duration_seconds_count") == 0
    assert fleet.value("replacement_duration_seconds_count") == 0


def test_a_step_is_counted_by_where_from_where_to_and_why(fleet):
    fleet.launch()
    for _ in range(2):
        fleet.step(EngineState.LAUNCHING, EngineState.UNAVAILABLE, Reason.PROBE_TIMEOUT)

    step = {"from_state": "launching", "to_state": "unavailable", "reason": "probe_timeout"}
    assert fleet.value("transitions_total", model="tiny", worker_type="regular", **step) == 2
    assert fleet.value("transitions_total", **(step | {"from_state": "ready"})) == 0


def test_an_engine_without_the_labels_is_counted_under_empty_ones(fleet):
    fleet.engines = [Engine(labels={})]
    fleet.launch()

    assert fleet.value("transitions_total", model="", worker_type="", reason="adopted") == 1
    assert fleet.value("engines_expected", model="", worker_type="") == 1


def test_a_launch_lasts_until_the_engine_is_ready_for_the_first_time(fleet):
    fleet.step(EngineState.UNAVAILABLE, EngineState.READY, Reason.RECOVERED, spent_s=4, age_s=25, first_ready=True)
    fleet.step(EngineState.UNAVAILABLE, EngineState.READY, Reason.RECOVERED, spent_s=6, age_s=900)

    assert fleet.value("launch_duration_seconds_sum") == 25
    assert fleet.value("launch_duration_seconds_bucket", le="20.0") == 0
    assert fleet.value("launch_duration_seconds_bucket", le="30.0") == 1
    assert fleet.value("unavailable_duration_seconds_sum") == 10
    assert fleet.value("unavailable_duration_seconds_count") == 2


def test_launches_are_told_apart_from_a_second_to_an_hour(fleet):
    fleet.launch()
    buckets = [
        s.labels["le"] for s in fleet.families()["enginefsm_launch_duration_seconds"].samples if "le" in s.labels
    ]

    assert (buckets[0], buckets[-2:]) == ("1.0", ["3600.0", "+Inf"])


@pytest.mark.parametrize(
    ("outcome", "result"),
    [
        (Outcome.SUCCEEDED, "answered"),
        (Outcome.METHOD_FAILED, "answered"),
        (Outcome.ACTOR_UNAVAILABLE, "unavailable"),
        (Outcome.ACTOR_DIED, "failed"),
        (Outcome.CALL_LOST, "failed"),
    ],
)
def test_an_outcome_is_counted_and_that_of_a_resubmission_once_more_as_a_reawait(fleet, outcome, result):
    fleet.outcome(outcome)
    fleet.outcome(outcome, attempt=1)

    assert fleet.value("outcomes_total", method="init", outcome=outcome.value) == 2
    assert fleet.value("reawaits_total", method="init", result=result) == 1


def test_only_probes_have_a_probe_duration(fleet):
    fleet.outcome(Outcome.SUCCEEDED, took_s=3)
    fleet.outcome(Outcome.SUCCEEDED, attempt=1, took_s=0.2, probe=True)

    assert fleet.value("probe_duration_seconds_sum", result="succeeded") == 0.2
    assert fleet.value("probe_duration_seconds_count", result="succeeded") == 1


@pytest.mark.parametrize("reason", [Reason.RETRY_EXHAUSTED, Reason.LAUNCH_DEADLINE])
def test_an_engine_that_was_given_up_is_counted_and_its_time_is_told(fleet, reason):
    fleet.step(EngineState.UNAVAILABLE, EngineState.DEAD, reason)
    fleet.engines = [Engine(state=EngineState.DEAD, reason=reason)]

    assert fleet.value("retry_exhausted_total", reason=reason.value) == 1
    assert fleet.value("retry_exhausted_timestamp_seconds", engine="e", reason=reason.value) == 1000.5


def test_an_engine_that_died_by_itself_was_not_given_up(fleet):
    fleet.step(EngineState.UNAVAILABLE, EngineState.DEAD, Reason.ACTOR_DIED)
    fleet.engines = [Engine(state=EngineState.DEAD, reason=Reason.ACTOR_DIED)]

    assert fleet.value("retry_exhausted_total", reason="retry_exhausted") == 0
    assert fleet.value("retry_exhausted_timestamp_seconds") is None


# --- what is read of the engines ---


def test_the_reason_of_each_engine_that_is_unavailable_or_dead_is_told_and_of_no_other(fleet):
    fleet.engines = [
        Engine("launched"),
        Engine("back", reason=Reason.ACTOR_REACHABLE),
        Engine("well", state=EngineState.READY, reason=Reason.RECOVERED),
        Engine("silent", state=EngineState.UNAVAILABLE, reason=Reason.PROBE_TIMEOUT),
        Engine("killed", state=EngineState.DEAD, reason=Reason.OUT_OF_MEMORY),
    ]

    told = fleet.families()["enginefsm_engine_reason"].samples
    assert {(one.labels["engine"], one.labels["reason"], one.value) for one in told} == {
        ("silent", "probe_timeout", 1), ("killed", "out_of_memory", 1),
    }  # fmt: skip


@pytest.mark.parametrize("state", EngineState)
def test_all_four_states_of_an_engine_are_exported_and_one_is_1(fleet, state):
    fleet.engines = [Engine(state=state)]

    states = {one.value: fleet.value("engine_state", engine="e", state=one.value) for one in EngineState}
    assert states == {one.value: float(one is state) for one in EngineState}
    assert fleet.value("engine_state_since_timestamp_seconds", engine="e") == 1000.5


def test_the_info_of_an_engine_names_its_node_actor_and_incarnation(fleet):
    assert fleet.value("engine_info", engine="e", node="n1", actor_id="abc", incarnation="1") == 1


def test_the_series_of_an_engine_go_away_with_it(fleet):
    fleet.launch()
    fleet.engines = []

    assert fleet.value("transitions_total", reason="adopted") == 1
    assert [s for family in fleet.families().values() for s in family.samples if "engine" in s.labels] == []
    assert fleet.value("engines_expected") is None


def test_engines_are_counted_by_model_and_worker_type(fleet):
    other = {"model": "tiny", "worker_type": "prefill"}
    fleet.engines = [Engine("a"), Engine("b", state=EngineState.DEAD), Engine("c", labels=other)]

    assert fleet.value("engines_expected", worker_type="regular") == 2
    assert fleet.value("engines_expected", worker_type="prefill") == 1


UP, FAILED = {"ever_ready": True}, {"state": EngineState.DEAD}


@pytest.mark.parametrize(
    ("engines", "phase"),
    [
        ([{}, {}], "in_progress"),
        ([UP, {}], "in_progress"),
        ([UP, UP], "succeeded"),
        ([UP, {**UP, **FAILED}], "succeeded"),
        ([UP, {**UP, "state": EngineState.UNAVAILABLE}], "succeeded"),
        ([{}, FAILED], "failed"),
        ([UP, FAILED], "failed"),
    ],
)
def test_a_bringup_is_in_one_phase(fleet, engines, phase):
    fleet.engines = [Engine(name=str(number), **settings) for number, settings in enumerate(engines)]

    phases = ("in_progress", "succeeded", "failed")
    assert [fleet.value("bringup_phase", model="tiny", phase=one) for one in phases] == [one == phase for one in phases]


def test_the_monitor_tells_that_it_lives_what_it_is_and_when_it_ended(fleet):
    before = time.time()
    assert before <= fleet.value("monitor_heartbeat_timestamp_seconds") <= time.time()
    assert fleet.value("monitor_stopped_timestamp_seconds") == 0
    (info,) = fleet.families()["enginefsm_monitor_info"].samples
    assert info.labels["ray_version"] == ray.__version__

    fleet.metrics.stopped()

    assert before <= fleet.value("monitor_stopped_timestamp_seconds") <= time.time()


def test_fleets_of_one_process_do_not_meet_and_nothing_is_in_the_global_registry():
    one, other = Fleet("one"), Fleet("other")
    one.launch()
    other.launch()
    one.launch()

    assert one.value("transitions_total", reason="adopted") == 2
    assert other.value("transitions_total", reason="adopted") == 1
    assert "enginefsm" not in generate_latest(REGISTRY).decode()


# --- a monitor and its listeners ---


@pytest.fixture
def monitor():
    return EngineMonitor(run="run")


def test_an_adopted_engine_has_its_counters_at_nought_and_a_released_one_has_no_series(monitor):
    engine = monitor.adopt(bare_handle("start"), name="e", launch="start", model="tiny")

    assert value(monitor.metrics, "outcomes_total", method="start", outcome="succeeded", model="tiny") == 0
    assert value(monitor.metrics, "engine_state", engine="e", state="launching") == 1

    monitor.release(engine)

    assert value(monitor.metrics, "engine_state", engine="e", state="dead") is None
    assert value(monitor.metrics, "transitions_total", from_state="launching", reason="released") == 1


def test_metrics_are_served_on_loopback_until_closed(monitor):
    server = monitor.serve_metrics(0)
    url = f"http://127.0.0.1:{server.port}/metrics"
    try:
        text = urllib.request.urlopen(url, timeout=10).read().decode()
    finally:
        server.close()

    assert 'enginefsm_monitor_stopped_timestamp_seconds{run="run"} 0.0' in text
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=10)


def test_two_monitors_serve_side_by_side_and_a_port_in_use_is_an_error(monitor):
    server, other = monitor.serve_metrics(0), EngineMonitor(run="other").serve_metrics(0)
    try:
        assert server.port != other.port
        with pytest.raises(OSError, match="in use"):
            monitor.serve_metrics(other.port)
    finally:
        server.close()
        other.close()


def test_a_listener_that_raises_is_logged_and_counted_and_costs_the_others_nothing(monitor, caplog):
    def bad_listener(event):
        raise RuntimeError("no")

    heard = []
    monitor.add_listener(bad_listener)
    monitor.add_listener(heard.append)
    assert value(monitor.metrics, "export_errors_total", run="run", sink="bad_listener") == 0

    with caplog.at_level(logging.ERROR, logger="enginefsm"):
        engine = monitor.adopt(bare_handle(), name="e")
        monitor.release(engine)

    assert [event.reason for event in heard] == [Reason.ADOPTED, Reason.RELEASED]
    assert value(monitor.metrics, "export_errors_total", sink="bad_listener") == 2
    assert [record.exc_info[1].args for record in caplog.records] == [("no",), ("no",)]
    assert "bad_listener" in caplog.text


def test_a_listener_hears_what_comes_after_it_was_added(monitor):
    heard = []
    monitor.adopt(bare_handle(), name="before")
    monitor.add_listener(heard.append)
    monitor.adopt(bare_handle(), name="after")

    assert [event.engine for event in heard] == ["after"]


def test_what_a_listener_does_to_the_fleet_is_told_after_what_it_heard(monitor):
    heard, engines = [], {}

    def releases_the_first(event):
        heard.append((event.engine, event.reason))
        if event.engine == "second" and event.reason is Reason.ADOPTED:
            monitor.release(engines["first"])
            heard.append("done")

    engines["first"] = monitor.adopt(bare_handle(), name="first")
    monitor.add_listener(releases_the_first)
    monitor.adopt(bare_handle(), name="second")

    assert heard == [("second", Reason.ADOPTED), "done", ("first", Reason.RELEASED)]


def test_events_of_two_threads_come_one_at_a_time_all_of_them_and_each_engines_in_order(monitor):
    heard, inside, start = [], threading.Lock(), threading.Barrier(2)

    def listener(event):
        assert inside.acquire(blocking=False), "two events at once"
        heard.append(event)
        inside.release()

    monitor.add_listener(listener)

    def work(prefix):
        start.wait(10)
        for number in range(100):
            monitor.release(monitor.adopt(bare_handle(), name=f"{prefix}{number}"))

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as threads:
            for future in [threads.submit(work, prefix) for prefix in "ab"]:
                future.result(30)
    finally:
        sys.setswitchinterval(interval_s)

    assert value(monitor.metrics, "export_errors_total", sink="listener") == 0
    for prefix in "ab":
        told = [(event.engine, event.reason) for event in heard if event.engine.startswith(prefix)]
        assert told == [
            (f"{prefix}{number}", reason) for number in range(100) for reason in (Reason.ADOPTED, Reason.RELEASED)
        ]


def test_an_event_that_comes_while_a_delivery_ends_is_not_left_behind(monitor, monkeypatch):
    heard = []

    class Claim(dict):
        """The claim to deliver; as the first thread gives it back, another one brings an event."""

        brings = ["late"]  # noqa: RUF012

        def pop(self, *key):
            while self.brings:
                with ThreadPoolExecutor(1) as thread:
                    thread.submit(monitor.adopt, bare_handle(), name=self.brings.pop()).result(10)
            return super().pop(*key)

    monitor.add_listener(heard.append)
    monkeypatch.setattr(monitor._delivery, "_deliverer", Claim())
    monitor.adopt(bare_handle(), name="first")

    assert [event.engine for event in heard] == ["first", "late"]


def test_the_module_serves_the_metrics_of_the_processs_monitor(monkeypatch):
    monkeypatch.setattr(enginefsm, "_monitor", None)
    monitor = enginefsm.configure(run="glm-rl")
    server = enginefsm.serve_metrics(0)
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10).read().decode()
    finally:
        server.close()

    assert 'enginefsm_monitor_info{ray_version="' in text
    assert 'run="glm-rl"' in text
    assert enginefsm.default_monitor() is monitor


def test_the_environment_of_a_multiprocess_client_changes_nothing(tmp_path):
    script = """
import enginefsm, prometheus_client
monitors = [enginefsm.EngineMonitor(run="same") for _ in range(2)]
monitors[0].metrics.listener_failed(print)
name, labels = "enginefsm_export_errors_total", {"run": "same", "sink": "print"}
print([monitor.metrics.registry.get_sample_value(name, labels) for monitor in monitors])
"""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "missing")}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert (told.stdout.strip(), told.returncode) == ("[1.0, None]", 0), told.stderr

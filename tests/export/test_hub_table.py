"""What the hub makes of reports, with clocks of the test's own: who counts, what adds up, what is forgotten."""

from __future__ import annotations

import gzip
import itertools
import random
from importlib.metadata import version

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest
from support.bare_handles import bare_handle
from support.exports import samples, value, without_times

from enginefsm import EngineMonitor, Reason
from enginefsm._engine.proxy import managed
from enginefsm.export.fleet import PROTOCOL, SILENT_S, FleetTable, counts, row
from enginefsm.export.hub import COMPRESSION


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def table(clock):
    return FleetTable(clock, clock)


class Manager:
    """A monitor, and the reports that it would send."""

    def __init__(self, table, clock, run="glm", number=0):
        self.table, self.clock, self.number = table, clock, number
        self.monitor = EngineMonitor(run=run)
        self.seq = itertools.count(1)
        self.engines = {}
        self.stopped_s = 0.0
        self.job = self.actor = ""
        self.held = {}

    def adopt(self, *names, **labels):
        for name in names:
            labels = {"model": "tiny", "worker_type": "regular"} | labels
            self.engines[name] = self.monitor.adopt(bare_handle(), name=name, **labels)
        return self

    def move(self, name, *reasons):
        for reason in reasons:
            assert managed(self.engines[name]).step(reason)
        self.monitor._delivery.deliver()
        return self

    def report(self, names=None, seq=None):
        """Of those engines, or of all."""
        present = self.monitor.engines() if names is None else [self.monitor.engine(name) for name in names]
        return {
            "protocol": PROTOCOL, "run": self.monitor.run, "manager": f"manager-{self.number}",
            "seq": next(self.seq) if seq is None else seq, "full": names is None,
            "rows": [row(managed(engine).snapshot()) for engine in present if engine is not None],
            "gone": [name for name in names or () if self.monitor.engine(name) is None],
            "counts": counts(self.monitor.metrics.collect_counts()), "held": self.held,
            "job": self.job, "actor": self.actor, "started_s": 900.0, "heartbeat_s": self.clock.now,
            "stopped_s": self.stopped_s, "host": "h", "pid": 1, "version": version("enginefsm"),
            "ray_version": "2.60.0",
        }  # fmt: skip

    def send(self, names=None):
        assert self.table.accept(self.report(names))
        return self


@pytest.fixture
def manager(table, clock):
    numbers = itertools.count()
    return lambda run="glm": Manager(table, clock, run, next(numbers))


def text_of(table):
    return table.text().decode()


def shown(table, state):
    """The engines in a state."""
    return {
        dict(labels)["engine"]
        for (name, labels), one in samples(text_of(table)).items()
        if name == "enginefsm_engine_state" and dict(labels)["state"] == state and one == 1
    }


def transitions(table, reason, **labels):
    found = [
        one
        for (name, having), one in samples(text_of(table)).items()
        if name == "enginefsm_transitions_total" and {"reason": reason, **labels}.items() <= dict(having).items()
    ]
    return sum(found)


def test_one_manager_s_text_is_that_of_its_own_registry(table, manager):
    one = manager().adopt("a", "b", "c", 'odd "name"\\\n').adopt("d", model="other", node="n1")
    one.move("a", Reason.INIT_SUCCEEDED, Reason.ACTOR_UNAVAILABLE).move("b", Reason.RETRY_EXHAUSTED)
    one.move("c", Reason.INIT_FAILED).send()
    own = generate_latest(one.monitor.metrics.registry).decode()
    assert without_times(text_of(table)) == without_times(own)
    for name in ("engine_state_since", "retry_exhausted"):
        key = f"enginefsm_{name}_timestamp_seconds"
        assert value(text_of(table), key, engine="b") == pytest.approx(value(own, key, engine="b"), abs=0.001)
    helps = {line for line in own.splitlines() if line.startswith("#")}
    assert {line for line in text_of(table).splitlines() if line.startswith("#")} == helps


def test_a_report_that_comes_again_or_late_changes_nothing(table, manager):
    one = manager().adopt("a", "b").send()
    early = one.move("a", Reason.INIT_SUCCEEDED).report(["a"])
    late = one.move("a", Reason.ACTOR_UNAVAILABLE).report(["a"])
    assert table.accept(late)
    text = text_of(table)
    assert shown(table, "unavailable") == {"a"}
    assert table.accept(early)
    assert table.accept({**late, "rows": []})
    assert text_of(table) == text
    assert transitions(table, "init_succeeded") == 1


@settings(deadline=None, max_examples=30)
@given(st.randoms(use_true_random=False), st.integers(2, 5))
def test_however_reports_are_repeated_and_shuffled_the_end_is_the_same(rng, size):
    clock = Clock()
    table = FleetTable(clock, clock)
    managers = [Manager(table, clock, number=number) for number in range(size)]
    waiting = []
    for one in managers:
        one.adopt(f"engine-{one.number}").send()
        route = [Reason.ACTOR_UNAVAILABLE, Reason.ACTOR_REACHABLE] * rng.randrange(1, 6)
        # Each report has what changed since the first: what is not acknowledged is sent again with the next.
        waiting += [one.move(f"engine-{one.number}", reason).report([f"engine-{one.number}"]) for reason in route]
    last = waiting[:]
    waiting += rng.sample(waiting, len(waiting) // 2)
    rng.shuffle(waiting)
    for report in waiting:
        assert table.accept(dict(report))
    moved = sum(report["seq"] - 1 for report in {report["manager"]: report for report in last}.values())
    assert transitions(table, "actor_unavailable") + transitions(table, "actor_reachable") == moved
    assert len(shown(table, "launching")) == size


def test_counters_of_the_managers_of_a_run_add_up_and_those_of_other_runs_do_not(table, manager):
    for run, times in (("glm", 3), ("glm", 4), ("other", 5)):
        one = manager(run).adopt(f"engine-{times}")
        one.move(f"engine-{times}", *[Reason.ACTOR_UNAVAILABLE, Reason.ACTOR_REACHABLE] * times).send()
    assert transitions(table, "actor_unavailable", run="glm") == 7
    assert transitions(table, "actor_unavailable", run="other") == 5
    assert value(text_of(table), "enginefsm_unavailable_duration_seconds_count", run="glm") == 7
    assert value(text_of(table), "enginefsm_engines_expected", run="glm") == 2


def test_a_manager_that_is_not_known_is_asked_for_everything(table, manager):
    one = manager().adopt("a", "b")
    assert not table.accept(one.move("a", Reason.INIT_SUCCEEDED).report(["a"]))
    assert shown(table, "ready") == set()
    one.send()
    assert (shown(table, "ready"), shown(table, "launching")) == ({"a"}, {"b"})


def test_a_full_report_is_all_there_is_and_a_released_engine_is_gone(table, manager):
    one = manager().adopt("a", "b", "c").send()
    one.monitor.release(one.engines["a"])
    one.send(["a"])
    assert shown(table, "launching") == {"b", "c"}
    one.monitor.release(one.engines["b"])
    one.send()
    assert shown(table, "launching") == {"c"}
    assert value(text_of(table), "enginefsm_engines_expected") == 1


def test_an_engine_of_two_managers_is_as_the_one_says_that_moved_last(table, manager):
    old = manager().adopt("a").move("a", Reason.RETRY_EXHAUSTED).send()
    new = manager().adopt("a").send()
    assert (shown(table, "launching"), shown(table, "dead")) == ({"a"}, set())
    old.send()
    assert shown(table, "launching") == {"a"}
    new.move("a", Reason.INIT_SUCCEEDED).send(["a"])
    assert shown(table, "ready") == {"a"}
    assert "enginefsm_retry_exhausted_timestamp_seconds{" not in text_of(table)


def test_a_bringup_that_is_started_again_smaller_does_not_show_the_engines_of_the_one_before(table, manager, clock):
    old = manager().adopt("a", "b").move("b", Reason.RETRY_EXHAUSTED).send()
    old.stopped_s = clock.now
    old.send()
    assert shown(table, "dead") == {"b"}, "until it is started again, what it left is shown"
    clock.now += 5
    manager().adopt("a").send()
    assert (shown(table, "launching"), shown(table, "dead")) == ({"a"}, set())
    assert value(text_of(table), "enginefsm_bringup_phase", phase="in_progress") == 1
    assert value(text_of(table), "enginefsm_monitor_stopped_timestamp_seconds") == 0
    managers = table.as_json()["runs"][0]["managers"]
    assert [one["state"] for one in managers] == ["replaced", "alive"]


def test_a_manager_that_vanishes_gives_way_only_to_one_that_came_after_it(table, manager, clock):
    vanished = manager().adopt("a").send()
    beside = manager().adopt("b").send()
    clock.now += 1
    vanished.send()
    clock.now += SILENT_S
    beside.send()
    assert shown(table, "launching") == {"a", "b"}, "one that was there beside it is no successor"
    assert table.as_json()["runs"][0]["state"] == "silent"
    manager().adopt("c").send()
    assert shown(table, "launching") == {"b", "c"}
    assert table.as_json()["runs"][0]["state"] == "alive"


def test_the_heartbeat_of_a_run_goes_on_while_a_manager_does_and_its_end_is_that_of_the_last(table, manager, clock):
    one, two = manager().adopt("a").send(), manager().adopt("b").send()
    clock.now += 10
    one.stopped_s = clock.now
    one.send([])
    clock.now += 10
    two.send([])
    heartbeat, stopped = (f"enginefsm_monitor_{what}_timestamp_seconds" for what in ("heartbeat", "stopped"))
    assert (value(text_of(table), heartbeat), value(text_of(table), stopped)) == (1020, 0)
    clock.now += 10
    assert value(text_of(table), heartbeat) == 1020, "the manager's last heartbeat, not the time of the scrape"
    two.stopped_s = clock.now
    two.send([])
    assert (value(text_of(table), heartbeat), value(text_of(table), stopped)) == (1030, 1030)
    assert table.as_json()["runs"][0]["state"] == "stopped"


def test_a_manager_in_an_actor_that_falls_silent_with_the_end_of_its_job_is_stopped(table, manager, clock):
    inside, driver, other = (manager(run).adopt("a") for run in ("inside", "driver", "other"))
    inside.job, other.job = "02000000", "03000000"
    for one in (inside, driver, other):
        one.send()
    table.end("job", {"02000000": clock.now})
    assert table.silent("job") == set(), "while it is heard of, it goes on"
    assert [run["state"] for run in table.as_json()["runs"]] == ["alive", "alive", "alive"]
    clock.now += SILENT_S
    assert table.silent("job") == {"02000000", "03000000"}
    table.end("job", {"02000000": 1005.0})
    assert {run["run"]: run["state"] for run in table.as_json()["runs"]} == {
        "inside": "stopped", "driver": "silent", "other": "silent",
    }  # fmt: skip
    assert value(text_of(table), "enginefsm_monitor_stopped_timestamp_seconds", run="inside") == 1005
    inside.send()
    assert table.as_json("inside")["runs"][0]["state"] == "alive", "it was not gone after all"


def test_a_manager_that_falls_silent_with_the_good_end_of_its_actor_is_stopped(table, manager, clock):
    inside, driver = manager("inside").adopt("a"), manager("driver").adopt("a")
    inside.actor = "a1"
    for one in (inside, driver):
        one.send()
    assert table.silent("actor") == set(), "while it is heard of, it goes on"
    clock.now += SILENT_S
    assert table.silent("actor") == {"a1"}
    table.end("actor", {"a1": 1005.0})
    assert {run["run"]: run["state"] for run in table.as_json()["runs"]} == {"inside": "stopped", "driver": "silent"}
    assert value(text_of(table), "enginefsm_monitor_stopped_timestamp_seconds", run="inside") == 1005


def test_a_manager_of_an_older_release_says_nothing_of_its_actor(table, manager, clock):
    one = manager().adopt("a")
    report = one.report()
    del report["actor"]
    assert table.accept(report)
    clock.now += SILENT_S
    assert table.silent("actor") == set()


def test_a_heartbeat_alone_keeps_the_engines_as_they_are(table, manager, clock):
    one = manager().adopt("a").send()
    clock.now += 1000
    one.send([])
    assert shown(table, "launching") == {"a"}
    assert table.silent_for_s() == 0


def test_a_forgotten_manager_leaves_its_counts_while_its_run_goes_on(table, manager, clock):
    old = manager().adopt("a").move("a", Reason.ACTOR_UNAVAILABLE).send()
    clock.now += 1800
    new = manager().adopt("b").move("b", Reason.ACTOR_UNAVAILABLE).send()
    table.forget(1800)
    assert shown(table, "unavailable") == {"b"}
    assert transitions(table, "actor_unavailable") == 2, "a counter that falls is a reset to Prometheus"
    assert not table.accept(old.report([]))
    old.send()
    assert transitions(table, "actor_unavailable") == 2, "it was not gone after all: it is not counted twice"
    clock.now += 1800
    table.forget(1800)
    assert "enginefsm_transitions_total{" not in text_of(table)
    assert table.as_json()["runs"] == []
    assert new.monitor.engines()


def test_a_report_of_another_protocol_is_refused_with_its_version(table, manager):
    with pytest.raises(ValueError, match=r"protocol 1, not 2: another version of enginefsm \("):
        table.accept(manager().report() | {"protocol": 2})


def test_the_json_says_what_is_known_of_each_engine(table, manager, clock):
    one = manager("glm-rl").adopt("a", node="n1", rank=3).adopt("b", model="other").move("a", Reason.INIT_SUCCEEDED)
    manager("idle").send()
    one.move("a", Reason.ACTOR_UNAVAILABLE).send()
    since_s = one.engines["a"].fsm.since
    clock.now = since_s + 12.5
    answer = table.as_json()
    assert (answer["version"], answer["now_s"], [run["run"] for run in answer["runs"]]) == (
        1,
        clock.now,
        ["glm-rl", "idle"],
    )
    run = answer["runs"][0]
    assert run["phases"] == {"other": "in_progress", "tiny": "succeeded"}
    assert run["counts"] == {"launching": 1, "ready": 0, "unavailable": 1, "dead": 0}
    spent = run["engines"][1].pop("spent_s")
    assert run["engines"][1] == {
        "engine": "a", "model": "tiny", "worker_type": "regular", "node": "n1",
        "labels": {"model": "tiny", "worker_type": "regular", "node": "n1", "rank": "3"},
        "state": "unavailable", "reason": "actor_unavailable", "since_s": since_s, "in_state_s": pytest.approx(12.5),
        "incarnation": 1, "actor_id": managed(one.engines["a"]).actor_id, "ever_ready": True, "manager": "manager-0",
        "stage": None, "max_task_retries": None, "past": [],
    }  # fmt: skip
    assert list(spent) == ["launching", "ready"]
    assert min(spent.values()) >= 0
    assert table.as_json("idle")["runs"] == [answer["runs"][1]]
    assert table.as_json("no such run")["runs"] == []


def test_verdicts_that_managers_hold_add_up_and_those_of_a_manager_that_is_gone_are_held_no_more(table, manager, clock):
    def held(why):
        return samples(text_of(table))["enginefsm_verdicts_held", (("run", "glm"), ("why", why))]

    one, other = manager().adopt("a"), manager().adopt("b")
    one.held, other.held = {"mass_outage": 2, "kill_cap": 0}, {"mass_outage": 1}
    one.send()
    other.send()
    assert (held("mass_outage"), held("kill_cap")) == (3, 0)
    clock.now += SILENT_S
    one.send()
    assert held("mass_outage") == 2
    one.stopped_s = clock.now
    one.send()
    assert held("mass_outage") == 0


def test_ten_thousand_engines_as_slime_names_them_are_eight_and_a_half_megabytes_half_a_megabyte_as_sent(
    table, manager
):
    one = manager("glm-rl")
    for number in range(10_000):
        one.adopt(f"default/regular/{number}", model="GLM-4.6-FP8", node=f"10.0.{number // 256}.{number % 256}")
    for engine in random.Random(1).sample(list(one.engines.values()), 5_000):
        managed(engine).step(Reason.INIT_SUCCEEDED)
    one.send()
    text = table.text()
    # Six lines an engine, of which the names and labels alone are 8.3 MB.
    assert len(text) <= 8.5e6
    assert len(gzip.compress(text, COMPRESSION)) <= 0.55e6

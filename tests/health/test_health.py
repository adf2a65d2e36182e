"""The health monitor, on real Ray with real faults: what it takes for trouble, for an end, and for neither."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import threading
import time
from http.server import BaseHTTPRequestHandler

import psutil
import pytest
import ray
from support.engines import Probed, wait_until
from support.servers import serving
from support.stopwatch import Stopwatch

import enginefsm
from enginefsm import EngineState, Reason, ServerAnswer
from enginefsm.health import monitor as health_module
from enginefsm.health.monitor import STOP_S
from enginefsm.rehearsal import chaos
from enginefsm.rehearsal.standin import StandInEngine

FAST = {"probe": "well", "interval_s": 0.2, "timeout_s": 0.5, "failure_threshold": 3}
READY, UNAVAILABLE, DEAD = EngineState.READY, EngineState.UNAVAILABLE, EngineState.DEAD


class Verdicts:
    """A callback that keeps what it is told."""

    def __init__(self):
        self.given = []
        self.came = threading.Condition()

    def __call__(self, verdict):
        with self.came:
            self.given.append(verdict)
            self.came.notify_all()

    def wait_for(self, count=1, timeout_s=60):
        with self.came:
            assert self.came.wait_for(lambda: len(self.given) >= count, timeout_s), self.given
            return self.given[count - 1]


class Served(StandInEngine):
    """An engine with a server in a process of its own."""

    def __init__(self, directory):
        super().__init__(import_s=0, load_s=0)


class Hosted(Probed):
    """An engine whose server is the test's."""

    def url(self):
        return (self.directory / "url").read_text()


@contextlib.contextmanager
def server_of(rig):
    """A server for the engine that answers with `status`, until the end of the block: then its port refuses."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(server.status)
            self.end_headers()

    with serving(Handler) as server:
        server.status = 200
        (rig.directory / "url").write_text(f"http://127.0.0.1:{server.server_port}")
        yield server


@pytest.fixture
def verdicts():
    return Verdicts()


@pytest.fixture
def watch(fleet):
    """`EngineMonitor.watch` at the pace of a test."""

    def begin(engines, **settings):
        return fleet.monitor.watch(engines, **FAST | settings)

    yield begin
    fleet.monitor.close()


def bring_up(fleet, count=1, cls=Probed, **options):
    rigs = [fleet.launch(cls, **options) for _ in range(count)]
    for rig in rigs:
        rig.open()
    fleet.monitor.get([rig.engine.init.remote() for rig in rigs])
    return rigs


def probes(rig):
    return len(rig.read("probes").splitlines())


def wait_for_probes(rig, more=1):
    before = probes(rig)
    wait_until(lambda: probes(rig) >= before + more, what="a probe")


def wait_until_all_came(rig):
    """Until the actor has had the probes that were sent: it has what one process asks in order."""
    time.sleep(0.3)  # one was about to be sent, it may be
    ray.get(rig.engine.handle.times_init_ran.remote())


def slow_down(rig):
    """Until a probe is slow."""
    before = rig.read("slowed")
    rig.open("slow")
    wait_until(lambda: rig.read("slowed") != before, what="a slow probe")


def cut_during_a_probe(rig):
    slow_down(rig)
    rig.cut()


def heal(rig, *files):
    for name in files:
        (rig.directory / name).unlink()


def checks(fleet, actor, server="not_asked"):
    labels = {"model": "tiny", "worker_type": "regular", "actor": actor, "server": server}
    return fleet.metric("enginefsm_health_checks_total", **labels) or 0


def held(fleet, why):
    return fleet.metric("enginefsm_verdicts_held", why=why)


def end_of(verdict):
    return verdict.reason, verdict.by_monitor, verdict.cause


OURS = (Reason.HEALTH_CHECKS_FAILED, True)
BUDGET_SPENT = (Reason.RETRY_EXHAUSTED, True)


def test_an_engine_whose_connection_breaks_becomes_unavailable_and_ready_again_and_no_break_is_a_failure(
    fleet, watch, verdicts
):
    (rig,) = bring_up(fleet)
    watch([rig.engine], on_dead=verdicts, timeout_s=30, failure_threshold=1)
    for times in (1, 2):
        cut_during_a_probe(rig)
        fleet.wait_for_state(rig.engine, UNAVAILABLE, times)
        assert rig.engine.fsm.reason is Reason.ACTOR_UNAVAILABLE
        heal(rig, "slow")
        fleet.wait_for_state(rig.engine, READY, times + 1)
    assert verdicts.given == []
    assert rig.times_init_began() == 1


def test_a_killed_actor_is_dead_by_rays_word_within_an_interval(fleet, watch, verdicts):
    rigs, took_s = bring_up(fleet, 3), []
    watch([rig.engine for rig in rigs], on_dead=verdicts)
    for count, rig in enumerate(rigs, start=1):
        wait_for_probes(rig)
        pid = rig.pid
        with Stopwatch() as since_killed:
            chaos.kill(pid)
            verdict = verdicts.wait_for(count)
            took_s.append(since_killed.s)
        assert (verdict.engine, verdict.engines) == (rig.engine, (rig.engine,))
        assert end_of(verdict)[:2] == (Reason.ACTOR_DIED, False)
        assert rig.engine.fsm.state is DEAD
    assert min(took_s) < 2  # 0.2 s, a loaded machine aside


def test_a_death_that_somebody_else_saw_is_told_too(fleet, watch, verdicts):
    (rig,) = bring_up(fleet)
    health = watch([rig.engine], on_dead=verdicts)
    health.pause()
    chaos.kill(rig.pid)
    with pytest.raises(ray.exceptions.ActorDiedError):
        fleet.monitor.get(rig.engine.launched.remote())
    health.resume()
    assert end_of(verdicts.wait_for()) == (Reason.ACTOR_DIED, False, None)


def test_a_frozen_actor_is_given_up_after_the_threshold_and_one_that_thaws_before_is_not(fleet, watch, verdicts):
    (rig,) = bring_up(fleet)
    watch([rig.engine], on_dead=verdicts, failure_threshold=15)
    wait_for_probes(rig)
    with chaos.freeze(rig.pid):
        fleet.wait_for_state(rig.engine, UNAVAILABLE)
        assert rig.engine.fsm.reason is Reason.PROBE_TIMEOUT
    fleet.wait_for_state(rig.engine, READY, 2)
    assert verdicts.given == []
    with chaos.freeze(rig.pid):
        verdict = verdicts.wait_for()
    assert end_of(verdict) == (*OURS, Reason.PROBE_TIMEOUT)
    assert verdict.engine is rig.engine
    assert ray.get(rig.engine.handle.times_init_ran.remote(), timeout=30) == 1  # its end is the callback's to make


def test_an_answer_that_comes_late_is_an_answer_and_no_probe_queues_behind_it(fleet, watch, verdicts):
    (rig,) = bring_up(fleet)
    watch([rig.engine], on_dead=verdicts, failure_threshold=50)
    wait_for_probes(rig)
    slow_down(rig)
    sent, silent = probes(rig), checks(fleet, "silent")
    wait_until(lambda: checks(fleet, "silent") >= silent + 5, what="some intervals")
    assert rig.engine.fsm.state is UNAVAILABLE
    assert probes(rig) == sent
    heal(rig, "slow")
    wait_until(lambda: rig.engine.fsm.state is READY, what="the late answer")
    assert verdicts.given == []


@pytest.mark.parametrize("sign", ["ill", "raises"])
def test_what_is_false_or_raises_is_a_failure_and_a_success_clears_them(fleet, watch, verdicts, sign):
    (rig,) = bring_up(fleet)
    watch([rig.engine], on_dead=verdicts, failure_threshold=10)
    for _ in range(4):  # four times three failures or so, never ten in a row
        before = checks(fleet, "failed")
        rig.open(sign)
        wait_until(lambda b=before: checks(fleet, "failed") >= b + 3, what="three failures")
        assert rig.engine.fsm.state is UNAVAILABLE
        heal(rig, sign)
        wait_until(lambda: rig.engine.fsm.state is READY, what="the success")
    assert verdicts.given == []
    rig.open(sign)
    assert end_of(verdicts.wait_for()) == (*OURS, Reason.PROBE_FAILED)
    assert (UNAVAILABLE, DEAD, Reason.HEALTH_CHECKS_FAILED) in fleet.steps(rig.engine)


def test_the_actors_other_answers_do_not_make_an_engine_ready_whose_probe_fails(fleet, watch):
    (rig,) = bring_up(fleet)
    watch([rig.engine], failure_threshold=1000)
    rig.open("ill")
    wait_until(lambda: rig.engine.fsm.reason is Reason.PROBE_FAILED, what="its failure")
    assert fleet.monitor.get(rig.engine.times_init_ran.remote()) == 1
    assert rig.engine.fsm.state is UNAVAILABLE
    heal(rig, "ill")
    wait_until(lambda: rig.engine.fsm.state is READY, what="the success")


def test_a_probe_is_given_the_timeout(fleet, watch):
    (rig,) = bring_up(fleet)
    watch([rig.engine], timeout_s=0.75)
    wait_for_probes(rig)
    assert rig.read("probes").splitlines()[0].split()[1] == "0.75"


def test_probes_are_plain_calls_of_which_the_actor_keeps_nothing(fleet, watch):
    (rig,) = bring_up(fleet)
    before = fleet.monitor.get(rig.engine.remembered.remote())
    watch([rig.engine])
    wait_for_probes(rig, 5)
    assert fleet.monitor.get(rig.engine.remembered.remote()) <= before + 1


def test_silence_while_a_call_of_ours_is_out_says_nothing(fleet, watch, verdicts):
    (rig,) = bring_up(fleet)
    watch([rig.engine], on_dead=verdicts, failure_threshold=1, timeout_s=2)
    held_call = rig.engine.hold.remote()
    rig.wait_for("held")
    wait_until(lambda: checks(fleet, "busy") >= 4, what="some intervals")
    assert rig.engine.fsm.state is READY
    rig.open("let_go")
    fleet.monitor.get(held_call)
    wait_for_probes(rig, 2)
    assert fleet.steps(rig.engine)[-1][1] is READY
    assert verdicts.given == []


def test_a_call_that_has_ended_hides_no_frozen_actor_though_nobody_has_awaited_it(fleet, watch, verdicts):
    (rig,) = bring_up(fleet)
    kept = [rig.engine.times_init_ran.remote() for _ in range(3)]
    ray.wait([call.ref for call in kept], num_returns=3)
    watch([rig.engine], on_dead=verdicts)
    wait_for_probes(rig)
    with chaos.freeze(rig.pid):
        verdict = verdicts.wait_for()
    assert end_of(verdict) == (*OURS, Reason.PROBE_TIMEOUT)


def test_a_listener_that_is_slow_hides_no_frozen_actor(fleet, watch, verdicts):
    (rig,) = bring_up(fleet)
    watch([rig.engine], on_dead=verdicts)
    wait_for_probes(rig)
    # Longer than the watch takes for a stop of this process, which forgives silence.
    fleet.monitor.add_listener(lambda event: time.sleep(2) if isinstance(event, enginefsm.HealthChecked) else None)
    with chaos.freeze(rig.pid):
        verdict = verdicts.wait_for()
    assert end_of(verdict) == (*OURS, Reason.PROBE_TIMEOUT)


def test_a_call_that_was_cut_off_may_run_on_and_excuses_silence_though_nobody_awaits_it(fleet, watch, verdicts):
    (rig,) = bring_up(fleet)
    watch([rig.engine], on_dead=verdicts, failure_threshold=1, timeout_s=1)
    held = rig.engine.hold.remote()
    rig.wait_for("held")
    rig.cut()
    ray.wait([held.ref])  # sealed
    before = checks(fleet, "busy")
    wait_until(lambda: checks(fleet, "busy") >= before + 4, what="some intervals")
    rig.open("let_go")
    wait_for_probes(rig, 2)
    wait_until(lambda: rig.engine.fsm.state is READY, what="the recovery")
    assert verdicts.given == []


def test_an_engine_is_not_probed_before_it_has_launched(fleet, watch):
    rig = fleet.launch(Probed)
    other = bring_up(fleet)[0]
    watch([rig.engine, other.engine])
    wait_for_probes(other, 3)
    assert probes(rig) == 0
    rig.open()
    fleet.monitor.get(rig.engine.init.remote())
    wait_for_probes(rig)


def test_an_engine_that_dies_before_anybody_has_seen_its_launch_succeed_is_told_of(fleet, watch, verdicts):
    rigs = [fleet.launch(Probed) for _ in range(2)]
    watch([rig.engine for rig in rigs], on_dead=verdicts)
    inits = [rigs[0].engine.init.remote(), rigs[1].engine.init.remote(error="no GPU")]
    rigs[1].open()
    with pytest.raises(RuntimeError, match="no GPU"):
        fleet.monitor.get(inits)
    rigs[0].open()
    ray.wait([inits[0].ref])
    assert end_of(verdicts.wait_for()) == (Reason.INIT_FAILED, False, None)
    assert rigs[0].engine.fsm.state is EngineState.LAUNCHING
    chaos.kill(rigs[0].pid)
    verdict = verdicts.wait_for(2)
    assert (verdict.engine, end_of(verdict)) == (rigs[0].engine, (Reason.ACTOR_DIED, False, None))
    assert probes(rigs[0]) == 0


# The second opinion.


def actor_pid(rig):
    return ray.get(rig.engine.handle.__ray_call__.remote(lambda actor: os.getpid()))


def server_pid(rig):
    """Of the engine's server: below its keeper, which is below the actor."""
    below = psutil.Process(actor_pid(rig)).children(recursive=True)
    return next(process.pid for process in below if not process.children())


def test_a_server_that_dies_under_a_living_actor_is_noticed_by_its_probe(fleet, watch, verdicts):
    rigs = bring_up(fleet, 2, Served)
    watch([rig.engine for rig in rigs], on_dead=verdicts, probe="health_generate", timeout_s=2)
    wait_until(lambda: checks(fleet, "answered") >= 4, what="some checks")
    pid = server_pid(rigs[0])
    with Stopwatch() as since_killed:
        chaos.kill(pid)
        verdict = verdicts.wait_for()
        assert since_killed.s < 3 * 0.2 + 2 + 1
    assert (verdict.engine, end_of(verdict)) == (rigs[0].engine, (*OURS, Reason.PROBE_FAILED))


def test_a_server_that_dies_is_noticed_over_http_though_the_actor_says_that_all_is_well(fleet, watch, verdicts):
    rigs = bring_up(fleet, 2, Served)
    watch([rig.engine for rig in rigs], on_dead=verdicts, probe="__ray_ready__", address="url", timeout_s=2)
    wait_until(lambda: checks(fleet, "answered", "serves") >= 4, what="some checks")
    pid = server_pid(rigs[0])
    with Stopwatch() as since_killed:
        chaos.kill(pid)
        verdict = verdicts.wait_for()
        assert since_killed.s < 3 * 0.2 + 2 + 1
    assert (verdict.engine, end_of(verdict)) == (rigs[0].engine, (*OURS, Reason.PROBE_FAILED))
    assert verdict.server is ServerAnswer.FAILS
    assert checks(fleet, "answered", "fails") >= 3
    assert rigs[1].engine.fsm.state is READY


def test_an_actor_that_is_silent_while_its_server_serves_is_unavailable_and_no_more(fleet, watch, verdicts):
    rigs = bring_up(fleet, 2, Served)
    settings = {"probe": "__ray_ready__", "address": "url", "failure_threshold": 1, "timeout_s": 2}
    watch([rig.engine for rig in rigs], on_dead=verdicts, **settings)
    wait_until(lambda: checks(fleet, "answered", "serves") >= 4, what="some checks")
    with chaos.freeze(actor_pid(rigs[0])):
        wait_until(lambda: checks(fleet, "silent", "serves") >= 5, what="more silence than the threshold")
        assert (rigs[0].engine.fsm.state, rigs[0].engine.fsm.reason) == (UNAVAILABLE, Reason.PROBE_TIMEOUT)
    fleet.wait_for_state(rigs[0].engine, READY, 2)
    assert verdicts.given == []


def test_an_actor_that_is_silent_while_its_server_serves_is_given_up_when_the_budget_is_spent(
    cluster, make_fleet, verdicts
):
    fleet = make_fleet(enginefsm.RetryPolicy(budget_s=1))
    rigs = bring_up(fleet, 2, Served)
    settings = FAST | {"probe": "__ray_ready__", "failure_threshold": 1, "timeout_s": 2}
    fleet.monitor.watch([rig.engine for rig in rigs], address="url", on_dead=verdicts, **settings)
    wait_until(lambda: checks(fleet, "answered", "serves") >= 4, what="some checks")
    began = time.monotonic()
    with chaos.freeze(actor_pid(rigs[0])):
        verdict = verdicts.wait_for()
    fleet.monitor.close()
    assert time.monotonic() - began >= 1
    assert (end_of(verdict), verdict.server) == ((*BUDGET_SPENT, Reason.PROBE_TIMEOUT), ServerAnswer.SERVES)


def test_while_a_call_is_out_a_server_that_is_unwell_ends_nothing_and_one_that_refuses_does(fleet, watch, verdicts):
    (rig,) = bring_up(fleet, cls=Hosted)
    watch([rig.engine], on_dead=verdicts, address="url", failure_threshold=1)
    with server_of(rig) as server:
        wait_until(lambda: checks(fleet, "answered", "serves") >= 2, what="some checks")
        held_call = rig.engine.hold.remote()  # as an update of weights, for which SGLang's scheduler is held
        rig.wait_for("held")
        wait_until(lambda: checks(fleet, "busy", "serves") >= 1, what="a check behind the call")
        server.status = 503
        wait_until(lambda: checks(fleet, "busy", "unwell") >= 4, what="some intervals")
        assert rig.engine.fsm.state is READY
    assert verdicts.wait_for().server is ServerAnswer.FAILS
    rig.open("let_go")
    ray.get(held_call.ref)


def test_an_engine_that_answers_while_its_server_is_unwell_is_given_up_after_the_threshold(fleet, watch, verdicts):
    (rig,) = bring_up(fleet, cls=Hosted)
    with server_of(rig) as server:
        watch([rig.engine], on_dead=verdicts, address="url")
        wait_until(lambda: checks(fleet, "answered", "serves") >= 2, what="some checks")
        server.status = 503
        verdict = verdicts.wait_for()
    assert (end_of(verdict), verdict.server) == ((*OURS, Reason.PROBE_FAILED), ServerAnswer.UNWELL)


def test_an_actor_that_is_silent_while_its_server_is_unwell_is_kept_for_the_budget(cluster, make_fleet, verdicts):
    fleet = make_fleet(enginefsm.RetryPolicy(budget_s=2))
    (rig,) = bring_up(fleet, cls=Hosted)
    with server_of(rig) as server:
        fleet.monitor.watch([rig.engine], address="url", on_dead=verdicts, **FAST | {"failure_threshold": 1})
        wait_until(lambda: checks(fleet, "answered", "serves") >= 2, what="some checks")
        began = time.monotonic()
        rig.open("slow")
        wait_until(lambda: checks(fleet, "silent", "serves") >= 1, what="silence")
        server.status = 503
        verdict = verdicts.wait_for()
        fleet.monitor.close()
    assert time.monotonic() - began >= 2
    assert (end_of(verdict), verdict.server) == ((*BUDGET_SPENT, Reason.PROBE_TIMEOUT), ServerAnswer.UNWELL)


# What holds verdicts.


def lines_of(caplog, text):
    return [record for record in caplog.records if text in record.getMessage()]


def test_while_most_engines_are_out_of_reach_none_is_given_up_and_that_is_said_at_begin_and_end(
    fleet, watch, verdicts, caplog
):
    rigs = bring_up(fleet, 2)
    watch([rig.engine for rig in rigs], on_dead=verdicts, failure_threshold=1, interval_s=1.0, timeout_s=1.5)
    for rig in rigs:
        wait_for_probes(rig)
    with caplog.at_level(logging.WARNING, "enginefsm"):
        frozen = [chaos.freeze(rig.pid) for rig in rigs]
        wait_until(lambda: held(fleet, "mass_outage") == 2, what="all verdicts held")
        for one in frozen:
            one.thaw()
        for rig in rigs:
            fleet.wait_for_state(rig.engine, READY, 2)
        wait_until(lambda: lines_of(caplog, "no more than half"), what="the line at the end")
    assert len(lines_of(caplog, "unavailable at once")) == len(lines_of(caplog, "no more than half")) == 1
    assert held(fleet, "mass_outage") == 0
    assert verdicts.given == []
    for rig in rigs:
        assert rig.times_init_began() == 1


def test_a_cut_of_the_whole_fleet_ends_nobody(fleet, watch, verdicts):
    rigs = bring_up(fleet, 2)
    watch([rig.engine for rig in rigs], on_dead=verdicts, timeout_s=30, failure_threshold=1)
    for rig in rigs:
        cut_during_a_probe(rig)
    for rig in rigs:
        fleet.wait_for_state(rig.engine, UNAVAILABLE)
        heal(rig, "slow")
    for rig in rigs:
        fleet.wait_for_state(rig.engine, READY, 2)
    assert verdicts.given == []


class Slow(Probed):
    """One that takes its time to answer, so that a probe of it is out at nearly any moment."""

    def well(self):
        time.sleep(0.6)
        return True


def test_a_process_that_was_stopped_itself_holds_that_against_nobody(fleet, watch, verdicts):
    rigs = bring_up(fleet, 2, Slow)
    watch([rig.engine for rig in rigs], on_dead=verdicts, failure_threshold=1, timeout_s=2)
    for _ in range(3):
        before = checks(fleet, "answered")
        wait_until(lambda b=before: checks(fleet, "answered") >= b + 2, what="some checks")
        ctypes.PyDLL(None).sleep(4)  # by PyDLL, this keeps every Python thread of the process from running
    before = checks(fleet, "answered")
    wait_until(lambda: checks(fleet, "answered") >= before + 2, what="some checks")
    assert checks(fleet, "silent") == 0
    for rig in rigs:
        assert [to for _, to, _ in fleet.steps(rig.engine)] == [EngineState.LAUNCHING, READY]
    assert verdicts.given == []


def test_an_engine_that_says_that_it_is_ill_is_given_up_though_this_process_is_stopped_time_and_again(
    fleet, watch, verdicts
):
    (rig,) = bring_up(fleet)
    rig.open("ill")
    watch([rig.engine], on_dead=verdicts, failure_threshold=8)
    for _ in range(8):
        before = checks(fleet, "failed")
        wait_until(lambda b=before: checks(fleet, "failed") >= b + 2 or verdicts.given, what="two failures")
        if verdicts.given:
            break
        ctypes.PyDLL(None).sleep(2)  # as above
    assert end_of(verdicts.wait_for(timeout_s=0)) == (*OURS, Reason.PROBE_FAILED)


def test_the_time_for_which_a_process_was_stopped_is_no_part_of_an_outage(cluster, make_fleet, verdicts):
    fleet = make_fleet(enginefsm.RetryPolicy(budget_s=4))
    rigs = bring_up(fleet, 2, Served)
    settings = FAST | {"probe": "__ray_ready__", "address": "url", "timeout_s": 1}
    fleet.monitor.watch([rig.engine for rig in rigs], on_dead=verdicts, **settings)
    wait_until(lambda: checks(fleet, "answered", "serves") >= 4, what="some checks")
    with chaos.freeze(actor_pid(rigs[0])):
        wait_until(lambda: checks(fleet, "silent", "serves") >= 2, what="silence")
        ctypes.PyDLL(None).sleep(5)  # as above; more than the budget
        before = checks(fleet, "silent", "serves")
        wait_until(lambda: checks(fleet, "silent", "serves") >= before + 2, what="more silence")
    fleet.wait_for_state(rigs[0].engine, READY, 2)
    fleet.monitor.close()
    assert verdicts.given == []


def test_the_last_engine_to_come_back_from_a_mass_outage_is_counted_anew(fleet, watch, verdicts):
    rigs = bring_up(fleet, 3)
    watch([rig.engine for rig in rigs], on_dead=verdicts, interval_s=1.0, timeout_s=1.0, failure_threshold=4)
    for rig in rigs:
        wait_for_probes(rig)
    frozen = [chaos.freeze(rig.pid) for rig in rigs]
    wait_until(lambda: held(fleet, "mass_outage") == 3, what="all verdicts held")
    for one in frozen[:2]:
        one.thaw()
    for rig in rigs[:2]:
        fleet.wait_for_state(rig.engine, READY, 2)
    silent = checks(fleet, "silent")
    wait_until(lambda: checks(fleet, "silent") > silent, what="one failure more of the last")
    frozen[2].thaw()
    fleet.wait_for_state(rigs[2].engine, READY, 2)
    assert verdicts.given == []


def test_no_more_than_a_quarter_is_given_up_at_a_time_and_the_rest_comes_back_when_it_is_well(
    fleet, watch, verdicts, caplog
):
    rigs = bring_up(fleet, 4)
    watch([rig.engine for rig in rigs], on_dead=verdicts)
    with caplog.at_level(logging.WARNING, "enginefsm"):
        rigs[0].open("ill")
        verdicts.wait_for()
        rigs[1].open("ill")
        wait_until(lambda: held(fleet, "kill_cap") == 1, what="a verdict held")
        before = checks(fleet, "failed")
        wait_until(lambda: checks(fleet, "failed") >= before + 5, what="more failures")
    assert len(lines_of(caplog, "is held")) == 1
    assert rigs[1].engine.fsm.state is UNAVAILABLE
    heal(rigs[1], "ill")
    fleet.wait_for_state(rigs[1].engine, READY, 2)
    wait_until(lambda: held(fleet, "kill_cap") == 0, what="the end of the hold")
    assert [verdict.engine for verdict in verdicts.given] == [rigs[0].engine]


def hold(rig):
    """A call, if Ray takes one: it counts an earlier one for a moment after its answer."""
    with contextlib.suppress(ray.exceptions.PendingCallsLimitExceeded):
        return rig.engine.handle.hold.remote()


def test_an_engine_whose_probes_ray_refuses_keeps_no_other_from_being_given_up(fleet, watch, verdicts):
    (ill,), (full,) = bring_up(fleet), bring_up(fleet, max_pending_calls=1)
    busy = wait_until(lambda: hold(full), what="room for a call")
    watch([ill.engine, full.engine], on_dead=verdicts)
    wait_until(lambda: checks(fleet, "lost") >= 2, what="refused probes")
    ill.open("ill")
    assert verdicts.wait_for().engine is ill.engine
    full.open("let_go")
    ray.get(busy)


def test_deaths_that_ray_reports_are_not_held(fleet, watch, verdicts):
    rigs = bring_up(fleet, 2)
    watch([rig.engine for rig in rigs], on_dead=verdicts)
    for rig in rigs:
        wait_for_probes(rig)
    for rig in rigs:
        chaos.kill(rig.pid)
    verdicts.wait_for(2)
    assert {verdict.by_monitor for verdict in verdicts.given} == {False}


def test_a_pause_sends_no_probes_and_gives_no_verdict_and_counts_begin_anew_after_it(fleet, watch, verdicts):
    (rig,) = bring_up(fleet)
    health = watch([rig.engine], on_dead=verdicts, failure_threshold=10)
    wait_for_probes(rig)
    rig.open("ill")
    fleet.wait_for_state(rig.engine, UNAVAILABLE)
    health.pause()
    assert health.paused
    wait_until_all_came(rig)
    before = probes(rig)
    time.sleep(1.2)  # six intervals, in which nothing is to happen
    assert probes(rig) == before
    assert verdicts.given == []
    health.resume()
    assert not health.paused
    assert end_of(verdicts.wait_for()) == (*OURS, Reason.PROBE_FAILED)
    assert probes(rig) - before >= 10


def test_the_first_wait_is_waited_after_the_start_and_after_each_resume(fleet, watch):
    (rig,) = bring_up(fleet)
    began = time.monotonic()
    health = watch([rig.engine], first_wait_s=1.0)
    wait_for_probes(rig)
    assert time.monotonic() - began >= 1.0
    health.pause()
    wait_until_all_came(rig)
    resumed = time.monotonic()
    health.resume()
    wait_until(lambda: [at for at in times_of_probes(rig) if at > resumed + 0.5], what="a probe after the resume")
    assert not [at for at in times_of_probes(rig) if resumed + 0.5 < at < resumed + 1.0]


def times_of_probes(rig):
    return [float(line.split()[0]) for line in rig.read("probes").splitlines()]


# Engines of several actors, and incarnations.


def test_an_engine_of_several_actors_ends_once_by_whichever_of_them_fails(fleet, watch, verdicts):
    rigs = bring_up(fleet, 3)
    watch([[rigs[0].engine, rigs[1].engine], rigs[2].engine], on_dead=verdicts)
    for rig in rigs:
        wait_for_probes(rig)
    rigs[1].open("ill")
    verdict = verdicts.wait_for()
    assert verdict.engine is rigs[1].engine
    assert verdict.engines == (rigs[0].engine, rigs[1].engine)
    assert rigs[0].engine.fsm.state is READY
    chaos.kill(rigs[0].pid)  # as the callback would
    chaos.kill(rigs[2].pid)
    assert verdicts.wait_for(2).engines == (rigs[2].engine,)
    assert len(verdicts.given) == 2


def test_an_engine_all_of_whose_actors_are_silent_ends_once_and_holds_no_verdict(fleet, watch, verdicts):
    rigs = bring_up(fleet, 3)
    watch([[rigs[0].engine, rigs[1].engine], rigs[2].engine], on_dead=verdicts)
    for rig in rigs:
        wait_for_probes(rig)
    with chaos.freeze(rigs[0].pid), chaos.freeze(rigs[1].pid):
        verdicts.wait_for()
        wait_for_probes(rigs[2], 8)
        assert fleet.metric("enginefsm_verdicts_held", why="kill_cap") == 0
    assert len(verdicts.given) == 1


def test_a_replacement_is_watched_under_its_name_and_its_end_is_told_again(fleet, watch):
    (first,) = bring_up(fleet)
    told = Verdicts()

    def replace(verdict):
        if verdict.by_monitor:
            ray.kill(verdict.engine.handle)
        if not told.given:
            successor = fleet.launch(Probed, name=verdict.engine.fsm.name)
            successor.open()
            fleet.monitor.get(successor.engine.init.remote())
            successors.append(successor)
        told(verdict)

    successors = []
    watch([first.engine], on_dead=replace)
    first.open("ill")
    assert told.wait_for().engine is first.engine
    (successor,) = successors
    assert successor.engine.fsm.incarnation == 2
    wait_for_probes(successor, 2)
    chaos.kill(successor.pid)
    assert told.wait_for(2).engine is successor.engine
    assert [end_of(verdict)[:2] for verdict in told.given] == [OURS, (Reason.ACTOR_DIED, False)]


def test_a_released_engine_is_left_alone_and_its_end_is_not_told(fleet, watch, verdicts):
    released, other = bring_up(fleet, 2)
    watch([released.engine, other.engine], on_dead=verdicts)
    wait_for_probes(released)
    fleet.monitor.release(released.engine)
    chaos.kill(released.pid)
    wait_for_probes(other, 5)
    chaos.kill(other.pid)
    verdicts.wait_for()
    assert [verdict.engine for verdict in verdicts.given] == [other.engine]


# Callbacks, and the end.


def test_a_callback_that_raises_or_exits_is_logged_and_counted_and_the_next_verdict_comes(fleet, watch, caplog):
    rigs = bring_up(fleet, 2)
    told = Verdicts()

    def fail(verdict):
        told(verdict)
        raise [SystemExit(1), RuntimeError("no")][len(told.given) - 1]

    watch([rig.engine for rig in rigs], on_dead=fail)
    for count, rig in enumerate(rigs, start=1):
        chaos.kill(rig.pid)
        assert told.wait_for(count).engine is rig.engine
    wait_until(lambda: fleet.metric("enginefsm_export_errors_total", sink="fail") == 2, what="the count of failures")
    for rig in rigs:
        assert any(rig.engine.fsm.name in record.getMessage() for record in lines_of(caplog, "failed on the end"))


def test_a_listener_that_exits_ends_no_watch(fleet, watch, caplog):
    rigs = bring_up(fleet, 2)

    def leave(event):
        if isinstance(event, enginefsm.Transition) and event.to_state is UNAVAILABLE:
            raise SystemExit(1)

    fleet.monitor.add_listener(leave)
    watch([rig.engine for rig in rigs], failure_threshold=1000)
    rigs[0].open("ill")
    wait_until(lambda: lines_of(caplog, "a listener has ended"), what="the exit")
    wait_for_probes(rigs[1], 5)


def test_a_callback_that_blocks_keeps_nobody_from_being_probed_is_complained_of_once_and_may_be_left_behind(
    fleet, watch, monkeypatch, caplog
):
    monkeypatch.setattr(health_module, "CALLBACK_S", 0.5)
    rigs = bring_up(fleet, 3)
    began, let_go = threading.Event(), threading.Event()

    def block(verdict):
        began.set()
        let_go.wait(60)

    health = watch([rig.engine for rig in rigs], on_dead=block)
    chaos.kill(rigs[0].pid)
    assert began.wait(30)
    wait_for_probes(rigs[1], 5)
    assert not lines_of(caplog, "wait for it")
    chaos.kill(rigs[2].pid)
    wait_until(lambda: lines_of(caplog, "wait for it"), what="the complaint")
    wait_for_probes(rigs[1], 5)
    (line,) = lines_of(caplog, "wait for it")
    assert f"on the end of engine {rigs[0].engine.fsm.name};" in line.getMessage()
    assert line.getMessage().endswith(f"wait for it: {rigs[2].engine.fsm.name}")
    asked = time.monotonic()
    health.stop(timeout_s=0.5)
    assert time.monotonic() - asked < 5
    let_go.set()


def test_an_event_loop_that_stops_the_monitor_is_not_kept_up_by_a_callback(fleet, watch):
    (rig,) = bring_up(fleet)
    began, let_go = threading.Event(), threading.Event()

    def block(verdict):
        began.set()
        let_go.wait(60)

    async def stop():
        asked = time.monotonic()
        health.stop()
        return time.monotonic() - asked

    health = watch([rig.engine], on_dead=block)
    chaos.kill(rig.pid)
    assert began.wait(30)
    assert asyncio.run(stop()) < STOP_S - 1
    let_go.set()


def test_a_callback_may_pause_resume_and_stop_the_monitor(fleet, watch):
    (rig,) = bring_up(fleet)
    done = threading.Event()

    def end(verdict):
        for act in (health.pause, health.resume, health.stop):
            act()
        done.set()

    health = watch([rig.engine], on_dead=end)
    chaos.kill(rig.pid)
    assert done.wait(30)
    assert health.stopped


def test_to_stop_or_resume_or_pause_at_any_time_does_no_harm(fleet, watch):
    (rig,) = bring_up(fleet)
    health = watch([rig.engine])
    for act in (health.resume, health.pause, health.pause, health.resume, health.resume):
        act()
    wait_for_probes(rig)
    for act in (health.stop, health.stop, health.pause, health.resume):
        act()
    wait_until_all_came(rig)
    before = probes(rig)
    time.sleep(0.6)
    assert probes(rig) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("enginefsm-health")]
    watch([rig.engine])
    wait_for_probes(rig)


def test_the_end_of_the_monitor_ends_its_watches(fleet, watch):
    (rig,) = bring_up(fleet)
    health = watch([rig.engine])
    fleet.monitor.close()
    assert health.stopped


async def coroutine(verdict):
    pass


def test_what_makes_no_sense_is_refused_and_nothing_is_watched(fleet, watch):
    first, second = bring_up(fleet, 2)
    stranger = enginefsm.EngineMonitor(run="other").adopt(first.engine.handle, name="stranger")
    good = FAST | {"engines": [first.engine]}
    for bad, error, says in (
        ({"engines": []}, ValueError, "one engine or more"),
        ({"engines": [[]]}, ValueError, "one engine or more"),
        ({"engines": [first.engine.handle]}, TypeError, "adopt"),
        ({"engines": [stranger]}, ValueError, "another monitor"),
        ({"engines": [first.engine, first.engine]}, ValueError, "'engine-0' is watched already"),
        ({"engines": [second.engine, [first.engine, second.engine]]}, ValueError, "'engine-1' is watched already"),
        ({"probe": "no_such"}, ValueError, "no method 'no_such'.* it has: .*well"),
        ({"probe": "directory"}, ValueError, "it has: .*well"),
        ({"probe": None}, ValueError, "it has: .*well"),
        ({"probe": "pair"}, ValueError, "one plain value"),
        ({"address": "no_such"}, ValueError, "no method 'no_such' to be its address"),
        ({"interval_s": 0}, ValueError, "interval_s"),
        ({"interval_s": float("nan")}, ValueError, "interval_s"),
        ({"timeout_s": "1"}, ValueError, "timeout_s"),
        ({"failure_threshold": 0}, ValueError, "failure_threshold"),
        ({"failure_threshold": 1.5}, ValueError, "failure_threshold"),
        ({"first_wait_s": -1}, ValueError, "first_wait_s"),
        ({"on_dead": "print"}, TypeError, "on_dead"),
        ({"on_dead": coroutine}, TypeError, "run_coroutine_threadsafe"),
    ):
        with pytest.raises(error, match=says):
            fleet.monitor.watch(**good | bad)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("enginefsm-health")]
    watch([first.engine])
    with pytest.raises(ValueError, match="'engine-0' is watched already"):
        watch([second.engine, first.engine])
    watch([second.engine])
    for rig in (first, second):
        wait_for_probes(rig)

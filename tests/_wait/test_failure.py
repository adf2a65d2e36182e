"""Deaths and errors fail at once, by engine and by reason. On a real Ray, with real deaths."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import threading
import time

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError
from support.engines import Doomed, kill, wait_until
from support.ways import GATHER, GATHER_FROM_ASYNC, also

import enginefsm
from enginefsm import EngineState, LaunchDeadlineError, Outcome, Reason, RetryExhaustedError, RetryPolicy
from enginefsm._engine.proxy import managed
from enginefsm.rehearsal import chaos

LAUNCHING, READY, UNAVAILABLE, DEAD = EngineState


def killed(rig):
    wait_until(rig.times_init_began, what="the beginning")  # the file alone may be there before its line
    os.kill(rig.pid, signal.SIGKILL)


@also(GATHER_FROM_ASYNC)
def test_a_killed_engine_fails_the_bringup_by_name_while_others_still_launch(fleet):
    rigs = [fleet.launch() for _ in range(3)]
    launch = fleet.in_background([rig.engine.init.remote() for rig in rigs])
    for rig in rigs:
        rig.wait_for("begun")
    killed(rigs[1])
    error = launch.exception(30)
    assert type(error) is ActorDiedError
    assert "'engine-1'" in error.__notes__[0]
    assert "model=tiny worker_type=regular" in error.__notes__[0]
    assert [rig.engine.fsm.state for rig in rigs] == [LAUNCHING, DEAD, LAUNCHING]
    assert rigs[1].engine.fsm.reason is Reason.ACTOR_DIED
    assert fleet.metric("enginefsm_bringup_phase", model="tiny", phase="failed") == 1


def test_a_killed_engine_that_ray_first_calls_unavailable_is_dead_one_probe_later(clusters, make_fleet):
    clusters.use(RAY_timeout_ms_task_wait_for_death_info="0")
    fleet = make_fleet()
    for _ in range(10):
        rig = fleet.launch()
        launch = fleet.in_background(rig.engine.init.remote())
        killed(rig)
        assert type(launch.exception(60)) is ActorDiedError
        outcomes = [each.outcome for each in fleet.outcomes(rig.engine)]
        if outcomes == [Outcome.ACTOR_UNAVAILABLE, Outcome.ACTOR_DIED]:
            break
        # On a busy machine Ray may know of the death at once, or call it unavailable a second time.
        assert outcomes == [Outcome.ACTOR_UNAVAILABLE] * (len(outcomes) - 1) + [Outcome.ACTOR_DIED]
    else:
        pytest.fail(f"Ray did not call it unavailable first, and once: {outcomes}")
    assert fleet.steps(rig.engine)[1:] == [
        (LAUNCHING, UNAVAILABLE, Reason.ACTOR_UNAVAILABLE),
        (UNAVAILABLE, DEAD, Reason.ACTOR_DIED),
    ]


@also(GATHER_FROM_ASYNC)
def test_an_engine_that_dies_while_it_is_re_awaited_is_dead(fleet):
    rig = fleet.launch()
    launch = fleet.in_background(rig.engine.init.remote())
    rig.wait_for("begun")
    rig.cut()
    fleet.wait_for_state(rig.engine, UNAVAILABLE)
    killed(rig)
    assert type(launch.exception(60)) is ActorDiedError
    assert fleet.steps(rig.engine)[-1] == (UNAVAILABLE, DEAD, Reason.ACTOR_DIED)


@also(GATHER_FROM_ASYNC)
def test_an_error_of_init_is_raised_on_the_first_attempt(fleet):
    rig = fleet.launch()
    rig.open()
    with pytest.raises(RuntimeError, match="CUDA out of memory") as raised:
        fleet.monitor.get(rig.engine.init.remote("CUDA out of memory"))
    assert isinstance(raised.value, RayTaskError)
    assert "'engine-0'" in raised.value.__notes__[0]
    assert [each.attempt for each in fleet.outcomes(rig.engine)] == [0]
    assert rig.engine.fsm.reason is Reason.INIT_FAILED
    assert rig.times_init_began() == 1


def test_an_error_of_another_method_is_raised_and_leaves_the_engine_as_it_was(fleet):
    rig = fleet.launch()
    rig.open()
    fleet.monitor.get(rig.engine.init.remote())
    with pytest.raises(ValueError, match="bad tag"):
        fleet.monitor.get(rig.engine.fail.remote("bad tag"))
    assert rig.engine.fsm.state is READY


def test_a_failed_constructor_is_named_as_such(cluster):
    monitor = enginefsm.EngineMonitor()
    engine = monitor.adopt(ray.remote(Doomed).options(num_cpus=0).remote(), name="doomed")
    with pytest.raises(ActorDiedError, match="no such GPU"):
        monitor.get(engine.init.remote())
    assert (engine.fsm.state, engine.fsm.reason) == (DEAD, Reason.CONSTRUCTOR_FAILED)


def test_a_runtime_environment_that_cannot_be_made_is_named_as_such(cluster, tmp_path):
    monitor = enginefsm.EngineMonitor()
    actor = ray.remote(Doomed).options(num_cpus=0, runtime_env={"working_dir": "file:///nowhere/at/all.zip"}).remote()
    engine = monitor.adopt(actor, name="homeless")
    with pytest.raises(Exception, match="untime"):
        monitor.get(engine.init.remote(), timeout=120)
    assert (engine.fsm.state, engine.fsm.reason) == (DEAD, Reason.RUNTIME_ENV_FAILED)


@also(GATHER_FROM_ASYNC)
def test_the_death_of_a_peer_inside_a_method_is_not_the_engine_s(fleet):
    peer, rig = fleet.launch(), fleet.launch()
    rig.open()
    fleet.monitor.get(rig.engine.init.remote())
    kill(peer.engine.handle)
    with pytest.raises(ActorDiedError) as raised:
        fleet.monitor.get(rig.engine.ask.remote(peer.engine))
    assert isinstance(raised.value, RayTaskError)
    assert rig.engine.fsm.state is READY


def test_a_restarted_actor_is_a_dead_engine_and_its_init_is_not_run_again(fleet):
    rig = fleet.launch(max_restarts=1, max_task_retries=1)
    rig.open()
    fleet.monitor.get(rig.engine.init.remote())
    before = rig.pid
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: rig.pid != before, what="the restart")
    with pytest.raises(ActorDiedError):
        fleet.monitor.get(rig.engine.times_init_ran.remote(), timeout=60)
    assert (rig.engine.fsm.state, rig.engine.fsm.reason) == (DEAD, Reason.ACTOR_DIED)
    assert rig.times_init_began() == 1


@also(GATHER_FROM_ASYNC)
def test_an_actor_restarted_while_init_runs_does_not_run_it_again(fleet):
    rig = fleet.launch(max_restarts=1)
    launch = fleet.in_background(rig.engine.init.remote())
    killed(rig)
    assert isinstance(launch.exception(60), ActorDiedError)
    assert rig.engine.fsm.reason is Reason.ACTOR_DIED
    assert rig.times_init_began() == 1


@pytest.mark.parametrize("policy", [RetryPolicy(budget_s=3, cap_s=0.5), RetryPolicy(max_attempts=1)])
def test_an_engine_that_stays_cut_off_is_given_up_and_ray_s_last_error_is_kept(fleet, policy):
    rig = fleet.launch()
    call = rig.engine.init.remote()
    rig.wait_for("begun")
    over = threading.Event()

    def keep_cutting():
        while not over.wait(0.02):
            chaos.cut(rig.pid)

    cutter = threading.Thread(target=keep_cutting)
    cutter.start()
    try:
        began = time.monotonic()
        with pytest.raises(RetryExhaustedError, match="'engine-0'") as raised:
            fleet.monitor.get(call)
        took_s = time.monotonic() - began
    finally:
        over.set()
        cutter.join()
    assert type(raised.value.__cause__) is ActorUnavailableError
    assert isinstance(raised.value, ActorUnavailableError)
    assert raised.value.actor_id == managed(rig.engine).actor_id
    assert took_s < 60
    assert fleet.steps(rig.engine)[-1] == (UNAVAILABLE, DEAD, Reason.RETRY_EXHAUSTED)
    labels = {"model": "tiny", "worker_type": "regular", "reason": "retry_exhausted"}
    assert fleet.metric("enginefsm_retry_exhausted_total", **labels) == 1
    assert fleet.metric("enginefsm_retry_exhausted_timestamp_seconds", engine="engine-0", **labels) > 0
    with pytest.raises(RetryExhaustedError):
        fleet.monitor.get(call)


@pytest.mark.parametrize("policy", [RetryPolicy(launch_deadline_s=5)])
@also(GATHER)
def test_a_frozen_engine_runs_into_the_launch_deadline_which_names_all_that_still_launch(fleet, policy):
    rigs = fleet.launch_begun(*[fleet.engine_class] * 3)
    rigs[0].open()
    calls = [rig.engine.init.remote() for rig in rigs]
    fleet.monitor.get(calls[0])
    for rig in rigs:
        rig.wait_for("begun")
    with chaos.freeze(rigs[1].pid), pytest.raises(LaunchDeadlineError) as raised:
        fleet.monitor.get(calls)
    assert isinstance(raised.value, GetTimeoutError)
    assert "'engine-1'" in str(raised.value)
    assert "'engine-2'" in str(raised.value)
    assert "'engine-0'" not in str(raised.value)
    assert rigs[0].engine.fsm.state is READY
    assert rigs[1].engine.fsm.reason is Reason.LAUNCH_DEADLINE


def test_resources_that_nobody_has_are_waited_for_until_the_caller_has_enough(fleet):
    rig = fleet.launch(resources={"no such thing": 1})
    with pytest.raises(GetTimeoutError, match=r"engine-0.*launching"):
        fleet.monitor.get(rig.engine.init.remote(), timeout=0.5)
    assert rig.engine.fsm.state is LAUNCHING


def test_an_outcome_of_an_older_incarnation_changes_nothing(fleet):
    old = fleet.launch(name="one")
    call = old.engine.init.remote()
    old.wait_for("begun")
    fleet.monitor.release(old.engine)
    new = fleet.launch(name="one")
    assert (old.engine.fsm.incarnation, new.engine.fsm.incarnation) == (1, 2)
    killed(old)
    with pytest.raises(ActorDiedError):
        fleet.monitor.get(call)
    assert (old.engine.fsm.reason, new.engine.fsm.state) == (Reason.RELEASED, LAUNCHING)
    assert [managed(engine).actor_id for engine in fleet.monitor.engines()] == [managed(new.engine).actor_id]


def test_a_listener_that_raises_costs_the_bringup_nothing(fleet, caplog):
    def broken(event):
        raise OSError("disk full")

    fleet.monitor.add_listener(broken)
    rig = fleet.launch()
    rig.open()
    assert fleet.monitor.get(rig.engine.init.remote()) == "launched"
    assert fleet.metric("enginefsm_export_errors_total", sink="broken") == len(fleet.events)
    assert "disk full" in caplog.text


def test_a_fresh_call_to_a_restarted_actor_does_not_hide_the_restart(fleet):
    rig = fleet.launch(max_restarts=1)
    call = rig.engine.init.remote()
    before = rig.pid
    killed(rig)
    wait_until(lambda: rig.pid != before, what="the restart")
    rig.open()
    with pytest.raises(ActorDiedError):
        fleet.monitor.get([rig.engine.times_init_ran.remote(), call], timeout=60)
    assert rig.times_init_began() == 1


@pytest.mark.parametrize("policy", [RetryPolicy(launch_deadline_s=2)])
def test_a_launch_that_ends_after_the_deadline_stays_late(fleet, policy):
    rig = fleet.launch()
    call = rig.engine.init.remote()
    rig.wait_for("begun")
    with pytest.raises(LaunchDeadlineError):
        fleet.monitor.get(call)
    rig.open()
    ray.wait([call.ref])
    with pytest.raises(LaunchDeadlineError):
        fleet.monitor.get(call)
    assert rig.engine.fsm.state is DEAD


def adopt_anew(fleet, rigs):
    """Have the launch deadline count from when the actors are there."""
    for rig in rigs:
        rig.wait_for("pid")
        fleet.monitor.release(rig.engine)
    for rig in rigs:
        rig.engine = fleet.monitor.adopt(rig.engine.handle, name=rig.engine.fsm.name)


@pytest.mark.parametrize("policy", [RetryPolicy(launch_deadline_s=2, cap_s=2)])
def test_a_launch_method_that_is_called_again_after_the_deadline_may_be_lost_and_ends_nobody(fleet, policy):
    rig = fleet.launch()
    adopt_anew(fleet, [rig])
    rig.open()
    fleet.monitor.get(rig.engine.init.remote())
    wait_until(lambda: time.monotonic() > managed(rig.engine).adopted_at + 2.1, what="the deadline")
    (rig.directory / "gate").unlink()
    again = fleet.in_background(rig.engine.init.remote())
    wait_until(lambda: rig.times_init_began() == 2, what="the second init")
    rig.cut()
    fleet.wait_for_state(rig.engine, UNAVAILABLE)
    rig.open()
    assert again.result(60) == "launched"
    assert rig.engine.fsm.state is READY


def get(monitor, calls):
    return monitor.get(calls)


def gather(monitor, calls):
    several = isinstance(calls, list)
    values = asyncio.run(monitor.gather(*(calls if several else [calls])))
    return values if several else values[0]


def stand_still(until):
    """Keep all of this interpreter's threads from running, as a value that is long to unpickle does."""
    ctypes.PyDLL(None).poll(None, 0, max(0, round((until - time.monotonic()) * 1000)))


@pytest.mark.parametrize("policy", [RetryPolicy(launch_deadline_s=2)])
@pytest.mark.parametrize("wait", [get, gather])
def test_launches_that_ended_in_time_are_in_time_though_they_are_heard_of_late(fleet, policy, wait):
    rigs = [fleet.launch() for _ in range(4)]
    adopt_anew(fleet, rigs)
    awaited, later = (
        [rig.engine.init.remote(value=number) for number, rig in enumerate(half)] for half in (rigs[:2], rigs[2:])
    )
    launch = fleet.threads.submit(wait, fleet.monitor, awaited)
    for rig in rigs:
        rig.wait_for("begun")
    for rig in rigs:
        rig.open()
    stand_still(managed(rigs[-1].engine).adopted_at + 2.1)
    assert launch.result(30) == [0, 1]
    assert [wait(fleet.monitor, call) for call in later] == [0, 1]
    assert {rig.engine.fsm.state for rig in rigs} == {READY}


@pytest.mark.parametrize("policy", [RetryPolicy(max_attempts=0)])
@also(GATHER)
def test_whoever_waits_for_an_engine_that_another_thread_gave_up_is_told(fleet, policy):
    rig = fleet.launch(max_concurrency=2)
    ref = rig.engine.handle.init.remote()  # stays out: nobody awaits it here
    rig.wait_for("begun")
    first = rig.engine.hold.remote()
    rig.wait_for("held")
    rig.cut()
    with pytest.raises(RetryExhaustedError):
        fleet.monitor.get(first)
    second = rig.engine.times_init_ran.remote()  # made afterwards: Ray's answer counts
    rig.open("let_go")
    assert fleet.monitor.get(second) == 1
    with pytest.raises(RetryExhaustedError):
        fleet.monitor.get(first)
    del ref


def test_a_slow_listener_hears_of_a_death_before_the_exception_leaves(fleet, patience):
    heard, busy, go_on = [], threading.Event(), threading.Event()

    def slow(event):
        if event.engine == "engine-0" and getattr(event, "to_state", None) is READY:
            busy.set()
            go_on.wait(30)
        heard.append(event)

    fleet.monitor.add_listener(slow)
    rigs = [fleet.launch() for _ in range(2)]
    rigs[0].open()
    launch = fleet.in_background(rigs[0].engine.init.remote())
    doomed = rigs[1].engine.init.remote()
    busy.wait(30)
    death = fleet.in_background(doomed)
    killed(rigs[1])
    threading.Timer(0.5, go_on.set).start()
    assert isinstance(death.exception(30), ActorDiedError)
    assert any(event.engine == "engine-1" and getattr(event, "to_state", None) is DEAD for event in heard)
    launch.result(30)


def test_a_call_of_another_monitor_s_engine_is_refused(fleet):
    rig = fleet.launch()
    rig.open()
    call = rig.engine.init.remote()
    with pytest.raises(ValueError, match="another monitor"):
        enginefsm.EngineMonitor().get(call)
    assert fleet.monitor.get(call) == "launched"


def test_what_killed_an_engine_is_told_in_one_line_by_its_detail_and_its_step(fleet):
    rig = fleet.launch()
    rig.open()
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        fleet.monitor.get(rig.engine.init.remote("CUDA out of memory\non GPU 3"))
    assert rig.engine.fsm.detail == "init() raised RuntimeError: CUDA out of memory on GPU 3"
    assert [step.detail for step in fleet.events if isinstance(step, enginefsm.Transition)][-1] == rig.engine.fsm.detail

"""Engines that are cut off while they launch come up, each `init` run once. On a real Ray, with real cuts."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import pytest
import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError
from support.engines import Grouped, WithoutEnginefsm, wait_until
from support.stopwatch import Stopwatch
from support.ways import GATHER, GATHER_FROM_ASYNC, GET_FROM_ASYNC, also

from enginefsm import EngineState, Outcome, Reason, RetryPolicy
from enginefsm.rehearsal import chaos

LAUNCHING, READY, UNAVAILABLE, DEAD = EngineState
LAUNCHED = (None, LAUNCHING, Reason.ADOPTED)
LOST = (LAUNCHING, UNAVAILABLE, Reason.ACTOR_UNAVAILABLE)
BACK = (UNAVAILABLE, READY, Reason.RECOVERED)


def test_a_plain_reference_that_failed_is_sealed_though_its_method_ends(fleet):
    rig = fleet.launch()
    ref = rig.engine.handle.init.remote()
    rig.wait_for("begun")
    rig.cut()
    with pytest.raises(ActorUnavailableError):
        ray.get(ref)
    rig.open()
    rig.wait_for("ended")
    with pytest.raises(ActorUnavailableError):
        ray.get(ref)


def test_a_healthy_engine_is_launched_and_nothing_else_is_said(fleet):
    rig = fleet.launch()
    rig.open()
    assert fleet.monitor.get(rig.engine.init.remote(value=7)) == 7
    assert fleet.steps(rig.engine) == [LAUNCHED, (LAUNCHING, READY, Reason.INIT_SUCCEEDED)]
    assert (
        fleet.metric("enginefsm_reawaits_total", model="tiny", worker_type="regular", method="init", result="answered")
        == 0
    )


def test_a_cut_before_init_runs_costs_nothing(fleet):
    rig = fleet.launch()
    holding = rig.engine.handle.hold.remote()
    rig.wait_for("held")
    launch = fleet.in_background(rig.engine.init.remote())
    rig.cut_until(lambda: rig.engine.fsm.state is UNAVAILABLE)
    assert rig.times_init_began() == 0
    rig.open("let_go")
    rig.open()
    assert launch.result(60) == "launched"
    assert rig.times_init_began() == 1
    del holding


@also(GATHER, GATHER_FROM_ASYNC, GET_FROM_ASYNC)
def test_a_cut_while_init_runs_costs_nothing(fleet):
    rig = fleet.launch()
    launch = fleet.in_background(rig.engine.init.remote())
    rig.wait_for("begun")
    rig.cut()
    fleet.wait_for_state(rig.engine, UNAVAILABLE)
    rig.open()
    assert launch.result(60) == "launched"
    assert fleet.steps(rig.engine) == [LAUNCHED, LOST, BACK]
    assert rig.times_init_began() == 1


@also(GATHER_FROM_ASYNC)
def test_init_that_ends_while_its_reply_is_lost_gives_what_it_gave(fleet):
    for _ in range(5):
        rig = fleet.launch()
        launch = fleet.in_background(rig.engine.init.remote(value={"port": 30000}))
        rig.wait_for("begun")
        rig.cut()
        rig.open()
        rig.wait_for("ended")
        ended_first = fleet.steps(rig.engine) == [LAUNCHED]
        assert launch.result(60) == {"port": 30000}
        assert rig.times_init_began() == 1
        if ended_first:
            return
    pytest.fail("Ray, which takes a second to tell of a break, told of each before init had ended")


@also(GATHER_FROM_ASYNC)
def test_init_that_raises_while_its_reply_is_lost_raises_the_original_once(fleet):
    rig = fleet.launch()
    launch = fleet.in_background(rig.engine.init.remote("CUDA out of memory"))
    rig.wait_for("begun")
    rig.cut()
    rig.open()
    error = launch.exception(60)
    assert isinstance(error, RuntimeError)
    assert "CUDA out of memory" in str(error)
    assert rig.times_init_began() == 1
    assert fleet.steps(rig.engine)[-1] == (UNAVAILABLE, DEAD, Reason.INIT_FAILED)


def test_a_cut_after_init_is_borne_by_the_next_call(fleet):
    rig = fleet.launch()
    rig.open()
    fleet.monitor.get(rig.engine.init.remote())
    holding = fleet.in_background(rig.engine.hold.remote())
    rig.wait_for("held")
    rig.cut()
    fleet.wait_for_state(rig.engine, UNAVAILABLE)
    rig.open("let_go")
    assert holding.result(60) is None
    assert fleet.steps(rig.engine)[2:] == [(READY, UNAVAILABLE, Reason.ACTOR_UNAVAILABLE), BACK]


@also(GATHER_FROM_ASYNC)
def test_two_cuts_in_one_launch_cost_nothing(fleet):
    rig = fleet.launch()
    launch = fleet.in_background(rig.engine.init.remote())
    rig.wait_for("begun")
    rig.cut()
    fleet.wait_for_attempts(rig.engine, 1)
    rig.cut_until(lambda: len(fleet.outcomes(rig.engine)) >= 2)  # the connection of the re-await
    rig.open()
    assert launch.result(60) == "launched"
    assert fleet.steps(rig.engine) == [LAUNCHED, LOST, BACK]
    *lost, last = [each.outcome for each in fleet.outcomes(rig.engine)]
    assert (set(lost), last) == ({Outcome.ACTOR_UNAVAILABLE}, Outcome.SUCCEEDED)
    assert rig.times_init_began() == 1


def test_a_busy_engine_is_not_polled_while_it_is_re_awaited(fleet):
    rig = fleet.launch()
    call = rig.engine.init.remote()
    launch = fleet.in_background(call)
    rig.wait_for("begun")
    rig.cut()
    fleet.wait_for_attempts(rig.engine, 1)
    wait_until(lambda: call.attempt == 1, what="the resubmission")
    with pytest.raises(GetTimeoutError):
        fleet.monitor.get(call, timeout=4)  # longer than any pause of the policy
    assert call.attempt == 1
    with Stopwatch() as since_opened:
        rig.open()
        launch.result(60)
        assert since_opened.s < 1, "the outcome did not arrive with the end of init"
    assert call.attempt == 1


def test_the_same_engines_come_up_and_none_is_recreated(fleet):
    rigs = [fleet.launch() for _ in range(4)]
    pids = [rig.pid for rig in rigs]
    launch = fleet.in_background([rig.engine.init.remote(value=number) for number, rig in enumerate(rigs)])
    for rig in rigs:
        rig.wait_for("begun")
    for rig in rigs[1:]:
        rig.cut()
    for rig in rigs[1:]:
        fleet.wait_for_state(rig.engine, UNAVAILABLE)
    for rig in rigs:
        rig.open()
    assert launch.result(60) == [0, 1, 2, 3]
    assert [[int(pid) for pid in rig.read("begun").split()] for rig in rigs] == [[pid] for pid in pids]


def test_an_engine_without_enginefsm_in_its_environment_recovers(fleet):
    rig = fleet.launch(WithoutEnginefsm)
    launch = fleet.in_background(rig.engine.init.remote())
    rig.wait_for("begun")
    rig.cut()
    fleet.wait_for_state(rig.engine, UNAVAILABLE)
    rig.open()
    assert launch.result(60) == "launched"
    assert fleet.monitor.get([rig.engine.can_import_enginefsm.remote(), rig.engine.times_init_ran.remote()]) == [
        False,
        1,
    ]


def test_an_engine_that_answers_another_call_is_launching_again(fleet):
    rig = fleet.launch(Grouped, concurrency_groups={"health": 1})
    launch = fleet.in_background(rig.engine.init.remote())
    rig.wait_for("begun")
    rig.cut()
    fleet.wait_for_state(rig.engine, UNAVAILABLE)
    assert fleet.monitor.get(rig.engine.health.remote(), timeout=30) == "well"
    assert fleet.steps(rig.engine)[-1] == (UNAVAILABLE, LAUNCHING, Reason.ACTOR_REACHABLE)
    rig.open()
    assert launch.result(60) == "launched"
    assert fleet.steps(rig.engine)[-1] == (LAUNCHING, READY, Reason.INIT_SUCCEEDED)
    assert rig.times_init_began() == 1


def test_many_cuts_leave_one_waiter_in_a_threaded_engine(fleet):
    rig = fleet.launch(max_concurrency=3)
    launch = fleet.in_background(rig.engine.init.remote())
    rig.wait_for("begun")
    for attempts in range(1, 5):
        rig.cut_until(lambda n=attempts: len(fleet.outcomes(rig.engine)) >= n)
        wait_until(lambda: launch.done() or rig.engine.fsm.state is UNAVAILABLE)
    # Of three threads init has one and the newest re-await another; older re-awaits have left theirs.
    assert fleet.monitor.get(rig.engine.times_init_ran.remote(), timeout=30) == 1
    rig.open()
    assert launch.result(60) == "launched"


def test_a_get_that_timed_out_is_called_again(fleet):
    rig = fleet.launch()
    call = rig.engine.init.remote()
    rig.wait_for("begun")
    with pytest.raises(GetTimeoutError, match=rig.engine.fsm.name):
        fleet.monitor.get(call, timeout=0.1)
    rig.cut()

    def is_told_to_be_unavailable():
        with pytest.raises(GetTimeoutError) as raised:
            fleet.monitor.get(call, timeout=1)
        return "unavailable" in str(raised.value)

    wait_until(is_told_to_be_unavailable, what="the notice of the cut")
    rig.open()
    assert fleet.monitor.get(call) == "launched"
    assert fleet.monitor.get([call, call]) == ["launched", "launched"]
    assert rig.times_init_began() == 1


def test_calls_that_were_lost_together_run_in_the_order_in_which_they_were_made(fleet):
    rig = fleet.launch()
    rig.open()
    fleet.monitor.get(rig.engine.init.remote())
    with chaos.freeze(rig.pid):
        rig.cut()
        calls = [rig.engine.note.remote(str(number)) for number in range(9)]

        async def one_by_one():
            await asyncio.gather(*calls[1::3])

        waits = [
            fleet.in_background(calls[0::3]),
            fleet.threads.submit(asyncio.run, one_by_one()),
            *(fleet.in_background(call) for call in calls[2::3]),
        ]
        fleet.wait_for_state(rig.engine, UNAVAILABLE)  # after 20 s, when Ray gives up to connect
    for wait in waits:
        wait.result(60)
    assert min(call.attempt for call in calls) >= 1
    assert rig.read("noted").split() == [str(number) for number in range(9)]


def test_two_threads_may_wait_for_one_call(fleet):
    rig = fleet.launch()
    call = rig.engine.init.remote()
    launches = [fleet.in_background(call) for _ in range(2)]
    rig.wait_for("begun")
    rig.cut()
    fleet.wait_for_attempts(rig.engine, 1)
    wait_until(lambda: call.attempt == 1, what="the resubmission")
    rig.open()
    assert [launch.result(60) for launch in launches] == ["launched"] * 2
    assert call.attempt == 1
    assert rig.times_init_began() == 1


def test_an_interrupt_ends_the_wait_at_once_and_the_calls_can_be_awaited_again(fleet):
    rig = fleet.launch()
    call = rig.engine.init.remote()
    rig.wait_for("begun")
    rig.cut()

    def interrupt():
        fleet.wait_for_state(rig.engine, UNAVAILABLE)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        fleet.monitor.get(call, timeout=60)
    thread.join()
    rig.open()
    assert fleet.monitor.get(call) == "launched"
    assert rig.times_init_began() == 1


def test_a_frozen_engine_that_thaws_answers_as_if_nothing_had_been(fleet):
    rig = fleet.launch()
    call = rig.engine.init.remote()
    rig.wait_for("begun")
    with chaos.freeze(rig.pid):
        rig.open()
        with pytest.raises(GetTimeoutError):
            fleet.monitor.get(call, timeout=2)
    assert fleet.monitor.get(call) == "launched"
    assert fleet.steps(rig.engine) == [LAUNCHED, (LAUNCHING, READY, Reason.INIT_SUCCEEDED)]


@also(GATHER_FROM_ASYNC)
def test_outcomes_that_arrived_are_forgotten_by_the_actor(fleet):
    rig = fleet.launch()
    rig.open()
    fleet.monitor.get(rig.engine.init.remote())
    fleet.monitor.get([rig.engine.echo.remote(number) for number in range(50)])
    assert fleet.monitor.get(rig.engine.remembered.remote()) == 0


@also(GATHER_FROM_ASYNC)
def test_a_plain_launch_reference_is_asked_after_by_the_probe(fleet):
    rig = fleet.launch(adopt={"launched_if": "launched"})
    ref = rig.engine.handle.init.remote()
    launch = fleet.in_background(ref)
    rig.wait_for("begun")
    rig.cut()
    fleet.wait_for_state(rig.engine, UNAVAILABLE)
    rig.open()
    assert launch.result(60) is True
    assert fleet.steps(rig.engine) == [LAUNCHED, LOST, BACK]
    assert fleet.monitor.get(ref) is True, "a second look at the lost reference must not say anything new"
    assert rig.engine.fsm.state is READY


@pytest.mark.parametrize(
    "probe",
    [
        pytest.param(lambda engine: (engine.directory / "ended").exists(), id="says so"),
        pytest.param(lambda engine: (engine.directory / "ended").stat(), id="raises"),
    ],
)
def test_a_probe_may_be_a_function_and_is_asked_again_while_it_says_not_yet_or_raises(fleet, probe):
    rig = fleet.launch(max_concurrency=2, adopt={"launched_if": probe})
    launch = fleet.in_background(rig.engine.handle.init.remote())
    rig.wait_for("begun")
    rig.cut()
    fleet.wait_for(lambda: (UNAVAILABLE, LAUNCHING, Reason.ACTOR_REACHABLE) in fleet.steps(rig.engine))
    rig.open()
    assert launch.result(60)
    assert rig.engine.fsm.state is READY
    assert rig.times_init_began() == 1


def test_a_plain_reference_without_a_probe_passes_the_error_on_after_the_state_has_moved(fleet):
    rig = fleet.launch()
    ref = rig.engine.handle.init.remote()
    rig.wait_for("begun")
    rig.cut()
    with pytest.raises(ActorUnavailableError) as raised:
        fleet.monitor.get(ref)
    assert rig.engine.fsm.state is UNAVAILABLE
    assert "never recovers" in "\n".join(raised.value.__notes__)
    rig.open()
    fleet.monitor.get(rig.engine.times_init_ran.remote())
    with pytest.raises(ActorUnavailableError):
        fleet.monitor.get(ref)
    assert rig.engine.fsm.state is LAUNCHING, "an old failure was taken for a new one"


def test_a_probe_goes_on_after_a_get_that_timed_out_and_for_several_waiters(fleet):
    rig = fleet.launch(adopt={"launched_if": "launched"})
    ref = rig.engine.handle.init.remote()
    rig.wait_for("begun")
    rig.cut()
    with pytest.raises(GetTimeoutError):
        fleet.monitor.get(ref, timeout=5)
    launches = [fleet.in_background([ref, ref]) for _ in range(2)]
    rig.open()
    assert [launch.result(60) for launch in launches] == [[True, True]] * 2
    assert rig.engine.fsm.state is READY


def test_another_plain_reference_is_not_taken_for_a_launch_that_was_called(fleet):
    rig = fleet.launch(max_concurrency=2)
    launch = fleet.in_background(rig.engine.init.remote())
    rig.wait_for("begun")
    assert fleet.monitor.get(rig.engine.handle.times_init_ran.remote()) == 1
    assert rig.engine.fsm.state is LAUNCHING
    with pytest.raises(ValueError, match="text"):
        fleet.monitor.get(rig.engine.handle.fail.remote("text"))
    assert rig.engine.fsm.state is LAUNCHING
    rig.open()
    launch.result(60)


def test_an_old_answer_does_not_bring_an_engine_back(fleet):
    rig = fleet.launch(max_concurrency=2)
    rig.open()
    fleet.monitor.get(rig.engine.init.remote())
    ref, call = rig.engine.handle.times_init_ran.remote(), rig.engine.times_init_ran.remote()
    ray.wait([ref, call.ref], num_returns=2)
    held = fleet.in_background(rig.engine.hold.remote())
    rig.wait_for("held")
    with chaos.freeze(rig.pid):
        rig.cut()
        fleet.wait_for_state(rig.engine, UNAVAILABLE)
        assert fleet.monitor.get([ref, call]) == [1, 1]
        assert rig.engine.fsm.state is UNAVAILABLE
    rig.open("let_go")
    held.result(60)


@also(GATHER_FROM_ASYNC)
def test_an_argument_that_failed_leaves_the_engine_as_it_was(fleet):
    rig = fleet.launch()
    rig.open()
    broken = rig.engine.handle.fail.remote("no such tensor")
    with pytest.raises(ValueError, match="no such tensor"):
        fleet.monitor.get(rig.engine.echo.remote(broken))
    assert fleet.monitor.get(rig.engine.init.remote()) == "launched"


def test_an_engine_that_restores_its_own_state_is_the_same_engine(fleet):
    rig = fleet.launch(adopt={"launch": "init_and_restore"})
    fleet.monitor.get(rig.engine.init_and_restore.remote())
    assert fleet.monitor.get(rig.engine.times_init_ran.remote()) == 0
    assert rig.engine.fsm.state is READY


@pytest.mark.parametrize("policy", [RetryPolicy(budget_s=6, cap_s=1)])
def test_the_budget_does_not_run_while_nobody_tries(fleet, policy):
    rig = fleet.launch()
    call = rig.engine.init.remote()
    rig.wait_for("begun")
    rig.cut()
    with pytest.raises(GetTimeoutError):
        fleet.monitor.get(call, timeout=2.2)
    # The re-await's own connection may only be on its way: cut whatever there is until it has failed.
    wait_until(lambda: chaos.cut(rig.pid) >= 0 and ray.wait([call.ref], timeout=0.2)[0], what="its failure")
    silent_since = time.monotonic()
    wait_until(lambda: time.monotonic() - silent_since > 7, what="the end of the budget")
    rig.open()
    assert fleet.monitor.get(call) == "launched"


def test_what_is_looked_at_twice_is_counted_once(fleet):
    rig = fleet.launch()
    rig.open()
    call = rig.engine.init.remote()
    for _ in range(3):
        fleet.monitor.get(call)
    labels = {"model": "tiny", "worker_type": "regular", "method": "init", "outcome": "succeeded"}
    assert fleet.metric("enginefsm_outcomes_total", **labels) == 1

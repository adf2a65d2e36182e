"""How far a launch is, and that nobody has to wait for a GCS that does not say. On a real Ray."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import ray
from ray.exceptions import ActorUnschedulableError, GetTimeoutError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
from support.bare_handles import bare_handle
from support.engines import Engine, SlowToConstruct, wait_until
from support.processes import below

from enginefsm import EngineMonitor, EngineState, LaunchDeadlineError, LaunchStage, Reason, RetryPolicy
from enginefsm._engine.proxy import managed

INFEASIBLE = {"resources": {"nowhere": 1}}


def say_when_asked(monitor, calls, text):
    """Wait until a `get` that times out says `text`; gives all that it says."""

    def told():
        with pytest.raises(GetTimeoutError) as raised:
            monitor.get(calls, timeout=0.05)
        return text in str(raised.value) and str(raised.value)

    return wait_until(told, what=text)


def test_an_engine_that_no_node_has_room_for_raises_nothing_and_is_told_to_wait_for_resources(fleet):
    rig = fleet.launch(**INFEASIBLE)
    call = rig.engine.init.remote()
    said = say_when_asked(fleet.monitor, call, "waiting for resources")
    assert "init() of engine 'engine-0'" in said
    assert "launching (waiting for resources); launching" in said
    assert rig.engine.fsm.state is EngineState.LAUNCHING


def test_a_launch_is_told_by_its_stages(fleet):
    rig = fleet.launch(SlowToConstruct)
    call = rig.engine.init.remote()
    say_when_asked(fleet.monitor, call, "launching (constructing)")
    rig.open("constructor_gate")
    rig.wait_for("begun")
    say_when_asked(fleet.monitor, call, "launching (init running)")
    rig.open()
    assert fleet.monitor.get(call) == "launched"
    assert managed(rig.engine).stage is None


def test_an_actor_whose_launch_was_not_called_is_told_to_be_constructed(fleet):
    rig = fleet.launch()
    say_when_asked(fleet.monitor, [fleet.launch(**INFEASIBLE).engine.init.remote()], "waiting for resources")
    wait_until(lambda: fleet.monitor.stages.look(1) or managed(rig.engine).stage is LaunchStage.CONSTRUCTED)
    launch = fleet.in_background(rig.engine.handle.init.remote())
    rig.wait_for("begun")
    wait_until(lambda: fleet.monitor.stages.look(1) or managed(rig.engine).stage is LaunchStage.INIT_RUNNING)
    rig.open()
    launch.result(60)


def test_an_actor_whose_arguments_are_still_made_is_told_so(fleet, tmp_path):
    @ray.remote(num_cpus=0)
    def made(directory):
        wait_until((directory / "made").exists)
        return str(directory)

    actor = ray.remote(num_cpus=0)(Engine).remote(made.remote(tmp_path))
    engine = fleet.monitor.adopt(actor, name="late")
    call = engine.init.remote()
    say_when_asked(fleet.monitor, call, "waiting for arguments")
    (tmp_path / "made").touch()
    (tmp_path / "gate").touch()
    assert fleet.monitor.get(call) == "launched"


@pytest.mark.parametrize("policy", [RetryPolicy(launch_deadline_s=3)])
def test_the_launch_deadline_tells_what_each_engine_still_waited_for(fleet, policy, monkeypatch):
    monkeypatch.setattr(
        "enginefsm._engine.launch_stages.ANSWER_S", 30.0
    )  # what the GCS has said is kept, should it be slow
    rigs = [*fleet.launch_begun(SlowToConstruct, Engine), fleet.launch(**INFEASIBLE)]
    calls = [rig.engine.init.remote() for rig in rigs]
    stages = [LaunchStage.CONSTRUCTING, LaunchStage.INIT_RUNNING, LaunchStage.WAITING_FOR_RESOURCES]
    wait_until(
        lambda: fleet.monitor.stages.look(1) or [managed(rig.engine).stage for rig in rigs] == stages, what="the stages"
    )
    with pytest.raises(LaunchDeadlineError) as raised:
        fleet.monitor.get(calls)
    told = dict(re.findall(r"engine '([^']+)' .+: \w+ \(([^)]+)\)", str(raised.value)))
    assert told[rigs[0].engine.fsm.name] == "launch_deadline: constructing"
    # The deadlines of the others, some milliseconds later, may have passed or not.
    assert [told[rig.engine.fsm.name].removeprefix("launch_deadline: ") for rig in rigs] == stages
    assert managed(rigs[0].engine).snapshot().stage is LaunchStage.CONSTRUCTING


def test_an_actor_that_ray_cannot_schedule_is_named_as_such_at_its_first_call(cluster):
    here = ray.get_runtime_context().get_node_id()
    gone = NodeAffinitySchedulingStrategy(here[::-1], soft=False)
    monitor = EngineMonitor()
    engine = monitor.adopt(ray.remote(Engine).options(num_cpus=0, scheduling_strategy=gone).remote("/"), name="lost")
    with pytest.raises(ActorUnschedulableError) as raised:
        monitor.get(engine.init.remote(), timeout=60)
    assert "engine 'lost'" in raised.value.__notes__[0]
    assert (engine.fsm.state, engine.fsm.reason) == (EngineState.DEAD, Reason.UNSCHEDULABLE)


def test_an_actor_whose_placement_group_is_removed_before_it_began_is_named_as_such(cluster, tmp_path):
    group = placement_group([{"CPU": 1}])
    ray.get(group.ready(), timeout=60)
    there = ray.remote(Engine).options(num_cpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(group))
    occupant = there.remote(str(tmp_path))
    wait_until((tmp_path / "pid").exists)
    monitor = EngineMonitor()
    engine = monitor.adopt(there.remote(str(tmp_path)), name="lost")
    call = engine.init.remote()
    say_when_asked(monitor, call, "waiting for resources")
    remove_placement_group(group)
    with pytest.raises(ActorUnschedulableError, match="placement group was removed"):
        monitor.get(call, timeout=60)
    assert (engine.fsm.state, engine.fsm.reason) == (EngineState.DEAD, Reason.UNSCHEDULABLE)
    del occupant


def gcs_of_this_cluster():
    (gcs,) = below(name="gcs_server")
    return gcs.pid


def test_a_gcs_that_does_not_answer_keeps_nobody_and_is_asked_again_when_it_does(clusters, make_fleet):
    clusters.use(RAY_gcs_rpc_server_reconnect_timeout_s="60")  # a cluster of its own
    fleet = make_fleet()
    rig = fleet.launch(**INFEASIBLE)
    call = rig.engine.init.remote()
    say_when_asked(fleet.monitor, call, "waiting for resources")
    gcs = gcs_of_this_cluster()
    os.kill(gcs, signal.SIGSTOP)
    try:
        took_s, said = [], []
        until = time.monotonic() + 3
        while time.monotonic() < until:
            began = time.monotonic()
            with pytest.raises(GetTimeoutError) as raised:
                fleet.monitor.get(call, timeout=0)
            took_s.append(time.monotonic() - began)
            said.append(str(raised.value))
    finally:
        os.kill(gcs, signal.SIGCONT)
    *others_s, _ = sorted(took_s)  # the machine itself may have stood still during one
    assert max(others_s) < 1
    assert sum(took > 0.3 for took in others_s) <= 3, "it was asked too often while it did not answer"
    assert "launching (adopted); launching" in said[-1]
    say_when_asked(fleet.monitor, call, "waiting for resources")


def test_a_stage_is_of_a_launch_alone_and_stays_where_its_deadline_ended_it():
    monitor = EngineMonitor()
    engine = monitor.adopt(bare_handle(), name="e")
    managed(engine).reached(LaunchStage.CONSTRUCTING)
    assert managed(engine).snapshot().stage is LaunchStage.CONSTRUCTING
    managed(engine).step(Reason.ACTOR_UNAVAILABLE)
    assert managed(engine).snapshot().stage is None
    managed(engine).reached(LaunchStage.INIT_RUNNING)
    assert managed(engine).snapshot().stage is None, "it is not known while it cannot be reached"
    managed(engine).step(Reason.ACTOR_REACHABLE)
    managed(engine).reached(LaunchStage.INIT_RUNNING)
    assert "launching (actor_reachable: init running)" in engine.fsm.describe()
    managed(engine).step(Reason.LAUNCH_DEADLINE)
    managed(engine).reached(None)
    assert "dead (launch_deadline: init running)" in engine.fsm.describe()

"""What slime's groups may hold when they are adopted and watched, and what is refused. On a real Ray, no faults."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import ray
from support.engines import kill

import enginefsm
from enginefsm import EngineState, Reason
from enginefsm._engine.proxy import managed
from enginefsm.embed import slime


class Plain:
    """An engine with those methods of slime's that a group's monitor needs."""

    def init(self):
        return "launched"

    def health_generate(self, timeout=5.0):
        return True

    def get_url(self):
        return None

    def shutdown(self):
        return None


@pytest.fixture
def monitor():
    return enginefsm.EngineMonitor(run="test")


@pytest.fixture
def group(cluster):
    """A group of two engines, as slime's ServerGroup has them."""
    made = SimpleNamespace(
        all_engines=[start(), start()], rank_offset=4, worker_type="decode", nodes_per_engine=1,
        model_path="/root/Qwen3-4B/", pg=None, router_ip=None, router_port=None,
    )  # fmt: skip
    yield made
    for held in made.all_engines:
        if held is not None:
            ray.kill(getattr(held, "handle", held))


def start():
    return ray.remote(num_cpus=0)(Plain).remote()


ARGS = SimpleNamespace(
    rollout_health_check_interval=0.2, rollout_health_check_timeout=5.0, rollout_health_check_first_wait=0.0
)


def test_a_group_is_adopted_in_place_and_only_the_new_are_given(group, monitor):
    adopted = slime.adopt_group(group, monitor=monitor)
    assert [(rank, engine.fsm.name) for rank, engine in adopted] == [(4, "Qwen3-4B/decode/4"), (5, "Qwen3-4B/decode/5")]
    assert [engine for _, engine in adopted] == group.all_engines
    assert dict(adopted[0][1].fsm.labels) == {"model": "Qwen3-4B", "worker_type": "decode", "node": ""}
    assert slime.adopt_group(group, monitor=monitor) == []
    group.all_engines[1] = None
    assert slime.adopt_group(group, monitor=monitor) == []


def test_a_group_takes_the_model_that_it_is_given_or_the_default(group, monitor):
    slime.adopt_group(group, model="actor", monitor=monitor)
    assert [engine.fsm.name for engine in group.all_engines] == ["actor/decode/4", "actor/decode/5"]
    group.model_path, group.all_engines[0] = None, start()
    assert [engine.fsm.name for _, engine in slime.adopt_group(group, monitor=monitor)] == ["default/decode/4"]


def test_an_actor_that_was_put_in_the_place_of_another_is_its_next_incarnation(group, monitor):
    slime.adopt_group(group, monitor=monitor)
    old = group.all_engines[0]
    ray.kill(old.handle)
    group.all_engines[0] = start()
    ((rank, engine),) = slime.adopt_group(group, monitor=monitor)
    assert (rank, engine.fsm.name, engine.fsm.incarnation) == (4, old.fsm.name, 2)
    assert old.fsm.state is EngineState.DEAD


def test_nodes_that_are_not_told_in_time_cost_a_label_and_no_more(group, monitor, monkeypatch):
    monkeypatch.setattr(slime, "NODES_TIMEOUT_S", 0.2)
    told = threading.Event()

    def table(_):
        told.wait(30)
        return {"bundles_to_node_id": {}}

    monkeypatch.setattr(ray.util, "placement_group_table", table)
    group.pg, group.gpu_offset, group.num_gpus_per_engine = (object(), [0, 1], ["0", "1"]), 0, 1
    group.args = SimpleNamespace(num_gpus_per_node=1)
    began = time.monotonic()
    try:
        adopted = slime.adopt_group(group, monitor=monitor)
    finally:
        told.set()
    assert time.monotonic() - began < 10
    assert [engine.fsm.labels["node"] for _, engine in adopted] == ["", ""]


def test_a_placeholder_group_has_nothing_to_adopt(monitor):
    placeholder = SimpleNamespace(all_engines=[], rank_offset=0, worker_type="placeholder")
    assert slime.adopt_group(placeholder, monitor=monitor) == []


def test_what_is_no_group_is_refused_and_named(cluster, monitor):
    with pytest.raises(TypeError, match=r"takes slime's ServerGroup, and this SimpleNamespace has no all_engines"):
        slime.adopt_group(SimpleNamespace(engines=[]), monitor=monitor)
    with pytest.raises(TypeError, match="is no list, but a tuple"):
        slime.adopt_group(SimpleNamespace(all_engines=(), rank_offset=0, worker_type="regular"), monitor=monitor)
    with pytest.raises(TypeError, match=r"all_engines\[1\] is no actor's handle, but a str"):
        slime.adopt_group(
            SimpleNamespace(all_engines=[None, "engine"], rank_offset=0, worker_type="regular"), monitor=monitor
        )
    with pytest.raises(TypeError, match="has no all_engines"):
        slime.RolloutHealthMonitor(object(), ARGS)


def test_engines_of_another_process_are_named_by_their_places(group, monitor):
    first, second = group.all_engines
    engines = slime.adopt_engines([first, second], monitor=monitor)
    assert [engine.fsm.name for engine in engines] == ["default/regular/0", "default/regular/1"]
    assert monitor.get([engine.get_url.remote() for engine in engines]) == [None, None]
    again = slime.adopt_engines([first, group.all_engines.append(start()) or group.all_engines[-1]], monitor=monitor)
    assert again[0] is engines[0]
    assert (again[1].fsm.name, again[1].fsm.incarnation) == ("default/regular/1", 2)


def test_a_health_monitor_is_driven_as_slimes_is(group, monitor):
    health = slime.RolloutHealthMonitor(group, ARGS)
    health.pause()
    health.resume()
    health.stop()
    assert not health.is_checking_enabled()
    with pytest.raises(TypeError, match=r"all_engines\[0\] is not adopted: call enginefsm.embed.slime.adopt_group"):
        health.start()
    slime.adopt_group(group, monitor=monitor)
    assert health.start()
    assert health.start()
    assert not health.is_checking_enabled()
    health.resume()
    assert health.is_checking_enabled()
    health.pause()
    assert not health.is_checking_enabled()
    health.stop()
    health.stop()
    assert not health.is_checking_enabled()
    assert health.start()
    health.stop()


def test_a_health_monitor_without_engines_says_so(monitor):
    empty = SimpleNamespace(all_engines=[], rank_offset=0, worker_type="regular")
    assert not slime.RolloutHealthMonitor(empty, ARGS).start()
    empty.all_engines = [None, None]
    assert not slime.RolloutHealthMonitor(empty, ARGS).start()


def test_a_wait_for_a_call_that_was_left_to_ray_shows_at_once(group, monitor):
    ((_, engine), _) = slime.adopt_group(group, monitor=monitor)
    with pytest.raises(ValueError, match="Call"):
        ray.get(engine.init.remote())
    with pytest.raises((TypeError, ValueError), match="Call"):
        ray.get([engine.get_url.remote()])


def started(group, monitor):
    """A health monitor that has begun, paused, over a group that is up."""
    slime.adopt_group(group, monitor=monitor)
    monitor.get([engine.init.remote() for engine in group.all_engines])
    health = slime.RolloutHealthMonitor(group, ARGS)
    assert health.start()
    return health


def test_a_pause_keeps_an_engine_that_was_given_up_without_a_verdict(group, monitor):
    health = started(group, monitor)
    engine = group.all_engines[1]
    assert managed(engine).step(Reason.ACTOR_UNAVAILABLE)
    assert managed(engine).step(Reason.RETRY_EXHAUSTED)
    health.pause()
    assert group.all_engines[1] is engine
    assert ray.get(engine.handle.get_url.remote()) is None
    health.stop()


def test_a_pause_ends_an_engine_that_is_known_to_be_dead(group, monitor):
    health = started(group, monitor)
    engine = group.all_engines[1]
    kill(engine.handle)
    with pytest.raises(ray.exceptions.ActorDiedError):
        monitor.get(engine.get_url.remote())
    health.pause()
    assert group.all_engines[0].fsm.state is EngineState.READY
    assert group.all_engines[1] is None
    health.stop()


def test_an_engine_that_may_not_be_replaced_again_leaves_no_actor_behind_and_the_rest_of_the_group_is_watched_on(group):
    monitor = enginefsm.EngineMonitor(run="test", restart_cap=enginefsm.RestartCap(restarts=0))
    group.all_engines.append(start())
    health = started(group, monitor)
    kept, *lost = list(group.all_engines)
    kill(lost[1].handle)
    with pytest.raises(ray.exceptions.ActorDiedError):
        monitor.get(lost[1].get_url.remote())
    monitor.release(lost[0])  # in good order: a successor is no restart
    ray.kill(lost[0].handle)
    group.all_engines[1:] = successors = [start(), start()]

    with pytest.raises(enginefsm.RestartCapError, match="go on without it") as refused:
        slime.adopt_group(group, monitor=monitor)

    assert "killed all 2" in refused.value.__notes__[0]
    assert group.all_engines == [kept, None, None]
    for successor in successors:
        with pytest.raises(ray.exceptions.ActorDiedError):
            ray.get(successor.get_url.remote())
    group.all_engines[2] = kept.handle  # one that is not adopted yet
    health.resume()
    health.pause()
    assert monitor.get(kept.get_url.remote()) is None
    assert monitor.engines() == [kept, lost[1]]
    health.stop()


def test_a_pause_waits_for_the_verdicts_that_are_behind_one_another(group, monitor, monkeypatch):
    group.all_engines.append(start())
    slime.adopt_group(group, monitor=monitor)
    engines = list(group.all_engines)
    health = slime.RolloutHealthMonitor(group, ARGS)
    assert health.start()
    begun = threading.Event()

    def shut_down(_):
        begun.set()
        time.sleep(1.5)

    def tell():
        for engine in engines:
            health._judged(SimpleNamespace(engines=(engine,)))
            time.sleep(0.3)  # a slow listener hears of the next one first

    monkeypatch.setattr(slime, "VERDICT_S", 3.0)  # shorter than all three, longer than a machine's pause
    monkeypatch.setattr(slime, "_shut_down", shut_down)
    for engine in engines:
        managed(engine).step(Reason.RETRY_EXHAUSTED)
    telling = threading.Thread(target=tell)
    telling.start()
    assert begun.wait(30)
    health.pause()
    assert group.all_engines == [None, None, None]
    telling.join()
    health.stop()
    for engine in engines:
        ray.kill(engine.handle)

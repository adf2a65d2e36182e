"""A RolloutManager in slime's shape that embeds enginefsm, on a real Ray and with real faults."""

from __future__ import annotations

import psutil
import pytest
import ray
from support.engines import wait_until
from support.rollouts import Rollout

from enginefsm import EngineState
from enginefsm.rehearsal import chaos

QUICK = {"import_s": 0.0, "load_s": 0.0}


@pytest.fixture
def start(cluster, tmp_path):
    """`start(...)` gives a manager whose constructor has begun."""
    started = []

    def begin(**args):
        started.append(Rollout(tmp_path / f"rollout-{len(started)}", **{"server": QUICK, **args}))
        return started[-1]

    yield begin
    for rollout in started:
        rollout.close()


@pytest.fixture(scope="module")
def kept(clusters, tmp_path_factory):
    clusters.use()
    rollout = Rollout(tmp_path_factory.mktemp("rollout"), server=QUICK, use_fault_tolerance=True)
    assert rollout.ready.result(150)
    yield rollout
    rollout.close()


@pytest.fixture
def rollout(kept, cluster):
    """A manager of two engines that is up, and serves when the test is done as it did before."""
    before = [incarnation for _, incarnation, _ in kept.places()]
    yield kept
    wait_until(lambda: [place and place[2] for place in kept.places()] == ["ready", "ready"], what="both engines")
    assert kept.ask("generate", 0) == [4, 4, 4, 4]
    kept.ask("offload")
    assert len(kept.ask("router_lists")) == 2
    for rank, was in enumerate(before):
        assert len(kept.begun("constructor", rank)) - was in (0, 1)


def test_a_manager_cut_off_at_each_wait_of_its_constructor_comes_up(start):
    waits = [("ports", [0]), ("init", [0]), ("get_url", [0]), ("ports", [1]), ("init", [1, 2])]
    rollout = start(hold=waits, num_encoders=1)
    for step, ranks in waits:
        rollout.cut_during(step, ranks)
    assert rollout.ready.result(150)
    for rank in range(3):
        assert len(rollout.begun("init", rank)) == 1
        assert len(rollout.begun("ports", rank)) == 4
        assert rollout.times("dead", rank) == 0
    assert rollout.places() == [
        ("tiny/encoder/0", 1, "ready"),
        ("tiny/regular/1", 1, "ready"),
        ("tiny/regular/2", 1, "ready"),
    ]
    assert [one["labels"]["node"] for one in rollout.ask("told")] == ["127.0.0.1"] * 3
    assert rollout.ask("generate", 0) == [4, 4, 4, 4]


def test_external_engines_cut_off_while_they_are_initialised_come_up(start):
    rollout = start(hold=[("init", [0, 1])], num_external=2, rollout_num_engines=0)
    rollout.cut_during("init", [0, 1])
    assert rollout.ready.result(150)
    assert rollout.places() == [("default/regular/0", 1, "ready"), ("default/regular/1", 1, "ready")]
    assert rollout.ask("generate", 0) == [4, 4, 4, 4]


@pytest.mark.parametrize(
    ("step", "method", "argument"),
    [
        ("offload", "offload", ()),
        ("onload", "onload", (["weights"],)),
        ("get_url", "get_urls", ()),
        ("check_weights", "check_weights", ("snapshot",)),
    ],
)
def test_a_manager_cut_off_while_it_waits_for_engines_gets_what_they_gave(rollout, step, method, argument):
    assert rollout.ask(method, *argument) == rollout.cut_during(
        step, [0, 1], lambda: rollout.call(method, *argument)
    )  # fmt: skip


def test_a_driver_cut_off_from_its_manager_gets_what_the_manager_gave(rollout):
    assert rollout.cut_off_the_driver() == [["weights_checker", {"action": "snapshot"}]] * 2
    assert rollout.manager.fsm.state is EngineState.READY


def test_a_trainer_cut_off_from_engines_while_it_updates_weights_goes_on(rollout):
    trainer = rollout.trainer()

    def update_weights():
        return rollout.threads.submit(ray.get, trainer.update_weights.remote("/models/tiny", "1"))

    for step in ("pause_generation", "update_weights"):
        assert rollout.cut_during(step, [0, 1], update_weights, "trainer") == 2
    ray.kill(trainer)


def test_an_engine_cut_off_or_frozen_for_a_time_while_it_is_probed_is_kept(rollout):
    probed = len(rollout.begun("health_generate", 0))
    rollout.ask("generate", 0)
    # With the second probe, where the server is has been asked and told: that it serves is known from there on.
    wait_until(lambda: len(rollout.begun("health_generate", 0)) > probed + 1, what="probes")
    rollout.cut_during("health_generate", [0])
    wait_until(lambda: rollout.places()[0][2] == "ready")
    with chaos.freeze(rollout.pid(1)):
        rollout.wait_for(lambda: rollout.places()[1][2] == "unavailable", "the notice of the freeze")
    wait_until(lambda: rollout.places()[1][2] == "ready")
    assert rollout.begun("shutdown", 1) == []


def test_a_killed_engine_is_replaced_once_though_recovery_is_cut_off(rollout):
    rollout.ask("generate", 0)
    (ghost,) = set(rollout.ask("router_lists")) - {rollout.ask("get_urls")[0]}
    before, kept = rollout.places()[1], rollout.pid(0)

    def kill():
        chaos.kill(rollout.pid(1))
        wait_until(lambda: ghost not in rollout.ask("router_lists"), what="the end of the ghost")

    rollout.replace_cut_off(1, kill)
    assert rollout.pid(0) == kept
    assert rollout.places()[1] == (before[0], before[1] + 1, "ready")
    assert sorted(rollout.ask("get_urls")) == rollout.ask("router_lists")


def test_an_engine_whose_server_is_killed_is_shut_down_and_replaced_once(rollout):
    rollout.ask("generate", 0)
    before, actor = len(rollout.begun("constructor", 0)), psutil.Process(rollout.pid(0))
    chaos.kill(rollout.server_pid(0))
    rollout.wait_for_free(0)
    assert rollout.begun("shutdown", 0) == [actor.pid]
    wait_until(lambda: not actor.is_running(), what="the end of the actor")
    assert rollout.ask("router_lists") == [
        rollout.ask(
            "get_urls",
        )[-1]
    ]
    rollout.ask("recover_updatable_engines")
    assert len(rollout.begun("constructor", 0)) == before + 1
    assert sorted(rollout.ask("get_urls")) == rollout.ask("router_lists")


def test_an_engine_frozen_for_good_is_killed_and_its_server_forgotten(start):
    rollout = start(use_fault_tolerance=True, budget_s=4.0, rollout_health_check_timeout=1.0)
    assert rollout.ready.result(150)
    rollout.ask("generate", 0)
    rollout.ask("get_urls")  # behind the question of the health monitor, for the router
    actor = psutil.Process(rollout.pid(0))
    chaos.freeze(actor.pid)
    rollout.wait_for_free(0)
    assert rollout.begun("shutdown", 0) == []
    wait_until(lambda: not actor.is_running(), what="the end of the actor")
    assert rollout.ask("router_lists") == rollout.ask("get_urls")
    rollout.ask("recover_updatable_engines")
    assert rollout.places() == [("tiny/regular/0", 2, "ready"), ("tiny/regular/1", 1, "ready")]
    assert rollout.ask("generate", 1) == [4, 4, 4, 4]


def test_an_engine_of_two_nodes_ends_and_returns_whole_when_one_of_them_dies(start):
    rollout = start(use_fault_tolerance=True, nodes_per_engine=2)
    assert rollout.ready.result(150)
    assert [one["labels"]["node_rank"] for one in rollout.ask("told")] == ["0", "1", "0", "1"]
    rollout.ask("generate", 0)
    rollout.ask("get_urls")  # behind the question of the health monitor, for the router
    first = psutil.Process(rollout.pid(0))
    chaos.kill(rollout.pid(1))
    rollout.wait_for_free(0, 1)
    assert rollout.begun("shutdown", 0) == [first.pid]
    wait_until(lambda: not first.is_running(), what="the end of node 0")
    assert len(rollout.ask("router_lists")) == 1
    rollout.ask("recover_updatable_engines")
    assert [(incarnation, state) for _, incarnation, state in rollout.places()] == [
        (2, "ready"), (2, "ready"), (1, "ready"), (1, "ready"),
    ]  # fmt: skip
    assert rollout.ask("generate", 1) == [4, 4, 4, 4]

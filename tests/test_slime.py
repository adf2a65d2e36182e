"""A RolloutManager in slime's shape that embeds enginefsm, on a real Ray and with real faults."""

from __future__ import annotations

import os

import pytest
import ray
from engines import wait_until
from rollouts import Rollout

from enginefsm import EngineState

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


def test_a_manager_cut_off_at_each_wait_of_its_constructor_comes_up(start):
    waits = [("ports", [0]), ("init", [0]), ("get_url", [0]), ("ports", [1]), ("init", [1, 2])]
    rollout = start(hold=waits, num_encoders=1)
    for step, ranks in waits:
        rollout.cut_during(step, ranks)
    assert rollout.ready.result(60)
    for rank in range(3):
        assert len(rollout.begun("init", rank)) == 1
        assert len(rollout.begun("ports", rank)) == 4
        assert rollout.times("unavailable", rank) > 0 or rank == 2
    told = rollout.ask("told")
    assert [(one["name"], one["incarnation"], one["state"]) for one in told] == [
        ("tiny/encoder/0", 1, "ready"),
        ("tiny/regular/1", 1, "ready"),
        ("tiny/regular/2", 1, "ready"),
    ]
    assert [one["labels"]["node"] for one in told] == ["127.0.0.1"] * 3
    assert rollout.ask("generate", 0) == [4, 4, 4, 4]


def test_a_manager_cut_off_at_each_wait_of_its_life_goes_on(start):
    rollout = start()
    assert rollout.ready.result(60)
    for step, method in (("offload", "offload"), ("onload", "onload"), ("get_url", "get_urls")):
        rollout.cut_during(step, [0, 1], lambda method=method: rollout.call(method))
    checked = rollout.cut_during("check_weights", [0, 1], lambda: rollout.call("check_weights", "snapshot"))
    assert checked == [["weights_checker", {"action": "snapshot"}]] * 2
    for rank in range(2):
        assert rollout.times("unavailable", rank) == 4
        assert rollout.times("dead", rank) == 0
    assert [one["state"] for one in rollout.ask("told")] == ["ready", "ready"]
    assert rollout.ask("generate", 0) == [4, 4, 4, 4]


def test_a_driver_cut_off_from_its_manager_gets_what_the_manager_gave(start):
    rollout = start()
    assert rollout.ready.result(60)
    rollout.hold("offload", [0])
    offload = rollout.call("offload")
    wait_until(lambda: rollout.begun("offload", 0))
    rollout.cut(rollout.manager_pid, os.getpid())
    wait_until(lambda: rollout.manager.state is EngineState.UNAVAILABLE)
    rollout.let_go("offload", [0])
    offload.result(60)
    assert len(rollout.begun("offload", 0)) == 1
    assert rollout.manager.state is EngineState.READY


def test_a_trainer_cut_off_from_an_engine_while_it_updates_weights_goes_on(start):
    rollout = start()
    assert rollout.ready.result(60)
    trainer = rollout.trainer()

    def update_weights():
        return rollout.threads.submit(ray.get, trainer.update_weights.remote("/models/tiny", "1"))

    for step in ("pause_generation", "update_weights", "continue_generation"):
        assert rollout.cut_during(step, [0, 1], update_weights, "trainer") == 2


def test_external_engines_cut_off_while_they_are_initialised_come_up(start):
    rollout = start(hold=[("init", [0, 1])], num_external=2, rollout_num_engines=0)
    rollout.cut_during("init", [0, 1])
    assert rollout.ready.result(60)
    assert [(one["name"], one["state"]) for one in rollout.ask("told")] == [
        ("default/regular/0", "ready"),
        ("default/regular/1", "ready"),
    ]
    assert rollout.ask("generate", 0) == [4, 4, 4, 4]

"""A RolloutManager in slime's shape with real SGLang engines and the real sglang-router, under real faults."""

from __future__ import annotations

import psutil
import pytest
import ray
from engines import wait_until
from rollouts import Rollout

from enginefsm import chaos
from enginefsm.sglang import CPU_ENV, cpu_server_args
from enginefsm.tiny_model import make_tiny_model


@pytest.mark.timeout(600)
def test_real_engines_come_up_serve_and_are_replaced_once_whatever_is_cut_off_frozen_or_killed(cluster, tmp_path):
    model = str(make_tiny_model(tmp_path / "model"))
    waits = [("ports", [0]), ("ports", [1]), ("init", [0, 1])]
    rollout = Rollout(
        tmp_path / "rollout",
        hold=waits,
        engine="Real",
        server={"server_args": cpu_server_args(model), "env": dict(CPU_ENV), "log_dir": str(tmp_path)},
        use_fault_tolerance=True,
        rollout_health_check_interval=1.0,
        rollout_health_check_timeout=20.0,
    )
    try:
        for step, ranks in waits:
            rollout.cut_during(step, ranks)
        assert rollout.ready.result(300)
        assert rollout.places() == [("tiny/regular/0", 1, "ready"), ("tiny/regular/1", 1, "ready")]
        assert rollout.ask("generate", 0) == [4, 4, 4, 4]
        urls = rollout.ask("get_urls")
        assert rollout.ask("router_lists") == sorted(urls)

        for step, method, argument in (
            ("offload", "offload", ()),
            ("onload", "onload", (["weights"],)),
            ("onload", "onload", (["kv_cache"],)),
            ("get_url", "get_urls", ()),
        ):
            rollout.cut_during(step, [0, 1], lambda m=method, a=argument: rollout.call(m, *a))
        snapshots = rollout.cut_during("check_weights", [0, 1], lambda: rollout.call("check_weights", "snapshot"))
        assert [snapshot["success"] for snapshot in snapshots] == [True, True]
        assert [snapshot["success"] for snapshot in rollout.cut_off_the_driver()] == [True, True]

        trainer = rollout.trainer()
        update = lambda: rollout.threads.submit(ray.get, trainer.update_weights.remote(model, "7"))  # noqa: E731
        assert rollout.cut_during("update_weights", [0, 1], update, "trainer") == 2
        ray.kill(trainer)

        assert rollout.ask("generate", 1) == [4, 4, 4, 4]  # and the engines are probed
        rollout.cut_during("health_generate", [0])
        with chaos.freeze(rollout.pid(1), for_s=3):
            wait_until(lambda: rollout.places()[0][2] == "ready", what="engine 0 to be ready again")
        assert rollout.begun("shutdown", 0) == rollout.begun("shutdown", 1) == []
        assert [rollout.begun("init", rank) for rank in range(2)] == [[rollout.pid(0)], [rollout.pid(1)]]

        chaos.kill(rollout.pid(1))
        rollout.wait_for_free(1)
        assert rollout.ask("router_lists") == [urls[0]]
        assert rollout.ask("generate", 2) == [4, 4, 4, 4]
        chaos.kill(rollout.server_pid(0))
        rollout.wait_for_free(0, 1)
        assert rollout.begun("shutdown", 0) == [rollout.pid(0)]
        assert rollout.ask("router_lists") == []

        rollout.hold("init", [0, 1])
        recovered = rollout.call("recover_updatable_engines")
        wait_until(lambda: len(rollout.begun("init", 0)) == len(rollout.begun("init", 1)) == 2, what="the replacements")
        rollout.cut_during("init", [0, 1])
        recovered.result(300)
        assert rollout.places() == [("tiny/regular/0", 2, "ready"), ("tiny/regular/1", 2, "ready")]
        assert [len(rollout.begun("constructor", rank)) for rank in range(2)] == [2, 2]
        assert rollout.ask("router_lists") == sorted(rollout.ask("get_urls"))
        assert rollout.ask("generate", 3) == [4, 4, 4, 4]
        processes = rollout.processes()
        assert len(processes) > 8  # the manager and its router, two actors, their servers
        rollout.ask("dispose")
    finally:
        rollout.close()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []

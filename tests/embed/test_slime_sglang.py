"""A RolloutManager in slime's shape with real SGLang engines and the real sglang-router, under real faults."""

from __future__ import annotations

import psutil
import pytest
import ray
from support.engines import wait_until
from support.rollouts import Rollout

from enginefsm.rehearsal import chaos
from enginefsm.rehearsal.sglang import CPU_ENV, cpu_server_args
from enginefsm.rehearsal.tiny_model import make_tiny_model


@pytest.mark.timeout(900)
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
            ("get_url", "get_urls", ()),
        ):
            rollout.cut_during(step, [0, 1], lambda m=method, a=argument: rollout.call(m, *a))
        rollout.ask("onload", ["kv_cache"])
        snapshots = rollout.cut_during("check_weights", [0, 1], lambda: rollout.call("check_weights", "snapshot"))
        assert [snapshot["success"] for snapshot in snapshots] == [True, True]
        assert [snapshot["success"] for snapshot in rollout.cut_off_the_driver()] == [True, True]

        trainer = rollout.trainer()
        update = lambda: rollout.threads.submit(ray.get, trainer.update_weights.remote(model, "7"))  # noqa: E731
        assert rollout.cut_during("update_weights", [0, 1], update, "trainer") == 2
        ray.kill(trainer)

        assert rollout.ask("generate", 1) == [4, 4, 4, 4]  # and the engines are probed
        rollout.cut_during("health_generate", [0])
        probed = len(rollout.begun("health_generate", 1))
        chaos.freeze(rollout.pid(1), for_s=3)
        rollout.wait_for(lambda: len(rollout.begun("health_generate", 1)) > probed + 1, "probes after the freeze")
        assert rollout.begun("shutdown", 0) == rollout.begun("shutdown", 1) == []
        assert [rollout.begun("init", rank) for rank in range(2)] == [[rollout.pid(0)], [rollout.pid(1)]]

        def kill():
            chaos.kill(rollout.pid(1))
            wait_until(lambda: rollout.ask("router_lists") == [urls[0]], what="the end of the ghost")
            assert rollout.ask("generate", 2) == [4, 4, 4, 4]

        rollout.replace_cut_off(1, kill)
        assert rollout.places() == [("tiny/regular/0", 1, "ready"), ("tiny/regular/1", 2, "ready")]
        assert rollout.ask("router_lists") == sorted(rollout.ask("get_urls"))
        assert rollout.ask("generate", 3) == [4, 4, 4, 4]

        chaos.kill(rollout.server_pid(0))
        rollout.wait_for_free(0)
        assert rollout.begun("shutdown", 0) == [rollout.pid(0)]
        assert rollout.ask("router_lists") == rollout.ask("get_urls")
        assert rollout.ask("generate", 4) == [4, 4, 4, 4]
        assert [len(rollout.begun("constructor", rank)) for rank in range(2)] == [1, 2]
        processes = rollout.processes()
        assert len(processes) > 6  # the manager and its router, an actor, its server
        rollout.ask("dispose")
    finally:
        rollout.close()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []

"""The fixture that users' tests get: used here as they use it."""

from __future__ import annotations

import threading

import ray
from support.engines import Engine, wait_until

import enginefsm
from enginefsm.rehearsal import chaos
from enginefsm.testing import engine_monitor  # noqa: F401

pytest_plugins = ["pytester"]


def test_an_engine_that_was_cut_off_comes_back_without_a_pause_and_no_hub_is_started(
    cluster, engine_monitor, tmp_path  # noqa: F811
):  # fmt: skip
    actor = ray.remote(num_cpus=0)(Engine).remote(str(tmp_path))
    engine = enginefsm.adopt(actor, name="mine")
    call = engine.init.remote()
    wait_until((tmp_path / "begun").exists, what="the start of init")
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: chaos.cut(pid), what="a connection to cut")
    opened = threading.Timer(5, (tmp_path / "gate").touch)  # Ray reports a cut within 2 s
    opened.start()
    assert enginefsm.get(call, timeout=60) == "launched"
    assert engine_monitor.engine("mine") is engine
    assert engine.fsm.reason is enginefsm.Reason.RECOVERED
    assert ray.util.list_named_actors(all_namespaces=True) == []
    ray.kill(actor)


def test_an_engine_that_stays_away_is_asked_again_at_once(engine_monitor):  # noqa: F811
    assert engine_monitor.policy.pause_s(1) == engine_monitor.policy.pause_s(20) <= 0.001


def test_configure_in_the_code_under_test_exports_nothing(engine_monitor, monkeypatch):  # noqa: F811
    def hub(*args, **kwargs):
        raise AssertionError("the code under test would start a hub")

    monkeypatch.setattr("enginefsm.export.Hub", hub)
    assert enginefsm.configure(run="mine") is enginefsm.default_monitor()


def test_the_next_test_has_the_process_s_own_monitor_again(pytester):
    pytester.makeconftest("from enginefsm.testing import engine_monitor")
    pytester.makepyfile(
        """
        import os
        import enginefsm

        own = enginefsm.configure(run="own", export=[])

        def test_with_it(engine_monitor):
            assert enginefsm.default_monitor() is engine_monitor is not own
            globals()["theirs"] = engine_monitor

        def test_after_it():
            assert enginefsm.default_monitor() is own and not own.closed
            assert theirs.closed
            assert "ENGINEFSM_EXPORT" not in os.environ
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=2)

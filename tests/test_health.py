"""The health monitor, on real Ray with real faults: what it takes for trouble, for an end, and for neither."""

from __future__ import annotations

import threading
import time

import pytest
import ray
from engines import Probed, wait_until

from enginefsm import EngineState, Reason, chaos

FAST = {"probe": "well", "interval_s": 0.2, "timeout_s": 0.5, "failure_threshold": 3}
PATIENT = FAST | {"timeout_s": 30.0}
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

    def wait_for(self, count=1, timeout_s=30):
        with self.came:
            assert self.came.wait_for(lambda: len(self.given) >= count, timeout_s), self.given
            return self.given[count - 1]


@pytest.fixture
def verdicts():
    return Verdicts()


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


def cut_during_a_probe(rig):
    rig.open("slow")
    wait_for_probes(rig)
    rig.cut()


def test_an_engine_whose_connection_breaks_becomes_unavailable_and_ready_again_and_nothing_ends_it(fleet, verdicts):
    (rig,) = bring_up(fleet)
    fleet.monitor.watch([rig.engine], on_dead=verdicts, **PATIENT)
    for times in (1, 2):
        cut_during_a_probe(rig)
        fleet.wait_for_state(rig.engine, UNAVAILABLE, times)
        assert rig.engine.reason is Reason.ACTOR_UNAVAILABLE
        (rig.directory / "slow").unlink()
        fleet.wait_for_state(rig.engine, READY, times + 1)
    assert verdicts.given == []
    assert rig.times_init_began() == 1


def test_a_killed_actor_is_dead_by_rays_word(fleet, verdicts):
    (rig,) = bring_up(fleet)
    fleet.monitor.watch([rig.engine], on_dead=verdicts, **FAST)
    wait_for_probes(rig)
    began = time.monotonic()
    chaos.kill(rig.pid)
    verdict = verdicts.wait_for()
    assert time.monotonic() - began < 3
    assert (verdict.engine, verdict.engines) == (rig.engine, (rig.engine,))
    assert (verdict.reason, verdict.by_monitor) == (Reason.ACTOR_DIED, False)


def test_a_frozen_actor_is_given_up_after_the_threshold_and_one_that_thaws_before_is_not(fleet, verdicts):
    rigs = bring_up(fleet, 3)
    fleet.monitor.watch([rig.engine for rig in rigs], on_dead=verdicts, **FAST | {"failure_threshold": 20})
    wait_for_probes(rigs[0])
    with chaos.freeze(rigs[0].pid):
        fleet.wait_for_state(rigs[0].engine, UNAVAILABLE)
    fleet.wait_for_state(rigs[0].engine, READY, 2)
    assert verdicts.given == []
    with chaos.freeze(rigs[0].pid):
        verdict = verdicts.wait_for()
    assert (verdict.reason, verdict.by_monitor, verdict.cause) == (
        Reason.RETRY_EXHAUSTED, True, Reason.PROBE_TIMEOUT,
    )  # fmt: skip
    assert ray.get(rigs[0].engine.handle.times_init_ran.remote(), timeout=30) == 1  # its end is the callback's to make

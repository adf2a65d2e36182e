"""The incarnations of a name: what is kept of each, what counts as a restart, and how many are allowed."""

from __future__ import annotations

import itertools
import pickle
import time
from unittest import mock

import pytest
from support.bare_handles import bare_handle

from enginefsm import EngineMonitor, Reason, RestartCap, RestartCapError, Transition
from enginefsm._engine.proxy import managed
from enginefsm.fsm.incarnations import INCARNATIONS_KEPT

EPOCH_S = 1_763_830_000.0


class Clock:
    """The monotonic time and the epoch's, as the library reads them, set by the test."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        return EPOCH_S + self.now


@pytest.fixture
def clock():
    clock = Clock()
    with (
        mock.patch(
            "enginefsm._engine.registry.time", mock.Mock(wraps=time, monotonic=clock.monotonic, time=clock.time)
        ),
        mock.patch("enginefsm._engine.managed.time", mock.Mock(wraps=time, monotonic=clock.monotonic, time=clock.time)),
    ):
        yield clock


class Name:
    """One engine name under a monitor, driven through its incarnations."""

    def __init__(self, clock, **settings):
        self.clock = clock
        self.told = []
        self.monitor = EngineMonitor(run="test", listeners=[self.told.append], **settings)
        self.engine = None

    def adopt(self, handle=None):
        self.engine = self.monitor.adopt(handle or bare_handle(), name="e", model="tiny", worker_type="regular")

    def at(self, s, *deeds):
        """After `s` seconds in all: reasons to move for, or `adopt`, or `release`."""
        self.clock.now = 1000.0 + s
        for deed in deeds:
            if deed == "adopt":
                self.adopt()
            elif deed == "release":
                self.monitor.release(self.engine)
            else:
                assert managed(self.engine).step(deed)
        return self

    def replaced_after_s(self):
        self.monitor._delivery.deliver()
        return [step.replaced_after_s for step in self.told if isinstance(step, Transition) and step.first_ready]

    def histogram(self, what):
        labels = {"run": "test", "model": "tiny", "worker_type": "regular"}
        return self.monitor.metrics.registry.get_sample_value(f"enginefsm_replacement_duration_seconds_{what}", labels)


@pytest.fixture
def name(clock):
    return Name(clock)


READY, DIED, INIT_FAILED = Reason.INIT_SUCCEEDED, Reason.ACTOR_DIED, Reason.INIT_FAILED


def test_the_time_from_dead_to_ready_again_is_measured_from_the_death(name):
    name.at(0, "adopt").at(5, READY).at(100, DIED).at(130, "adopt").at(190, READY)

    assert name.replaced_after_s() == [None, 90]
    assert (name.histogram("sum"), name.histogram("count")) == (90, 1)


def test_a_dead_engine_that_was_released_before_it_was_replaced_was_replaced_all_the_same(name):
    name.at(0, "adopt").at(5, READY).at(100, DIED).at(110, "release").at(130, "adopt").at(190, READY)

    assert name.replaced_after_s() == [None, 90]


def test_an_engine_that_was_released_alive_is_not_replaced_by_what_follows_it(name):
    name.at(0, "adopt").at(5, READY).at(100, "release").at(130, "adopt").at(190, READY)

    assert name.replaced_after_s() == [None, None]
    assert name.histogram("count") == 0


@pytest.mark.parametrize("end", [INIT_FAILED, "release"], ids=str)
def test_a_replacement_that_never_was_ready_does_not_end_the_time_without_an_engine(name, end):
    name.at(0, "adopt").at(5, READY).at(100, DIED).at(110, "adopt").at(150, end).at(160, "adopt").at(200, READY)

    assert name.replaced_after_s() == [None, 100]


def test_a_replacement_that_was_ready_begins_anew(name):
    name.at(0, "adopt", READY).at(10, DIED, "adopt").at(20, READY).at(50, DIED, "adopt").at(55, READY)

    assert name.replaced_after_s() == [None, 10, 5]


def test_an_engine_is_replaced_once_however_often_it_becomes_ready(name):
    name.at(0, "adopt", READY, DIED, "adopt").at(10, Reason.ACTOR_UNAVAILABLE).at(20, Reason.RECOVERED)
    name.at(30, Reason.ACTOR_UNAVAILABLE).at(40, Reason.RECOVERED)

    assert name.replaced_after_s() == [None, 20]


def test_history_tells_what_became_of_each_incarnation(name):
    assert name.monitor.history("e") == []
    name.at(0, "adopt").at(5, READY).at(100, DIED)
    first = managed(name.engine).actor_id
    name.at(130, "adopt").at(140, INIT_FAILED).at(141, "release")
    second = managed(name.engine).actor_id
    expected = [
        (1, first, DIED, EPOCH_S + 1000, EPOCH_S + 1005, EPOCH_S + 1100),
        (2, second, INIT_FAILED, EPOCH_S + 1130, None, EPOCH_S + 1140),
    ]
    assert name.monitor.history("e") == expected
    name.at(150, "adopt")
    third = (3, managed(name.engine).actor_id, None, EPOCH_S + 1150, None, None)
    assert name.monitor.history("e") == [*expected, third]
    name.at(170, "release")
    assert name.monitor.history("e") == [*expected, (*third[:2], Reason.RELEASED, *third[3:5], EPOCH_S + 1170)]


def test_history_is_bounded_and_incarnations_go_on_being_counted(name):
    for turn in range(40):
        name.at(turn, "adopt", DIED, *["release"] * (turn % 2))

    assert [one.incarnation for one in name.monitor.history("e")] == [*range(41 - INCARNATIONS_KEPT, 41)]
    name.adopt()
    assert [one.incarnation for one in name.monitor.history("e")] == [*range(42 - INCARNATIONS_KEPT, 42)]
    assert name.engine.fsm.incarnation == 41


def test_one_restart_too_many_is_refused_by_name_and_reasons_and_changes_nothing(clock):
    name = Name(clock, restart_cap=RestartCap(restarts=2, within_s=600))
    name.at(0, "adopt", READY, DIED).at(10, "adopt", INIT_FAILED).at(20, "adopt", Reason.OUT_OF_MEMORY)
    name.clock.now += 30
    before, history = name.engine, name.monitor.history("e")
    assert not name.monitor.may_restart("e")
    with pytest.raises(RestartCapError) as refused:
        name.adopt()

    text = str(refused.value)
    assert "engine 'e'" in text
    assert "2 restarts within 600 s" in text
    assert "#1 actor_died, #2 init_failed, #3 out_of_memory" in text
    assert "one more is allowed in 560 s" in text
    assert "may_restart('e')" in text
    assert str(pickle.loads(pickle.dumps(refused.value))) == text
    assert name.monitor.engines() == [before]
    assert name.monitor.engine("e") is before
    assert name.monitor.history("e") == history
    name.monitor.release(before)
    with pytest.raises(RestartCapError):
        name.adopt()
    name.at(609.9)
    assert not name.monitor.may_restart("e")
    name.at(610)
    assert name.monitor.may_restart("e")
    name.adopt()
    assert name.engine.fsm.incarnation == 4


def test_a_cap_counts_restarts_alone_each_name_by_itself(clock):
    name = Name(clock, restart_cap=RestartCap(restarts=1, within_s=600))
    for turn in range(5):
        name.at(turn, "adopt", READY, "release")
    assert name.monitor.may_restart("e"), "what was released alive was not restarted"
    name.at(10, "adopt", READY, DIED, "adopt")
    assert not name.monitor.may_restart("e"), "a living engine's next restart is asked for as well"
    assert name.monitor.may_restart("another")
    name.monitor.adopt(bare_handle(), name="another")
    assert name.monitor.adopt(name.engine.handle, name="e") is name.engine, "the same actor is no restart"
    name.at(20, READY, "release", "adopt")
    assert name.engine.fsm.incarnation == 8, "the first engine after a good end is no restart"


def test_without_a_cap_an_engine_may_be_replaced_for_ever(name):
    for turn in itertools.count():
        name.at(turn, "adopt", DIED)
        if turn == 50:
            break
    assert name.monitor.may_restart("e")


def test_a_cap_of_none_refuses_the_first_restart(clock):
    name = Name(clock, restart_cap=RestartCap(restarts=0))
    name.at(0, "adopt", DIED)
    with pytest.raises(RestartCapError, match="0 restarts within 3600 s"):
        name.adopt()

"""The machine of one engine: its edges, its records, and that nothing which is said of the dead revives them."""

from __future__ import annotations

import itertools
import logging
import re
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support.bare_handles import bare_handle
from transitions import Machine

from enginefsm import EngineMonitor, Transition
from enginefsm._engine.managed import ManagedEngine
from enginefsm._engine.proxy import managed
from enginefsm.fsm.outcomes import Outcome
from enginefsm.fsm.states import EngineRecord, EngineState, Reason, diagram

LAUNCHING, READY, UNAVAILABLE, DEAD = EngineState

# The table of edges, written out once more.
FATAL = (
    Reason.ACTOR_DIED, Reason.CONSTRUCTOR_FAILED, Reason.INIT_FAILED, Reason.PREEMPTED, Reason.OUT_OF_MEMORY,
    Reason.UNSCHEDULABLE, Reason.RUNTIME_ENV_FAILED, Reason.RETRY_EXHAUSTED, Reason.HEALTH_CHECKS_FAILED,
    Reason.RELEASED,
)  # fmt: skip
DOUBTS = (Reason.ACTOR_UNAVAILABLE, Reason.PROBE_TIMEOUT, Reason.PROBE_FAILED)
EDGES = {
    (LAUNCHING, Reason.INIT_SUCCEEDED): READY,
    **{(state, reason): UNAVAILABLE for state in (LAUNCHING, READY) for reason in DOUBTS},
    (UNAVAILABLE, Reason.ACTOR_REACHABLE): LAUNCHING,
    (UNAVAILABLE, Reason.RECOVERED): READY,
    **{(state, reason): DEAD for state in (LAUNCHING, READY, UNAVAILABLE) for reason in FATAL},
    **{(state, Reason.LAUNCH_DEADLINE): DEAD for state in (LAUNCHING, UNAVAILABLE)},
}
WAY_TO = {
    LAUNCHING: (),
    READY: (Reason.INIT_SUCCEEDED,),
    UNAVAILABLE: (Reason.ACTOR_UNAVAILABLE,),
    DEAD: (Reason.ACTOR_DIED,),
}


def record_in(state=LAUNCHING, now=0.0):
    record = EngineRecord("e", {"model": "tiny"}, 1, now, 1000.0 + now)
    for reason in WAY_TO[state]:
        record.move(reason, now, 1000.0 + now)
    assert record.state == state
    return record


@pytest.mark.parametrize(
    ("state", "reason"), list(itertools.product(EngineState, sorted(set(Reason) - {Reason.ADOPTED})))
)
def test_a_record_moves_along_the_edges_of_the_design_and_no_other(state, reason):
    record = record_in(state)

    step = record.move(reason, 2.0, 1002.0)

    expected = EDGES.get((state, reason))
    assert (step and step.to_state) == expected
    assert record.state == (expected or state)


def test_every_reason_but_the_first_has_an_edge():
    assert {reason for _, reason in EDGES} | {Reason.ADOPTED} == set(Reason)


def test_a_reason_that_means_nothing_here_changes_nothing():
    record = record_in(UNAVAILABLE)
    before = {name: getattr(record, name) for name in EngineRecord.__slots__}

    assert record.move(Reason.PROBE_FAILED, 5.0, 1005.0) is None

    assert {name: getattr(record, name) for name in EngineRecord.__slots__} == before


def test_the_first_step_says_that_the_engine_is_launched():
    assert record_in().first_step() == Transition(
        "e", {"model": "tiny"}, 1, None, LAUNCHING, Reason.ADOPTED, spent_s=0.0, age_s=0.0, at_s=1000.0,
        first_ready=False,
    )  # fmt: skip


def test_a_step_tells_where_from_where_to_why_when_and_after_how_long():
    record = record_in(now=10.0)
    record.move(Reason.ACTOR_UNAVAILABLE, 12.0, 1012.0)

    step = record.move(Reason.RECOVERED, 15.0, 1015.0)

    assert step == Transition(
        "e", {"model": "tiny"}, 1, UNAVAILABLE, READY, Reason.RECOVERED, spent_s=3.0, age_s=5.0, at_s=1015.0,
        first_ready=True,
    )  # fmt: skip
    assert (record.reason, record.since_epoch_s) == (Reason.RECOVERED, 1015.0)


def test_the_time_in_a_state_adds_up_over_visits_and_counts_the_present_one():
    record = record_in()
    for reason, now in (
        (Reason.ACTOR_UNAVAILABLE, 1.0),
        (Reason.ACTOR_REACHABLE, 3.0),
        (Reason.ACTOR_UNAVAILABLE, 7.0),
        (Reason.RECOVERED, 15.0),
    ):
        record.move(reason, now, now)

    assert record.time_in_states(31.0) == {LAUNCHING: 1.0 + 4.0, UNAVAILABLE: 2.0 + 8.0, READY: 16.0}
    assert list(record.time_in_states(31.0)) == [LAUNCHING, UNAVAILABLE, READY]


def test_only_the_first_time_that_an_engine_is_ready_is_marked_so():
    record = record_in()
    marked = [
        record.move(reason, 1.0, 1.0).first_ready
        for reason in (Reason.INIT_SUCCEEDED, Reason.ACTOR_UNAVAILABLE, Reason.RECOVERED, Reason.RELEASED)
    ]

    assert marked == [True, False, False, False]


def test_the_diagram_has_every_edge():
    arrows = {
        (source, dest, reason)
        for source, dest, reasons in re.findall(r"(\S+) --> (\w+): (.+)", diagram())
        for reason in re.split(r", |<br/>", reasons)
    }

    live = {("live", "dead", reason) for reason in FATAL}
    others = {(state, dest, reason) for (state, reason), dest in EDGES.items() if reason not in FATAL}
    assert arrows == {("[*]", "launching", "adopted")} | live | others


def test_the_lines_of_the_machine_library_are_silent_for_engines_and_kept_for_others(caplog):
    other = Machine(states=["a", "b"], initial="a", transitions=[["go", "a", "b"]], name="other")
    with caplog.at_level(logging.DEBUG, logger="transitions"):
        record_in().move(Reason.ACTOR_DIED, 1.0, 1.0)
        assert caplog.messages == []

        other.go()

    assert caplog.messages
    assert all(message.startswith("other") for message in caplog.messages)


# --- whatever is said of an engine, in whatever order ---


def engine_and_steps(launch="init"):
    steps = []
    record = EngineRecord("e", {}, 1, time.monotonic(), time.time())
    return ManagedEngine(bare_handle(), record, launch, None, steps.append), steps


observations = st.tuples(st.sampled_from(Outcome), st.booleans(), st.sampled_from([0.0, 1.0, 60.0]))
verdicts = st.sampled_from([reason for reason in Reason if reason is not Reason.ADOPTED])


def tell(engine, said):
    if isinstance(said, Reason):
        engine.step(said)
    else:
        outcome, launches, submitted_before_s = said
        engine.observe(outcome, launches=launches, submitted_at=time.monotonic() - submitted_before_s)


def check_chain(steps, state):
    """Each step begins where the last one ended, the last one ends in `state`, and nothing follows a death."""
    ends = [LAUNCHING, *(step.to_state for step in steps)]
    assert [step.from_state for step in steps] == ends[:-1]
    assert ends[-1] is state
    assert DEAD not in ends[:-1]
    assert all(EDGES[step.from_state, step.reason] is step.to_state for step in steps)


class WhateverIsSaidOfAnEngine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.engine, self.steps = engine_and_steps()

    @rule(said=observations)
    def observe(self, said):
        tell(self.engine, said)

    @rule(said=verdicts)
    def step(self, said):
        before = len(self.steps)
        moved = self.engine.step(said)
        assert [step.reason for step in self.steps[before:]] == [said] * moved

    @invariant()
    def is_a_chain_of_edges(self):
        check_chain(self.steps, self.engine.state)

    @invariant()
    def has_a_time_for_each_state_that_it_was_in(self):
        assert set(self.engine.time_in_states()) == {LAUNCHING, *(step.to_state for step in self.steps)}

    @invariant()
    def was_ready_if_a_step_was_the_first_to_make_it_so(self):
        assert [step.first_ready for step in self.steps].count(True) == self.engine.ever_ready

    @invariant()
    def is_ready_only_after_its_launch_was_heard_to_succeed(self):
        launched_by_verdict = any(step.reason in (Reason.INIT_SUCCEEDED, Reason.RECOVERED) for step in self.steps)
        assert self.engine.state is not READY or launched_by_verdict


def test_no_deadline_of_its_launch_ends_an_engine_that_has_launched_be_it_unavailable_since():
    engine, _ = engine_and_steps()
    engine.observe(Outcome.SUCCEEDED, launches=True, submitted_at=time.monotonic())
    engine.give_up_launch()
    assert engine.state is READY
    engine.step(Reason.PROBE_TIMEOUT)
    engine.give_up_launch()
    assert engine.state is UNAVAILABLE
    other, _ = engine_and_steps()
    other.step(Reason.ACTOR_UNAVAILABLE)
    other.give_up_launch()
    assert (other.state, other.reason) == (DEAD, Reason.LAUNCH_DEADLINE)


@pytest.mark.parametrize("outcome", [Outcome.SUCCEEDED, Outcome.METHOD_FAILED])
@pytest.mark.parametrize("launches", [False, True])
def test_whatever_an_engine_answers_shows_that_its_constructor_ended(outcome, launches):
    for way, reached in (((), Reason.INIT_SUCCEEDED), ((Reason.ACTOR_UNAVAILABLE,), Reason.RECOVERED)):
        engine, steps = engine_and_steps("__ray_ready__")
        for reason in way:
            engine.step(reason)
        engine.observe(outcome, launches=launches, submitted_at=time.monotonic())
        assert (engine.state, steps[-1].reason) == (READY, reached)
        engine.step(Reason.PROBE_FAILED)
        engine.observe(outcome, launches=False, submitted_at=time.monotonic())
        assert engine.state is UNAVAILABLE, "once it is ready, answers say no more than any engine's do"


WhateverIsSaidOfAnEngine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
test_a_dead_engine_stays_dead_whatever_is_said_of_it = WhateverIsSaidOfAnEngine.TestCase


def in_two_threads(*tasks):
    """Run the tasks at once, each interrupted by the other as often as Python can."""
    start, errors = threading.Barrier(len(tasks)), []

    def run(task):
        try:
            start.wait(10)
            task()
        except BaseException as error:  # noqa: BLE001  raised below, in the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    finally:
        sys.setswitchinterval(interval_s)
    for error in errors:
        raise error


said_in_a_thread = st.lists(observations | verdicts, min_size=1, max_size=15)


@settings(max_examples=100, deadline=None)
@given(one=said_in_a_thread, other=said_in_a_thread)
def test_two_threads_that_move_one_engine_at_once_make_one_chain_of_steps(one, other):
    engine, steps = engine_and_steps()

    def tells(every):
        return lambda: [tell(engine, said) for said in every]

    in_two_threads(tells(one), tells(other))

    check_chain(steps, engine.state)


@settings(max_examples=50, deadline=None)
@given(said_in_a_thread, said_in_a_thread)
def test_a_death_that_one_thread_reports_is_told_once_and_outlives_what_the_other_says(one, other):
    engine, steps = engine_and_steps()

    def tells(every):
        def task():
            for said in every:
                tell(engine, said)
            engine.step(Reason.ACTOR_DIED)

        return task

    in_two_threads(tells(one), tells(other))

    assert engine.state is DEAD
    assert [step.to_state for step in steps].count(DEAD) == 1


# --- a fleet that two threads change ---

NAMES = ("a", "b")
deeds = st.lists(st.tuples(st.sampled_from(["adopt", "kill", "release", "release again"]), st.sampled_from(NAMES)))


class Owner:
    """Adopts, loses and releases engines of one monitor, under names of its own or under shared ones."""

    def __init__(self, monitor, prefix=""):
        self.monitor = monitor
        self.prefix = prefix
        self.present = {}
        self.former = {}

    def do(self, deed, name):
        name = self.prefix + name
        present, former = self.present.get(name), self.former.get(name)
        if deed == "adopt":
            # An actor that was released may be adopted again.
            handle = former.handle if former and not present else bare_handle()
            try:
                self.present[name] = self.monitor.adopt(handle, name=name)
            except ValueError as refusal:
                assert "living engine" in str(refusal)  # noqa: PT017  a refusal is one of two right answers
        elif deed == "kill" and present:
            managed(present).step(Reason.ACTOR_DIED)
        elif deed == "release" and present:
            self.monitor.release(present)
            self.former[name] = self.present.pop(name)
        elif deed == "release again" and former:
            self.monitor.release(former)


@settings(max_examples=60, deadline=None)
@given(deeds, deeds)
def test_a_monitor_holds_what_two_threads_adopted_and_did_not_release(one, other):
    monitor = EngineMonitor()
    owners = Owner(monitor, "one/"), Owner(monitor, "other/")

    in_two_threads(*(
        lambda owner=owner, every=every: [owner.do(*deed) for deed in every]
        for owner, every in zip(owners, (one, other), strict=True)
    ))  # fmt: skip

    expected = [engine for owner in owners for engine in owner.present.values()]
    assert sorted(map(id, monitor.engines())) == sorted(map(id, expected))


@settings(max_examples=60, deadline=None)
@given(deeds, deeds)
def test_of_two_threads_that_use_the_same_names_none_leaves_a_name_with_two_engines_or_a_living_one_lost(one, other):
    told = []
    monitor = EngineMonitor(listeners=[told.append])
    owners = Owner(monitor), Owner(monitor)

    in_two_threads(*(
        lambda owner=owner, every=every: [owner.do(*deed) for deed in every]
        for owner, every in zip(owners, (one, other), strict=True)
    ))  # fmt: skip

    monitor.adopt(bare_handle(), name="the last")  # which delivers what was not delivered yet
    held = monitor.engines()
    assert len({engine.fsm.name for engine in held}) == len(held)
    everyone = {id(engine): engine for owner in owners for engine in (*owner.present.values(), *owner.former.values())}
    living = {key for key, engine in everyone.items() if engine.fsm.state is not DEAD}
    assert living <= {id(engine) for engine in held}
    for engine in held:
        steps = [step for step in told if (step.engine, step.incarnation) == (engine.fsm.name, engine.fsm.incarnation)]
        assert [step.reason for step in steps[:1]] == [Reason.ADOPTED]
        check_chain(steps[1:], engine.fsm.state)

"""What a wait says to do next. No Ray, no sleeping: the test is the driver, and its clock is the wait's."""

from __future__ import annotations

import gc
import time

import pytest
from ray._raylet import ActorID
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, PendingCallsLimitExceeded
from support.bare_handles import RecordingHandle, bare_handle, make_call, sent

from enginefsm import EngineState, LaunchDeadlineError, Reason, RetryExhaustedError, RetryPolicy
from enginefsm._engine.managed import ManagedEngine
from enginefsm._wait.wait import Raise, Raised, Sleep, Step, Submit, Wait, submit
from enginefsm.fsm.outcomes import Outcome
from enginefsm.fsm.states import EngineRecord

POLICY = RetryPolicy(base_s=0.02, factor=4, cap_s=3, budget_s=60, jitter="none")


class Driver:
    """Drives waits for calls to engines that are not there, and keeps the time."""

    def __init__(self):
        self.began = self.now = time.monotonic()
        self.events = []
        self.steps = []
        self.policy = POLICY
        self.engine = self.make_engine()

    def make_engine(self, name="e"):
        engine = ManagedEngine(bare_handle(), EngineRecord(name, {}, 1, self.now, 0.0), "init", None, self.steps.append)
        engine.handle = RecordingHandle()
        engine.handle._ray_actor_id = ActorID.from_random()
        return engine

    def wait(self, *calls, timeout_s=None, policy=None):
        made = Wait(policy or self.policy, lambda: [self.engine], self.events.append, timeout_s, self.now)
        for call in calls:
            made.take_up(call)
        return made

    def next(self, wait, after_s=0.0):
        self.now += after_s
        return wait.next(self.now)

    def lose(self, call, wait):
        wait.take_up(call)
        wait.take(call.ref, Raised(ActorUnavailableError("cut", None)), self.now)

    def submit_when_due(self, wait):
        """Sleep until the wait has something to submit, and submit it."""
        step = wait.next(self.now)
        if isinstance(step, Sleep):
            self.now = step.until
            step = wait.next(self.now)
        assert isinstance(step, Submit)
        wait.submitted(submit(step.calls, self.now))
        return wait.next(self.now)

    def answer(self, call, wait, value="value"):
        wait.take(call.ref, value, self.now)


@pytest.fixture
def driver():
    return Driver()


def raised_by(step, of):
    assert isinstance(step, Raise)
    assert isinstance(step.failure, of), step
    return step.failure


def test_a_wait_sleeps_until_every_call_has_ended_and_is_done(driver):
    calls = [make_call(driver.engine, "m", number) for number in range(2)]
    wait = driver.wait(*calls)

    assert driver.next(wait) == Sleep(float("inf"))
    driver.answer(calls[1], wait, "b")
    assert driver.next(wait) == Sleep(float("inf"))
    driver.answer(calls[0], wait, "a")
    assert driver.next(wait) is Step.DONE
    assert [wait.values[call] for call in calls] == ["a", "b"]


def test_a_wait_for_nothing_is_done(driver):
    assert driver.next(driver.wait()) is Step.DONE


def test_a_lost_call_is_submitted_again_after_its_pause_and_gives_what_it_gives_then(driver):
    call = make_call(driver.engine)
    wait = driver.wait()
    driver.lose(call, wait)

    assert driver.engine.state is EngineState.UNAVAILABLE
    assert driver.next(wait) == Sleep(pytest.approx(driver.began + 0.02))
    assert driver.submit_when_due(wait) == Sleep(float("inf"))
    driver.answer(call, wait)
    assert driver.next(wait) is Step.DONE
    assert driver.engine.state is EngineState.READY
    assert [event.outcome for event in driver.events] == [Outcome.ACTOR_UNAVAILABLE, Outcome.SUCCEEDED]


def test_an_outcome_that_is_told_twice_counts_once(driver):
    call = make_call(driver.engine)
    wait = driver.wait(call)
    ref = call.ref
    driver.lose(call, wait)
    wait.take(ref, Raised(ActorUnavailableError("cut", None)), driver.now)

    driver.submit_when_due(wait)
    wait.take(ref, Raised(ActorUnavailableError("cut", None)), driver.now)

    assert call.attempt == 1
    assert len(driver.events) == 1


def test_the_first_failure_is_raised_while_others_are_out_and_only_once(driver):
    doomed, other = make_call(driver.engine, "m"), make_call(driver.make_engine("other"), "m")
    wait = driver.wait(doomed, other)
    wait.take(doomed.ref, Raised(ActorDiedError(None)), driver.now)

    failure = raised_by(driver.next(wait), ActorDiedError)
    assert "engine 'e'" in failure.__notes__[0]
    assert driver.engine.state is EngineState.DEAD
    assert driver.engine.detail.startswith("m() raised ray.exceptions.ActorDiedError: ")


def test_a_call_whose_budget_is_spent_is_a_retry_exhausted(driver):
    driver.policy = RetryPolicy(max_attempts=1, base_s=1, jitter="none")
    call = make_call(driver.engine)
    wait = driver.wait()
    driver.lose(call, wait)
    driver.submit_when_due(wait)
    wait.take(call.ref, Raised(ActorUnavailableError("cut again", None)), driver.now)

    failure = raised_by(driver.next(wait), RetryExhaustedError)
    assert "1 resubmissions of init()" in str(failure)
    assert driver.engine.reason is Reason.RETRY_EXHAUSTED
    assert "cut again" in driver.engine.detail


def test_before_a_timeout_is_raised_everything_is_looked_at_and_stages_are_asked_for(driver):
    call = make_call(driver.engine)
    wait = driver.wait(call, timeout_s=5)

    assert driver.next(wait) == Sleep(driver.began + 5)
    assert driver.next(wait, after_s=5) is Step.LOOK_AT_ALL
    wait.looked_at_all(driver.now)
    assert driver.next(wait) is Step.ASK_STAGES
    wait.asked_stages(driver.now)
    failure = raised_by(driver.next(wait), GetTimeoutError)
    assert str(failure).startswith("0 of 1 calls ended within 5 s; still waiting for\n  init() of engine 'e'")


def test_what_the_last_look_finds_is_in_time(driver):
    call = make_call(driver.engine)
    wait = driver.wait(call, timeout_s=0)

    assert driver.next(wait) is Step.LOOK_AT_ALL
    driver.answer(call, wait)
    wait.looked_at_all(driver.now)
    assert driver.next(wait) is Step.DONE


def test_a_launch_deadline_ends_a_launch_and_no_launch_that_the_last_look_finds_ended(driver):
    driver.policy = RetryPolicy(launch_deadline_s=10)
    late, launched = driver.engine, driver.make_engine("launched")
    launch, in_time = make_call(late), make_call(launched)
    wait = driver.wait(launch, in_time)

    assert driver.next(wait) == Sleep(driver.began + 10)
    assert driver.next(wait, after_s=10) is Step.LOOK_AT_ALL
    driver.answer(in_time, wait)
    wait.looked_at_all(driver.now)
    assert driver.next(wait) is Step.ASK_STAGES
    wait.asked_stages(driver.now)
    failure = raised_by(driver.next(wait), LaunchDeadlineError)

    assert "launch_deadline_s=10 has passed for 1 engines" in str(failure)
    assert (late.reason, launched.state) == (Reason.LAUNCH_DEADLINE, EngineState.READY)


def test_a_deadline_that_all_launches_met_after_all_is_past(driver):
    driver.policy = RetryPolicy(launch_deadline_s=10)
    launch, other = make_call(driver.engine), make_call(driver.engine, "m")
    wait = driver.wait(launch, other)
    assert driver.next(wait, after_s=11) is Step.LOOK_AT_ALL
    driver.answer(launch, wait)
    wait.looked_at_all(driver.now)

    assert driver.next(wait) == Sleep(float("inf"))


def test_an_engine_that_another_wait_gave_up_fails_the_calls_from_before_and_no_later_ones(driver):
    call = make_call(driver.engine, "m")
    wait = driver.wait(call)
    assert driver.engine.step(Reason.RETRY_EXHAUSTED, "given up elsewhere")
    raised_by(driver.next(wait), RetryExhaustedError)

    later = make_call(driver.engine, "m")
    assert driver.next(driver.wait(later)) == Sleep(float("inf"))


def test_a_call_that_ray_refuses_to_submit_again_is_told_to_the_wait_whose_call_it_is(driver):
    call, other = make_call(driver.engine, "m", 0), make_call(driver.engine, "m", 1)
    mine, another = driver.wait(), driver.wait()
    driver.lose(call, mine)
    driver.lose(other, another)
    refused = {call: PendingCallsLimitExceeded("too many")}

    another.submitted(refused)
    assert isinstance(driver.next(another), Sleep)
    mine.submitted(refused)
    raised_by(driver.next(mine), PendingCallsLimitExceeded)


def test_a_wait_watches_what_another_wait_has_submitted(driver):
    call = make_call(driver.engine)
    one, other = driver.wait(), driver.wait()
    driver.lose(call, one)
    other.take_up(call)

    driver.submit_when_due(one)
    assert driver.next(other) == Sleep(float("inf"))

    assert list(other.watched) == list(one.watched) == [call.ref]
    assert call.attempt == 1


def test_a_call_for_which_one_of_two_waits_ended_is_submitted_again_for_the_other(driver):
    call = make_call(driver.engine)
    ends, stays = driver.wait(), driver.wait()
    driver.lose(call, ends)
    stays.take_up(call)
    ends.leave()

    driver.submit_when_due(stays)

    assert call.attempt == 1


def test_time_in_which_nobody_waits_for_a_call_is_not_held_against_its_engine(driver, monkeypatch):
    call = make_call(driver.engine)
    wait = driver.wait(policy=RetryPolicy(budget_s=60, base_s=1, jitter="none"))
    driver.lose(call, wait)
    clock = [time.monotonic()]
    monkeypatch.setattr("enginefsm._calls.calls.time.monotonic", lambda: clock[0])
    began = call.outage.since
    wait.leave()
    clock[0] += 1000
    driver.wait(call)

    assert call.outage.since == pytest.approx(began + 1000)


def test_calls_that_were_lost_go_out_again_in_the_order_of_their_making_whoever_awaits_them(driver):
    calls = [make_call(driver.engine, "m", number) for number in range(6)]
    waits = [driver.wait() for _ in range(3)]
    for number in (4, 2, 3, 0, 1, 5):
        driver.lose(calls[number], waits[number % 3])
    assert len({call.resubmit_at for call in calls}) == 1

    driver.submit_when_due(waits[2])
    for wait in waits:
        assert driver.next(wait) == Sleep(float("inf"))

    assert [(header[2], *values) for _, header, values in sent(driver.engine)] == [
        (attempt, number) for attempt in (0, 1) for number in range(6)
    ]
    assert [sorted(one._arguments.values()[0] for [one] in wait.watched.values()) for wait in waits] == [
        [0, 3], [1, 4], [2, 5],
    ]  # fmt: skip


def test_a_call_that_nobody_holds_any_more_does_not_go_out_with_others(driver):
    kept, wait = make_call(driver.engine, "m", "kept"), driver.wait()
    driver.lose(make_call(driver.engine, "m", "dropped"), driver.wait())
    driver.lose(kept, wait)
    gc.collect()

    driver.submit_when_due(wait)

    assert [values for _, _, values in sent(driver.engine)] == [["kept"], ["dropped"], ["kept"]]


def test_a_call_that_nobody_awaits_waits_until_somebody_does(driver):
    left, awaited, leaves, wait = make_call(driver.engine), make_call(driver.engine), driver.wait(), driver.wait()
    driver.lose(left, leaves)
    driver.lose(awaited, wait)
    leaves.leave()

    driver.submit_when_due(wait)
    assert (left.attempt, awaited.attempt) == (0, 1)

    driver.submit_when_due(driver.wait(left))
    assert left.attempt == 1


class Unwilling:
    """An argument that cannot be unpickled once it was lost."""

    lost = False

    def __reduce__(self):
        return Unwilling.again, ()

    @staticmethod
    def again():
        if Unwilling.lost:
            raise ValueError("not now")
        return Unwilling()


def test_what_keeps_a_call_from_being_submitted_again_is_told_to_whoever_awaits_that_one(driver, monkeypatch):
    bad, good = make_call(driver.engine, "m", Unwilling()), make_call(driver.engine)
    bads, goods = driver.wait(), driver.wait()
    driver.lose(bad, bads)
    driver.lose(good, goods)
    monkeypatch.setattr(Unwilling, "lost", True)

    assert driver.submit_when_due(goods) == Sleep(float("inf"))
    assert good.attempt == 1
    assert str(raised_by(driver.submit_when_due(bads), ValueError)) == "not now"


def test_a_new_outage_does_not_wait_for_calls_of_an_earlier_one_that_nobody_holds(driver):
    driver.lose(make_call(driver.engine), driver.wait(policy=RetryPolicy(base_s=15, jitter="none")))
    gc.collect()
    driver.engine.observe(Outcome.SUCCEEDED, launches=False, submitted_at=driver.now, now=driver.now)
    call, wait = make_call(driver.engine), driver.wait()

    driver.lose(call, wait)

    assert driver.next(wait).until - driver.now < 1


def test_pauses_grow_with_the_outage_and_not_with_the_calls_that_it_takes(driver):
    calls, wait, pauses = [make_call(driver.engine, "m", number) for number in range(4)], driver.wait(), []
    for _ in range(3):
        began = driver.now
        for call in calls:
            driver.lose(call, wait)
        pauses.append(driver.next(wait).until - began)
        calls.append(make_call(driver.engine, "m", len(calls)))  # one more each time, which fails with the others
        driver.submit_when_due(wait)
    assert pauses == [pytest.approx(expected) for expected in (0.02, 0.08, 0.32)]
    assert [call.outage.attempts if call.outage else 0 for call in calls] == [3, 3, 3, 3, 2, 1, 0]

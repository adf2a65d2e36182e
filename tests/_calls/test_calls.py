"""Calls before they reach Ray: their numbers, their arguments as they were, and what a resubmission sends."""

from __future__ import annotations

import gc
import pickle
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from ray import ObjectRef, cloudpickle
from ray._raylet import ActorID
from ray.exceptions import ActorUnavailableError, RayTaskError
from support.bare_handles import RecordingHandle, bare_handle, recording_engine

from enginefsm import EngineMonitor, RetryPolicy
from enginefsm._calls.actor_side import DROPPED, RESTARTED
from enginefsm._calls.calls import Arguments, Call, Ledger, says_restarted
from enginefsm._engine.managed import ManagedEngine
from enginefsm._wait.arrivals import Raised
from enginefsm._wait.wait import Wait
from enginefsm.fsm.outcomes import Outcome
from enginefsm.fsm.states import EngineRecord
from enginefsm.health.plain_calls import PlainCall


class Numbered:
    """As much of a call as a ledger keeps."""


CALL = Numbered()


def settled(ledger):
    return ledger.header()[1]


@pytest.fixture
def ledger():
    return Ledger()


def test_numbers_count_from_nought(ledger):
    assert [ledger.open(CALL) for _ in range(3)] == [0, 1, 2]


def test_nothing_is_settled_at_first(ledger):
    assert settled(ledger) == (0, ())
    ledger.open(CALL)
    assert settled(ledger) == (0, ())


def test_all_below_the_first_open_call_is_settled_and_others_are_told_once(ledger):
    for _ in range(5):
        ledger.open(CALL)

    ledger.settle(1)
    ledger.settle(3)
    assert settled(ledger) == (0, (1, 3))
    assert settled(ledger) == (0, ())
    ledger.settle(0)
    assert settled(ledger) == (2, ())
    ledger.settle(2)
    ledger.settle(4)
    assert settled(ledger) == (5, ())


def test_settling_twice_is_settling_once(ledger):
    ledger.open(CALL), ledger.open(CALL)

    ledger.settle(0)
    ledger.settle(0)

    assert settled(ledger) == (1, ())


def test_ledgers_have_names_of_their_own_and_keep_them(ledger):
    assert ledger.header()[0] == ledger.header()[0] != Ledger().header()[0]


def test_a_call_may_be_settled_by_the_garbage_collector_while_the_ledger_is_in_use(ledger):
    ledger.open(CALL)
    with ledger._lock, ThreadPoolExecutor() as threads:
        threads.submit(ledger.settle, 0).result(10)

    assert settled(ledger) == (1, ())


def test_threads_that_open_and_settle_at_once_get_every_number_once(ledger):
    start = threading.Barrier(4)

    def work():
        start.wait(10)
        numbers = []
        for _ in range(200):
            numbers.append(ledger.open(CALL))
            ledger.header()
            ledger.settle(numbers[-1])
        return numbers

    with ThreadPoolExecutor(4) as threads:
        numbers = [number for future in [threads.submit(work) for _ in range(4)] for number in future.result(10)]

    assert sorted(numbers) == list(range(800))
    assert settled(ledger) == (800, ())


# --- arguments ---


def test_values_come_in_order_and_those_of_keywords_last():
    arguments = Arguments((1, "two"), {"three": 3, "fn": None})

    assert arguments.values() == (1, "two", 3, None)
    assert arguments.keywords == ("three", "fn")


def test_what_the_caller_makes_of_its_arguments_later_is_not_seen():
    listed, nested, text = [1], {"ports": [30000]}, bytearray(b"as it was")
    arguments = Arguments((listed, text), {"settings": nested})

    listed.append(2)
    nested["ports"].clear()
    text[:] = b"changed!!"

    assert arguments.values() == ([1], bytearray(b"as it was"), {"ports": [30000]})


def test_what_is_made_of_values_once_sent_is_not_seen_in_the_next_submission():
    arguments = Arguments(([1],), {})
    arguments.values()[0].append(2)

    assert arguments.values() == ([1],)


class Tensor:
    """Pickles its data out of band, as numpy arrays do."""

    def __init__(self, data):
        self.data = data

    def __reduce_ex__(self, protocol):
        return Tensor, (pickle.PickleBuffer(self.data),)


def test_the_contents_of_large_buffers_are_not_copied():
    data = bytearray(1000)

    (tensor,) = Arguments((Tensor(data),), {}).values()

    assert memoryview(tensor.data).obj is data


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: [one]], ids=["alone", "inside a list"])
def test_references_and_handles_stay_themselves_beside_what_is_copied(wrap):
    ref, handle = ObjectRef.from_random(), bare_handle()

    _, first, second = Arguments(({}, wrap(ref)), {"peer": wrap(handle)}).values()

    assert (first, second) == (wrap(ref), wrap(handle))


def test_an_engine_travels_as_its_actors_handle():
    handle = bare_handle()
    engine = EngineMonitor().adopt(handle, name="e")

    (peers,) = Arguments(([engine],), {}).values()

    assert type(peers[0]) is type(handle)
    assert peers == [handle]


def test_an_argument_that_cannot_be_sent_is_refused_where_the_call_is_made():
    with pytest.raises(TypeError, match="pickle"):
        Arguments((threading.Lock(),), {})


# --- submissions ---


@pytest.fixture
def engine():
    return recording_engine()


def make_call(engine, method="init", *args, **kwargs):
    return Call(engine, method, Arguments(args, kwargs), {"name": f"SGLangEngine.{method}"})


def sent(engine):
    """(code, header, values) of each submission."""
    return [(*carrier.args, values) for carrier, *values in engine.handle.submitted]


def test_a_call_is_submitted_when_it_is_made(engine):
    call = make_call(engine, "init", 1, port=30000)

    ((code, header, values),) = sent(engine)
    assert code is not None
    assert header == (engine.ledger.header()[0], 0, 0, False, (0, ()), "init", ("port",))
    assert values == [1, 30000]
    assert engine.handle.options_given == [{"name": "SGLangEngine.init"}]
    assert (call.attempt, call.launches) == (0, True)


def test_only_the_launch_method_launches(engine):
    assert not make_call(engine, "health_generate").launches


def test_a_resubmission_sends_the_same_call_with_the_arguments_as_they_were(engine):
    ports = [30000]
    call = make_call(engine, "init", ports)
    first_ref = call.ref
    ports.append(30001)
    call.resubmit_at = 5.0

    call.resubmit(now=5.0)

    (_, first, _), (_, second, values) = sent(engine)
    assert second == (first[0], first[1], 1, *first[3:])
    assert values == [[30000]]
    assert call.ref is not first_ref
    assert call.resubmit_at is None
    assert engine.handle.options_given[0] == engine.handle.options_given[1]


@pytest.mark.parametrize("due", [None, 5.1])
def test_a_call_that_is_not_due_is_not_resubmitted(engine, due):
    call = make_call(engine)
    call.resubmit_at = due

    call.resubmit(now=5.0)

    assert len(sent(engine)) == 1
    assert call.resubmit_at == due


POLICY = RetryPolicy(base_s=0.02, factor=4, cap_s=3, budget_s=60, jitter="none")


@pytest.fixture
def lost():
    """An engine that can be reached no more, and how to lose a call to it that some wait has taken up."""
    record = EngineRecord("e", {}, 1, time.monotonic(), time.time())
    real = ManagedEngine(bare_handle(), record, "init", None, lambda _: None)
    real.handle = RecordingHandle()
    real.handle._ray_actor_id = ActorID.from_random()

    def lose(call, wait):
        wait.take_up(call)
        assert wait.take(call.ref, Raised(ActorUnavailableError("cut", None))) is None

    return real, lose


def a_wait():
    return Wait(POLICY, list, lambda _: None, lambda: None)


def submit_when_due(wait):
    time.sleep(max(0.0, wait.wake_at() - time.monotonic()))
    wait.resubmit_due()


def test_calls_that_were_lost_go_out_again_in_the_order_of_their_making_whoever_awaits_them(lost):
    engine, lose = lost
    calls = [make_call(engine, "m", number) for number in range(6)]
    waits = [a_wait() for _ in range(3)]
    for number in (4, 2, 3, 0, 1, 5):
        lose(calls[number], waits[number % 3])
    assert len({call.resubmit_at for call in calls}) == 1

    for wait in reversed(waits):
        submit_when_due(wait)

    assert [(header[2], *values) for _, header, values in sent(engine)] == [
        (attempt, number) for attempt in (0, 1) for number in range(6)
    ]
    assert [sorted(one._arguments.values()[0] for [one] in wait.watched.values()) for wait in waits] == [
        [0, 3], [1, 4], [2, 5],
    ]  # fmt: skip


def test_a_call_that_nobody_holds_any_more_does_not_go_out_with_others(lost):
    engine, lose = lost
    kept, wait = make_call(engine, "m", "kept"), a_wait()
    lose(make_call(engine, "m", "dropped"), a_wait())
    lose(kept, wait)
    gc.collect()

    submit_when_due(wait)

    assert [values for _, _, values in sent(engine)] == [["kept"], ["dropped"], ["kept"]]


def test_a_call_that_nobody_awaits_waits_until_somebody_does(lost):
    engine, lose = lost
    left, awaited, leaves, wait = make_call(engine), make_call(engine), a_wait(), a_wait()
    lose(left, leaves)
    lose(awaited, wait)
    leaves.leave()

    submit_when_due(wait)
    assert (left.attempt, awaited.attempt) == (0, 1)

    later = a_wait()
    later.take_up(left)
    submit_when_due(later)
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


def test_what_keeps_a_call_from_being_submitted_again_is_told_to_whoever_awaits_that_one(lost, monkeypatch):
    engine, lose = lost
    bad, good, bads, goods = make_call(engine, "m", Unwilling()), make_call(engine), a_wait(), a_wait()
    lose(bad, bads)
    lose(good, goods)
    monkeypatch.setattr(Unwilling, "lost", True)

    submit_when_due(goods)
    assert good.attempt == 1
    with pytest.raises(ValueError, match="not now"):
        submit_when_due(bads)


def test_a_new_outage_does_not_wait_for_calls_of_an_earlier_one_that_nobody_holds(lost):
    engine, lose = lost
    lose(make_call(engine), Wait(RetryPolicy(base_s=15, jitter="none"), list, lambda _: None, lambda: None))
    gc.collect()
    engine.observe(Outcome.SUCCEEDED, launches=False, submitted_at=time.monotonic())
    call, wait = make_call(engine), a_wait()

    lose(call, wait)

    assert wait.wake_at() - time.monotonic() < 1


def test_pauses_grow_with_the_outage_and_not_with_the_calls_that_it_takes(lost):
    engine, lose = lost
    calls, wait, pauses = [make_call(engine, "m", number) for number in range(4)], a_wait(), []
    for _ in range(3):
        began = time.monotonic()
        for call in calls:
            lose(call, wait)
        pauses.append(wait.wake_at() - began)
        calls.append(make_call(engine, "m", len(calls)))  # one more each time, which fails with the others
        submit_when_due(wait)
    assert pauses == [pytest.approx(expected, abs=0.015) for expected in (0.02, 0.08, 0.32)]
    assert [call.attempts_in_outage for call in calls] == [3, 3, 3, 3, 2, 1, 0]


def test_threads_that_wait_for_one_call_resubmit_it_once(engine):
    call = make_call(engine)
    call.resubmit_at = 0.0
    start = threading.Barrier(4)

    def resubmit():
        start.wait(10)
        call.resubmit(now=1.0)

    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(resubmit) for _ in range(4)]:
            future.result(10)

    assert [header[2] for _, header, _ in sent(engine)] == [0, 1]


def test_a_plain_call_is_behind_a_call_that_another_thread_makes_as_it_is_sent(engine, monkeypatch):
    made = []

    def call():
        made.append(make_call(engine))
        return Future()

    monkeypatch.setattr(Ledger, "is_out", lambda ledger, below: below > made[0]._number)
    assert PlainCall(SimpleNamespace(engine=engine, waits_its_turn=True, call=call)).is_behind_a_call()


def test_the_code_is_sent_until_the_actor_has_answered(engine):
    calls = [make_call(engine), make_call(engine)]
    calls[0].settle(answered=False)
    calls.append(make_call(engine))
    calls[1].settle(answered=True)
    calls.append(make_call(engine))

    assert [code is not None for code, _, _ in sent(engine)] == [True, True, True, False]


def test_the_next_call_tells_the_actor_which_calls_are_settled_or_forgotten(engine):
    kept, forgotten = make_call(engine), make_call(engine)
    del forgotten
    gc.collect()
    calls = [make_call(engine)]
    kept.settle(answered=True)
    calls.append(make_call(engine))

    assert [header[4] for _, header, _ in sent(engine)] == [(0, ()), (0, ()), (0, (1,)), (2, ())]


def test_what_a_call_costs_on_the_way_does_not_grow_with_the_code_once_it_is_known(engine):
    calls = [make_call(engine)]
    calls[0].settle(answered=True)
    calls.append(make_call(engine))

    with_code, without = (len(cloudpickle.dumps(carrier)) for carrier, *_ in engine.handle.submitted)
    assert without < 2000 < with_code


def test_a_call_cannot_be_pickled_and_says_what_can(engine):
    with pytest.raises(TypeError, match=r"Call\('e', 'init', attempt=0\) cannot be sent elsewhere: pass .*call\.ref"):
        pickle.dumps(make_call(engine))


@pytest.mark.parametrize(
    ("cause", "restarted"),
    [(RuntimeError(RESTARTED), True), (RuntimeError(DROPPED), False), (RuntimeError(), False), (ValueError(), False)],
    ids=repr,
)
def test_only_an_actor_that_was_restarted_says_so(cause, restarted):
    answer = RayTaskError("engine.init()", "Traceback ...", cause, "title", 1, "127.0.0.1").as_instanceof_cause()

    assert says_restarted(answer) is restarted
    assert not says_restarted(cause)

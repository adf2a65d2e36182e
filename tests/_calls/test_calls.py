"""Calls before they reach Ray: their numbers, their arguments as they were, and what a resubmission sends."""

from __future__ import annotations

import gc
import pickle
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from ray import ObjectRef, cloudpickle
from ray.exceptions import RayTaskError
from support.bare_handles import bare_handle, make_call, recording_engine, sent

from enginefsm import EngineMonitor
from enginefsm._calls.actor_side import DROPPED, RESTARTED
from enginefsm._calls.arguments import Arguments
from enginefsm._calls.calls import says_restarted
from enginefsm._calls.ledger import Ledger
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
    call.rest(5.0)

    call.resubmit(now=5.0)

    (_, first, _), (_, second, values) = sent(engine)
    assert second == (first[0], first[1], 1, *first[3:])
    assert values == [[30000]]
    assert call.ref is not first_ref
    assert call.out is call.ref
    assert engine.handle.options_given[0] == engine.handle.options_given[1]


@pytest.mark.parametrize("rests_until", [None, 5.1])
def test_a_call_that_is_out_or_not_due_is_not_resubmitted(engine, rests_until):
    call = make_call(engine)
    if rests_until is not None:
        call.rest(rests_until)
    out = call.out

    call.resubmit(now=5.0)

    assert len(sent(engine)) == 1
    assert call.out is out


def test_threads_that_wait_for_one_call_resubmit_it_once(engine):
    call = make_call(engine)
    call.rest(0.0)
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

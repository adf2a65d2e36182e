"""What runs inside an engine's actor, here on plain objects: every call runs once, however often it comes."""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import json
import pickle
import subprocess
import sys
import threading
import traceback
import tracemalloc
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from ray import cloudpickle
from support.bare_handles import recording_engine

from enginefsm._calls import actor_side as _actorside
from enginefsm._calls.actor_side import DROPPED, RESTARTED, SHELF, enter, run_once, run_once_on_loop
from enginefsm._calls.calls import Arguments, Call

TIMEOUT_S = 10


class Value:
    """Something that a weak reference can tell the end of."""


class Engine:
    """The instance that an actor would be."""

    def __init__(self):
        self.runs = []
        self.begun = threading.Event()
        self.gate = threading.Event()

    def work(self, what=None):
        self.runs.append(what)
        return Value()

    def fail(self, error):
        self.runs.append(error)
        raise error

    def hold(self, error=None):
        self.runs.append("hold")
        self.begun.set()
        assert self.gate.wait(TIMEOUT_S)
        if error is not None:
            raise error
        return "held"


class WatchedCondition(threading.Condition):
    """Tells when somebody begins to wait; that one has the lock until it really waits."""

    def __init__(self):
        super().__init__()
        self.waits = threading.Semaphore(0)

    def wait(self, timeout=None):
        self.waits.release()
        return super().wait(timeout)


@pytest.fixture(autouse=True)
def actor_was_restarted(monkeypatch):
    """Whether Ray says so; it does not, unless a test sets it."""
    answer = SimpleNamespace(value=False)
    monkeypatch.setattr(_actorside, "_was_restarted", lambda: answer.value)
    return answer


@pytest.fixture
def clock(monkeypatch):
    """The time that the book goes by."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(_actorside, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def engine():
    return Engine()


def book_of(actor):
    """What is remembered of an actor; begun if there is nothing yet."""
    shelf = sys.modules.setdefault(SHELF, types.ModuleType(SHELF))
    return shelf.__dict__.setdefault("books", {}).setdefault(id(actor), {"actor": actor, "run": run_once})


@pytest.fixture
def threads(engine):
    """Threads to call the engine from; what still holds when the test ends is let go."""
    with ThreadPoolExecutor(10) as pool:
        yield pool
        engine.gate.set()
        changed = book_of(engine).setdefault("changed", threading.Condition())
        with changed:
            changed.notify_all()


@pytest.fixture
def changed(engine):
    """The condition of the engine's book."""
    changed = WatchedCondition()
    book_of(engine)["changed"] = changed
    return changed


def call(actor, method, *args, number=0, attempt=0, settled=(0, ()), caller="me", answered=False, **kwargs):
    header = (caller, number, attempt, answered, settled, method, tuple(kwargs))
    return run_once(book_of(actor), header, *args, *kwargs.values())


def test_a_call_runs_once_and_gives_the_same_value_to_every_attempt(engine):
    values = [call(engine, "work", attempt=attempt) for attempt in range(3)]

    assert values[1:] == values[:1] * 2
    assert len(engine.runs) == 1


def test_calls_with_numbers_of_their_own_run_each(engine):
    for number in range(3):
        call(engine, "work", number, number=number)

    assert engine.runs == [0, 1, 2]


def test_callers_do_not_meet_in_one_number(engine):
    assert call(engine, "work", caller="me") is not call(engine, "work", caller="other")
    assert len(engine.runs) == 2


def test_a_call_that_raised_raises_the_same_exception_to_every_attempt(engine):
    error = ValueError("no")
    for attempt in range(3):
        with pytest.raises(ValueError, match="no") as raised:
            call(engine, "fail", error, attempt=attempt)
        assert raised.value is error

    assert len(engine.runs) == 1


def test_the_traceback_of_a_remembered_exception_shows_the_method_and_does_not_grow(engine):
    traces = []
    for attempt in range(20):
        with pytest.raises(ValueError, match="no") as raised:
            call(engine, "fail", ValueError("no"), attempt=attempt)
        traces.append([frame.name for frame in traceback.extract_tb(raised.value.__traceback__)])

    assert all(trace[-1] == "fail" for trace in traces)
    assert {len(trace) for trace in traces[1:]} == {len(traces[1])}


def raise_it(value):
    raise ValueError("no")


def raise_from_it(value):
    try:
        raise_it(value)
    except ValueError as cause:
        raise RuntimeError("no") from cause


def raise_after_it(value):
    try:
        raise_it(value)
    except ValueError:
        raise RuntimeError("no")  # noqa: B904  the context is what this is about


def raise_in_a_group(value):
    try:
        raise_it(value)
    except ValueError as error:
        raise ExceptionGroup("no", [error]) from None


@pytest.mark.parametrize("how", [raise_it, raise_from_it, raise_after_it, raise_in_a_group])
def test_a_remembered_exception_keeps_nothing_alive_of_what_the_method_had_in_hand(engine, how):
    gone = []

    def fail():
        local = Value()
        gone.append(weakref.ref(local))
        how(local)

    engine.fail = fail
    with pytest.raises(Exception, match="no"):
        call(engine, "fail")

    gc.collect()
    assert gone[0]() is None


def test_an_attempt_that_finds_the_method_running_waits_for_its_value(engine, changed, threads):
    first = threads.submit(call, engine, "hold")
    assert engine.begun.wait(TIMEOUT_S)
    second = threads.submit(call, engine, "hold", attempt=1)
    assert changed.waits.acquire(timeout=TIMEOUT_S)
    assert not second.done()

    engine.gate.set()

    assert (first.result(TIMEOUT_S), second.result(TIMEOUT_S)) == ("held", "held")
    assert engine.runs == ["hold"]


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_whatever_the_method_raises_passes_and_reaches_the_attempt_that_waits(engine, changed, threads, error):
    first = threads.submit(call, engine, "hold", error)
    assert engine.begun.wait(TIMEOUT_S)
    second = threads.submit(call, engine, "hold", error, attempt=1)
    assert changed.waits.acquire(timeout=TIMEOUT_S)

    engine.gate.set()

    assert first.exception(TIMEOUT_S) is error
    assert second.exception(TIMEOUT_S) is error


def test_of_many_attempts_only_the_newest_waits(engine, changed, threads):
    first = threads.submit(call, engine, "hold")
    assert engine.begun.wait(TIMEOUT_S)
    waiting = None
    for attempt in (1, 2, 3):
        superseded, waiting = waiting, threads.submit(call, engine, "hold", attempt=attempt)
        assert changed.waits.acquire(timeout=TIMEOUT_S)
        if superseded is not None:
            assert superseded.result(TIMEOUT_S) is None  # while the method runs

    assert threads.submit(call, engine, "hold", attempt=2).result(TIMEOUT_S) is None  # one that was overtaken
    assert not waiting.done()
    engine.gate.set()
    assert (first.result(TIMEOUT_S), waiting.result(TIMEOUT_S)) == ("held", "held")
    assert engine.runs == ["hold"]


def test_an_attempt_that_comes_after_a_newer_one_was_answered_gets_nothing(engine):
    call(engine, "work", attempt=1)

    assert call(engine, "work", attempt=0) is None
    assert len(engine.runs) == 1


SETTLED = pytest.mark.parametrize("settled", [(1, ()), (0, (0,))], ids=["all below", "this one"])


@SETTLED
def test_the_value_of_a_settled_call_is_let_go(engine, settled):
    value = weakref.ref(call(engine, "work"))
    assert value() is not None

    call(engine, "work", number=1, settled=settled)

    gc.collect()
    assert value() is None


@SETTLED
def test_a_late_duplicate_of_a_settled_call_runs_nothing(engine, settled):
    call(engine, "work", "the call", attempt=1)
    call(engine, "work", "the next", number=1, settled=settled)

    for attempt in (0, 1, 2):
        assert call(engine, "work", "the call", attempt=attempt, settled=settled) is None

    assert engine.runs == ["the call", "the next"]


@SETTLED
def test_a_call_that_was_given_up_before_it_came_runs_once_and_is_not_remembered(engine, settled):
    # The caller let go of it at once; on a threaded actor, or in another concurrency group, the next may come first.
    call(engine, "work", "the next", number=1, settled=settled)

    value = weakref.ref(call(engine, "work", "given up"))
    assert call(engine, "work", "given up", attempt=1) is None

    assert engine.runs == ["the next", "given up"]
    gc.collect()
    assert value() is None


def test_a_call_that_is_given_up_while_it_runs_ends_and_is_not_remembered(engine, threads):
    given_up = threads.submit(call, engine, "hold")
    assert engine.begun.wait(TIMEOUT_S)
    call(engine, "work", number=1, settled=(1, ()))
    engine.gate.set()

    assert given_up.result(TIMEOUT_S) == "held"
    assert call(engine, "hold", attempt=1) is None


def test_an_attempt_that_waits_for_a_call_that_is_given_up_waits_no_longer(engine, changed, threads):
    threads.submit(call, engine, "hold")
    assert engine.begun.wait(TIMEOUT_S)
    waiting = threads.submit(call, engine, "hold", attempt=1)
    assert changed.waits.acquire(timeout=TIMEOUT_S)

    assert call(engine, "work", "late", number=0, settled=(1, ())) is None  # which ends nothing, and so tells nobody

    assert waiting.result(TIMEOUT_S) is None


def test_beyond_a_number_of_outcomes_the_oldest_are_dropped_and_do_not_run_again(engine, monkeypatch):
    monkeypatch.setattr(_actorside, "MAX_OUTCOMES", 3)
    values = [weakref.ref(call(engine, "work", number=number)) for number in range(10)]
    gc.collect()

    assert [number for number, value in enumerate(values) if value() is not None] == [6, 7, 8, 9]
    with pytest.raises(RuntimeError, match=DROPPED):
        call(engine, "work", number=0, attempt=1)
    assert call(engine, "work", number=9, attempt=1) is values[9]()
    assert len(engine.runs) == 10


def test_an_outcome_nobody_asks_for_is_dropped_in_the_end_and_does_not_run_again(engine, clock):
    value = weakref.ref(call(engine, "work"))
    clock.now += _actorside.MAX_AGE_S - 1
    assert call(engine, "work", attempt=1) is value()

    clock.now += 2
    call(engine, "work", number=1)

    gc.collect()
    assert value() is None
    with pytest.raises(RuntimeError, match=DROPPED):
        call(engine, "work", attempt=2)
    assert len(engine.runs) == 2


def test_an_outcome_whose_caller_says_nothing_more_is_dropped_when_another_calls(engine, clock):
    call(engine, "work", caller="other")
    value = weakref.ref(call(engine, "work", caller="silent"))
    clock.now += _actorside.MAX_AGE_S + 1

    call(engine, "work", caller="other", number=1, answered=True)

    gc.collect()
    assert value() is None
    with pytest.raises(RuntimeError, match=DROPPED):
        call(engine, "work", caller="silent", attempt=1)


@pytest.mark.parametrize("open_one", ["runs", "has ended"])
def test_calls_settled_while_an_earlier_one_is_open_leave_nothing_behind_and_do_not_run_again(
    engine, threads, open_one
):
    first = threads.submit(call, engine, "hold")
    assert engine.begun.wait(TIMEOUT_S)
    if open_one == "has ended":
        engine.gate.set()
        assert first.result(TIMEOUT_S) == "held"
    engine.take = lambda: None

    def make(numbers):
        for number in numbers:
            call(engine, "take", number=number, settled=(0, (number - 1,) if number > 1 else ()))
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = make(range(1, 100))
        assert make(range(100, 3_000)) - before < 50_000  # bytes
    finally:
        tracemalloc.stop()
    engine.take = None  # which cannot run
    for number in (1, 1_500, 2_998):
        assert call(engine, "take", number=number, attempt=1) is None
    engine.gate.set()
    assert call(engine, "hold", attempt=1) == "held"
    assert engine.runs == ["hold"]


def test_an_open_call_keeps_its_outcome_when_others_beyond_the_number_that_is_kept_are_settled(engine, monkeypatch):
    monkeypatch.setattr(_actorside, "MAX_OUTCOMES", 3)
    values = [call(engine, "work", number=number) for number in range(4)]

    call(engine, "work", number=4, settled=(0, (1, 2, 3)))

    assert call(engine, "work", number=0, attempt=1) is values[0]


def callers(engine):
    return set(book_of(engine)["callers"])


def test_a_caller_that_is_silent_for_long_is_forgotten(engine, clock):
    call(engine, "work", caller="gone")
    call(engine, "work", caller="gone", number=1, settled=(2, ()))
    clock.now += _actorside.MAX_AGE_S

    call(engine, "work", caller="new")

    assert callers(engine) == {"new"}
    call(engine, "work", "back", caller="gone", number=1_000_000, settled=(1_000_000, ()))
    assert engine.runs[-1] == "back"
    assert len(book_of(engine)["callers"]["gone"]["unseen"]) <= _actorside.MAX_OUTCOMES


def test_a_caller_that_is_silent_for_long_does_not_get_a_call_run_twice(engine, clock, threads):
    # It waits for an `init` that takes longer than the book remembers outcomes.
    first = threads.submit(call, engine, "hold")
    assert engine.begun.wait(TIMEOUT_S)
    clock.now += 2 * _actorside.MAX_AGE_S
    engine.gate.set()
    assert first.result(TIMEOUT_S) == "held"

    call(engine, "work", caller="new")

    assert call(engine, "hold", attempt=1) == "held"
    clock.now += 2 * _actorside.MAX_AGE_S
    call(engine, "work", caller="newer")
    with pytest.raises(RuntimeError, match=DROPPED):
        call(engine, "hold", attempt=2)
    assert engine.runs.count("hold") == 1


def test_keywords_reach_the_method_whatever_their_names(engine):
    names = ["fn", "self_", "header", "code", "actor", "values", "caller", "args", "kwargs", "number", "method"]
    given = {name: name.upper() for name in names}
    engine.take = lambda *args, **kwargs: (args, kwargs)

    header = ("me", 0, 0, False, (0, ()), "take", tuple(given))
    assert enter(cloudpickle.dumps(run_once), header, engine, 1, 2, *given.values()) == ((1, 2), given)


def test_an_unknown_method_is_an_attribute_error(engine):
    with pytest.raises(AttributeError, match="no_such_method"):
        call(engine, "no_such_method")


def test_a_restarted_actor_says_so_to_whoever_knew_the_old_one(engine, actor_was_restarted):
    actor_was_restarted.value = True

    for known in ({"attempt": 1}, {"number": 1, "answered": True}):
        with pytest.raises(RuntimeError, match=RESTARTED):
            call(engine, "work", **known)
    assert engine.runs == []


def test_an_actor_that_lost_the_code_says_that_it_was_restarted(engine):
    with pytest.raises(RuntimeError, match=RESTARTED):
        enter(None, ("me", 1, 0, (0, ()), "work", ()), engine)
    assert engine.runs == []


def test_a_restarted_actor_serves_whoever_comes_anew(engine, actor_was_restarted):
    actor_was_restarted.value = True

    value = call(engine, "work")

    assert call(engine, "work", attempt=1) is value


def test_a_first_attempt_that_got_lost_is_no_sign_of_a_restart(engine):
    call(engine, "work", attempt=1)

    assert len(engine.runs) == 1


def test_threads_that_come_to_a_new_actor_at_once_run_every_call_once(engine, threads):
    start = threading.Barrier(8)

    def submit(attempt):
        start.wait(TIMEOUT_S)
        return [call(engine, "work", number, number=number, attempt=attempt) for number in range(50)]

    given = [future.result(TIMEOUT_S) for future in [threads.submit(submit, attempt) for attempt in range(8)]]

    assert sorted(engine.runs) == list(range(50))
    for values in zip(*given, strict=True):
        assert len(set(values) - {None}) == 1  # an attempt that was overtaken gives None
    assert None not in given[-1]


# --- on event loops ---


class LoopEngine:
    """The instance that an asyncio actor would be."""

    def __init__(self):
        self.runs = []
        self.begun = asyncio.Event()
        self.gate = asyncio.Event()

    async def hold(self, error=None):
        self.runs.append("hold")
        self.begun.set()
        await self.gate.wait()
        if error is not None:
            raise error
        return "held"

    async def fail(self, gone):
        local = Value()
        gone.append(weakref.ref(local))
        raise ValueError("no")

    def sync(self):
        return threading.current_thread()


def loop_call(actor, method, *args, number=0, attempt=0, settled=(0, ())):
    header = ("me", number, attempt, False, settled, method, ())
    return asyncio.ensure_future(run_once_on_loop(book_of(actor), header, *args))


def on_loop(scene):
    """A test that is a coroutine, given an engine."""

    @functools.wraps(scene)
    def test():
        async def run():
            await asyncio.wait_for(scene(LoopEngine()), TIMEOUT_S)

        asyncio.run(run())

    del test.__wrapped__  # pytest would take its parameter for a fixture
    return test


@on_loop
async def test_on_a_loop_attempts_wait_for_the_one_run_and_of_several_only_the_newest(engine):
    first = loop_call(engine, "hold")
    await engine.begun.wait()
    waiting = [loop_call(engine, "hold", attempt=attempt) for attempt in (1, 2, 3)]
    assert [await waiting[0], await waiting[1]] == [None, None]  # while the method runs
    assert not waiting[2].done()
    engine.gate.set()
    assert [await first, await waiting[2], await loop_call(engine, "hold", attempt=4)] == ["held"] * 3
    assert engine.runs == ["hold"]


@on_loop
async def test_on_a_loop_an_exception_reaches_the_attempt_that_waits(engine):
    error = ValueError("no")
    first = loop_call(engine, "hold", error)
    await engine.begun.wait()
    second = loop_call(engine, "hold", error, attempt=1)
    await asyncio.sleep(0)
    engine.gate.set()
    assert await asyncio.gather(first, second, return_exceptions=True) == [error, error]


@on_loop
async def test_on_a_loop_a_method_that_is_no_coroutine_runs_on_it(engine):
    assert await loop_call(engine, "sync") is threading.current_thread()


@on_loop
async def test_on_a_loop_what_a_coroutine_had_in_hand_is_let_go_with_its_exception(engine):
    gone = []
    for attempt in range(2):
        with pytest.raises(ValueError, match="no"):
            await loop_call(engine, "fail", gone, attempt=attempt)
    gc.collect()
    assert [value() for value in gone] == [None]


@on_loop
async def test_cancelling_the_newest_attempt_cancels_the_run_and_an_older_one_does_not(engine):
    first = loop_call(engine, "hold")
    await engine.begun.wait()
    second, third = (loop_call(engine, "hold", attempt=attempt) for attempt in (1, 2))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.sleep(0.01)
    assert not first.done()
    third.cancel()
    outcomes = await asyncio.gather(first, second, third, return_exceptions=True)
    assert [type(each) for each in outcomes] == [asyncio.CancelledError] * 3
    with pytest.raises(asyncio.CancelledError):
        await loop_call(engine, "hold", attempt=3)
    assert engine.runs == ["hold"]


@on_loop
async def test_on_a_loop_an_attempt_that_waits_for_a_call_that_is_given_up_waits_no_longer(engine):
    first = loop_call(engine, "hold")
    await engine.begun.wait()
    waiting = loop_call(engine, "hold", attempt=1)
    await asyncio.sleep(0)
    await loop_call(engine, "sync", number=1, settled=(1, ()))
    assert await waiting is None
    engine.gate.set()
    assert await first == "held"


@on_loop
async def test_loops_in_several_threads_run_a_call_once(engine):
    async def elsewhere(attempt):
        return await loop_call(engine, "hold", attempt=attempt)

    first = loop_call(engine, "hold")
    await engine.begun.wait()
    waiting = asyncio.ensure_future(asyncio.to_thread(asyncio.run, elsewhere(1)))
    changed = book_of(engine)["changed"]
    while not any(entry["wakers"] for entry in book_of(engine)["callers"]["me"]["calls"].values()):
        await asyncio.sleep(0.001)
    with changed:
        assert not waiting.done()
    engine.gate.set()
    assert [await first, await waiting] == ["held", "held"]
    assert engine.runs == ["hold"]


class Copied:
    """An actor that copies itself, as it does to run its own method in a child process that is spawned."""

    def pickled(self):
        return pickle.dumps(self)

    def duplicated(self):
        return copy.deepcopy(self)

    def name(self):
        return "an actor"


def test_an_actor_may_pickle_and_copy_itself_and_what_is_remembered_stays_behind():
    actor = Copied()
    for number, method in enumerate(["pickled", "duplicated"]):
        made = call(actor, method, number=number)
        copied = pickle.loads(made) if isinstance(made, bytes) else made
        assert vars(copied) == vars(actor) == {}
        assert call(actor, method, number=number, attempt=1) is made


ELSEWHERE = """
import json, pickle, sys

class NoEnginefsm:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "enginefsm":
            raise ImportError("there is no enginefsm here")

class Engine:
    runs = 0
    def add(self, one, *, header):
        self.runs += 1
        return [one + header, self.runs]

sys.meta_path.insert(0, NoEnginefsm())
sys.path += json.loads(sys.argv[1])
import types, ray
ray.get_runtime_context = lambda: types.SimpleNamespace(was_current_actor_reconstructed=False)
actor, answers = Engine(), []
for carrier, *values in pickle.load(sys.stdin.buffer):
    answers.append(pickle.loads(carrier)(actor, *values))
try:
    pickle.loads(carrier)(Engine(), *values)
except RuntimeError as error:
    answers.append(str(error))
assert "enginefsm" not in sys.modules
print(json.dumps(answers))
"""


def test_what_is_sent_to_an_actor_runs_where_there_is_no_enginefsm(tmp_path):
    engine = recording_engine()
    one = Call(engine, "add", Arguments((1,), {"header": 2}), {})
    one.rest(0.0)
    one.resubmit(now=0.0)
    one.settle(answered=True)  # from here on the code is not sent
    other = Call(engine, "add", Arguments((3,), {"header": 4}), {})
    sent = [(cloudpickle.dumps(carrier), *values) for carrier, *values in engine.handle.submitted]

    process = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ELSEWHERE, json.dumps([path for path in sys.path if path])],
        input=pickle.dumps(sent), capture_output=True, cwd=tmp_path, timeout=60, check=False,
    )  # fmt: skip

    assert process.returncode == 0, process.stderr.decode()
    assert json.loads(process.stdout) == [[3, 1], [3, 1], [7, 2], RESTARTED]
    assert other.attempt == 0

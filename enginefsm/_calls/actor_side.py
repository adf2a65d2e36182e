"""What runs inside the engine's actor: a call that runs once, however often it is submitted.

`run_once` serves sync and threaded actors. `run_once_on_loop` serves asyncio actors, which have `carry` as a method.

The caller ships these functions by value, because the actor's environment may have no enginefsm. So this file imports
only the standard library. The book that it keeps in the actor's process is made of plain containers, because another
monitor may bring another release of this file.

The book of an actor:
    actor      the actor instance. A process of Ray's holds one; a test's may hold several
    run        `run_once` or `run_once_on_loop`, as the first caller brought it
    changed    a condition around everything below
    callers    {caller: page}. A caller is one monitor that adopted this actor. A page is
        below      every call with a lower number is settled: its caller has the outcome and will not ask again
        heard      the caller has settled no call from this number on
        open       the calls between the two that are not settled either
        unseen     settled calls that have not come yet. The caller gave them up on the way; they run once all the same
        late       whether Ray had restarted the actor before the caller first came to this process
        seen_at    when the caller was last heard of
        calls      {number: entry} of the calls that came and are not settled
        held       {number: entry} of those that hold an outcome, in the order in which they ended
    An entry is
        status     one of the five below
        value      what the method returned, or its exception with the traceback
        ended_at   when the method ended
        attempt    the newest submission that asked for the call
        wakers     called when the entry changes; for event loops
        cancel     cancels the task in which the method runs; for event loops
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import inspect
import itertools
import pickle
import sys
import threading
import time
import types
from collections.abc import Iterator
from typing import Any, NamedTuple


class Header(NamedTuple):
    """What a submission says of its call. It travels as a plain tuple, which is small and needs no class there."""

    caller: str
    number: int
    attempt: int
    answered: bool
    """Whether the actor has answered the caller before."""
    settled: tuple[int, tuple[int, ...]]
    """What the caller has settled: all numbers below the first, and those of the second."""
    method: str
    keywords: tuple[str, ...]


# Where the books are. Not on the actor, which may restore, copy or pickle its own state. The number counts the layouts
# of the book and of the header.
SHELF = "_enginefsm_books_2"
MAX_OUTCOMES = 10_000
"""How many outcomes are held for one caller. Past it the oldest is dropped."""
MAX_AGE_S = 3600.0
"""An outcome of this age is dropped at the next call of anybody. A caller that was silent for so long and has no call
open is forgotten when a new caller comes."""
RESTARTED = "enginefsm: this actor was restarted, and the earlier process took the call with it"
DROPPED = "enginefsm: the outcome of this call is no longer remembered"

_RUNNING, _RETURNED, _RAISED, _SETTLED, _DROPPED = "running", "returned", "raised", "settled", "dropped"
_SUSPENDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE | inspect.CO_ASYNC_GENERATOR


def enter(code: bytes | None, header: tuple[Any, ...], actor: Any, *values: Any) -> Any:
    """Run the function of which `code` is a pickle.

    It is unpickled once in an actor. The caller no longer sends it once the actor has answered, so a process that does
    not have it then is a new one.
    """
    books = sys.modules.setdefault(SHELF, types.ModuleType(SHELF)).__dict__.setdefault("books", {})
    book = books.setdefault(id(actor), {"actor": actor})
    if "run" not in book:
        if code is None:
            raise RuntimeError(RESTARTED)
        book["run"] = pickle.loads(code)  # noqa: S301  as Ray unpickles what it is sent
    return book["run"](book, header, *values)


async def carry(actor: Any, carrier: Any, *values: Any) -> Any:
    """Be the method through which an asyncio actor is called. Ray awaits a coroutine method, but no returned value."""
    return await carrier(actor, *values)


def run_once(book: dict[str, Any], submitted: tuple[Any, ...], *values: Any) -> Any:
    """Run a method of the book's actor under its call's number, or return the outcome that it had.

    The last of `values` belong to the header's keywords. They travel by position, because Ray resolves references only
    at the top level, and because a keyword of the method must not meet one of ours.

    A submission that finds the method running waits for it. Only the newest attempt at a call waits, so that repeated
    attempts do not fill the actor's threads. A superseded attempt returns to nobody.
    """
    header = Header(*submitted)
    changed = book.setdefault("changed", threading.Condition())
    with changed:
        page, entry, runs_it = _admit(changed, book, header)
        while not runs_it and _is_to_wait(entry, header):
            changed.wait()
        if not runs_it:
            return _given(entry, header)
    try:
        run, args, kwargs = _bound(book, header, values)
        value = run(*args, **kwargs)
    except BaseException as error:
        values = args = ()
        kwargs = {}
        _forget_locals(error)
        _end(changed, page, header, entry, _RAISED, (error, error.__traceback__))
        raise
    _end(changed, page, header, entry, _RETURNED, value)
    return value


async def run_once_on_loop(book: dict[str, Any], submitted: tuple[Any, ...], *values: Any) -> Any:
    """Do on an event loop what `run_once` does. Coroutines are awaited, and a submission that waits keeps no thread.

    An actor with concurrency groups has one loop, in a thread, for each group. A method that is not a coroutine
    function runs on the loop itself, as Ray would run it. Cancelling the newest submission cancels the method, in
    whichever submission it runs.
    """
    header = Header(*submitted)
    changed = book.setdefault("changed", threading.Condition())
    loop = asyncio.get_running_loop()
    with changed:
        page, entry, runs_it = _admit(changed, book, header)
        if runs_it:
            task = asyncio.current_task()
            entry["cancel"] = None if task is None else functools.partial(loop.call_soon_threadsafe, task.cancel)
    while not runs_it:
        with changed:
            if not _is_to_wait(entry, header):
                return _given(entry, header)
            woken = loop.create_future()
            entry["wakers"].append(functools.partial(loop.call_soon_threadsafe, _wake, woken))
        try:
            await woken
        except asyncio.CancelledError:
            with changed:
                if _is_to_wait(entry, header) and entry["cancel"] is not None:
                    entry["cancel"]()
            raise
    frame = None
    try:
        run, args, kwargs = _bound(book, header, values)
        value = run(*args, **kwargs)
        if asyncio.iscoroutine(value):
            frame = getattr(value, "cr_frame", None)
            value = await value
    except BaseException as error:
        values = args = ()
        kwargs = {}
        _forget_locals(error, ended=frame)
        _end(changed, page, header, entry, _RAISED, (error, error.__traceback__))
        raise
    _end(changed, page, header, entry, _RETURNED, value)
    return value


def _admit(changed: Any, book: dict[str, Any], header: Header) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Take a submission into the book. Return the page, the call's entry, and whether to run the method for it."""
    number, attempt = header.number, header.attempt
    callers = book.setdefault("callers", {})
    page = _page(callers, header.caller, header.settled[0], came_before=header.answered or attempt > 0)
    _settle(page, *header.settled)
    changed.notify_all()  # submissions that wait for a call that was given up may go
    for each in callers.values():  # a caller that is silent drops nothing itself
        _drop_oldest(each)
    entry = page["calls"].get(number)
    if entry is not None:
        if attempt > entry["attempt"]:
            entry["attempt"] = attempt
            _tell(entry)
        return page, entry, False
    given_up = number in page["unseen"]
    page["unseen"].discard(number)
    if not given_up and _is_settled(page, number):
        return page, _entry(_SETTLED, attempt), False  # a late duplicate of a settled call
    if attempt > 0 and page["late"]:
        raise RuntimeError(RESTARTED)  # its first attempt may have begun in the earlier process
    entry = _entry(_SETTLED if given_up else _RUNNING, attempt)
    if not given_up:
        page["calls"][number] = entry
    return page, entry, True


def _entry(status: str, attempt: int) -> dict[str, Any]:
    return {"status": status, "value": None, "ended_at": 0.0, "attempt": attempt, "wakers": [], "cancel": None}


def _is_to_wait(entry: dict[str, Any], header: Header) -> bool:
    return bool(entry["status"] == _RUNNING and entry["attempt"] == header.attempt)


def _given(entry: dict[str, Any], header: Header) -> Any:
    """Return, or raise, the outcome that a call had, to its newest attempt."""
    status, value = entry["status"], entry["value"]
    if entry["attempt"] != header.attempt:
        return None
    if status == _RAISED:
        raised, trace = value
        raise raised.with_traceback(trace)  # without this the traceback grows each time it is raised
    if status == _DROPPED:
        raise RuntimeError(DROPPED)
    return value


def _bound(book: dict[str, Any], header: Header, values: tuple[Any, ...]) -> tuple[Any, Any, dict[str, Any]]:
    """Return the method of the call, its positional arguments, and its keyword arguments."""
    split = len(values) - len(header.keywords)
    kwargs = dict(zip(header.keywords, values[split:], strict=True))
    return getattr(book["actor"], header.method), values[:split], kwargs


def _tell(entry: dict[str, Any]) -> None:
    """Wake the tasks on event loops that wait for the entry to change."""
    wakers, entry["wakers"] = entry["wakers"], []
    for wake in wakers:
        with contextlib.suppress(RuntimeError):  # that loop has been closed
            wake()


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


def _forget_locals(error: BaseException, ended: types.FrameType | None = None) -> None:
    """Clear the frames of an exception, so that it does not keep alive the method's variables, tensors included.

    The frames of coroutines and generators are left as they are, except the method's own, which has `ended`. The
    exception may have come through a coroutine that goes on (a background loop that passes it to a future, say).
    Clearing that one's frame would end it.
    """
    chain: dict[int, BaseException] = {}
    found: list[BaseException | None] = [error]
    while found:
        one = found.pop()
        if one is not None and id(one) not in chain:
            chain[id(one)] = one
            for frame in _frames(one):
                if frame is ended or not frame.f_code.co_flags & _SUSPENDS:
                    with contextlib.suppress(RuntimeError):  # it is running
                        frame.clear()
            found += [one.__cause__, one.__context__]
            found += one.exceptions if isinstance(one, BaseExceptionGroup) else ()


def _frames(error: BaseException) -> Iterator[types.FrameType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _page(callers: dict[str, Any], caller: str, below: int, came_before: bool) -> dict[str, Any]:
    now = time.monotonic()
    if caller not in callers:
        late = _was_restarted()
        # A caller that has come to this actor before is in its book, unless the process is a new one.
        if came_before and late:
            raise RuntimeError(RESTARTED)
        for name, page in list(callers.items()):
            # A call that is forgotten and then asked for would run again.
            if not page["calls"] and now - page["seen_at"] >= MAX_AGE_S:
                del callers[name]
        first = max(0, below - MAX_OUTCOMES)  # no more than so many count as unseen
        callers[caller] = {
            "below": first, "heard": first, "open": set(), "unseen": set(), "late": late, "seen_at": now, "calls": {},
            "held": collections.OrderedDict(),
        }  # fmt: skip
    callers[caller]["seen_at"] = now
    return callers[caller]  # type: ignore[no-any-return]


def _was_restarted() -> bool:
    ray = sys.modules["ray"]  # every actor has it; importing it elsewhere would start a cluster
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _settle(page: dict[str, Any], below: int, also: tuple[int, ...]) -> None:
    """Take in what the caller has settled. Nothing is kept of a settled call, except that it is not in `open`."""
    heard = max(page["heard"], below, *(number + 1 for number in also))
    page["open"].update(range(page["heard"], heard))
    page["heard"] = heard
    for number in itertools.chain(range(page["below"], below), also):
        if number in page["open"]:
            page["open"].remove(number)
            entry = page["calls"].pop(number, None)
            if entry is None:
                page["unseen"].add(number)
            else:
                _release(page, number, entry, _SETTLED)
    page["below"] = max(page["below"], below)


def _is_settled(page: dict[str, Any], number: int) -> bool:
    return number < page["heard"] and number not in page["open"]


def _drop_oldest(page: dict[str, Any]) -> None:
    held, oldest_kept = page["held"], time.monotonic() - MAX_AGE_S
    while held:
        number, entry = next(iter(held.items()))
        if len(held) <= MAX_OUTCOMES and entry["ended_at"] >= oldest_kept:
            return
        _release(page, number, entry, _DROPPED)


def _release(page: dict[str, Any], number: int, entry: dict[str, Any], status: str) -> None:
    page["held"].pop(number, None)
    entry["status"], entry["value"] = status, None
    _tell(entry)


def _end(
    changed: threading.Condition, page: dict[str, Any], header: Header, entry: dict[str, Any], status: str, value: Any
) -> None:
    with changed:
        entry["cancel"] = None
        if entry["status"] == _RUNNING:  # else its caller gave it up meanwhile, and nobody will ask for it
            entry["status"], entry["value"], entry["ended_at"] = status, value, time.monotonic()
            page["held"][header.number] = entry
            changed.notify_all()
            _tell(entry)

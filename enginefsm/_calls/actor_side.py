"""What runs inside the engine's actor: a call that runs once, however often it is submitted.

`run_once` is for sync and threaded actors, `run_once_on_loop` for asyncio actors, which have `carry` as a method.

These functions are shipped by value to actors whose environment has no enginefsm, so this file imports the standard
library and nothing of enginefsm, and the book that it keeps in the actor's process is made of plain containers:
another monitor may bring another release of this file.

The book of an actor:
    actor      the actor instance; a process of Ray's holds one, a test's may hold several
    run        `run_once` or `run_once_on_loop`, as the first caller brought it
    changed    a condition around everything below
    callers    {caller: page}, where a caller is one monitor that adopted this actor, and a page is
        below      every call with a lower number is settled: its caller has the outcome and will not ask again
        heard      no call from this number on is settled, as far as the caller has said
        open       nor are these, of those between the two
        unseen     those settled that have not come yet: given up on the way, they run once all the same
        late       whether Ray had restarted the actor by the time the caller first came to this process
        seen_at    when the caller was last heard of
        calls      {number: entry} of those that came and are not settled
        held       {number: entry} of those of them that hold an outcome, in the order in which they ended
An entry is [status, value, ended_at, attempt, wakers, cancel]: `attempt` is the newest that asked for it, `wakers` are
called when something has become of it, and `cancel` cancels the task in which it runs; both are for event loops.
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
from typing import Any

Header = tuple[str, int, int, bool, tuple[int, tuple[int, ...]], str, tuple[str, ...]]
"""Caller, number and attempt of the call; whether the actor has answered the caller before; what the caller has
settled; the method, and the names of its keywords."""

# Where the books are: not on the actor, which may restore, copy or pickle its own state. The number is that of the
# layout of the book and of the header.
SHELF = "_enginefsm_books_1"
MAX_OUTCOMES = 10_000  # held for one caller; past it the oldest is dropped
# An outcome so old is dropped when anybody next calls, a caller so long silent, with no call open, when a new one does.
MAX_AGE_S = 3600.0
RESTARTED = "enginefsm: this actor was restarted, and the earlier process took the call with it"
DROPPED = "enginefsm: the outcome of this call is no longer remembered"

_RUNNING, _RETURNED, _RAISED, _SETTLED, _DROPPED = "running", "returned", "raised", "settled", "dropped"
_STATUS, _VALUE, _ENDED_AT, _ATTEMPT, _WAKERS, _CANCEL = range(6)
_SUSPENDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE | inspect.CO_ASYNC_GENERATOR


def enter(code: bytes | None, header: Header, actor: Any, *values: Any) -> Any:
    """Run what `code` is a pickle of.

    It is unpickled once an actor, and no longer sent once the actor has answered its caller: a process that then
    does not have it is a new one.
    """
    books = sys.modules.setdefault(SHELF, types.ModuleType(SHELF)).__dict__.setdefault("books", {})
    book = books.setdefault(id(actor), {"actor": actor})
    if "run" not in book:
        if code is None:
            raise RuntimeError(RESTARTED)
        book["run"] = pickle.loads(code)  # noqa: S301  as Ray unpickles what it is sent
    return book["run"](book, header, *values)


async def carry(actor: Any, carrier: Any, *values: Any) -> Any:
    """The method by which an asyncio actor is called: a coroutine, which Ray awaits, as it would not await a value."""
    return await carrier(actor, *values)


def run_once(book: dict[str, Any], header: Header, *values: Any) -> Any:
    """Run a method of the book's actor under its call's number, or give the outcome that it had.

    The last of `values` belong to the header's keywords: they travel by position, since Ray resolves references only
    at the top level, and a keyword of the method must not meet one of ours. A submission that finds the method
    running waits for it; only the newest attempt at a call waits, so that repeated attempts do not fill an actor's
    threads. What a superseded attempt returns reaches nobody.
    """
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


async def run_once_on_loop(book: dict[str, Any], header: Header, *values: Any) -> Any:
    """`run_once` on an event loop: what can be awaited is, and a submission that waits keeps no thread.

    An actor with concurrency groups has a loop, in a thread, for each. A method that is not a coroutine function runs
    on the loop itself, as Ray would run it. Cancelling the newest submission cancels the method, in whichever
    submission it runs.
    """
    changed = book.setdefault("changed", threading.Condition())
    loop = asyncio.get_running_loop()
    with changed:
        page, entry, runs_it = _admit(changed, book, header)
        if runs_it:
            task = asyncio.current_task()
            entry[_CANCEL] = None if task is None else functools.partial(loop.call_soon_threadsafe, task.cancel)
    while not runs_it:
        with changed:
            if not _is_to_wait(entry, header):
                return _given(entry, header)
            woken = loop.create_future()
            entry[_WAKERS].append(functools.partial(loop.call_soon_threadsafe, _wake, woken))
        try:
            await woken
        except asyncio.CancelledError:
            with changed:
                if _is_to_wait(entry, header) and entry[_CANCEL] is not None:
                    entry[_CANCEL]()
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


def _admit(changed: Any, book: dict[str, Any], header: Header) -> tuple[dict[str, Any], list[Any], bool]:
    """Take a submission into the book: the page, the call's entry, and whether the method is to be run for it."""
    caller, number, attempt, answered, settled, _, _ = header
    callers = book.setdefault("callers", {})
    page = _page(callers, caller, settled[0], came_before=answered or attempt > 0)
    _settle(page, *settled)
    changed.notify_all()  # whoever waits for a call that was given up may go
    for each in callers.values():  # a caller that says nothing more drops nothing itself
        _drop_oldest(each)
    entry = page["calls"].get(number)
    if entry is not None:
        if attempt > entry[_ATTEMPT]:
            entry[_ATTEMPT] = attempt
            _tell(entry)
        return page, entry, False
    given_up = number in page["unseen"]
    page["unseen"].discard(number)
    if not given_up and _is_settled(page, number):
        return page, [_SETTLED, None, 0.0, attempt, [], None], False  # a late duplicate of a settled call
    if attempt > 0 and page["late"]:
        raise RuntimeError(RESTARTED)  # its first attempt may have begun in the earlier process
    entry = [_SETTLED if given_up else _RUNNING, None, 0.0, attempt, [], None]
    if not given_up:
        page["calls"][number] = entry
    return page, entry, True


def _is_to_wait(entry: list[Any], header: Header) -> bool:
    _, _, attempt, _, _, _, _ = header
    return bool(entry[_STATUS] == _RUNNING and entry[_ATTEMPT] == attempt)


def _given(entry: list[Any], header: Header) -> Any:
    """The outcome that a call had, for its newest attempt."""
    _, _, attempt, _, _, _, _ = header
    status, value = entry[_STATUS], entry[_VALUE]
    if entry[_ATTEMPT] != attempt:
        return None
    if status == _RAISED:
        raised, trace = value
        raise raised.with_traceback(trace)  # which would grow with every time it is raised
    if status == _DROPPED:
        raise RuntimeError(DROPPED)
    return value


def _bound(book: dict[str, Any], header: Header, values: tuple[Any, ...]) -> tuple[Any, Any, dict[str, Any]]:
    """The method of the call, its arguments, and those by keyword."""
    *_, method, keywords = header
    split = len(values) - len(keywords)
    return getattr(book["actor"], method), values[:split], dict(zip(keywords, values[split:], strict=True))


def _tell(entry: list[Any]) -> None:
    """Wake the loops' tasks that wait for something to become of the entry."""
    wakers, entry[_WAKERS] = entry[_WAKERS], []
    for wake in wakers:
        with contextlib.suppress(RuntimeError):  # that loop has been closed
            wake()


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


def _forget_locals(error: BaseException, ended: types.FrameType | None = None) -> None:
    """A remembered exception must not keep alive what the method had in its variables, tensors included.

    The frames of coroutines and generators stay as they are, but for that of the method itself, which has `ended`: an
    exception may have come by way of one that goes on (a background loop that passes it to a future, say), and to
    clear that one's frame would end it.
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
        # Whoever has come to this actor before is in its book, unless the process is a new one.
        if came_before and late:
            raise RuntimeError(RESTARTED)
        for name, page in list(callers.items()):
            # Forgetting a call that may be asked for again would run it again.
            if not page["calls"] and now - page["seen_at"] >= MAX_AGE_S:
                del callers[name]
        first = max(0, below - MAX_OUTCOMES)  # no more than so many are taken for unseen
        callers[caller] = {
            "below": first, "heard": first, "open": set(), "unseen": set(), "late": late, "seen_at": now, "calls": {},
            "held": collections.OrderedDict(),
        }  # fmt: skip
    callers[caller]["seen_at"] = now
    return callers[caller]  # type: ignore[no-any-return]


def _was_restarted() -> bool:
    ray = sys.modules["ray"]  # there is one in every actor; importing it elsewhere would start a cluster
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _settle(page: dict[str, Any], below: int, also: tuple[int, ...]) -> None:
    """Take in what the caller has settled. Of a settled call nothing is kept, but that it is not in `open`."""
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
        if len(held) <= MAX_OUTCOMES and entry[_ENDED_AT] >= oldest_kept:
            return
        _release(page, number, entry, _DROPPED)


def _release(page: dict[str, Any], number: int, entry: list[Any], status: str) -> None:
    page["held"].pop(number, None)
    entry[_STATUS], entry[_VALUE] = status, None
    _tell(entry)


def _end(
    changed: threading.Condition, page: dict[str, Any], header: Header, entry: list[Any], status: str, value: Any
) -> None:
    _, number, _, _, _, _, _ = header
    with changed:
        entry[_CANCEL] = None
        if entry[_STATUS] == _RUNNING:  # else its caller gave it up meanwhile, and nobody will ask
            entry[_STATUS], entry[_VALUE], entry[_ENDED_AT] = status, value, time.monotonic()
            page["held"][number] = entry
            changed.notify_all()
            _tell(entry)

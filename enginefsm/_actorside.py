"""What runs inside the engine's actor: a call that runs once, however often it is submitted.

These functions are shipped by value to actors whose environment has no enginefsm, so this file imports the standard
library and nothing of enginefsm, and the book that it keeps on the actor is made of plain containers: another
monitor may bring another release of this file.

The book, on the actor instance under `BOOK`:
    run        `run_once`, as the first caller brought it
    changed    a condition around everything below
    callers    {caller: page}, where a caller is one monitor that adopted this actor, and a page is
        below      every call with a lower number is settled: its caller has the outcome and will not ask again
        unseen     those of them that have not come yet: given up on the way, they run once all the same
        seen_at    when the caller was last heard of
        calls      {number: entry} of those not below
        ended      the entries in the order in which they ended, for dropping the oldest
        held       how many of them hold an outcome
An entry is [status, value, ended_at, attempt], the latter the newest attempt that asked for it.
"""

from __future__ import annotations

import collections
import pickle
import threading
import time
import traceback
from typing import Any

Header = tuple[str, int, int, bool, tuple[int, tuple[int, ...]], str, tuple[str, ...]]
"""Caller, number and attempt of the call; whether the actor has answered the caller before; what the caller has
settled; the method, and the names of its keywords."""

BOOK = "_enginefsm_book_1"  # the number is that of the layout above
MAX_OUTCOMES = 1000  # held for one caller; past it the oldest is dropped
MAX_AGE_S = 3600.0  # an outcome not asked for in so long is dropped; a caller so long silent, with no call open, too
RESTARTED = "enginefsm: this actor was restarted, and the earlier process took the call with it"
DROPPED = "enginefsm: the outcome of this call is no longer remembered"

_RUNNING, _RETURNED, _RAISED, _SETTLED, _DROPPED = "running", "returned", "raised", "settled", "dropped"
_STATUS, _VALUE, _ENDED_AT, _ATTEMPT = range(4)


def enter(code: bytes | None, header: Header, actor: Any, *values: Any) -> Any:
    """Run `run_once`, of which `code` is a pickle.

    It is unpickled once an actor, and no longer sent once the actor has answered its caller: an actor that then
    does not have it is a new process.
    """
    book = actor.__dict__.get(BOOK)
    if book:  # else there is none, or the empty copy in a state that the actor restored
        run = book["run"]
    elif code is not None:
        run = pickle.loads(code)  # noqa: S301  as Ray unpickles what it is sent
    else:
        raise RuntimeError(RESTARTED)
    return run(actor, header, *values)


class _Book(dict[str, Any]):
    """Stays behind, locks and outcomes with it, when the actor copies or pickles itself: for a child process, say."""

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()


def run_once(actor: Any, header: Header, *values: Any) -> Any:
    """Run a method of `actor` under its call's number, or give the outcome that it had.

    The last of `values` belong to the header's keywords: they travel by position, since Ray resolves references only
    at the top level, and a keyword of the method must not meet one of ours. A submission that finds the method
    running waits for it; only the newest attempt at a call waits, so that repeated attempts do not fill an actor's
    threads. What a superseded attempt returns reaches nobody.
    """
    caller, number, attempt, answered, settled, method, keywords = header
    book = actor.__dict__.setdefault(BOOK, _Book())
    book.setdefault("run", run_once)
    callers, changed = book.setdefault("callers", {}), book.setdefault("changed", threading.Condition())
    with changed:
        page = _page(callers, caller, settled[0], came_before=answered or attempt > 0)
        _settle(page, *settled)
        changed.notify_all()  # whoever waits for a call that was given up may go
        _drop_oldest(page)
        entry = page["calls"].get(number)
        runs_it = entry is None
        if entry is None:
            given_up = number in page["unseen"]
            page["unseen"].discard(number)
            if number < page["below"] and not given_up:
                return None  # a late duplicate of a settled call
            entry = [_SETTLED if given_up else _RUNNING, None, 0.0, attempt]
            if number >= page["below"]:
                page["calls"][number] = entry
        else:
            entry[_ATTEMPT] = max(attempt, entry[_ATTEMPT])
            changed.notify_all()
            while entry[_STATUS] == _RUNNING and entry[_ATTEMPT] == attempt:
                changed.wait()
            if entry[_ATTEMPT] != attempt:
                return None
        status, value = entry[_STATUS], entry[_VALUE]
    if runs_it:
        split = len(values) - len(keywords)
        try:
            value = getattr(actor, method)(*values[:split], **dict(zip(keywords, values[split:], strict=True)))
        except BaseException as error:
            _forget_locals(error)
            _end(changed, page, entry, _RAISED, (error, error.__traceback__))
            raise
        _end(changed, page, entry, _RETURNED, value)
        return value
    if status == _RAISED:
        raised, trace = value
        raise raised.with_traceback(trace)  # which would grow with every time it is raised
    if status == _DROPPED:
        raise RuntimeError(DROPPED)
    return value


def _forget_locals(error: BaseException) -> None:
    """A remembered exception must not keep alive what the method had in its variables, tensors included."""
    chain: dict[int, BaseException] = {}
    found: list[BaseException | None] = [error]
    while found:
        one = found.pop()
        if one is not None and id(one) not in chain:
            chain[id(one)] = one
            traceback.clear_frames(one.__traceback__)
            found += [one.__cause__, one.__context__]
            found += one.exceptions if isinstance(one, BaseExceptionGroup) else ()


def _page(callers: dict[str, Any], caller: str, below: int, came_before: bool) -> dict[str, Any]:
    now = time.monotonic()
    if caller not in callers:
        # Whoever has come to this actor before is in its book, unless the process is a new one.
        if came_before and _was_restarted():
            raise RuntimeError(RESTARTED)
        for name, page in list(callers.items()):
            _drop_oldest(page)
            # Forgetting a call that may be asked for again would run it again.
            is_open = any(entry[_STATUS] != _SETTLED for entry in page["calls"].values())
            if not is_open and now - page["seen_at"] >= MAX_AGE_S:
                del callers[name]
        callers[caller] = {
            "below": max(0, below - MAX_OUTCOMES),  # no more than so many are taken for unseen
            "unseen": set(), "seen_at": now, "calls": {}, "ended": collections.deque(), "held": 0,
        }  # fmt: skip
    callers[caller]["seen_at"] = now
    return callers[caller]  # type: ignore[no-any-return]


def _was_restarted() -> bool:
    import ray

    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _settle(page: dict[str, Any], below: int, also: tuple[int, ...]) -> None:
    calls, unseen = page["calls"], page["unseen"]
    for number in range(page["below"], below):
        if number in calls:
            _release(page, calls.pop(number), _SETTLED)
        else:
            unseen.add(number)
    page["below"] = max(page["below"], below)
    for number in also:
        if number in calls:
            # The number stays, so that a late duplicate does not run the method again; what it returned goes.
            _release(page, calls[number], _SETTLED)
        elif number >= page["below"]:
            unseen.add(number)


def _drop_oldest(page: dict[str, Any]) -> None:
    ended, oldest_kept = page["ended"], time.monotonic() - MAX_AGE_S
    while ended:
        holds = ended[0][_STATUS] in (_RETURNED, _RAISED)
        if holds and page["held"] <= MAX_OUTCOMES and ended[0][_ENDED_AT] >= oldest_kept:
            return
        entry = ended.popleft()
        if holds:
            _release(page, entry, _DROPPED)


def _release(page: dict[str, Any], entry: list[Any], status: str) -> None:
    if entry[_STATUS] in (_RETURNED, _RAISED):
        page["held"] -= 1
    entry[_STATUS], entry[_VALUE] = status, None


def _end(changed: threading.Condition, page: dict[str, Any], entry: list[Any], status: str, value: Any) -> None:
    with changed:
        if entry[_STATUS] == _RUNNING:  # else its caller gave it up meanwhile, and nobody will ask
            entry[_STATUS], entry[_VALUE], entry[_ENDED_AT] = status, value, time.monotonic()
            page["ended"].append(entry)
            page["held"] += 1
            changed.notify_all()

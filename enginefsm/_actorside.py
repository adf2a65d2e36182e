"""What runs inside the engine's actor: a call that runs once, however often it is submitted.

These functions are shipped by value to actors whose environment has no enginefsm, so this file imports the standard
library and nothing of enginefsm, and the book that it keeps on the actor is made of plain containers: another
monitor may bring another release of this file.

The book, on the actor instance under `BOOK`:
    changed    a condition around everything below
    callers    {caller: page}, where a caller is one monitor that adopted this actor, and a page is
        below      every call with a lower number is settled: its caller has the outcome and will not ask again
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

Header = tuple[str, int, int, tuple[int, tuple[int, ...]], str, tuple[str, ...]]
"""Caller, number and attempt of the call; what the caller has settled; the method, and the names of its keywords."""

BOOK = "_enginefsm_book_1"  # the number is that of the layout above
RUN = "_enginefsm_run_1"
MAX_OUTCOMES = 1000  # held for one caller; past it the oldest is dropped
MAX_AGE_S = 3600.0  # an outcome not asked for in so long is dropped; a caller silent for so long is forgotten
RESTARTED = "enginefsm: this actor was restarted, and the earlier process took the call with it"
DROPPED = "enginefsm: the outcome of this call is no longer remembered"

_RUNNING, _RETURNED, _RAISED, _SETTLED, _DROPPED = "running", "returned", "raised", "settled", "dropped"
_STATUS, _VALUE, _ENDED_AT, _ATTEMPT = range(4)


def enter(code: bytes | None, header: Header, actor: Any, *values: Any) -> Any:
    """Run `run_once`, of which `code` is a pickle.

    It is unpickled once an actor, and no longer sent once the actor has answered its caller: an actor that then
    does not have it is a new process.
    """
    run = actor.__dict__.get(RUN)
    if run is None:
        if code is None:
            raise RuntimeError(RESTARTED)
        run = actor.__dict__[RUN] = pickle.loads(code)  # noqa: S301  as Ray unpickles what it is sent
    return run(actor, header, *values)


def run_once(actor: Any, header: Header, *values: Any) -> Any:
    """Run a method of `actor` under its call's number, or give the outcome that it had.

    The last of `values` belong to the header's keywords: they travel by position, since Ray resolves references only
    at the top level, and a keyword of the method must not meet one of ours. A submission that finds the method
    running waits for it; only the newest attempt at a call waits, so that repeated attempts do not fill an actor's
    threads. What a superseded attempt returns reaches nobody.
    """
    caller, number, attempt, settled, method, keywords = header
    book = actor.__dict__.setdefault(BOOK, {"changed": threading.Condition(), "callers": {}})
    changed = book["changed"]
    with changed:
        page = _page(book["callers"], caller, knows_actor=attempt > 0 or settled != (0, ()))
        _settle(page, *settled)
        _drop_oldest(page)
        if number < page["below"]:
            return None  # a late duplicate of a settled call
        entry = page["calls"].get(number)
        if entry is None:
            entry = page["calls"][number] = [_RUNNING, None, 0.0, attempt]
            runs_it = True
        else:
            runs_it = False
            entry[_ATTEMPT] = max(attempt, entry[_ATTEMPT])
            changed.notify_all()
            while entry[_STATUS] == _RUNNING and entry[_ATTEMPT] == attempt:
                changed.wait()
            if entry[_ATTEMPT] != attempt:
                return None
    if runs_it:
        split = len(values) - len(keywords)
        try:
            value = getattr(actor, method)(*values[:split], **dict(zip(keywords, values[split:], strict=True)))
        except BaseException as error:
            # A remembered exception must not keep alive what the method had in its variables, tensors included.
            traceback.clear_frames(error.__traceback__)
            _end(changed, page, entry, _RAISED, (error, error.__traceback__))
            raise
        _end(changed, page, entry, _RETURNED, value)
        return value
    if entry[_STATUS] == _RAISED:
        raised, trace = entry[_VALUE]
        raise raised.with_traceback(trace)  # which would grow with every time it is raised
    if entry[_STATUS] == _DROPPED:
        raise RuntimeError(DROPPED)
    return entry[_VALUE]


def _page(callers: dict[str, Any], caller: str, knows_actor: bool) -> dict[str, Any]:
    now = time.monotonic()
    if caller not in callers:
        # Whoever has dealt with this actor before is in its book, unless the process is a new one.
        if knows_actor and _was_restarted():
            raise RuntimeError(RESTARTED)
        for name, page in list(callers.items()):
            running = any(entry[_STATUS] == _RUNNING for entry in page["calls"].values())
            if not running and now - page["seen_at"] >= MAX_AGE_S:
                del callers[name]
        callers[caller] = {"below": 0, "seen_at": now, "calls": {}, "ended": collections.deque(), "held": 0}
    callers[caller]["seen_at"] = now
    return callers[caller]  # type: ignore[no-any-return]


def _was_restarted() -> bool:
    import ray

    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _settle(page: dict[str, Any], below: int, also: tuple[int, ...]) -> None:
    calls = page["calls"]
    for number in range(page["below"], below):
        if number in calls:
            _release(page, calls.pop(number), _SETTLED)
    page["below"] = max(page["below"], below)
    for number in also:
        if number >= page["below"]:
            # The number stays, so that a late duplicate does not run the method again; what it returned goes.
            _release(page, calls.setdefault(number, [_SETTLED, None, 0.0, 0]), _SETTLED)


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

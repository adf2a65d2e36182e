"""The wait of a thread, which stands still meanwhile: behind `EngineMonitor.get`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray import ObjectRef

from enginefsm._calls.calls import Awaited
from enginefsm._wait.arrivals import Raised
from enginefsm._wait.wait import Wait

TOGETHER_S = 2e-5  # a reference
MOST_TOGETHER_S = 0.05
LOOK_S = 1.0  # how long a wait goes on before it looks whether another thread has given an engine up


def wait_blocking(
    wait: Wait, awaited: Iterable[Awaited], timeout_s: float | None, deliver: Callable[[], None]
) -> dict[Awaited, Any]:
    """Wait for all of `awaited`, and give their values. Calls `deliver` whenever engines may have moved."""
    give_up_at = None if timeout_s is None else time.monotonic() + timeout_s
    busy = True  # whether the last look found something
    try:
        for one in awaited:
            wait.take_up(one)
        while wait.open:
            failure = wait.session_ended() or wait.given_up()
            if failure is None:
                wait.resubmit_due()
                found = ready(wait, give_up_at, busy=busy)
                busy = bool(found)
                failure = _take_all(wait, found)
                del found
            is_over = give_up_at is not None and time.monotonic() >= give_up_at
            if failure is None and wait.open and (is_over or wait.is_late()):
                failure = _take_all(wait, complete(wait))
            if failure is None and wait.is_late():
                failure = wait.launch_deadline()
            deliver()
            if failure is None and wait.open and is_over:
                assert timeout_s is not None
                failure = wait.timed_out(timeout_s)
            if failure is not None:
                try:
                    raise failure
                finally:
                    failure = None  # else the exception, by its traceback, keeps all of this alive
        return wait.values
    finally:
        wait.leave()


def _take_all(wait: Wait, found: list[tuple[ObjectRef[Any], Any]]) -> Exception | None:
    failures = [wait.take(ref, outcome) for ref, outcome in found]
    return next((failure for failure in failures if failure is not None), None)


def together_s(references: int) -> float:
    """How long to look at so many references together, when some have come in.

    A look at many costs about a microsecond each: those that come in soon after one another are looked at together. A
    failure waits no longer than `MOST_TOGETHER_S` for that.
    """
    return min(references * TOGETHER_S, MOST_TOGETHER_S)


def ready(wait: Wait, give_up_at: float | None, *, busy: bool) -> list[tuple[ObjectRef[Any], Any]]:
    """References that have an outcome, with it: a value, or an exception in a `Raised`."""
    wake_at = wait.wake_at() if give_up_at is None else min(wait.wake_at(), give_up_at)
    pause_s = min(LOOK_S, max(0.0, wake_at - time.monotonic()))
    if not wait.watched:
        time.sleep(pause_s)
        return []
    refs = list(wait.watched)
    found = ray.wait(refs, num_returns=len(refs), timeout=together_s(len(refs)))[0] if busy else []
    if not found:
        found = ray.wait(refs, num_returns=1, timeout=pause_s)[0]
    try:
        return list(zip(found, ray.get(found), strict=True)) if found else []
    except Exception:  # noqa: BLE001  one of them failed: which, is asked of each
        return [(ref, _outcome(ref)) for ref in found]


def complete(wait: Wait) -> list[tuple[ObjectRef[Any], Any]]:
    """All that is there when time is up: nothing that has come is to count as late for not having been looked at."""
    return ready(wait, time.monotonic(), busy=True)


def _outcome(ref: ObjectRef[Any]) -> Any:
    try:
        return ray.get(ref)
    except Exception as exception:  # noqa: BLE001  whatever the reference holds is the outcome; classify() sorts it
        return Raised(exception)

"""The driver of a wait in a thread, for `EngineMonitor.get`. The thread is blocked meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import ray
from ray import ObjectRef

from enginefsm._calls.calls import Awaited
from enginefsm._wait.wait import Raise, Raised, Sleep, Step, Submit, Wait, submit

TOGETHER_S = 2e-5  # for each reference
MOST_TOGETHER_S = 0.05
LOOK_S = 1.0
"""How long a thread sleeps at most. Nothing wakes it if another thread gives an engine up or Ray is shut down."""

# A text, because the ObjectRef of Ray 2.47 takes no subscript at run time.
Outcomes: TypeAlias = "list[tuple[ObjectRef[Any], Any]]"


def wait_blocking(
    wait: Wait, awaited: Iterable[Awaited], deliver: Callable[[], None], ask_stages: Callable[[], None]
) -> dict[Awaited, Any]:
    """Wait for all of `awaited`, and return their values. This calls `deliver` before each sleep."""
    busy = True  # whether the last look found something
    try:
        for one in awaited:
            wait.take_up(one)
        while True:
            now = time.monotonic()
            match wait.next(now):
                case Sleep(until):
                    deliver()
                    found = ready(list(wait.watched), min(until, now + LOOK_S), busy=busy)
                    busy = bool(found)
                    _take(wait, found)
                    del found
                case Submit(calls):
                    wait.submitted(submit(calls, now))
                case Step.LOOK_AT_ALL:
                    _take(wait, complete(wait.watched))
                    wait.looked_at_all(now)
                case Step.ASK_STAGES:
                    ask_stages()
                    wait.asked_stages(now)
                case Raise(failure):
                    try:
                        raise failure
                    finally:
                        del failure  # else the exception's traceback keeps this frame alive
                case Step.DONE:
                    return wait.values
    finally:
        wait.leave()


def _take(wait: Wait, outcomes: Outcomes) -> None:
    now = time.monotonic()
    for ref, outcome in outcomes:
        wait.take(ref, outcome, now)


def together_s(references: int) -> float:
    """Return how long to wait for more outcomes once some have come.

    A look costs about a microsecond for each reference, so one look takes in many outcomes that come in quick
    succession. No failure waits longer than `MOST_TOGETHER_S` for that.
    """
    return min(references * TOGETHER_S, MOST_TOGETHER_S)


def ready(refs: list[ObjectRef[Any]], until: float, *, busy: bool) -> Outcomes:
    """Return the references that have an outcome, each with its outcome: a value, or an exception in a `Raised`.

    If `busy`, wait for all of them for `together_s` at most. If none came, wait for one until `until` (monotonic).
    """
    pause_s = max(0.0, until - time.monotonic())
    if not refs:
        time.sleep(pause_s)
        return []
    found = ray.wait(refs, num_returns=len(refs), timeout=together_s(len(refs)))[0] if busy else []
    if not found:
        found = ray.wait(refs, num_returns=1, timeout=pause_s)[0]
    try:
        return list(zip(found, ray.get(found), strict=True)) if found else []
    except Exception:  # noqa: BLE001  at least one of them failed, so each is read alone
        return [(ref, _outcome(ref)) for ref in found]


def complete(refs: Iterable[ObjectRef[Any]]) -> Outcomes:
    """Return every reference that has an outcome by now, each with its outcome."""
    return ready(list(refs), -float("inf"), busy=True)


def _outcome(ref: ObjectRef[Any]) -> Any:
    try:
        return ray.get(ref)
    except Exception as exception:  # noqa: BLE001  the exception is the reference's outcome, and classify() sorts it
        return Raised(exception)

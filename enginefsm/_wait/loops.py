"""The driver of a wait on an event loop, for `EngineMonitor.gather` and `await call`. The loop goes on meanwhile.

The driver never blocks the loop. Outcomes come from Ray's own threads. A lane does the work that may take long. The
driver does the rest on the loop in small pieces. All waits together use a few milliseconds of one turn of the loop.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from ray import ObjectRef

from enginefsm._calls.calls import Awaited
from enginefsm._wait.arrivals import forget, tell
from enginefsm._wait.lane import Lane
from enginefsm._wait.threads import complete, together_s
from enginefsm._wait.wait import Raise, Sleep, Step, Submit, Wait, submit

TURN_S = 0.003
"""How many seconds of one turn of a loop all its waits use together."""
QUEUED_A_TURN = 8
"""How many pieces of work that had to wait for a turn are done in it."""
TOGETHER_FROM = 100
LOOK_S = 5.0
"""How many seconds a task sleeps at most. Nothing wakes it if Ray is shut down.

An engine that is given up wakes the task. So this is longer than for a thread, and one loop may have thousands of tasks
asleep.
"""


class Pace:
    """Spreads the pieces of work of all waits over the turns of one event loop."""

    def __init__(self) -> None:
        self._began: float | None = None  # when the first work of this turn began (monotonic)
        self._queue: collections.deque[asyncio.Future[None]] = collections.deque()

    async def __call__(self) -> None:
        """Wait for another turn if the time of this turn is used up."""
        now = time.monotonic()
        loop = asyncio.get_running_loop()
        if self._began is None:
            self._began = now
            loop.call_soon(self._next_turn)
        if not self._queue and now - self._began < TURN_S:
            return
        turn = loop.create_future()
        self._queue.append(turn)
        await turn

    def _next_turn(self) -> None:
        self._began = None
        admitted = 0
        while self._queue and admitted < QUEUED_A_TURN:
            turn = self._queue.popleft()
            if not turn.done():  # else its task was cancelled
                turn.set_result(None)
                admitted += 1
        if self._queue:
            self._began = time.monotonic()
            asyncio.get_running_loop().call_soon(self._next_turn)


_paces: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Pace] = weakref.WeakKeyDictionary()


def pace() -> Pace:
    """Return the pace of the running loop."""
    loop = asyncio.get_running_loop()
    known = _paces.get(loop)
    if known is None:
        known = _paces.setdefault(loop, Pace())
    return known


class _Inbox:
    """Holds the outcomes that Ray's threads bring to one task, and wakes the task."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._outcomes: collections.deque[tuple[ObjectRef[Any], Any]] = collections.deque()
        self._again: collections.deque[ObjectRef[Any]] = collections.deque()
        self._is_waking = False
        self._was_woken = False
        self._sleeper: asyncio.Future[None] | None = None

    def came(self, ref: ObjectRef[Any], outcome: Any) -> None:
        self._outcomes.append((ref, outcome))
        self.wake()

    def look_again(self, ref: ObjectRef[Any]) -> None:
        self._again.append(ref)
        self.wake()

    def wake(self) -> None:
        """Wake the task, from any thread."""
        if not self._is_waking:
            self._is_waking = True
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits any more
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_waking = False
        self._was_woken = True
        if self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_result(None)

    async def sleep(self, until: float) -> None:
        """Sleep until somebody wakes the task, or until the time `until` (monotonic)."""
        if not self._was_woken:
            self._sleeper = self._loop.create_future()
            pause_s = until - time.monotonic()
            timer = self._loop.call_later(max(0.0, pause_s), self._wake) if pause_s < float("inf") else None
            try:
                await self._sleeper
            finally:
                self._sleeper = None
                if timer is not None:
                    timer.cancel()
        self._was_woken = False

    def outcomes(self) -> list[tuple[ObjectRef[Any], Any]]:
        """Return the outcomes that have come since the last call."""
        return [self._outcomes.popleft() for _ in range(len(self._outcomes))]

    def again(self) -> list[ObjectRef[Any]]:
        """Return the references to ask for again."""
        return [self._again.popleft() for _ in range(len(self._again))]


async def wait_on_loop(
    wait: Wait,
    awaited: Iterable[Awaited],
    deliver: Callable[[], None],
    ask_stages: Callable[[], None],
    lane: Lane,
) -> dict[Awaited, Any]:
    """Wait for all of `awaited`, and return their values.

    This calls `deliver`, which must not block, before each sleep. `lane` does the work that may block.
    """
    inbox, turn = _Inbox(), pace()
    fresh: collections.deque[ObjectRef[Any]] = collections.deque()
    wait.expect = fresh.append
    try:
        for one in awaited:
            await turn()
            wait.take_up(one)
        for engine in wait.engines:
            engine.when_given_up(inbox.wake)
        while True:
            while fresh:
                await turn()
                tell(inbox, fresh.popleft())
            now = time.monotonic()
            match wait.next(now):
                case Sleep(until) if not fresh:
                    deliver()
                    await inbox.sleep(min(until, now + LOOK_S))
                    await _take_all(wait, inbox, turn)
                case Submit(calls):
                    wait.submitted(await lane.run(functools.partial(submit, calls, now)) or {})
                case Step.LOOK_AT_ALL:  # Ray's threads may not have brought every outcome yet
                    await _take(wait, await lane.run(functools.partial(complete, list(wait.watched))) or [], turn)
                    wait.looked_at_all(now)
                case Step.ASK_STAGES:
                    await lane.run(ask_stages)
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
        for engine in wait.engines:
            engine.forget_waker(inbox.wake)
        for ref in list(wait.watched):
            forget(inbox, ref)


async def _take_all(wait: Wait, inbox: _Inbox, turn: Pace) -> None:
    if len(wait.watched) > TOGETHER_FROM:  # one look then takes in many outcomes that come in quick succession
        await asyncio.sleep(together_s(len(wait.watched)))
    for ref in inbox.again():
        await turn()
        tell(inbox, ref)
    await _take(wait, inbox.outcomes(), turn)


async def _take(wait: Wait, outcomes: Iterable[tuple[ObjectRef[Any], Any]], turn: Pace) -> None:
    for ref, outcome in outcomes:
        await turn()
        wait.take(ref, outcome, time.monotonic())

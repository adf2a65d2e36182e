"""The queue of one engine's calls that are to be submitted again."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator

from enginefsm._calls.calls import Awaited
from enginefsm.fsm.outages import CallOutage, Outage
from enginefsm.policy import RetryPolicy


class Resubmissions:
    """The resting calls of one engine, from all waits. The caller holds the engine's lock.

    All of them are submitted at one moment, so that the actor gets them in the order in which they were made.
    """

    __slots__ = ("_at", "_calls")

    def __init__(self) -> None:
        self._at = 0.0  # the moment, monotonic
        self._calls: dict[weakref.ref[Awaited], None] = {}

    def plan(self, call: Awaited, outage: Outage | None, policy: RetryPolicy, now: float) -> bool:
        """Queue a call that found the engine unavailable. Return False if it is out of bounds."""
        if outage is None:  # another call was answered since, so the engine is available again
            self.put(call, max(now, self._at) if self._some_wait() else now)
            return True
        if call.outage is None or call.outage.outage is not outage:
            call.outage = CallOutage(outage, since=now)
        if call.outage.exhausted(policy, now):
            return False
        if self._at <= now or not self._some_wait():
            self._at = now + outage.next_pause_s(policy)
        self.put(call, call.outage.in_budget(policy, self._at, now))
        call.outage.attempts += 1
        return True

    def put(self, call: Awaited, at: float) -> None:
        """Queue a call for resubmission at `at`."""
        call.rest(at)
        self._calls[weakref.ref(call)] = None

    def due(self, now: float) -> list[Awaited]:
        """Return the calls that a wait waits for and that are due, in the order in which they were made."""
        resting = list(self._resting())
        self._calls = {weakref.ref(call): None for call in resting}
        due = (call for call in resting if call.is_awaited and now >= call.resubmit_at)
        return sorted(due, key=operator.attrgetter("made_at"))

    def _resting(self) -> Iterator[Awaited]:
        """Yield the calls that still rest and that somebody still holds."""
        held = (ref() for ref in self._calls)
        return (call for call in held if call is not None and call.out is None)

    def _some_wait(self) -> bool:
        return any(call.is_awaited for call in self._resting())

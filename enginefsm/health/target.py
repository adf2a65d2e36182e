"""What a health monitor keeps of the actors that it watches, and of the probes that it sends them."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from enginefsm._engine.managed import ManagedEngine
from enginefsm.fsm.outcomes import Outcome
from enginefsm.fsm.verdicts import Failures, ServerAnswer
from enginefsm.health.plain_calls import Method, PlainCall
from enginefsm.health.server_check import ServerCheck


class Phase(NamedTuple):
    """A time in which probes are sent, from `at` on (monotonic); a pause, if that is None."""

    number: int
    at: float | None


class Phases:
    """The phase in which a health monitor is, and whether it has ended. Thread-safe."""

    def __init__(self, first_wait_s: float) -> None:
        self.lock = threading.Lock()
        """Around a change of it, and around a verdict and what that rests on."""
        self.now = Phase(0, time.monotonic() + first_wait_s)
        self.ended = False
        self._first_wait_s = first_wait_s

    def pause(self) -> None:
        """Begin a pause, unless it is one."""
        with self.lock:
            if self.now.at is not None:
                self.now = Phase(self.now.number + 1, None)

    def resume(self) -> None:
        """End a pause, if it is one."""
        with self.lock:
            if self.now.at is None:
                self.now = Phase(self.now.number + 1, time.monotonic() + self._first_wait_s)

    def end(self) -> bool:
        """End for good; says whether that is new."""
        with self.lock:
            is_new, self.ended = not self.ended, True
            return is_new

    def is_current(self, phase: Phase) -> bool:
        """Whether nothing has changed since."""
        return not self.ended and self.now == phase


class TargetGroup:
    """The actors of one engine; `url` is the method that gives the address of the server that they share, if any."""

    def __init__(self, engines: Sequence[ManagedEngine], url: str | None, timeout_s: float) -> None:
        self.members = [Target(engine, self) for engine in engines]
        node_0 = self.members[0]
        self.server_check = None if url is None else ServerCheck(lambda: node_0.engine, url, timeout_s, node_0.wake)

    @property
    def says(self) -> ServerAnswer:
        """What its server says."""
        return ServerAnswer.NOT_ASKED if self.server_check is None else self.server_check.says


class Target:
    """One watched name, and the actor that has it."""

    def __init__(self, engine: ManagedEngine, group: TargetGroup) -> None:
        self.name = engine.name
        self.group = group
        self.engine = engine
        self.failures = Failures()
        self.phase: Phase | None = None
        """The one that its checks have begun."""
        self.outages_ended = 0
        """How many mass outages had ended when its failures began to be counted."""
        self.method: Method | None = None
        self.probe: Probe | None = None
        """The call of it that is out."""
        self.sign_of_life: PlainCall | None = None
        """The call that is out while its launch has not succeeded."""
        self.overdue_at = 0.0
        """When its silence is a failure, or one more."""
        self.reported: ManagedEngine | None = None
        """The incarnation whose end was reported."""
        self._waiter: asyncio.Future[None] | None = None

    @property
    def server_check(self) -> ServerCheck | None:
        """The one that is asked when this actor is checked: that of node 0, whose server it is."""
        return self.group.server_check if self.group.members[0] is self else None

    def take_over(self, engine: ManagedEngine) -> None:
        """Another actor has the name."""
        self.engine, self.failures = engine, Failures()
        self.probe = self.sign_of_life = None

    def forgive_stop(self, stopped_s: float, heard_by: float) -> None:
        """This process was stopped for so long; what came meanwhile will have been heard by `heard_by` (monotonic)."""
        self.failures = self.failures.forgive_stop(stopped_s)
        self.overdue_at = max(self.overdue_at + stopped_s, heard_by)
        if self.probe is not None:
            self.probe.silence_counted = False

    async def sleep_until(self, at: float) -> None:
        """Wait until `at`, or until something happens to it."""
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None if at == math.inf else loop.call_later(max(0.0, at - time.monotonic()), self.wake)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def wake(self) -> None:
        """Something happened to it."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Probe(PlainCall):
    """A call of the method that says whether all is well."""

    def __init__(self, method: Method, phase: Phase, answered: Callable[[], object]) -> None:
        super().__init__(method, answered)
        self.phase = phase
        self.silence_counted = False
        """Whether its silence was counted as a failure."""

    def outcome(self) -> Outcome:
        """What its answer says: something false is a failure of the method."""
        outcome = super().outcome()
        return Outcome.METHOD_FAILED if outcome is Outcome.SUCCEEDED and not self.answer.result() else outcome

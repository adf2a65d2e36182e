"""What a health monitor keeps of the actors that it watches, and the plain calls by which it asks them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from ray.actor import ActorMethod
from ray.exceptions import RayError

from enginefsm import _ray_handles
from enginefsm.engine import MonitoredEngine
from enginefsm.outcomes import Outcome, classify
from enginefsm.serving import Address, Server
from enginefsm.verdicts import FailureCount


class Phase(NamedTuple):
    """A time in which probes are sent, from `at` on (monotonic); a pause, if that is None."""

    number: int
    at: float | None


class Group:
    """The actors of one engine, and what its server says."""

    def __init__(self, engines: Sequence[MonitoredEngine]) -> None:
        self.members = [Watched(engine, self) for engine in engines]
        self.said = Server.UNKNOWN
        self.is_asking = False
        self.wanted = asyncio.Event()
        self.address: Address | None = None
        self.address_of: MonitoredEngine | None = None
        """The engine that the four around this are of."""
        self.url: PlainCall | None = None
        self.has_no_address = False

    def ask(self) -> None:
        """Have the server asked, unless it is being asked."""
        if not self.is_asking:
            self.is_asking = True
            self.wanted.set()

    @property
    def opinion(self) -> Server:
        """What the server said last. That it fails is held against it only until it is asked again."""
        return Server.UNKNOWN if self.is_asking and self.said is Server.FAILS else self.said


class Watched:
    """One watched name, and the actor that has it."""

    def __init__(self, engine: MonitoredEngine, group: Group) -> None:
        self.name = engine.name
        self.group = group
        self.engine = engine
        self.failures = FailureCount()
        self.phase: Phase | None = None
        """The one that its checks have begun."""
        self.ends = (0, 0)
        """How many mass outages and stops had ended when its failures began to be counted."""
        self.method: Method | None = None
        self.probe: PlainCall | None = None
        """The call of it that is out."""
        self.overdue_at = 0.0
        """When its silence is a failure, or one more."""
        self.attempts = 0
        """How many probes in a row found it unavailable."""
        self.reported: MonitoredEngine | None = None
        """The incarnation whose end was reported."""
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_node_0(self) -> bool:
        """Whether the server is its own."""
        return self.group.members[0] is self

    def succeed(self, engine: MonitoredEngine) -> None:
        """Another actor has the name."""
        self.engine, self.failures, self.probe, self.attempts = engine, FailureCount(), None, 0

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


class Method:
    """A method of one actor, to be called plainly, and time and again."""

    def __init__(self, engine: MonitoredEngine, method: str, timeout_s: float) -> None:
        self.engine = engine
        # An asyncio actor answers though a call is out.
        self.waits_its_turn = not _ray_handles.is_asyncio(engine.handle)
        bound: ActorMethod = getattr(engine.handle, method)
        signature = _ray_handles.signature(bound)
        takes = () if signature is None else signature.parameters
        self._timeout = {name: timeout_s for name in ("timeout", "timeout_s") if name in takes}
        # A retry of Ray's own would hide that the actor is unavailable.
        self._bound = bound.options(max_task_retries=0, retry_exceptions=False)

    def call(self) -> Future[Any]:
        """Call the method; its answer arrives by itself. What Ray says when it refuses the call is an answer."""
        try:
            answer: Future[Any] = self._bound.remote(**self._timeout).future()
        except RayError as error:
            answer = Future()
            answer.set_exception(error)
        return answer


class PlainCall:
    """One call of a method, and its answer to come."""

    def __init__(self, method: Method, phase: Phase, answered: Callable[[], object]) -> None:
        self.phase = phase
        self.counted = False
        """Whether its silence was counted as a failure."""
        self._method = method
        self.sent_at = time.monotonic()
        self.answer = method.call()
        # Counted afterwards: one that another thread made meanwhile may have got before it.
        self._calls_before = method.engine.ledger.calls
        self.answer.add_done_callback(lambda _: answered())

    def is_behind_a_call(self) -> bool:
        """Whether a call of this monitor's that was made before it is out, and may keep the actor from answering."""
        method = self._method
        return method.waits_its_turn and method.engine.ledger.is_open(below=self._calls_before)


def outcome_of(probe: PlainCall, engine: MonitoredEngine) -> Outcome:
    """What a probe that was answered says of the engine: something false is a failure of the method."""
    failure = probe.answer.exception()
    if failure is not None:
        return what_it_says(failure, engine)
    return Outcome.SUCCEEDED if probe.answer.result() else Outcome.METHOD_FAILED


def what_it_says(failure: BaseException, engine: MonitoredEngine) -> Outcome:
    """What an exception instead of an answer says of the engine; nothing, if it is not an `Exception`."""
    return classify(failure, engine.actor_id) if isinstance(failure, Exception) else Outcome.CALL_LOST

"""Plain calls of actors' methods, as a health monitor makes them: they need not run once, and answer by themselves."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ray.actor import ActorMethod
from ray.exceptions import RayError

from enginefsm._engine.managed import ManagedEngine
from enginefsm._ray import handles as _ray_handles
from enginefsm.fsm.outcomes import Outcome, classify


class Method:
    """A method of one actor, to be called plainly, and time and again."""

    def __init__(self, engine: ManagedEngine, method: str, timeout_s: float) -> None:
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
    """One call of a method, and its answer to come; `answered` is called, on a thread of Ray's, when it has come."""

    def __init__(self, method: Method, answered: Callable[[], object] = lambda: None) -> None:
        self._method = method
        self.sent_at = time.monotonic()
        self.answer = method.call()
        # Counted afterwards: one that another thread made meanwhile may have got before it.
        self._calls_before = method.engine.ledger.calls
        self.answer.add_done_callback(lambda _: answered())

    def is_behind_a_call(self) -> bool:
        """Whether a call of this monitor's that was made before it is out, and may keep the actor from answering."""
        method = self._method
        return method.waits_its_turn and method.engine.ledger.is_out(below=self._calls_before)

    def outcome(self) -> Outcome:
        """What its answer says of the actor. An exception that is not an `Exception` says nothing."""
        failure = self.answer.exception()
        if failure is None:
            return Outcome.SUCCEEDED
        return classify(failure, self._method.engine.actor_id) if isinstance(failure, Exception) else Outcome.CALL_LOST

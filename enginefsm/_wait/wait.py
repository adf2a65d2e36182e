"""One wait for calls. It takes in the outcomes that Ray gives, and says what to do next.

`Wait` neither sleeps nor calls Ray. A driver asks `next` what to do, does it, and reports the result. The driver of
`EngineMonitor.get` is `threads`, and the driver of `EngineMonitor.gather` is `loops`.

1. The driver passes each call to `take_up`. `watched` holds the references that are out.
2. The driver does what `next` says, and passes outcomes to `take`, until `next` returns `Step.DONE` or a `Raise`.
3. The driver calls `leave`, however the wait ended. Calls and engines keep the state that outlives a wait.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

from ray import ObjectRef
from ray.exceptions import RayError

from enginefsm._calls.calls import Awaited, says_dropped, says_restarted
from enginefsm._calls.plain_ref import PlainRef
from enginefsm._engine.managed import ManagedEngine, engine_of
from enginefsm._ray import this_process
from enginefsm._wait import failures
from enginefsm.events import CallOutcome, Event
from enginefsm.fsm.outcomes import Outcome, classify, detail_of
from enginefsm.fsm.states import GIVEN_UP, EngineState, Reason
from enginefsm.policy import RetryPolicy


class Raised(NamedTuple):
    """An exception that a reference raises. A reference may also return an exception as its value."""

    exception: Exception


class Submit(NamedTuple):
    """Submit these calls again with `submit`, and report the result to `submitted`."""

    calls: Sequence[Awaited]


class Sleep(NamedTuple):
    """Sleep until `until` (monotonic) or until a watched reference has its outcome."""

    until: float


class Raise(NamedTuple):
    """Raise this exception."""

    failure: Exception


class Step(Enum):
    """A next step that needs no data."""

    LOOK_AT_ALL = auto()
    """A bound has passed. Take in every outcome that is there, then call `looked_at_all`.

    Without this, a call could count as late only because nobody had looked at its outcome."""
    ASK_STAGES = auto()
    """Ask Ray how far launches are, then call `asked_stages`. An exception's message will tell the stages."""
    DONE = auto()
    """All calls have ended. `values` holds their values."""


class Wait:
    """Decides what follows from outcomes. It tells engines of outcomes, ends calls, and has the first failure raised.

    One driver uses it at a time. Times are monotonic, and the driver reads the clock.

    Args:
        policy: The bounds.
        fleet: Returns all engines of the monitor, for the message of a launch deadline.
        emit: Takes events. It must not block.
        timeout_s: How many seconds the wait may take. None sets no limit.
        now: When the wait begins.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        fleet: Callable[[], Iterable[ManagedEngine]],
        emit: Callable[[Event], None],
        timeout_s: float | None,
        now: float,
    ) -> None:
        self._policy = policy
        self._fleet = fleet
        self._emit = emit
        self._timeout_s = timeout_s
        self._give_up_at = math.inf if timeout_s is None else now + timeout_s
        self.values: dict[Awaited, Any] = {}
        """The values of the calls that have ended."""
        self.open: dict[Awaited, ManagedEngine] = {}
        """The calls that have not ended, and their engines."""
        self.engines: set[ManagedEngine] = set()
        """The engines of all calls."""
        self.watched: dict[ObjectRef[Any], list[Awaited]] = {}
        """The references that are out, with the calls that each belongs to."""
        self.expect: Callable[[ObjectRef[Any]], None] = lambda _: None
        """Called with each reference that the wait begins to watch."""
        self._resting: dict[Awaited, None] = {}  # this wait's; their engines' queues say when they are submitted
        self._failure: Exception | None = None
        self._looked_at = self._asked_at = -math.inf  # when it looked at all, and asked for stages
        self._session = this_process.session()

    def take_up(self, one: Awaited) -> None:
        """Wait for one more call."""
        if one in self.open or one in self.values:
            return
        one.take_up()
        engine = self.open[one] = engine_of(one)
        self.engines.add(engine)
        if isinstance(one, PlainRef) and one.recovered:
            self._close(one, one.recovered[0])
        else:
            self._watch(one)

    def leave(self) -> None:
        """End the wait, even if calls have not ended."""
        for one in self.open:
            one.leave()

    def next(self, now: float) -> Submit | Sleep | Raise | Step:
        """Return what to do next."""
        for one in [one for one in self._resting if one.out is not None]:  # another wait has submitted it
            del self._resting[one]
            self._watch(one)
        failure = self._failure
        if failure is None and self.open:
            failure = self._session_ended() or self._given_up()
        if failure is not None:
            self._failure = None  # else the exception's traceback and this object keep each other alive
            return Raise(failure)
        if not self.open:
            return Step.DONE
        if any(one.resubmit_at <= now for one in self._resting):
            # Calls of other waits on the same engines go out too, so that the calls keep their order.
            return Submit([call for engine in dict.fromkeys(map(engine_of, self._resting)) for call in engine.due(now)])
        return self._check_bounds(now)

    def _check_bounds(self, now: float) -> Sleep | Raise | Step:
        deadlines = self._launch_deadlines()
        passed = max((bound for bound in (self._give_up_at, *deadlines.values()) if bound <= now), default=None)
        if passed is not None:
            if self._looked_at < passed:
                return Step.LOOK_AT_ALL
            late = [engine for engine, deadline in deadlines.items() if deadline <= now]
            is_over = self._give_up_at <= now
            told = late or [engine for engine in self.open.values() if engine.state is EngineState.LAUNCHING]
            if told and self._asked_at < passed:
                return Step.ASK_STAGES
            failure = self._launch_deadline(late) if late else None
            if failure is None and is_over:
                assert self._timeout_s is not None
                failure = failures.timed_out(self.open, len(self.values), self._timeout_s)
            if failure is not None:
                return Raise(failure)
        upcoming = (bound for bound in (self._give_up_at, *self._launch_deadlines().values()) if bound > now)
        return Sleep(min([*upcoming, *(one.resubmit_at for one in self._resting)], default=math.inf))

    def looked_at_all(self, began_at: float) -> None:
        """Note that the wait has taken in every outcome that was there at `began_at`."""
        self._looked_at = began_at

    def asked_stages(self, began_at: float) -> None:
        """Note that Ray was asked for the stages of launches at `began_at`."""
        self._asked_at = began_at

    def submitted(self, refused: Mapping[Awaited, Exception]) -> None:
        """Take in which calls Ray refused to submit. The next call of `next` watches those that went out."""
        for one, error in refused.items():
            # If the call is another wait's, that wait also submits it, and raises the exception.
            if one in self.open and self._failure is None:
                self._failure = failures.noted(one, error) if isinstance(error, RayError) else error

    def take(self, ref: ObjectRef[Any], outcome: Any, now: float) -> None:
        """Take in the outcome of a watched reference: a value, or an exception in a `Raised`.

        A repeated outcome changes nothing.
        """
        for one in self.watched.pop(ref, ()):
            with one.lock:
                if one.out != ref:
                    self._watch(one)  # another wait has dealt with this failure
                    continue
                if isinstance(outcome, Raised):
                    failure = self._failed(one, outcome.exception, now)
                else:
                    failure = self._answered(one, outcome, now)
                self._failure = self._failure or failure

    def _watch(self, one: Awaited) -> None:
        ref = one.out
        if ref is None:
            self._resting[one] = None
        elif ref in self.watched:
            self.watched[ref].append(one)
        else:
            self.watched[ref] = [one]
            self.expect(ref)

    def _answered(self, one: Awaited, value: Any, now: float) -> Exception | None:
        if isinstance(one, PlainRef) and one.is_probe:
            if not value:
                self._not_launched_yet(one, now)
                return None
            one.recover(value)
        self._observe(one, Outcome.SUCCEEDED, f"{one.method}() returned", now)
        self._close(one, value)
        return None

    def _failed(self, one: Awaited, exception: Exception, now: float) -> Exception | None:
        engine = self.open[one]
        outcome = classify(exception, engine.actor_id)
        if says_restarted(exception):
            exception, outcome = failures.restarted(one, exception), Outcome.ACTOR_DIED
        elif says_dropped(exception):
            outcome = Outcome.CALL_LOST
        if one.is_probe and outcome is Outcome.METHOD_FAILED:
            self._not_launched_yet(one, now)
            return None
        self._observe(one, outcome, f"{one.method}() raised {detail_of(exception)}", now)
        if outcome is Outcome.ACTOR_UNAVAILABLE:
            if isinstance(one, PlainRef) and not one.is_probe:
                engine.lose(one)
                if not one.can_be_probed:
                    return failures.noted(one, exception, failures.SEALED)
            if engine.state is not EngineState.DEAD and engine.plan_resubmission(one, self._policy, now):
                self._resting[one] = None
                return None
            exhausted = failures.exhausted(one, exception, self._policy)
            engine.step(Reason.RETRY_EXHAUSTED, exhausted.error_msg)
            if engine.reason in (Reason.RETRY_EXHAUSTED, Reason.HEALTH_CHECKS_FAILED):
                exception = exhausted
        one.settle(answered=False)
        return failures.noted(one, exception)

    def _not_launched_yet(self, one: Awaited, now: float) -> None:
        """Take in a check that says that the launch has not ended.

        The launch deadline bounds these checks. The budget does not.
        """
        self._observe(one, Outcome.SUCCEEDED, "the launch has not ended", now, launches=False)
        one.settle(answered=True)
        self.open[one].ask_again(one, now + self._policy.pause_s(one.attempt))
        self._resting[one] = None

    def _observe(self, one: Awaited, outcome: Outcome, detail: str, now: float, launches: bool | None = None) -> None:
        if one.attempt == one.reported:
            return  # an earlier wait or another thread took this outcome in already
        one.reported = one.attempt
        engine = self.open[one]
        engine.observe(
            outcome,
            launches=one.launches if launches is None else launches,
            submitted_at=one.submitted_at,
            again=one.attempt > 0,
            detail=detail,
            now=now,
        )
        took_s = now - max(one.submitted_at, one.made_at)
        self._emit(
            CallOutcome(
                engine.name, engine.labels, one.method, outcome, one.attempt, took_s, one.is_probe,
                engine.incarnation, time.time(),
            )
        )  # fmt: skip

    def _close(self, one: Awaited, value: Any) -> None:
        self.values[one] = value
        del self.open[one]
        one.settle(answered=True)

    def _session_ended(self) -> Exception | None:
        """Return the exception for a shutdown of Ray, if Ray was shut down.

        Ray reports nothing about the calls that were out, and another call would start Ray again.
        """
        return None if this_process.session() is self._session else failures.session_ended(next(iter(self.open)))

    def _given_up(self) -> Exception | None:
        """Return the exception for an engine that some thread gave up after one of the open calls was made."""
        engines = {engine for engine in self.engines if engine.reason in GIVEN_UP}
        for one, engine in self.open.items() if engines else ():
            if engine in engines and one.made_at <= engine.given_up_at():
                return failures.given_up(one)
        return None

    def _launch_deadlines(self) -> dict[ManagedEngine, float]:
        """Return the engines whose launch is awaited here and has not succeeded, each with its deadline."""
        after_s = self._policy.launch_deadline_s
        if after_s is None:
            return {}
        launching = (engine for one, engine in self.open.items() if one.launches and not engine.has_launched)
        return {engine: engine.adopted_at + after_s for engine in launching}

    def _launch_deadline(self, late: Iterable[ManagedEngine]) -> Exception | None:
        """Give up engines whose launch is late, and return the exception. Return None if all of them have launched."""
        detail = f"launch_deadline_s={self._policy.launch_deadline_s:g} has passed"
        for engine in late:
            engine.give_up_launch(detail)
        late = [engine for engine in late if not engine.has_launched]  # another thread may have taken in the launch
        if not late:
            return None
        others = [engine for engine in self._fleet() if engine.is_launching]
        return failures.launch_deadline(detail, late, others)


def submit(calls: Iterable[Awaited], now: float) -> dict[Awaited, Exception]:
    """Submit calls again, and return those that Ray refused. This calls Ray, so event loops run it on a thread."""
    refused: dict[Awaited, Exception] = {}
    for one in calls:
        try:
            one.resubmit(now)
        except Exception as error:  # noqa: BLE001  the wait that the call belongs to raises it
            refused[one] = error
    return refused

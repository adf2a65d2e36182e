"""What follows from what Ray says of calls: each failure to its engine, each call to its end, the first failure raised.

Nothing here waits. `blocking` and `looping` do, the one for `EngineMonitor.get`, the other for `EngineMonitor.gather`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from ray import ObjectRef
from ray.exceptions import GetTimeoutError, RayError, RaySystemError

from enginefsm._calls.calls import Awaited, PlainRef, says_dropped, says_restarted
from enginefsm._engine.managed import ManagedEngine
from enginefsm._ray import this_process
from enginefsm._wait.arrivals import Raised
from enginefsm.errors import ActorRestartedError, LaunchDeadlineError, RetryExhaustedError
from enginefsm.events import CallOutcome, Event
from enginefsm.fsm.outcomes import Outcome, classify, detail_of
from enginefsm.fsm.states import GIVEN_UP, EngineState, Reason
from enginefsm.policy import RetryPolicy


class Wait:
    """One `get` or `gather`. What must outlive it, and an interrupt or a timeout, is kept by the calls and engines.

    Args:
        policy: The bounds.
        fleet: Gives all engines, for the message of a launch deadline.
        emit: Takes events.
        look: Looks how far launches are, before it is told; within a short bound.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        fleet: Callable[[], Iterable[ManagedEngine]],
        emit: Callable[[Event], None],
        look: Callable[[], None],
    ) -> None:
        self._policy = policy
        self._fleet = fleet
        self._emit = emit
        self._look = look
        self.expect: Callable[[ObjectRef[Any]], None] = lambda _: None
        """Told of each reference that is watched from now on."""
        self.values: dict[Awaited, Any] = {}
        """Of what has ended."""
        self.open: dict[Awaited, None] = {}
        """What has not."""
        self.engines: set[ManagedEngine] = set()
        """Of all that is waited for."""
        self.watched: dict[ObjectRef[Any], list[Awaited]] = {}
        """The references that are out, and whose they are."""
        self._resting: list[Awaited] = []
        self._session = this_process.session()

    def take_up(self, one: Awaited) -> None:
        """Wait for `one`, too."""
        if one in self.open or one in self.values:
            return
        self.open[one] = None
        self.engines.add(one.engine)
        one.take_up()
        if isinstance(one, PlainRef) and one.recovered:
            self._close(one, one.recovered[0])
        else:
            self._watch_or_rest(one)

    def leave(self) -> None:
        """Nobody waits any more, whatever has not ended."""
        for one in self.open:
            one.leave()

    def wake_at(self) -> float:
        """When something is to be done though no reference is ready, on the monotonic clock; infinity for never."""
        times = [one.resubmit_at or 0.0 for one in self._resting]  # None: another wait has submitted it
        times += [deadline for deadline, _ in self._launch_deadlines()]
        return min(times, default=math.inf)

    def resubmission_due(self) -> bool:
        """Whether `resubmit_due` has something to do: to submit again, or to watch what another wait has submitted."""
        now = time.monotonic()
        return any(one.resubmit_at is None or one.is_due(now) for one in self._resting)

    def resubmit_due(self) -> None:
        """Submit again what has paused for long enough, and what other waits have of the same engines before it."""
        now = time.monotonic()
        resting, self._resting = dict.fromkeys(self._resting), []
        engines = dict.fromkeys(one.engine for one in resting if one.is_due(now))
        for one in dict.fromkeys([*(one for engine in engines for one in engine.due(now)), *resting]):
            try:
                one.resubmit(now)
            except Exception as error:
                if one not in resting:
                    continue  # whoever awaits that one submits it too, and is told
                if isinstance(error, RayError):  # Ray refuses to submit: too many calls are pending, say
                    raise _noted(one, error) from error.__cause__
                raise
        for one in resting:
            self._watch_or_rest(one)

    def take(self, ref: ObjectRef[Any], outcome: Any) -> Exception | None:
        """Take in what came of a watched reference: a value, or a `Raised`. Gives what is to be raised, if anything.

        What comes a second time, of a reference that was looked at meanwhile, changes nothing.
        """
        failures = [self._take(one, ref, outcome) for one in self.watched.pop(ref, ())]
        return next((failure for failure in failures if failure is not None), None)

    def _watch_or_rest(self, one: Awaited) -> None:
        ref = one.ref  # read once: another wait may submit it again at any moment
        if one.resubmit_at is not None:
            self._resting.append(one)
        elif ref in self.watched:
            self.watched[ref].append(one)
        else:
            self.watched[ref] = [one]
            self.expect(ref)

    def _take(self, one: Awaited, ref: ObjectRef[Any], value: Any) -> Exception | None:
        with one.lock:
            if one.ref != ref or one.resubmit_at is not None:
                self._watch_or_rest(one)  # another thread has dealt with this failure
                return None
            return self._failed(one, value.exception) if isinstance(value, Raised) else self._answered(one, value)

    def _answered(self, one: Awaited, value: Any) -> Exception | None:
        if isinstance(one, PlainRef) and one.is_probe:
            if not value:
                self._not_launched_yet(one)
                return None
            one.recover(value)
        self._observe(one, Outcome.SUCCEEDED, f"{one.method}() returned")
        self._close(one, value)
        return None

    def _failed(self, one: Awaited, exception: Exception) -> Exception | None:
        engine = one.engine
        outcome = classify(exception, engine.actor_id)
        if says_restarted(exception):
            exception, outcome = _restarted(one, exception), Outcome.ACTOR_DIED
        elif says_dropped(exception):
            outcome = Outcome.CALL_LOST
        if one.is_probe and outcome is Outcome.METHOD_FAILED:
            self._not_launched_yet(one)
            return None
        self._observe(one, outcome, f"{one.method}() raised {detail_of(exception)}")
        if outcome is Outcome.ACTOR_UNAVAILABLE:
            if isinstance(one, PlainRef) and not one.is_probe:
                engine.lose(one)
                if not one.can_be_probed:
                    return _noted(one, exception, _SEALED)
            if engine.state is not EngineState.DEAD and engine.plan_resubmission(self._policy, one):
                self._resting.append(one)
                return None
            exhausted = _exhausted(one, exception, self._policy)
            if engine.step(Reason.RETRY_EXHAUSTED, exhausted.error_msg) or engine.reason in _GIVEN_UP_BY_BOUNDS:
                exception = exhausted
        one.settle(answered=False)
        return _noted(one, exception)

    def _not_launched_yet(self, one: Awaited) -> None:
        """The engine answers its probe, but not that the launch succeeded: a deadline bounds that, not the budget."""
        self._observe(one, Outcome.SUCCEEDED, "the check for the launch says that it has not ended", launches=False)
        one.settle(answered=True)
        one.resubmit_at = time.monotonic() + self._policy.pause_s(one.attempt)
        self._resting.append(one)

    def _observe(self, one: Awaited, outcome: Outcome, detail: str, launches: bool | None = None) -> None:
        if one.attempt == one.reported:
            return  # looked at before, by an earlier get or another thread: it says nothing new
        one.reported = one.attempt
        engine = one.engine
        engine.observe(
            outcome,
            launches=one.launches if launches is None else launches,
            submitted_at=one.submitted_at,
            again=one.attempt > 0,
            detail=detail,
        )
        took_s = time.monotonic() - max(one.submitted_at, one.made_at)
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

    def session_ended(self) -> Exception | None:
        """What to raise when Ray was shut down: it tells nothing of what was out then, and would be started anew."""
        if this_process.session() is self._session:
            return None
        one = next(iter(self.open))
        return _noted(one, RaySystemError(f"Ray was shut down while {one.method}() of {one.engine.name!r} was out"))

    def given_up(self) -> Exception | None:
        """The verdict on an engine that was given up, by whichever thread, while a call made before was still out."""
        engines = {engine for engine in self.engines if engine.reason in GIVEN_UP}
        for one in self.open if engines else ():
            if one.engine in engines and one.made_at <= one.engine.given_up_at():
                text = f"engine {one.engine.name!r} was given up ({one.engine.reason}) while {one.method}() was out"
                if one.engine.reason is Reason.LAUNCH_DEADLINE:
                    return _noted(one, LaunchDeadlineError(text))
                return _noted(one, RetryExhaustedError(text, one.engine.actor_id))
        return None

    def _launch_deadlines(self) -> list[tuple[float, ManagedEngine]]:
        """Until when the engines that are launched here, and have not been yet, may take."""
        after_s = self._policy.launch_deadline_s
        if after_s is None:
            return []
        engines = dict.fromkeys(one.engine for one in self.open if one.launches and not one.engine.has_launched)
        return [(engine.adopted_at + after_s, engine) for engine in engines]

    def is_late(self) -> bool:
        """Whether a launch deadline has passed."""
        now = time.monotonic()
        return any(now >= deadline for deadline, _ in self._launch_deadlines())

    def launch_deadline(self) -> Exception | None:
        """The verdict on engines that are launched here and have not been by their deadline."""
        now = time.monotonic()
        late = [engine for deadline, engine in self._launch_deadlines() if now >= deadline]
        if not late:
            return None
        self._look()
        for engine in late:
            engine.give_up_launch(f"launch_deadline_s={self._policy.launch_deadline_s:g} has passed")
        late = [engine for engine in late if not engine.has_launched]  # another thread may have heard that one did
        if not late:
            return None
        launching = [*late, *(engine for engine in self._fleet() if engine.is_launching)]
        lines = "\n".join(f"  {engine.describe()}" for engine in dict.fromkeys(launching))
        return LaunchDeadlineError(
            f"launch_deadline_s={self._policy.launch_deadline_s:g} has passed for {len(late)} engines. "
            f"These have not launched:\n{lines}"
        )

    def timed_out(self, timeout_s: float) -> GetTimeoutError:
        """What to raise when the caller's time is up."""
        if any(one.engine.state is EngineState.LAUNCHING for one in self.open):
            self._look()
        waiting = "\n".join(f"  {one.method}() of {one.engine.describe()}" for one in self.open)
        done, every = len(self.values), len(self.values) + len(self.open)
        return GetTimeoutError(f"{done} of {every} calls ended within {timeout_s:g} s; still waiting for\n{waiting}")


_GIVEN_UP_BY_BOUNDS = (Reason.RETRY_EXHAUSTED, Reason.HEALTH_CHECKS_FAILED)

_SEALED = (
    "A plain ObjectRef that failed so never recovers. Call the method through the engine that adopt() gave "
    "(it is then submitted again, and runs once), or give adopt() a probe for the launch."
)


def _noted(one: Awaited, exception: Exception, advice: str = "") -> Exception:
    exception.add_note(f"enginefsm: {one.method}() of {one.engine.describe(detail=False)}")
    if advice:
        exception.add_note(f"enginefsm: {advice}")
    return exception


def _restarted(one: Awaited, exception: Exception) -> Exception:
    error = ActorRestartedError(
        f"Ray restarted the actor of engine {one.engine.name!r} while {one.method}() was out. What its "
        f"{one.engine.launch}() had set up went with the old process: release the engine and launch it anew.",
        one.engine.actor_id,
    )
    error.__cause__ = exception
    return error


def _exhausted(one: Awaited, exception: Exception, policy: RetryPolicy) -> RetryExhaustedError:
    bounds = f"budget_s={policy.budget_s:g}, max_attempts={policy.max_attempts}"
    error = RetryExhaustedError(
        f"engine {one.engine.name!r} could not be reached again within {bounds} "
        f"({one.attempts_in_outage} resubmissions of {one.method}()); Ray's last word: {exception}",
        one.engine.actor_id,
    )
    error.__cause__ = exception
    return error

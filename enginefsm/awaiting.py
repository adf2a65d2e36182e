"""The wait behind `EngineMonitor.get`: every call to its end, each failure to its engine, the first one raised."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, RayError

from enginefsm.calls import Awaited, PlainRef, says_dropped, says_restarted
from enginefsm.engine import MonitoredEngine
from enginefsm.errors import ActorRestartedError, LaunchDeadlineError, RetryExhaustedError
from enginefsm.events import CallOutcome, Event
from enginefsm.outcomes import Outcome, classify
from enginefsm.policy import RetryPolicy
from enginefsm.states import GIVEN_UP, EngineState, Reason

GATHER_S = 2e-5  # a reference
MOST_GATHER_S = 0.05
LOOK_S = 1.0  # how long a wait goes on before it looks whether another thread has given an engine up


class Await:
    """One `get`. All that must outlive it, an interrupt or a timeout included, is kept by the calls and engines."""

    def __init__(
        self,
        awaited: Iterable[Awaited],
        policy: RetryPolicy,
        fleet: Callable[[], Iterable[MonitoredEngine]],
        emit: Callable[[Event], None],
        look: Callable[[], None],
    ) -> None:
        self._policy = policy
        self._fleet = fleet
        self._emit = emit
        self._look = look  # at how far launches are, before it is told; within a short bound
        self._values: dict[Awaited, Any] = {}
        self._open = dict.fromkeys(awaited)
        self._engines = {one.engine for one in self._open}
        self._watched: dict[ObjectRef[Any], list[Awaited]] = {}
        self._resting: list[Awaited] = []
        self._busy = True  # whether the last look found something
        for one in list(self._open):
            one.take_up()
            if isinstance(one, PlainRef) and one.recovered:
                self._close(one, one.recovered[0])
            else:
                self._watch_or_rest(one)

    def run(self, timeout_s: float | None, deliver: Callable[[], None]) -> dict[Awaited, Any]:
        """Wait for all. Calls `deliver` whenever engines may have moved."""
        try:
            return self._run(timeout_s, deliver)
        finally:
            for one in self._open:
                one.leave()

    def _run(self, timeout_s: float | None, deliver: Callable[[], None]) -> dict[Awaited, Any]:
        give_up_at = None if timeout_s is None else time.monotonic() + timeout_s
        while self._open:
            failure = self._given_up()
            if failure is None:
                self._resubmit_due()
                failure = self._take_all(*self._ready(give_up_at)) or self._launch_deadline()
            deliver()
            if failure is None and self._open and give_up_at is not None and time.monotonic() >= give_up_at:
                failure = self._timed_out(timeout_s)
            if failure is not None:
                try:
                    raise failure
                finally:
                    failure = None  # else the exception, by its traceback, keeps all of this alive
        return self._values

    def _watch_or_rest(self, one: Awaited) -> None:
        if one.resubmit_at is None:
            self._watched.setdefault(one.ref, []).append(one)
        else:
            self._resting.append(one)

    def _resubmit_due(self) -> None:
        now = time.monotonic()
        resting, self._resting = self._resting, []
        for one in resting:
            try:
                one.resubmit(now)
            except RayError as error:  # Ray refuses to submit: too many calls are pending, say
                raise _noted(one, error) from error.__cause__
            self._watch_or_rest(one)

    def _ready(self, give_up_at: float | None) -> tuple[list[ObjectRef[Any]], list[Any]]:
        """References that have an outcome, and their outcomes: a value, or an exception in a `_Raised`."""
        wake_at = [one.resubmit_at for one in self._resting if one.resubmit_at is not None]
        wake_at += [give_up_at] if give_up_at is not None else []
        wake_at += [deadline for deadline, _ in self._launch_deadlines()]
        pause_s = min(LOOK_S, max(0.0, min(wake_at) - time.monotonic())) if wake_at else LOOK_S
        if not self._watched:
            time.sleep(pause_s)
            return [], []
        refs = list(self._watched)
        # A look at many references costs about a microsecond each. With many open, those that come in soon after one
        # another are looked at together; a failure waits no longer than MOST_GATHER_S for that.
        gather_s = min(len(refs) * GATHER_S, MOST_GATHER_S)
        ready = ray.wait(refs, num_returns=len(refs), timeout=gather_s)[0] if self._busy else []
        if not ready:
            ready = ray.wait(refs, num_returns=1, timeout=pause_s)[0]
        self._busy = bool(ready)
        if not ready:
            return [], []
        try:
            return ready, ray.get(ready)
        except Exception:  # noqa: BLE001  one of them failed: which, is asked of each
            return ready, [_outcome(ref) for ref in ready]

    def _take_all(self, refs: list[ObjectRef[Any]], values: list[Any]) -> Exception | None:
        """Take in the outcomes of references; gives what is to be raised, if anything."""
        failures = [
            failure
            for ref, value in zip(refs, values, strict=True)
            for one in self._watched.pop(ref)
            if (failure := self._take(one, ref, value)) is not None
        ]
        return failures[0] if failures else None

    def _take(self, one: Awaited, ref: ObjectRef[Any], value: Any) -> Exception | None:
        with one.lock:
            if one.ref != ref or one.resubmit_at is not None:
                self._watch_or_rest(one)  # another thread has dealt with this failure
                return None
            return self._failed(one, value.exception) if isinstance(value, _Raised) else self._answered(one, value)

    def _answered(self, one: Awaited, value: Any) -> Exception | None:
        if isinstance(one, PlainRef) and one.is_probe:
            if not value:
                self._not_launched_yet(one)
                return None
            one.recover(value)
        self._observe(one, Outcome.SUCCEEDED)
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
        self._observe(one, outcome)
        if outcome is Outcome.ACTOR_UNAVAILABLE:
            if isinstance(one, PlainRef) and not one.is_probe:
                engine.lose(one)
                if not one.can_be_probed:
                    return _noted(one, exception, _SEALED)
            if engine.state is not EngineState.DEAD and engine.plan_resubmission(self._policy, one):
                self._resting.append(one)
                return None
            if engine.step(Reason.RETRY_EXHAUSTED) or engine.reason is Reason.RETRY_EXHAUSTED:
                exception = _exhausted(one, exception, self._policy)
        one.settle(answered=False)
        return _noted(one, exception)

    def _not_launched_yet(self, one: Awaited) -> None:
        """The engine answers its probe, but not that the launch succeeded: a deadline bounds that, not the budget."""
        self._observe(one, Outcome.SUCCEEDED, launches=False)
        one.settle(answered=True)
        one.resubmit_at = time.monotonic() + self._policy.pause_s(one.attempt)
        self._resting.append(one)

    def _observe(self, one: Awaited, outcome: Outcome, launches: bool | None = None) -> None:
        if one.attempt == one.reported:
            return  # looked at before, by an earlier get or another thread: it says nothing new
        one.reported = one.attempt
        engine = one.engine
        engine.observe(
            outcome,
            launches=one.launches if launches is None else launches,
            submitted_at=one.submitted_at,
            again=one.attempt > 0,
        )
        took_s = time.monotonic() - max(one.submitted_at, one.made_at)
        self._emit(
            CallOutcome(
                engine.name, engine.labels, one.method, outcome, one.attempt, took_s, one.is_probe,
                engine.incarnation, time.time(),
            )
        )  # fmt: skip

    def _close(self, one: Awaited, value: Any) -> None:
        self._values[one] = value
        del self._open[one]
        one.settle(answered=True)

    def _given_up(self) -> Exception | None:
        """The verdict on an engine that was given up, by whichever thread, while a call made before was still out."""
        engines = {engine for engine in self._engines if engine.reason in GIVEN_UP}
        for one in self._open if engines else ():
            if one.engine in engines and one.made_at <= one.engine.given_up_at():
                text = f"engine {one.engine.name!r} was given up ({one.engine.reason}) while {one.method}() was out"
                if one.engine.reason is Reason.LAUNCH_DEADLINE:
                    return _noted(one, LaunchDeadlineError(text))
                return _noted(one, RetryExhaustedError(text, one.engine.actor_id))
        return None

    def _launch_deadlines(self) -> list[tuple[float, MonitoredEngine]]:
        """Until when the engines that are launched here may take."""
        after_s = self._policy.launch_deadline_s
        if after_s is None:
            return []
        engines = dict.fromkeys(one.engine for one in self._open if one.launches)
        return [(engine.launched_at + after_s, engine) for engine in engines]

    def _launch_deadline(self) -> Exception | None:
        now = time.monotonic()
        late = [engine for deadline, engine in self._launch_deadlines() if now >= deadline]
        if not late:
            return None
        self._look()
        for engine in late:
            engine.step(Reason.LAUNCH_DEADLINE)
        launching = [*late, *(engine for engine in self._fleet() if engine.is_launching)]
        lines = "\n".join(f"  {engine.describe()}" for engine in dict.fromkeys(launching))
        return LaunchDeadlineError(
            f"launch_deadline_s={self._policy.launch_deadline_s:g} has passed for {len(late)} engines. "
            f"These have not launched:\n{lines}"
        )

    def _timed_out(self, timeout_s: float | None) -> GetTimeoutError:
        if any(one.engine.state is EngineState.LAUNCHING for one in self._open):
            self._look()
        waiting = "\n".join(f"  {one.method}() of {one.engine.describe()}" for one in self._open)
        done, every = len(self._values), len(self._values) + len(self._open)
        return GetTimeoutError(f"{done} of {every} calls ended within {timeout_s:g} s; still waiting for\n{waiting}")


_SEALED = (
    "A plain ObjectRef that failed so never recovers. Call the method through the engine that adopt() gave "
    "(it is then submitted again, and runs once), or give adopt() a probe for the launch."
)


class _Raised:
    """An exception that a reference holds, told apart from a value that is an exception."""

    def __init__(self, exception: Exception) -> None:
        self.exception = exception


def _outcome(ref: ObjectRef[Any]) -> Any:
    try:
        return ray.get(ref)
    except Exception as exception:  # noqa: BLE001  whatever the reference holds is the outcome; classify() sorts it
        return _Raised(exception)


def _noted(one: Awaited, exception: Exception, advice: str = "") -> Exception:
    exception.add_note(f"enginefsm: {one.method}() of {one.engine.describe()}")
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


def _exhausted(one: Awaited, exception: Exception, policy: RetryPolicy) -> Exception:
    bounds = f"budget_s={policy.budget_s:g}, max_attempts={policy.max_attempts}"
    error = RetryExhaustedError(
        f"engine {one.engine.name!r} could not be reached again within {bounds} "
        f"({one.attempts_in_outage} resubmissions of {one.method}()); Ray's last word: {exception}",
        one.engine.actor_id,
    )
    error.__cause__ = exception
    return error

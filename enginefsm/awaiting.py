"""The wait behind `EngineMonitor.get`: every call to its end, each failure to its engine, the first one raised."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import GetTimeoutError

from enginefsm.calls import Call, says_restarted
from enginefsm.engine import MonitoredEngine
from enginefsm.errors import ActorRestartedError, LaunchDeadlineError, RetryExhaustedError
from enginefsm.events import CallOutcome, Event
from enginefsm.outcomes import Outcome, classify
from enginefsm.policy import Outage, RetryPolicy
from enginefsm.states import EngineState, Reason

SPENT_REFS_KEPT = 100  # an engine
GATHER_S = 5e-6  # a reference
MOST_GATHER_S = 0.01


class PlainRef:
    """A plain ObjectRef of an adopted actor. Once failed it stays so; a launch is then asked after by probes."""

    def __init__(self, engine: MonitoredEngine, ref: ObjectRef[Any]) -> None:
        self.engine = engine
        # Ray does not tell which method a reference is of. While an engine launches, it is taken for the launch.
        self.launches = engine.is_launching
        self.method = engine.launch if self.launches else "(reference)"
        self.submitted_at = time.monotonic()
        self.attempt = 0
        self.outage: Outage | None = None
        self.attempts_in_outage = 0
        self.resubmit_at: float | None = None
        self.lock = threading.Lock()
        self.probed_since: float | None = None
        """Since when the engine answers probes, but does not say yet that it launched."""
        self._given = ref
        self._probe: Call | None = None

    @property
    def ref(self) -> ObjectRef[Any]:
        """What to wait for: the reference given, or that of the newest probe."""
        return self._given if self._probe is None else self._probe.ref

    @property
    def is_probe(self) -> bool:
        """Whether what is waited for is a probe."""
        return self._probe is not None

    @property
    def given(self) -> str:
        """The id of the reference given."""
        return str(self._given.hex())

    def spend(self, *value: Any) -> None:
        """Remember that the reference failed, and the value that a probe gave for it, if one did."""
        spent = self.engine.spent_refs
        spent[self.given] = value
        while len(spent) > SPENT_REFS_KEPT:
            spent.pop(next(iter(spent)), None)

    def resubmit(self, now: float) -> None:
        """Send a probe, if that is due."""
        probe = self.engine.probe
        if self.resubmit_at is None or self.resubmit_at > now or probe is None:
            return
        method = getattr(self.engine, probe) if isinstance(probe, str) else self.engine.__ray_call__
        self._probe = method.remote() if isinstance(probe, str) else method.remote(probe)
        self.attempt += 1
        self.submitted_at = now
        self.resubmit_at = None

    def settle(self, *, answered: bool) -> None:
        """Its outcome has arrived, from the actor or from Ray."""
        if self._probe is not None:
            self._probe.settle(answered=answered)


Awaited = Call | PlainRef


class Await:
    """One `get`. All that must outlive it, an interrupt or a timeout included, is kept by the calls and engines."""

    def __init__(self, awaited: Iterable[Awaited], policy: RetryPolicy, emit: Callable[[Event], None]) -> None:
        self._policy = policy
        self._emit = emit
        self._values: dict[Awaited, Any] = {}
        self._open = dict.fromkeys(awaited)
        self._watched: dict[ObjectRef[Any], list[Awaited]] = {}
        self._resting: list[Awaited] = []
        self._busy = True  # whether the last look found something
        for one in self._open:
            self._watch_or_rest(one)

    def run(self, timeout_s: float | None, deliver: Callable[[], None]) -> dict[Awaited, Any]:
        """Wait for all. Calls `deliver` whenever engines may have moved, before anything is raised."""
        give_up_at = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while self._open:
                self._resubmit_due()
                failures = [failure for failure in map(self._take, *self._ready(give_up_at)) if failure is not None]
                if failures:
                    raise failures[0]
                self._check_launch_deadline()
                if self._open and give_up_at is not None and time.monotonic() >= give_up_at:
                    raise self._timed_out(timeout_s)
                deliver()
        finally:
            deliver()
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
            one.resubmit(now)
            self._watch_or_rest(one)

    def _ready(self, give_up_at: float | None) -> tuple[list[ObjectRef[Any]], list[Any]]:
        """References that have an outcome, and their outcomes: a value, or an exception in a `_Raised`."""
        wake_at = [one.resubmit_at for one in self._resting if one.resubmit_at is not None]
        wake_at += [give_up_at] if give_up_at is not None else []
        wake_at += [deadline for deadline, _ in self._launch_deadlines()]
        pause_s = max(0.0, min(wake_at) - time.monotonic()) if wake_at else None
        if not self._watched:
            time.sleep(pause_s or 0.0)
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

    def _take(self, ref: ObjectRef[Any], value: Any) -> Exception | None:
        """Take in the outcome of one reference; gives what is to be raised."""
        for one in self._watched.pop(ref):
            with one.lock:
                if one.ref != ref or one.resubmit_at is not None:
                    self._watch_or_rest(one)  # another thread has dealt with this failure
                    continue
                failure = (
                    self._failed(one, value.exception) if isinstance(value, _Raised) else self._answered(one, value)
                )
            if failure is not None:
                return failure
        return None

    def _answered(self, one: Awaited, value: Any) -> Exception | None:
        if isinstance(one, PlainRef) and one.is_probe and not value:
            return self._not_launched_yet(one)
        self._observe(one, Outcome.SUCCEEDED)
        if isinstance(one, PlainRef) and one.is_probe:
            one.spend(value)
        self._close(one, value)
        return None

    def _failed(self, one: Awaited, exception: Exception) -> Exception | None:
        engine = one.engine
        if isinstance(one, PlainRef) and not one.is_probe and one.given in engine.spent_refs:
            return self._spent(one, exception)
        outcome = classify(exception, engine.actor_id)
        if says_restarted(exception):
            exception = _restarted(one, exception)
            outcome = Outcome.ACTOR_DIED
        if outcome is Outcome.TIMED_OUT:
            self._watch_or_rest(one)
            return None
        self._observe(one, outcome)
        if outcome is Outcome.ACTOR_UNAVAILABLE:
            if isinstance(one, PlainRef) and not one.is_probe:
                one.spend()
                if not (one.launches and engine.probe is not None):
                    return _noted(one, exception, _SEALED)
            if engine.state is not EngineState.DEAD and engine.plan_resubmission(self._policy, one):
                self._resting.append(one)
                return None
            if engine.step(Reason.RETRY_EXHAUSTED) or engine.reason is Reason.RETRY_EXHAUSTED:
                exception = _exhausted(one, exception, self._policy)
        one.settle(answered=outcome is Outcome.METHOD_FAILED)
        return _noted(one, exception)

    def _not_launched_yet(self, one: PlainRef) -> Exception | None:
        """The engine answers, but its probe does not say that the launch succeeded."""
        self._observe(one, Outcome.SUCCEEDED, launches=False)
        now = time.monotonic()
        one.probed_since = one.probed_since or now
        one.settle(answered=True)
        if now - one.probed_since >= self._policy.budget_s:
            one.engine.step(Reason.RETRY_EXHAUSTED)
            error = RetryExhaustedError(
                f"{one.engine.name} answers, but for {self._policy.budget_s:g} s its probe has not said that "
                f"{one.engine.launch}() succeeded. Call it through the engine that adopt() gave, or raise budget_s.",
                one.engine.actor_id,
            )
            return _noted(one, error)
        one.resubmit_at = now + self._policy.pause_s(one.attempt)
        self._resting.append(one)
        return None

    def _spent(self, one: PlainRef, exception: Exception) -> Exception | None:
        for value in one.engine.spent_refs[one.given]:
            self._close(one, value)
            return None
        return _noted(one, exception, _SEALED)

    def _observe(self, one: Awaited, outcome: Outcome, launches: bool | None = None) -> None:
        one.engine.observe(
            outcome, launches=one.launches if launches is None else launches, submitted_at=one.submitted_at
        )
        took_s = time.monotonic() - one.submitted_at
        engine = one.engine
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

    def _launch_deadlines(self) -> list[tuple[float, MonitoredEngine]]:
        after_s = self._policy.launch_deadline_s
        if after_s is None:
            return []
        engines = dict.fromkeys(one.engine for one in self._open if one.launches)
        return [
            (engine.launched_at + after_s, engine)
            for engine in engines
            if engine.is_launching or engine.reason is Reason.LAUNCH_DEADLINE
        ]

    def _check_launch_deadline(self) -> None:
        deadlines, now = self._launch_deadlines(), time.monotonic()
        late = [engine for deadline, engine in deadlines if now >= deadline]
        if not late:
            return
        for engine in late:
            engine.step(Reason.LAUNCH_DEADLINE)
        lines = "\n".join(f"  {engine.describe()}" for _, engine in deadlines)
        raise LaunchDeadlineError(
            f"{len(deadlines)} engines have not launched, and launch_deadline_s={self._policy.launch_deadline_s:g} "
            f"has passed for {len(late)} of them:\n{lines}"
        )

    def _timed_out(self, timeout_s: float | None) -> GetTimeoutError:
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

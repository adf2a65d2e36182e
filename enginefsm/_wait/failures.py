"""The exceptions that a wait raises, and their messages."""

from __future__ import annotations

from collections.abc import Iterable

from ray.exceptions import GetTimeoutError, RaySystemError

from enginefsm._calls.calls import Awaited
from enginefsm._engine.managed import ManagedEngine, engine_of
from enginefsm.errors import ActorRestartedError, LaunchDeadlineError, RetryExhaustedError
from enginefsm.fsm.states import Reason
from enginefsm.policy import RetryPolicy

SEALED = (
    "A plain ObjectRef that failed so never recovers. Call the method through the engine that adopt() gave "
    "(it is then submitted again, and runs once), or give adopt() a launched_if for the launch."
)


def noted(one: Awaited, exception: Exception, advice: str = "") -> Exception:
    """Add the note that names the engine, and the advice as a second note. Return the exception."""
    exception.add_note(f"enginefsm: {one.method}() of {engine_of(one).describe(detail=False)}")
    if advice:
        exception.add_note(f"enginefsm: {advice}")
    return exception


def restarted(one: Awaited, exception: Exception) -> Exception:
    """Return the exception for a call whose actor was restarted by Ray."""
    engine = engine_of(one)
    error = ActorRestartedError(
        f"Ray restarted the actor of engine {engine.name!r} while {one.method}() was out. What its "
        f"{engine.launch}() had set up went with the old process: release the engine and launch it anew.",
        engine.actor_id,
    )
    error.__cause__ = exception
    return error


def exhausted(one: Awaited, exception: Exception, policy: RetryPolicy) -> RetryExhaustedError:
    """Return the exception for a call whose bounds are spent."""
    engine, attempts = engine_of(one), 0 if one.outage is None else one.outage.attempts
    error = RetryExhaustedError(
        f"engine {engine.name!r} could not be reached again within budget_s={policy.budget_s:g}, "
        f"max_attempts={policy.max_attempts} ({attempts} resubmissions of {one.method}()); "
        f"Ray's last word: {exception}",
        engine.actor_id,
    )
    error.__cause__ = exception
    return error


def session_ended(one: Awaited) -> Exception:
    """Return the exception for a call that was out when Ray was shut down."""
    return noted(one, RaySystemError(f"Ray was shut down while {one.method}() of {one.engine.name!r} was out"))


def given_up(one: Awaited) -> Exception:
    """Return the exception for a call whose engine was given up elsewhere."""
    engine = engine_of(one)
    text = f"engine {engine.name!r} was given up ({engine.reason}) while {one.method}() was out"
    if engine.reason is Reason.LAUNCH_DEADLINE:
        return noted(one, LaunchDeadlineError(text))
    return noted(one, RetryExhaustedError(text, engine.actor_id))


def launch_deadline(detail: str, late: list[ManagedEngine], others: list[ManagedEngine]) -> Exception:
    """Return the exception for launches that took too long. It names all engines that have not launched."""
    lines = "\n".join(f"  {engine.describe()}" for engine in dict.fromkeys([*late, *others]))
    return LaunchDeadlineError(f"{detail} for {len(late)} engines. These have not launched:\n{lines}")


def timed_out(waiting: Iterable[Awaited], ended: int, timeout_s: float) -> Exception:
    """Return the exception for the caller's timeout. It names the calls that have not ended."""
    lines = [f"  {one.method}() of {engine_of(one).describe()}" for one in waiting]
    every = ended + len(lines)
    return GetTimeoutError(
        f"{ended} of {every} calls ended within {timeout_s:g} s; still waiting for\n" + "\n".join(lines)
    )

"""What an exception says about the engine that was called, and where that moves the engine.

Pure: it knows Ray's exception classes, and no clusters, threads or metrics.
"""

from __future__ import annotations

import traceback
from enum import StrEnum

from ray import exceptions as rx

from enginefsm.fsm.states import EngineState, Reason, one_line


class Outcome(StrEnum):
    """The outcome of one submission of a call to an engine."""

    SUCCEEDED = "succeeded"
    METHOD_FAILED = "method_failed"
    """The engine answered: its method raised, for whatever reason. The death of a peer is one."""
    ACTOR_UNAVAILABLE = "actor_unavailable"
    """The connection broke; the method may be running, may have ended, or may never have begun."""
    ACTOR_DIED = "actor_died"
    CONSTRUCTOR_FAILED = "constructor_failed"
    PREEMPTED = "preempted"
    OUT_OF_MEMORY = "out_of_memory"
    UNSCHEDULABLE = "unschedulable"
    RUNTIME_ENV_FAILED = "runtime_env_failed"
    CALL_LOST = "call_lost"
    """The call or its result was lost, cancelled or refused on the way. That says nothing about the engine."""


# What each class of ray.exceptions says that is neither an actor's error nor RayTaskError. `classify` looks along an
# exception's bases, so the nearest entry counts. The keys are names because some Rays lack some of these classes, and
# a Ray never raises a class that it lacks. tests/test_outcomes.py fails if a new Ray adds a class.
_BY_NAME = {
    "OutOfMemoryError": Outcome.OUT_OF_MEMORY,
    "ActorUnschedulableError": Outcome.UNSCHEDULABLE,
    "ActorPlacementGroupRemoved": Outcome.UNSCHEDULABLE,
    "RuntimeEnvSetupError": Outcome.RUNTIME_ENV_FAILED,
    # The process or the node under the engine is gone.
    "WorkerCrashedError": Outcome.ACTOR_DIED,
    "NodeDiedError": Outcome.ACTOR_DIED,
    "AsyncioActorExit": Outcome.ACTOR_DIED,
    # The engine answered, and the answer is an error.
    "UserCodeException": Outcome.METHOD_FAILED,
    "CrossLanguageError": Outcome.METHOD_FAILED,
    "UnserializableException": Outcome.METHOD_FAILED,  # since Ray 2.50
    # Ray lost, cancelled or refused something between the caller and the engine, or on the caller's own node.
    "TaskCancelledError": Outcome.CALL_LOST,
    "GetTimeoutError": Outcome.CALL_LOST,  # the caller's own: it stopped waiting
    "LocalRayletDiedError": Outcome.CALL_LOST,
    "RaySystemError": Outcome.CALL_LOST,
    "AuthenticationError": Outcome.CALL_LOST,  # since Ray 2.52
    "ObjectStoreFullError": Outcome.CALL_LOST,
    "OutOfDiskError": Outcome.CALL_LOST,
    "ObjectLostError": Outcome.CALL_LOST,
    "RpcError": Outcome.CALL_LOST,
    "PlasmaObjectNotAvailable": Outcome.CALL_LOST,
    "TaskPlacementGroupRemoved": Outcome.CALL_LOST,
    "PendingCallsLimitExceeded": Outcome.CALL_LOST,
    "TaskUnschedulableError": Outcome.CALL_LOST,
    "ObjectRefStreamEndOfStreamError": Outcome.CALL_LOST,
    "OufOfBandObjectRefSerializationException": Outcome.CALL_LOST,
    "ActorAlreadyExistsError": Outcome.CALL_LOST,  # since Ray 2.53
    "ActorHandleNotFoundError": Outcome.CALL_LOST,  # since Ray 2.54
    "RayError": Outcome.CALL_LOST,
}
_PLAIN: dict[type[BaseException], Outcome] = {
    getattr(rx, name): outcome for name, outcome in _BY_NAME.items() if hasattr(rx, name)
}

# Where an outcome that ends an engine moves it.
FATAL: dict[Outcome, Reason] = {
    Outcome.ACTOR_DIED: Reason.ACTOR_DIED,
    Outcome.CONSTRUCTOR_FAILED: Reason.CONSTRUCTOR_FAILED,
    Outcome.PREEMPTED: Reason.PREEMPTED,
    Outcome.OUT_OF_MEMORY: Reason.OUT_OF_MEMORY,
    Outcome.UNSCHEDULABLE: Reason.UNSCHEDULABLE,
    Outcome.RUNTIME_ENV_FAILED: Reason.RUNTIME_ENV_FAILED,
}


def classify(exception: Exception, actor_id: str) -> Outcome:
    """Return what an exception says about the actor `actor_id` (hex), if `ray.get` raised it for a call to that actor.

    A `RayTaskError` comes first, whatever it also is. It is the engine's own answer, and an `ActorDiedError` inside it
    is about a peer. A bare actor error counts only if it is about this actor. One that names no actor is Ray's verdict
    on the call itself, and counts.
    """
    if isinstance(exception, rx.RayTaskError):
        return Outcome.METHOD_FAILED
    if isinstance(exception, rx.RayActorError):
        if exception.actor_id is not None and exception.actor_id != actor_id:
            return Outcome.METHOD_FAILED
        if isinstance(exception, rx.ActorUnavailableError):
            return Outcome.ACTOR_UNAVAILABLE
        if exception.actor_init_failed:
            return Outcome.CONSTRUCTOR_FAILED
        if exception.preempted:
            return Outcome.PREEMPTED
        return Outcome.ACTOR_DIED
    for base in type(exception).__mro__:
        if base in _PLAIN:
            return _PLAIN[base]
    # Not Ray's: a value raised it while it was deserialized here. The method has ended.
    return Outcome.METHOD_FAILED


def detail_of(exception: BaseException) -> str:
    """Return what an exception says, in one line. The text of a `RayTaskError` is a traceback, so take its cause's."""
    cause = exception.cause if isinstance(exception, rx.RayTaskError) else None
    said = cause if isinstance(cause, BaseException) else exception
    # Not str(): a user's exception may raise when it is printed.
    return one_line("".join(traceback.format_exception_only(said)))


def reason_for(outcome: Outcome, *, state: EngineState, launches: bool, launched: bool) -> Reason | None:
    """Return why an engine in `state` moves upon `outcome`, or None if it does not.

    `launches` says whether the call was of the launch method, and `launched` whether the launch has succeeded already.
    """
    if outcome in FATAL:
        return FATAL[outcome]
    match outcome:
        case Outcome.ACTOR_UNAVAILABLE:
            return Reason.ACTOR_UNAVAILABLE
        case Outcome.METHOD_FAILED if launches and not launched:
            return Reason.INIT_FAILED
        case Outcome.SUCCEEDED if launches and state == EngineState.LAUNCHING:
            return Reason.INIT_SUCCEEDED
        case Outcome.SUCCEEDED | Outcome.METHOD_FAILED if state == EngineState.UNAVAILABLE:
            # Any answer shows that the engine can be reached.
            return Reason.RECOVERED if launches or launched else Reason.ACTOR_REACHABLE
    return None

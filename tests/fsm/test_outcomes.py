"""What each exception says of the engine that was asked, and where each outcome moves it."""

from __future__ import annotations

import inspect
import itertools
import pickle

import pytest
from ray import exceptions as rx
from ray._raylet import ActorID
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from support.ray_versions import has_exception

from enginefsm.errors import ActorRestartedError, RetryExhaustedError
from enginefsm.fsm.outcomes import Outcome, classify, reason_for
from enginefsm.fsm.states import EngineState, Reason

O = Outcome  # noqa: E741
MINE, PEER = ActorID.from_random(), ActorID.from_random()

# What each class of ray.exceptions says when it is raised bare. If a new Ray adds a class, the test below fails and
# names it. Decide what it says, and enter it here, in enginefsm/fsm/outcomes.py and in support/ray_versions.py.
EXPECTED = {
    "ActorAlreadyExistsError": O.CALL_LOST,
    "ActorDiedError": O.ACTOR_DIED,
    "ActorHandleNotFoundError": O.CALL_LOST,
    "ActorPlacementGroupRemoved": O.UNSCHEDULABLE,
    "ActorUnavailableError": O.ACTOR_UNAVAILABLE,
    "ActorUnschedulableError": O.UNSCHEDULABLE,
    "AsyncioActorExit": O.ACTOR_DIED,
    "AuthenticationError": O.CALL_LOST,
    "CrossLanguageError": O.METHOD_FAILED,
    "GetTimeoutError": O.CALL_LOST,
    "LocalRayletDiedError": O.CALL_LOST,
    "NodeDiedError": O.ACTOR_DIED,
    "ObjectFetchTimedOutError": O.CALL_LOST,
    "ObjectFreedError": O.CALL_LOST,
    "ObjectLostError": O.CALL_LOST,
    "ObjectReconstructionFailedError": O.CALL_LOST,
    "ObjectReconstructionFailedLineageEvictedError": O.CALL_LOST,
    "ObjectReconstructionFailedMaxAttemptsExceededError": O.CALL_LOST,
    "ObjectRefStreamEndOfStreamError": O.CALL_LOST,
    "ObjectStoreFullError": O.CALL_LOST,
    "OufOfBandObjectRefSerializationException": O.CALL_LOST,
    "OutOfDiskError": O.CALL_LOST,
    "OutOfMemoryError": O.OUT_OF_MEMORY,
    "OwnerDiedError": O.CALL_LOST,
    "PendingCallsLimitExceeded": O.CALL_LOST,
    "PlasmaObjectNotAvailable": O.CALL_LOST,
    "RayActorError": O.ACTOR_DIED,
    "RayCgraphCapacityExceeded": O.CALL_LOST,
    "RayChannelError": O.CALL_LOST,
    "RayChannelTimeoutError": O.CALL_LOST,
    "RayDirectTransportError": O.CALL_LOST,
    "RayError": O.CALL_LOST,
    "RaySystemError": O.CALL_LOST,
    "RayTaskError": O.METHOD_FAILED,
    "ReferenceCountingAssertionError": O.CALL_LOST,
    "RpcError": O.CALL_LOST,
    "RuntimeEnvSetupError": O.RUNTIME_ENV_FAILED,
    "StreamingGeneratorReplayInconsistentError": O.CALL_LOST,
    "TaskCancelledError": O.CALL_LOST,
    "TaskPlacementGroupRemoved": O.CALL_LOST,
    "TaskUnschedulableError": O.CALL_LOST,
    "UnserializableException": O.METHOD_FAILED,
    "UserCodeException": O.METHOD_FAILED,
    "WorkerCrashedError": O.ACTOR_DIED,
}


def ray_exceptions():
    """Every exception class that Ray defines for its users, by name."""
    public = dict(inspect.getmembers(rx, lambda one: inspect.isclass(one) and issubclass(one, rx.RayError)))
    return public | {cls.__name__: cls for cls in rx.RAY_EXCEPTION_TYPES}


def bare(cls):
    """One of `cls`, as little said in it as can be."""
    exception = cls.__new__(cls)
    if issubclass(cls, rx.RayActorError):
        rx.RayActorError.__init__(exception)
    return exception


def died(actor=MINE, **context):
    return rx.ActorDiedError(ActorDiedErrorContext(actor_id=actor.binary(), **context))


def heard_of_death(actor):
    """A death as one actor tells it to another: Ray's own record of it does not always pickle."""
    error = rx.ActorDiedError()
    error.actor_id = actor.hex()
    return error


def raised_by_method(cause):
    """What `ray.get` raises of a method that raised `cause`."""
    return rx.RayTaskError("engine.init()", "Traceback ...", cause, "title", 1, "127.0.0.1").as_instanceof_cause()


def raised_by_constructor(actor=MINE):
    error = rx.RayTaskError("__init__", "Traceback ...", ValueError(), "title", 1, "127.0.0.1", actor_id=actor.hex())
    return rx.ActorDiedError.from_task_error(error)


def test_there_is_a_decision_for_every_exception_that_ray_defines():
    assert {name for name in EXPECTED if has_exception(name)} == set(ray_exceptions())


@pytest.mark.parametrize("name", sorted(filter(has_exception, EXPECTED)))
def test_every_exception_of_ray_says_what_was_decided(name):
    assert classify(bare(ray_exceptions()[name]), MINE.hex()) is EXPECTED[name]


PREEMPTION = NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
CRASH = NodeDeathInfo(reason=NodeDeathInfo.UNEXPECTED_TERMINATION)


@pytest.mark.parametrize(
    ("exception", "outcome"),
    [
        pytest.param(rx.ActorUnavailableError("cut", MINE.binary()), O.ACTOR_UNAVAILABLE, id="unavailable"),
        pytest.param(rx.ActorUnavailableError("cut", None), O.ACTOR_UNAVAILABLE, id="unavailable, no actor named"),
        pytest.param(rx.ActorUnavailableError("cut", PEER.binary()), O.METHOD_FAILED, id="a peer is unavailable"),
        pytest.param(died(), O.ACTOR_DIED, id="died"),
        pytest.param(died(node_death_info=CRASH), O.ACTOR_DIED, id="died with its node"),
        pytest.param(died(node_death_info=PREEMPTION), O.PREEMPTED, id="preempted"),
        pytest.param(died(PEER), O.METHOD_FAILED, id="a peer died"),
        pytest.param(died(PEER, node_death_info=PREEMPTION), O.METHOD_FAILED, id="a peer was preempted"),
        pytest.param(rx.ActorDiedError(), O.ACTOR_DIED, id="died, no actor named"),
        pytest.param(raised_by_constructor(), O.CONSTRUCTOR_FAILED, id="constructor"),
        pytest.param(raised_by_constructor(PEER), O.METHOD_FAILED, id="a peer's constructor"),
        pytest.param(raised_by_method(heard_of_death(PEER)), O.METHOD_FAILED, id="a peer's death inside the method"),
        pytest.param(
            raised_by_method(heard_of_death(MINE)), O.METHOD_FAILED, id="its own death, told by the engine itself"
        ),
        pytest.param(
            raised_by_method(rx.ActorUnavailableError("cut", PEER.binary())),
            O.METHOD_FAILED,
            id="a peer is unavailable inside the method",
        ),
        pytest.param(raised_by_method(rx.OutOfMemoryError("peer")), O.METHOD_FAILED, id="a peer's memory"),
        pytest.param(raised_by_method(rx.GetTimeoutError("peer")), O.METHOD_FAILED, id="a get inside timed out"),
        pytest.param(raised_by_method(ValueError("no")), O.METHOD_FAILED, id="the method raised"),
        pytest.param(raised_by_method(ExceptionGroup("no", [ValueError()])), O.METHOD_FAILED, id="it raised several"),
        pytest.param(rx.OutOfMemoryError("node"), O.OUT_OF_MEMORY, id="out of memory"),
        pytest.param(rx.ActorUnschedulableError("gone"), O.UNSCHEDULABLE, id="unschedulable"),
        pytest.param(rx.RuntimeEnvSetupError("pip"), O.RUNTIME_ENV_FAILED, id="runtime env"),
        pytest.param(rx.GetTimeoutError("caller"), O.CALL_LOST, id="the caller's own timeout"),
        pytest.param(rx.TaskCancelledError(), O.CALL_LOST, id="cancelled"),
        pytest.param(ImportError("torch"), O.METHOD_FAILED, id="a value that cannot be read here"),
        pytest.param(TimeoutError(), O.METHOD_FAILED, id="a timeout that is not Ray's"),
    ],
)
def test_an_exception_says_of_the_engine_only_what_ray_knows_of_it(exception, outcome):
    assert classify(exception, MINE.hex()) is outcome


def test_a_death_inside_a_method_is_a_death_to_isinstance():
    # Which is why the order in classify() matters.
    assert isinstance(raised_by_method(heard_of_death(PEER)), rx.ActorDiedError)


def test_a_class_derived_from_one_of_rays_says_what_its_base_says():
    class FleetOutOfMemoryError(rx.OutOfMemoryError):
        pass

    assert classify(FleetOutOfMemoryError("node"), MINE.hex()) is O.OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("ours", "rays"), [(RetryExhaustedError, rx.ActorUnavailableError), (ActorRestartedError, rx.ActorDiedError)]
)
def test_our_own_errors_are_rays_and_name_the_actor_also_after_a_journey(ours, rays):
    error = ours("the message", MINE.hex())
    error.add_note("a note")

    for one in (error, pickle.loads(pickle.dumps(error))):
        assert isinstance(one, rays)
        assert (str(one), one.actor_id, one.__notes__) == ("the message", MINE.hex(), ["a note"])


# --- where outcomes move an engine ---

FATAL = {
    O.ACTOR_DIED: Reason.ACTOR_DIED,
    O.CONSTRUCTOR_FAILED: Reason.CONSTRUCTOR_FAILED,
    O.PREEMPTED: Reason.PREEMPTED,
    O.OUT_OF_MEMORY: Reason.OUT_OF_MEMORY,
    O.UNSCHEDULABLE: Reason.UNSCHEDULABLE,
    O.RUNTIME_ENV_FAILED: Reason.RUNTIME_ENV_FAILED,
}
LAUNCHING, READY, UNAVAILABLE, DEAD = EngineState
every_case = list(itertools.product(EngineState, [False, True], [False, True]))


@pytest.mark.parametrize(("state", "launches", "launched"), every_case)
@pytest.mark.parametrize("outcome", Outcome)
def test_an_outcome_moves_an_engine_for_one_reason_or_none(outcome, state, launches, launched):
    answered = outcome in (O.SUCCEEDED, O.METHOD_FAILED)
    expected = None
    if outcome in FATAL:
        expected = FATAL[outcome]
    elif outcome is O.ACTOR_UNAVAILABLE:
        expected = Reason.ACTOR_UNAVAILABLE
    elif outcome is O.METHOD_FAILED and launches and not launched:
        expected = Reason.INIT_FAILED
    elif answered and state is UNAVAILABLE:
        expected = Reason.RECOVERED if launches or launched else Reason.ACTOR_REACHABLE
    elif outcome is O.SUCCEEDED and launches and state is LAUNCHING:
        expected = Reason.INIT_SUCCEEDED

    assert reason_for(outcome, state=state, launches=launches, launched=launched) is expected


@pytest.mark.parametrize(
    ("outcome", "state", "launches", "launched", "reason"),
    [
        (O.SUCCEEDED, LAUNCHING, True, False, Reason.INIT_SUCCEEDED),
        (O.SUCCEEDED, LAUNCHING, False, False, None),
        (O.SUCCEEDED, UNAVAILABLE, False, False, Reason.ACTOR_REACHABLE),
        (O.SUCCEEDED, UNAVAILABLE, True, False, Reason.RECOVERED),
        (O.SUCCEEDED, UNAVAILABLE, False, True, Reason.RECOVERED),
        (O.SUCCEEDED, READY, True, True, None),
        (O.METHOD_FAILED, LAUNCHING, True, False, Reason.INIT_FAILED),
        (O.METHOD_FAILED, UNAVAILABLE, True, False, Reason.INIT_FAILED),
        (O.METHOD_FAILED, UNAVAILABLE, False, True, Reason.RECOVERED),
        (O.METHOD_FAILED, READY, True, True, None),
        (O.METHOD_FAILED, READY, False, True, None),
        (O.ACTOR_UNAVAILABLE, READY, False, True, Reason.ACTOR_UNAVAILABLE),
        (O.ACTOR_DIED, UNAVAILABLE, False, False, Reason.ACTOR_DIED),
        (O.CALL_LOST, LAUNCHING, True, False, None),
        (O.CALL_LOST, UNAVAILABLE, True, False, None),
    ],
)
def test_an_engine_moves_as_the_design_says(outcome, state, launches, launched, reason):
    assert reason_for(outcome, state=state, launches=launches, launched=launched) is reason

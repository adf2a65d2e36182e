"""The library's view of one adopted engine: its actor, its record, and the lock around the record."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from ray import ObjectRef
from ray.actor import ActorHandle

from enginefsm._calls.calls import Awaited, Awaiter, LaunchedIf
from enginefsm._calls.ledger import Ledger
from enginefsm._calls.plain_ref import PlainRef
from enginefsm._engine.resubmissions import Resubmissions
from enginefsm._ray import handles as _ray_handles
from enginefsm.fsm.incarnations import FIRST, INCARNATIONS_KEPT, Incarnation, Lineage
from enginefsm.fsm.outages import OutageTracker
from enginefsm.fsm.outcomes import Outcome, reason_for
from enginefsm.fsm.states import GIVEN_UP, STATES, EngineRecord, EngineState, LaunchStage, Reason, Transition, why
from enginefsm.policy import RetryPolicy

PLAIN_REFS_KEPT = 100  # for each engine
BY_CONSTRUCTOR = "__ray_ready__"
"""The launch method of an engine that its constructor makes ready. Every actor has this method of Ray's."""


@dataclasses.dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """One engine at one moment. All fields are read under one lock, so they agree."""

    engine: str
    labels: Mapping[str, str]
    incarnation: int
    actor_id: str
    state: EngineState
    reason: Reason
    since_s: float
    """When the engine entered the state, in seconds since the epoch."""
    spent_s: Mapping[EngineState, float]
    """Seconds spent in each earlier state, before `since_s`."""
    ever_ready: bool
    stage: LaunchStage | None
    """How far its launch is, or was when its deadline passed. None if this is not known."""
    past: tuple[Incarnation, ...]
    """The earlier incarnations of its name and their ends, oldest first."""
    detail: str = ""
    """What happened when the engine entered the state, in one line."""


def _nobody() -> None:
    return None


class ManagedEngine:
    """One incarnation of an engine. Thread-safe.

    The engine changes its state and emits the transition under its lock, so that its transitions keep their order. The
    monitor delivers them later, outside the lock.

    Args:
        handle: The actor.
        record: The record of the incarnation.
        launch: The method whose outcome says whether the engine launched.
        launched_if: The check for a launch that was called on the plain handle, if there is one.
        emit: Takes each transition. It must not block.
        awaiter: The monitor, which awaits the engine's calls.
        lineage: The earlier incarnations of the name.
    """

    __slots__ = (
        "_emit",
        "_lock",
        "_outages",
        "_plain_refs",
        "_record",
        "_resubmissions",
        "_wakers",
        "awaiter",
        "handle",
        "launch",
        "launch_called",
        "launched_if",
        "ledger",
        "lineage",
        "on_loop",
        "proxy",
        "stage",
    )

    def __init__(
        self,
        handle: ActorHandle[Any],
        record: EngineRecord,
        launch: str,
        launched_if: LaunchedIf | None,
        emit: Callable[[Transition], None],
        awaiter: Awaiter | None = None,
        lineage: Lineage = FIRST,
    ) -> None:
        self.handle = handle
        self.launch = launch
        self.launched_if = launched_if
        self.awaiter = awaiter
        self.lineage = lineage
        self.on_loop = _ray_handles.is_monitored(handle)
        """Whether the actor is an asyncio actor."""
        self.ledger = Ledger()
        self.launch_called = False
        """Whether the launch method was called through the engine, and not on the plain handle."""
        self.stage: LaunchStage | None = None
        """How far the launch was when Ray was last asked. None if this is not known or the engine is not launching.

        If the launch deadline ended the engine, it keeps its stage."""
        # A weak reference, because a cycle with the handle would keep the actor alive until a garbage collection.
        self.proxy: Callable[[], Any] = _nobody
        """Returns the engine that users hold, or None."""
        self._wakers: dict[Callable[[], None], None] = {}  # a set takes three times the memory
        self._plain_refs: dict[str, PlainRef] = {}
        self._record = record
        self._lock = threading.Lock()
        self._emit = emit
        self._outages = OutageTracker()
        self._resubmissions = Resubmissions()

    @property
    def name(self) -> str:
        """The name under which the engine was adopted."""
        return self._record.name

    @property
    def labels(self) -> Mapping[str, str]:
        """The labels with which the engine was adopted."""
        return self._record.labels

    @property
    def incarnation(self) -> int:
        """How many actors have had this name, this one included."""
        return self._record.incarnation

    @property
    def state(self) -> EngineState:
        """The engine's present state."""
        return STATES[self._record.state]

    @property
    def reason(self) -> Reason:
        """Why the engine entered its state."""
        return self._record.reason

    @property
    def detail(self) -> str:
        """What happened when the engine entered its state, in one line."""
        return self._record.detail

    @property
    def since(self) -> float:
        """When the engine entered its state, in seconds since the epoch."""
        return self._record.since_epoch_s

    @property
    def adopted_at(self) -> float:
        """When the engine was adopted, on the monotonic clock."""
        return self._record.adopted_at

    @property
    def ever_ready(self) -> bool:
        """Whether the engine is ready or has been ready before."""
        return self._record.ever_ready

    @property
    def has_launched(self) -> bool:
        """Whether the launch method has succeeded, whatever happened to the engine since."""
        return self._record.succeeded

    @property
    def is_launching(self) -> bool:
        """Whether the launch method has not succeeded yet, and the engine is not dead."""
        return not self.has_launched and self._record.state != EngineState.DEAD

    @property
    def launch_is_out(self) -> bool:
        """Whether the launch method was called, through the engine or by a plain reference that was awaited."""
        with self._lock:
            return self.launch_called or any(ref.launches for ref in self._plain_refs.values())

    @property
    def actor_id(self) -> str:
        """The id of the actor, in hex."""
        return _ray_handles.actor_id(self.handle)

    def __repr__(self) -> str:
        return f"Engine({self.name!r}, {self.state.value}, {self.handle!r})"

    def time_in_states(self) -> dict[EngineState, float]:
        """Return the seconds spent in each state so far."""
        with self._lock:
            return self._record.time_in_states(time.monotonic())

    def snapshot(self) -> EngineSnapshot:
        """Return the engine as it is now."""
        with self._lock:
            record = self._record
            return EngineSnapshot(
                record.name, record.labels, record.incarnation, self.actor_id, EngineState(record.state),
                record.reason, record.since_epoch_s, dict(record.spent), record.ever_ready, self.stage,
                self.lineage.past, record.detail,
            )  # fmt: skip

    def describe(self, *, detail: bool = True) -> str:
        """Return the engine in one line: name, labels, incarnation, state, the time in each state, and the detail."""
        given = " ".join(f"{key}={value}" for key, value in self.labels.items() if value)
        labels = f" ({given})" if given else ""
        times = ", ".join(f"{state} {seconds:.1f} s" for state, seconds in self.time_in_states().items())
        reason = why(self.reason, self.stage)
        line = f"engine {self.name!r}{labels} incarnation {self.incarnation}: {self.state} ({reason}); {times}"
        return f"{line}; {self.detail}" if detail and self.detail else line

    def history(self) -> list[Incarnation]:
        """Return the incarnations of the name and their ends, oldest first, this one last."""
        with self._lock:
            return [*self.lineage.past, Incarnation.of(self._record, self.actor_id)][-INCARNATIONS_KEPT:]

    def lineage_after(self) -> Lineage:
        """Return the `lineage` of the successor, after this engine died or was released."""
        with self._lock:
            return self.lineage.ended(self._record, self.actor_id)

    def reached(self, stage: LaunchStage | None) -> None:
        """Take in the stage of the launch, if the engine is still launching."""
        with self._lock:
            if self._record.state == EngineState.LAUNCHING:
                self.stage = stage

    def observe(
        self,
        outcome: Outcome,
        *,
        launches: bool,
        submitted_at: float,
        again: bool = False,
        probed: bool = False,
        detail: str = "",
        now: float | None = None,
    ) -> None:
        """Take in the outcome of one submission.

        Args:
            outcome: What Ray said.
            launches: Whether the call was of the launch method.
            submitted_at: When the call was submitted, on the monotonic clock.
            again: Whether the submission was a resubmission.
            probed: Whether the call was a health check that found the engine well.
            detail: What happened, in one line.
            now: The monotonic time. If it is None, the engine reads the clock.
        """
        with self._lock:
            now = time.monotonic() if now is None else now
            if outcome is Outcome.ACTOR_UNAVAILABLE:
                self._outages.failed(submitted_at, now, again=again)
            if outcome in (Outcome.SUCCEEDED, Outcome.METHOD_FAILED):
                if self.launch == BY_CONSTRUCTOR and self.launched_if is None and not self._record.succeeded:
                    launches, outcome = True, Outcome.SUCCEEDED  # any answer shows that the constructor has ended
                if launches and outcome is Outcome.SUCCEEDED:
                    self._record.succeeded = True
                is_back = self._outages.answered(submitted_at)
                if not is_back and (outcome is Outcome.SUCCEEDED or not launches):
                    return
                if self._record.reason is Reason.PROBE_FAILED and not probed and not launches:
                    return  # this answer proves nothing, because the failure is behind the actor
            reason = reason_for(outcome, state=self.state, launches=launches, launched=self._record.succeeded)
            if reason is not None:
                self._step(reason, detail, now)

    def suspect(self, reason: Reason, asked_at: float, detail: str = "") -> None:
        """Mark the engine unavailable after a failed health check that was sent at `asked_at` (monotonic)."""
        with self._lock:
            if self._step(reason, detail, time.monotonic()):
                self._outages.suspected(asked_at)

    def step(self, reason: Reason, detail: str = "") -> bool:
        """Move for `reason` if the present state has an edge for it. Return whether the engine moved."""
        with self._lock:
            moved = self._step(reason, detail, time.monotonic())
        self._wake_waits()
        return moved

    def give_up(self, reason: Reason, detail: str = "") -> bool:
        """End the engine for a watch's verdict, unless it is available again. Return whether it ended."""
        with self._lock:
            ended = self.state is EngineState.UNAVAILABLE and self._step(reason, detail, time.monotonic())
        self._wake_waits()
        return ended

    def give_up_launch(self, detail: str = "") -> None:
        """End the engine for the launch deadline, unless it has launched."""
        with self._lock:
            if not self._record.succeeded:
                self._step(Reason.LAUNCH_DEADLINE, detail, time.monotonic())
        self._wake_waits()

    def given_up_at(self) -> float:
        """Return the monotonic time at which the monitor gave the engine up, or infinity if it did not."""
        with self._lock:
            return self._record.since if self._record.reason in GIVEN_UP else math.inf

    def when_given_up(self, wake: Callable[[], None]) -> None:
        """Call `wake` when the monitor gives the engine up."""
        self._wakers[wake] = None

    def forget_waker(self, wake: Callable[[], None]) -> None:
        """Do not call `wake` any more."""
        self._wakers.pop(wake, None)

    def plan_resubmission(self, call: Awaited, policy: RetryPolicy, now: float) -> bool:
        """Queue a call that found the engine unavailable for resubmission. Return False if it is out of bounds."""
        with self._lock:
            return self._resubmissions.plan(call, self._outages.present, policy, now)

    def ask_again(self, call: Awaited, at: float) -> None:
        """Queue a check for the launch for resubmission at `at` (monotonic)."""
        with self._lock:
            self._resubmissions.put(call, at)

    def due(self, now: float) -> list[Awaited]:
        """Return the calls to submit again now, in the order in which they were made."""
        with self._lock:
            return self._resubmissions.due(now)

    def plain_ref(self, ref: ObjectRef[Any]) -> PlainRef:
        """Return the `PlainRef` of a plain reference of the actor. A launch or a failed reference keeps its object."""
        with self._lock:
            known = self._plain_refs.get(ref.hex())
        if known is not None:
            return known
        made = PlainRef(self, ref)
        with self._lock:
            known = self._plain_refs.get(made.given, made)
            if known.launches:
                self._remember(known)
            return known

    def lose(self, ref: PlainRef) -> None:
        """Note that a plain reference failed. Another look at it would say nothing new about the engine."""
        with self._lock:
            ref.lost = True
            self._remember(ref)

    def _remember(self, ref: PlainRef) -> None:
        self._plain_refs[ref.given] = ref
        while len(self._plain_refs) > PLAIN_REFS_KEPT:
            self._plain_refs.pop(next(iter(self._plain_refs)))

    def _step(self, reason: Reason, detail: str, now: float) -> bool:
        step = self._record.move(reason, now, time.time(), detail)
        if step is None:
            return False
        if reason is not Reason.LAUNCH_DEADLINE:
            self.stage = None
        self._emit(step)
        return True

    def _wake_waits(self) -> None:
        if self._record.reason in GIVEN_UP:
            for wake in list(self._wakers):
                wake()


def engine_of(call: Awaited) -> ManagedEngine:
    """Return the engine of a call. `Awaited` declares it as a `Callee`, so that calls do not import this module."""
    return cast("ManagedEngine", call.engine)

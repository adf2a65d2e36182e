"""One adopted engine as the library sees it: its actor, its record, and the lock around the record."""

from __future__ import annotations

import dataclasses
import math
import operator
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ray import ObjectRef
from ray.actor import ActorHandle

from enginefsm._calls.calls import Awaited, Awaiter, LaunchedIf, Ledger, PlainRef
from enginefsm._ray import handles as _ray_handles
from enginefsm.fsm.incarnations import FIRST, INCARNATIONS_KEPT, Incarnation, Lineage
from enginefsm.fsm.outcomes import Outcome, reason_for
from enginefsm.fsm.states import GIVEN_UP, STATES, EngineRecord, EngineState, LaunchStage, Reason, Transition, why
from enginefsm.policy import HELD_S, Outage, RetryPolicy

PLAIN_REFS_KEPT = 100  # an engine
BY_CONSTRUCTOR = "__ray_ready__"
"""The launch method of an engine that its constructor makes ready: Ray's own, which any actor answers."""


@dataclasses.dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """One engine at one moment: what is said here was true together."""

    engine: str
    labels: Mapping[str, str]
    incarnation: int
    actor_id: str
    state: EngineState
    reason: Reason
    since_s: float
    """When it entered the state, in seconds since the epoch."""
    spent_s: Mapping[EngineState, float]
    """Seconds spent in each state that it left, before `since_s`."""
    ever_ready: bool
    stage: LaunchStage | None
    """How far its launch is, or was when its deadline passed; None when that is not known."""
    past: tuple[Incarnation, ...]
    """What became of those before it under its name, oldest first."""
    detail: str = ""
    """What happened when it entered the state, in one line."""


def _nobody() -> None:
    return None


class ManagedEngine:
    """One incarnation of an engine. Thread-safe.

    Every change of state happens under the engine's lock and is emitted there, so that an engine's transitions keep
    their order. The monitor delivers them later, outside the lock.

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
        "_again_at",
        "_emit",
        "_lock",
        "_outage",
        "_plain_refs",
        "_record",
        "_resting",
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
        """How far the launch was when Ray was last asked; None if that is not known or the engine is not launching.
        An engine that the launch deadline ended keeps its stage."""
        # Not the object itself: in a cycle with the handle, it would keep the actor alive until a garbage collection.
        self.proxy: Callable[[], Any] = _nobody
        """Gives the engine that users hold, or None."""
        self._wakers: set[Callable[[], None]] = set()
        self._plain_refs: dict[str, PlainRef] = {}
        self._record = record
        self._lock = threading.Lock()
        self._emit = emit
        self._outage: Outage | None = None
        self._again_at = 0.0  # the moment at which all that rest are submitted again, monotonic
        self._resting: list[weakref.ref[Awaited]] = []

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
        """Where the engine is now."""
        return STATES[self._record.state]

    @property
    def reason(self) -> Reason:
        """Why the engine is there."""
        return self._record.reason

    @property
    def detail(self) -> str:
        """What happened when the engine got there, in one line."""
        return self._record.detail

    @property
    def since(self) -> float:
        """Since when the engine is there, in seconds since the epoch."""
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
        """Seconds spent in each state so far."""
        with self._lock:
            return self._record.time_in_states(time.monotonic())

    def snapshot(self) -> EngineSnapshot:
        """The engine as it is now."""
        with self._lock:
            record = self._record
            return EngineSnapshot(
                record.name, record.labels, record.incarnation, self.actor_id, EngineState(record.state),
                record.reason, record.since_epoch_s, dict(record.spent), record.ever_ready, self.stage,
                self.lineage.past, record.detail,
            )  # fmt: skip

    def describe(self, *, detail: bool = True) -> str:
        """Return the engine in one line: name, labels, incarnation, state, the time in each state, and the detail."""
        labels = " ".join(f"{key}={value}" for key, value in self.labels.items() if value)
        times = ", ".join(f"{state} {seconds:.1f} s" for state, seconds in self.time_in_states().items())
        reason = why(self.reason, self.stage)
        line = f"engine {self.name!r} ({labels}) incarnation {self.incarnation}: {self.state} ({reason}); {times}"
        return f"{line}; {self.detail}" if detail and self.detail else line

    def step(self, reason: Reason, detail: str = "") -> bool:
        """Move for `reason` if there is such an edge from here, and say whether the engine moved."""
        with self._lock:
            return self._step(reason, detail, time.monotonic())

    def when_given_up(self, wake: Callable[[], None]) -> None:
        """Have `wake` called when the monitor gives the engine up, under the engine's lock: it may only set a flag."""
        self._wakers.add(wake)

    def forget_waker(self, wake: Callable[[], None]) -> None:
        """Have `wake` not called any more."""
        self._wakers.discard(wake)

    def history(self) -> list[Incarnation]:
        """What became of each incarnation of its name, oldest first, up to this one and with it."""
        with self._lock:
            return [*self.lineage.past, Incarnation.of(self._record, self.actor_id)][-INCARNATIONS_KEPT:]

    def lineage_after(self) -> Lineage:
        """What its successor is to have as `lineage`, now that it has died or was released."""
        with self._lock:
            return self.lineage.ended(self._record, self.actor_id)

    def reached(self, stage: LaunchStage | None) -> None:
        """Take in how far its launch is, if it is launching still."""
        with self._lock:
            if self._record.state == EngineState.LAUNCHING:
                self.stage = stage

    def given_up_at(self) -> float:
        """When the monitor gave it up, its bounds spent, on the monotonic clock; infinity if it did not."""
        with self._lock:
            return self._record.since if self._record.reason in GIVEN_UP else math.inf

    def plain_ref(self, ref: ObjectRef[Any]) -> PlainRef:
        """What is known of a plain reference of its actor: one object, however often and by whomever it is awaited."""
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
        """The reference failed: looking at it again will say nothing new of the engine."""
        with self._lock:
            ref.lost = True
            self._remember(ref)

    def _remember(self, ref: PlainRef) -> None:
        self._plain_refs[ref.given] = ref
        while len(self._plain_refs) > PLAIN_REFS_KEPT:
            self._plain_refs.pop(next(iter(self._plain_refs)))

    def observe(
        self,
        outcome: Outcome,
        *,
        launches: bool,
        submitted_at: float,
        again: bool = False,
        probed: bool = False,
        detail: str = "",
    ) -> None:
        """Take in the outcome of one submission.

        Args:
            outcome: What Ray said.
            launches: Whether the call was of the launch method.
            submitted_at: When it was submitted, on the monotonic clock.
            again: Whether it was a resubmission.
            probed: Whether it was a health check that found all well.
            detail: What happened, in one line.
        """
        with self._lock:
            now = time.monotonic()
            held = again and now - submitted_at >= HELD_S
            if outcome is Outcome.ACTOR_UNAVAILABLE and (self._outage is None or held):
                self._outage = Outage(since=now)
            if outcome in (Outcome.SUCCEEDED, Outcome.METHOD_FAILED):
                if self.launch == BY_CONSTRUCTOR and self.launched_if is None and not self._record.succeeded:
                    launches, outcome = True, Outcome.SUCCEEDED  # whatever was answered, the constructor had ended
                if launches and outcome is Outcome.SUCCEEDED:
                    self._record.succeeded = True
                if self._outage is None or submitted_at >= self._outage.since:
                    self._outage = None
                elif outcome is Outcome.SUCCEEDED or not launches:
                    return  # asked before the break, and answered before it: no sign that the engine is back
                if self._record.reason is Reason.PROBE_FAILED and not probed and not launches:
                    return  # the actor answers, as it did all along: what fails is behind it
            reason = reason_for(outcome, state=self.state, launches=launches, launched=self._record.succeeded)
            if reason is not None:
                self._step(reason, detail, now)

    def suspect(self, reason: Reason, asked_at: float, detail: str = "") -> None:
        """Mark the engine unavailable after a failed health check that was sent at `asked_at` (monotonic)."""
        with self._lock:
            if self._step(reason, detail, time.monotonic()) and self._outage is None:
                self._outage = Outage(since=asked_at)

    def give_up(self, reason: Reason, detail: str = "") -> bool:
        """End the engine for a watch's verdict, unless it is back, and say whether it ended."""
        with self._lock:
            return self.state is EngineState.UNAVAILABLE and self._step(reason, detail, time.monotonic())

    def give_up_launch(self, detail: str = "") -> None:
        """End the engine for the launch deadline, unless it has launched."""
        with self._lock:
            if not self._record.succeeded:
                self._step(Reason.LAUNCH_DEADLINE, detail, time.monotonic())

    def plan_resubmission(self, policy: RetryPolicy, call: Awaited) -> bool:
        """Set when `call`, which found the engine unavailable, is to be submitted again; False when out of bounds.

        All that rest are submitted at one moment, so that the actor gets them in the order in which they were made.
        """
        with self._lock:
            now = time.monotonic()
            if self._outage is None:
                # Another thread's call was answered since: the engine is back already.
                call.resubmit_at = max(now, self._again_at if self._some_rest() else now)
                self._resting.append(weakref.ref(call))
                return True
            if call.failing is None or call.outage is not self._outage:
                call.outage, call.failing, call.attempts_in_outage = self._outage, Outage(since=now), 0
            if call.failing.exhausted(policy, call.attempts_in_outage, now):
                return False
            if self._again_at <= now or not self._some_rest():
                self._again_at = now + self._outage.next_pause_s(policy)
            call.resubmit_at = call.failing.in_budget(policy, self._again_at, now)
            call.attempts_in_outage += 1
            self._resting.append(weakref.ref(call))
            return True

    def _rest(self) -> Iterator[Awaited]:
        """The calls that rest, of those that somebody still holds."""
        held = (ref() for ref in self._resting)
        return (call for call in held if call is not None and call.resubmit_at is not None)

    def _some_rest(self) -> bool:
        return any(call.is_awaited for call in self._rest())

    def due(self, now: float) -> list[Awaited]:
        """Which of its calls that are awaited are to be submitted again by now, in the order of their making."""
        with self._lock:
            calls = list(self._rest())
            self._resting = [weakref.ref(call) for call in calls]
        due = (call for call in calls if call.is_due(now) and call.is_awaited)
        return sorted(due, key=operator.attrgetter("made_at"))

    def _step(self, reason: Reason, detail: str, now: float) -> bool:
        step = self._record.move(reason, now, time.time(), detail)
        if step is None:
            return False
        if reason is not Reason.LAUNCH_DEADLINE:
            self.stage = None
        self._emit(step)
        if reason in GIVEN_UP:
            for wake in list(self._wakers):
                wake()
        return True

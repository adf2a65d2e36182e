"""One adopted engine: its actor's handle, its record, and the lock around it."""

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
from ray.actor import ActorHandle, ActorMethod

from enginefsm._calls.calls import Awaited, EngineMethod, Ledger, PlainRef
from enginefsm._ray import handles as _ray_handles
from enginefsm.fsm.incarnations import FIRST, INCARNATIONS_KEPT, Incarnation, Lineage
from enginefsm.fsm.outcomes import Outcome, reason_for
from enginefsm.fsm.states import GIVEN_UP, STATES, EngineRecord, EngineState, LaunchStage, Reason, Transition, why
from enginefsm.policy import HELD_S, Outage, RetryPolicy

PLAIN_REFS_KEPT = 100  # an engine
BY_CONSTRUCTOR = "__ray_ready__"
"""The launch method of an engine that its constructor makes ready: Ray's own, which any actor answers."""

Probe = str | Callable[[Any], Any]
"""A method of the actor, by name, or a function of the actor instance, that says whether the launch succeeded."""


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


class MonitoredEngine:
    """An engine actor under a monitor. What it does not have itself, it forwards to the actor's handle.

    It pickles as the plain `ActorHandle`, and equals it. A method of the actor that has the name of something here is
    reached through `engine.handle`.
    """

    __slots__ = (
        "_again_at",
        "_lock",
        "_on_step",
        "_outage",
        "_plain_refs",
        "_record",
        "_resting",
        "_wakers",
        "handle",
        "launch",
        "launch_called",
        "ledger",
        "lineage",
        "on_loop",
        "owner",
        "probe",
        "stage",
    )

    def __init__(
        self,
        handle: ActorHandle[Any],
        record: EngineRecord,
        launch: str,
        probe: Probe | None,
        on_step: Callable[[Transition], None],
        owner: Any = None,
        lineage: Lineage = FIRST,
    ) -> None:
        self.owner = owner
        """The monitor that adopted it."""
        self.handle = handle
        """The plain handle, for what takes nothing else (`ray.kill`)."""
        self.launch = launch
        """The name of the method that launches it."""
        self.probe = probe
        """What says whether it launched, where a plain reference to the launch failed."""
        self.on_loop = _ray_handles.is_monitored(handle)
        """Whether its actor is an asyncio actor."""
        self.lineage = lineage
        """What became of those before it under its name."""
        self.ledger = Ledger()
        self.launch_called = False
        """Whether the launch method was called through this engine, and not on the plain handle."""
        self.stage: LaunchStage | None = None
        """How far its launch was when Ray was last asked; None when that is not known, or it is not launching. What
        the launch deadline ended, keeps it."""
        self._wakers: set[Callable[[], None]] = set()
        self._plain_refs: dict[str, PlainRef] = {}
        self._record = record
        self._lock = threading.Lock()
        self._on_step = on_step
        self._outage: Outage | None = None
        self._again_at = 0.0  # the moment at which all that rest are submitted again, monotonic
        self._resting: list[weakref.ref[Awaited]] = []

    @property
    def name(self) -> str:
        """The name it was adopted under."""
        return self._record.name

    @property
    def labels(self) -> Mapping[str, str]:
        """The labels it was adopted with."""
        return self._record.labels

    @property
    def incarnation(self) -> int:
        """How many actors have had this name, this one included."""
        return self._record.incarnation

    @property
    def state(self) -> EngineState:
        """Where it is now."""
        return STATES[self._record.state]

    @property
    def reason(self) -> Reason:
        """Why it is there."""
        return self._record.reason

    @property
    def state_since(self) -> float:
        """Since when it is there, in seconds since the epoch."""
        return self._record.since_epoch_s

    @property
    def launched_at(self) -> float:
        """When it was adopted, on the monotonic clock."""
        return self._record.launched_at

    @property
    def ever_ready(self) -> bool:
        """Whether it has been ready before, or is."""
        return self._record.ever_ready

    @property
    def has_launched(self) -> bool:
        """Whether its launch method has succeeded, whatever became of it since."""
        return self._record.succeeded

    @property
    def is_launching(self) -> bool:
        """Whether its launch method has not succeeded yet, though it is not dead: launching, or unavailable."""
        return not self.has_launched and self._record.state != EngineState.DEAD

    @property
    def launch_is_out(self) -> bool:
        """Whether its launch method was called, through this engine or by a plain reference that was awaited."""
        with self._lock:
            return self.launch_called or any(ref.launches for ref in self._plain_refs.values())

    @property
    def actor_id(self) -> str:
        """Its actor's id, in hex."""
        return _ray_handles.actor_id(self.handle)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.handle, name)
        return EngineMethod(self, attribute, {}) if isinstance(attribute, ActorMethod) else attribute

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.handle)})

    def __repr__(self) -> str:
        return f"MonitoredEngine({self.name!r}, {self.state.value}, {self.handle!r})"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, MonitoredEngine):
            return bool(self.handle == other.handle)
        return bool(self.handle == other) if isinstance(other, ActorHandle) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.handle)

    def __reduce__(self) -> tuple[Any, ...]:
        # A receiver that knows nothing of enginefsm gets the handle itself; Ray counts the handle as it passes.
        return operator.itemgetter(0), ((self.handle,),)

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
                self.lineage.past,
            )  # fmt: skip

    def describe(self) -> str:
        """The engine in one line: name, labels, incarnation, and the time in each state."""
        labels = " ".join(f"{key}={value}" for key, value in self.labels.items() if value)
        times = ", ".join(f"{state} {seconds:.1f} s" for state, seconds in self.time_in_states().items())
        reason = why(self.reason, self.stage)
        return f"engine {self.name!r} ({labels}) incarnation {self.incarnation}: {self.state} ({reason}); {times}"

    def step(self, reason: Reason) -> bool:
        """Move for `reason`, if there is such an edge from here; says whether it moved."""
        with self._lock:
            return self._step(reason, time.monotonic())

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
        self, outcome: Outcome, *, launches: bool, submitted_at: float, again: bool = False, probed: bool = False
    ) -> None:
        """Take in what came of a submission that was made at `submitted_at` (monotonic); `again` if not the first.

        `probed` says that it was the health monitor's, and that all is well.
        """
        with self._lock:
            now = time.monotonic()
            held = again and now - submitted_at >= HELD_S
            if outcome is Outcome.ACTOR_UNAVAILABLE and (self._outage is None or held):
                self._outage = Outage(since=now)
            if outcome in (Outcome.SUCCEEDED, Outcome.METHOD_FAILED):
                if self.launch == BY_CONSTRUCTOR and self.probe is None and not self._record.succeeded:
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
                self._step(reason, now)

    def suspect(self, reason: Reason, asked_at: float) -> None:
        """The health monitor, which asked at `asked_at` (monotonic), had no answer, or not the right one."""
        with self._lock:
            if self._step(reason, time.monotonic()) and self._outage is None:
                self._outage = Outage(since=asked_at)

    def give_up(self) -> bool:
        """End it for the health monitor, its bounds spent, unless it is back; says whether it did."""
        with self._lock:
            return self.state is EngineState.UNAVAILABLE and self._step(Reason.RETRY_EXHAUSTED, time.monotonic())

    def give_up_launch(self) -> None:
        """End it for the launch deadline, unless it has launched."""
        with self._lock:
            if not self._record.succeeded:
                self._step(Reason.LAUNCH_DEADLINE, time.monotonic())

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

    def _step(self, reason: Reason, now: float) -> bool:
        step = self._record.move(reason, now, time.time())
        if step is None:
            return False
        if reason is not Reason.LAUNCH_DEADLINE:
            self.stage = None
        # Queued here, under the lock, so that an engine's steps keep their order; delivered by whoever let go of it.
        self._on_step(step)
        if reason in GIVEN_UP:
            for wake in list(self._wakers):
                wake()
        return True

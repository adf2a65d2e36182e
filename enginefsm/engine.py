"""One adopted engine: its actor's handle, its record, and the lock around it."""

from __future__ import annotations

import dataclasses
import operator
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ray.actor import ActorHandle, ActorMethod

from enginefsm import _ray_handles
from enginefsm.calls import EngineMethod, Ledger
from enginefsm.outcomes import Outcome, reason_for
from enginefsm.policy import HELD_S, Outage, RetryPolicy
from enginefsm.states import EngineRecord, EngineState, Reason, Transition

Probe = str | Callable[[Any], Any]
"""A method of the actor, by name, or a function of the actor instance, that says whether the launch succeeded."""


class Retried(Protocol):
    """What is submitted again after its engine was found unavailable."""

    outage: Outage | None
    """The outage in which it failed last."""
    attempts_in_outage: int
    resubmit_at: float | None
    """When to submit it again, on the monotonic clock; None while a submission is out."""


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


class MonitoredEngine:
    """An engine actor under a monitor. What it does not have itself, it forwards to the actor's handle.

    It pickles as the plain `ActorHandle`, and equals it.
    """

    __slots__ = ("_lock", "_on_step", "_outage", "_record", "handle", "launch", "ledger", "probe", "spent_refs")

    def __init__(
        self,
        handle: ActorHandle[Any],
        record: EngineRecord,
        launch: str,
        probe: Probe | None,
        on_step: Callable[[Transition], None],
    ) -> None:
        self.handle = handle
        """The plain handle, for what takes nothing else (`ray.kill`)."""
        self.launch = launch
        """The name of the method that launches it."""
        self.probe = probe
        """What says whether it launched, where a plain reference to the launch failed."""
        self.ledger = Ledger()
        self.spent_refs: dict[str, Any] = {}
        """Plain references that failed once, by id; looking at one again says nothing new of the engine."""
        self._record = record
        self._lock = threading.Lock()
        self._on_step = on_step
        self._outage: Outage | None = None

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
        return EngineState(self._record.state)

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
    def is_launching(self) -> bool:
        """Whether its launch method has not succeeded yet, though it is not dead: launching, or unavailable."""
        return not self._record.succeeded and self._record.state != EngineState.DEAD

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
                record.reason, record.since_epoch_s, dict(record.spent), record.ever_ready,
            )  # fmt: skip

    def describe(self) -> str:
        """The engine in one line: name, labels, incarnation, and the time in each state."""
        labels = " ".join(f"{key}={value}" for key, value in self.labels.items() if value)
        times = ", ".join(f"{state} {seconds:.1f} s" for state, seconds in self.time_in_states().items())
        return f"engine {self.name!r} ({labels}) incarnation {self.incarnation}: {self.state} ({self.reason}); {times}"

    def step(self, reason: Reason) -> bool:
        """Move for `reason`, if there is such an edge from here; says whether it moved."""
        with self._lock:
            return self._step(reason, time.monotonic())

    def observe(self, outcome: Outcome, *, launches: bool, submitted_at: float) -> None:
        """Take in what came of a submission that was made at `submitted_at` (monotonic)."""
        with self._lock:
            now = time.monotonic()
            if outcome is Outcome.ACTOR_UNAVAILABLE and (self._outage is None or now - submitted_at >= HELD_S):
                self._outage = Outage(since=now)
            if outcome in (Outcome.SUCCEEDED, Outcome.METHOD_FAILED):
                if launches and outcome is Outcome.SUCCEEDED:
                    self._record.succeeded = True
                if self._outage is None or submitted_at >= self._outage.since:
                    self._outage = None
                elif outcome is Outcome.SUCCEEDED or not launches:
                    return  # asked before the break, and answered before it: no sign that the engine is back
            reason = reason_for(outcome, state=self.state, launches=launches, launched=self._record.succeeded)
            if reason is not None:
                self._step(reason, now)

    def plan_resubmission(self, policy: RetryPolicy, call: Retried) -> bool:
        """Set when `call`, which found the engine unavailable, is to be submitted again; False when out of bounds."""
        with self._lock:
            now = time.monotonic()
            if self._outage is None:
                # Another thread's call was answered since: the engine is back already.
                call.resubmit_at = now
                return True
            if call.outage is not self._outage:
                call.outage, call.attempts_in_outage = self._outage, 0
            if self._outage.exhausted(policy, call.attempts_in_outage, now):
                return False
            call.resubmit_at = self._outage.resubmit_at(policy, call.attempts_in_outage, now)
            call.attempts_in_outage += 1
            return True

    def _step(self, reason: Reason, now: float) -> bool:
        step = self._record.move(reason, now, time.time())
        if step is None:
            return False
        # Queued here, under the lock, so that an engine's steps keep their order; delivered by whoever let go of it.
        self._on_step(step)
        return True

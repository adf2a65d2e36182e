"""Collects what happened to each engine, from the monitor's events and the injector's reports."""

from __future__ import annotations

import dataclasses
import threading

from enginefsm import CallOutcome, EngineState, Event, Outcome, Reason, Transition
from enginefsm.cli.demo.faults import Injection
from enginefsm.cli.demo.options import FaultKind


@dataclasses.dataclass(slots=True)
class Life:
    """One incarnation of one engine."""

    name: str
    incarnation: int
    attempts: int = 1
    """The number of submissions of its launch method, with the one that is due."""
    injections: list[Injection] = dataclasses.field(default_factory=list)
    ready_after_s: float | None = None
    dead_after_s: float | None = None
    dead_because: Reason | None = None
    inits: int | None = None
    """How often its `init` ran, as the actor says; None if the demo did not ask it."""

    @property
    def title(self) -> str:
        """Return its name, with the incarnation if it is not the first."""
        return self.name if self.incarnation == 1 else f"{self.name} #{self.incarnation}"

    @property
    def was_killed(self) -> bool:
        """Return whether the demo killed it."""
        return any(each.hit and each.fault.kind is FaultKind.KILL for each in self.injections)

    @property
    def is_as_it_should_be(self) -> bool:
        """Return whether it died if the demo killed it, and otherwise came up with one run of `init`."""
        if not all(each.hit for each in self.injections):
            return False
        if self.was_killed:
            return self.dead_because is Reason.ACTOR_DIED
        return self.dead_because is None and self.ready_after_s is not None and self.inits == 1


class Board:
    """A listener of the monitor, for calls from any thread. It keeps lives in the order in which they began."""

    def __init__(self, launch: str) -> None:
        self._launch = launch
        self._lives: dict[tuple[str, int], Life] = {}
        self._newest: dict[str, Life] = {}
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        with self._lock:
            if isinstance(event, Transition):
                self._move(event)
            elif isinstance(event, CallOutcome) and event.method == self._launch:
                self._count(event)

    def injected(self, injection: Injection) -> None:
        """Take in one fault."""
        with self._lock:
            self._lives[injection.fault.engine, injection.incarnation].injections.append(injection)

    def life(self, name: str, incarnation: int) -> Life:
        """Return one life."""
        with self._lock:
            return self._lives[name, incarnation]

    def lives(self) -> list[Life]:
        """Return all lives."""
        with self._lock:
            return list(self._lives.values())

    def _move(self, step: Transition) -> None:
        if step.from_state is None:
            life = Life(step.engine, step.incarnation)
            self._lives[step.engine, step.incarnation] = self._newest[step.engine] = life
            return
        life = self._lives[step.engine, step.incarnation]
        if step.first_ready:
            life.ready_after_s = step.age_s
        if step.to_state is EngineState.DEAD:
            life.dead_after_s, life.dead_because = step.age_s, step.reason

    def _count(self, outcome: CallOutcome) -> None:
        due = outcome.outcome is Outcome.ACTOR_UNAVAILABLE
        self._newest[outcome.engine].attempts = outcome.attempt + 1 + due

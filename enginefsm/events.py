"""The events that a monitor tells its listeners. A listener is a callable that takes one event."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from enginefsm.fsm.outcomes import Outcome
from enginefsm.fsm.states import Transition
from enginefsm.fsm.verdicts import Finding, ServerAnswer, VerdictHeld


class CallOutcome(NamedTuple):
    """One submission of a call was answered, or failed."""

    engine: str
    labels: Mapping[str, str]
    method: str
    outcome: Outcome
    attempt: int
    """0 for the first submission, and the number of the resubmission otherwise."""
    took_s: float
    """From the submission to its outcome."""
    probe: bool
    """Whether the submission asked if the launch had succeeded."""
    incarnation: int
    """The incarnation of the engine."""
    at_s: float
    """When it came, in seconds since the epoch."""


class WatchBegan(NamedTuple):
    """A watch begins to check an engine, or the successor of one."""

    engine: str
    labels: Mapping[str, str]
    incarnation: int
    at_s: float
    """When: seconds since the epoch."""


class HealthChecked(NamedTuple):
    """A watch has checked an actor."""

    engine: str
    labels: Mapping[str, str]
    incarnation: int
    finding: Finding
    server: ServerAnswer
    """The last answer of the engine's server."""
    outcome: Outcome | None
    """What the probe was answered; None while it has no answer."""
    took_s: float | None
    """From the probe to its answer; None while it has none."""
    at_s: float
    """When: seconds since the epoch."""


Event = Transition | CallOutcome | WatchBegan | HealthChecked | VerdictHeld
Listener = Callable[[Event], None]

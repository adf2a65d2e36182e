"""The events that a monitor tells its listeners. A listener is a callable that takes one event."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from enginefsm.fsm.outcomes import Outcome
from enginefsm.fsm.states import Transition
from enginefsm.fsm.verdicts import Finding, ServerAnswer, VerdictHeld


class CallOutcome(NamedTuple):
    """The outcome of one submission of a call."""

    engine: str
    labels: Mapping[str, str]
    method: str
    outcome: Outcome
    attempt: int
    """0 for the first submission, else the number of the resubmission."""
    took_s: float
    """Seconds from the submission to its outcome."""
    probe: bool
    """Whether the submission asked if the launch had succeeded."""
    incarnation: int
    """The incarnation of the engine."""
    at_s: float
    """When the outcome came, in seconds since the epoch."""


class WatchBegan(NamedTuple):
    """A watch begins to check an engine or its successor."""

    engine: str
    labels: Mapping[str, str]
    incarnation: int
    at_s: float
    """When the watch began, in seconds since the epoch."""


class HealthChecked(NamedTuple):
    """A watch checked an actor."""

    engine: str
    labels: Mapping[str, str]
    incarnation: int
    finding: Finding
    server: ServerAnswer
    """The last answer of the engine's server."""
    outcome: Outcome | None
    """The outcome of the probe, or None if it had no answer yet."""
    took_s: float | None
    """Seconds from the probe to its answer, or None if it had none yet."""
    at_s: float
    """When the watch reported the check, in seconds since the epoch."""


Event = Transition | CallOutcome | WatchBegan | HealthChecked | VerdictHeld
Listener = Callable[[Event], None]

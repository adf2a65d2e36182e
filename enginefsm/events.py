"""What a monitor tells its listeners. A listener is any callable that takes one event."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from enginefsm.fsm.outcomes import Outcome
from enginefsm.fsm.states import Transition


class CallOutcome(NamedTuple):
    """One submission of a call was answered, or failed."""

    engine: str
    labels: Mapping[str, str]
    method: str
    outcome: Outcome
    attempt: int
    """0 for the first submission; above it, the re-await of that number."""
    took_s: float
    """From the submission to its outcome."""
    probe: bool
    """Whether the call was a probe."""
    incarnation: int
    """Of the engine."""
    at_s: float
    """When: seconds since the epoch."""


Event = Transition | CallOutcome
Listener = Callable[[Event], None]

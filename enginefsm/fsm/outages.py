"""Outages: since when an engine gives no answer, and when its calls are submitted again.

Pure: the caller passes the monotonic time in, and holds the engine's lock.

An outage belongs to the engine. It begins with the first failure and ends with the first answer to a call that was
submitted after it began. Each call that fails in it has a budget of its own, which runs from the call's first failure.
"""

from __future__ import annotations

import dataclasses

from enginefsm.policy import RetryPolicy

# If Ray leaves a submission standing for so long, the actor accepted it: Ray reports a refused or broken connection
# within 2 s, and an unanswered one after 20 s, when gRPC gives up connecting. If such a submission fails after all,
# that is a new outage with a budget of its own. The time for which it stood is not held against the engine.
HELD_S = 30.0


@dataclasses.dataclass(slots=True, eq=False)
class Outage:
    """One time in which an engine gives no answer."""

    since: float
    pauses: int = 0
    """How many times the calls of the engine have paused together before they were submitted again."""

    def next_pause_s(self, policy: RetryPolicy) -> float:
        """Return how long to pause now. Each pause of an outage may be longer than the last."""
        self.pauses += 1
        return policy.pause_s(self.pauses)


@dataclasses.dataclass(slots=True)
class CallOutage:
    """One call's part of an outage."""

    outage: Outage
    since: float
    """When the call failed first in it."""
    attempts: int = 0
    """How many times the call was submitted again in it."""

    def exhausted(self, policy: RetryPolicy, now: float) -> bool:
        """Return whether one more resubmission is out of bounds."""
        if policy.max_attempts is not None and self.attempts >= policy.max_attempts:
            return True
        return now - self.since >= policy.budget_s

    def in_budget(self, policy: RetryPolicy, at: float, now: float) -> float:
        """Return when to resubmit instead of at `at`: early enough to use the last of the budget."""
        return min(at, max(now, self.since + policy.budget_s))


class OutageTracker:
    """The outage in which an engine is, if it is in one. There is no other place that knows."""

    __slots__ = ("present",)

    def __init__(self) -> None:
        self.present: Outage | None = None

    def failed(self, submitted_at: float, now: float, *, again: bool) -> None:
        """Take in that a submission found the engine unavailable. `again` says that it was a resubmission."""
        held = again and now - submitted_at >= HELD_S
        if self.present is None or held:
            self.present = Outage(since=now)

    def suspected(self, asked_at: float) -> None:
        """Take in that a health check failed which was sent at `asked_at`."""
        if self.present is None:
            self.present = Outage(since=asked_at)

    def answered(self, submitted_at: float) -> bool:
        """End the outage, if the answer is to a submission from after its begin, and return whether none is left.

        An answer to an earlier submission was sent before the break. It is no sign that the engine is back.
        """
        if self.present is not None and submitted_at >= self.present.since:
            self.present = None
        return self.present is None

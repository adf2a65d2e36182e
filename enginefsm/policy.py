"""How long, and how often, an engine that cannot be reached is tried again, and one that died is replaced.

Pure: whoever asks passes the monotonic time in.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Literal

# The shortest pause before a resubmission. Full jitter alone may draw nothing, and hammer a node that is ill.
FLOOR_S = 0.05

# A submission that Ray leaves standing for so long was accepted: a refused or broken connection is reported within
# 2 s, an unanswered one when gRPC gives up connecting, after 20 s. When such a submission fails after all, that is
# a new outage with a budget of its own; the time for which it stood is not held against the engine.
HELD_S = 30.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Bounds on the re-await of an engine that Ray reports unavailable.

    The pause before the n-th resubmission is drawn evenly between `FLOOR_S` and `base_s * factor**(n-1)`, capped at
    `cap_s`: "full jitter", after Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015. With
    `jitter="none"` it is the upper end itself.

    Raises ValueError for values that make no sense; the message names the field.
    """

    budget_s: float = 120.0
    """Seconds an outage may last. A success ends the outage; the next one has the whole budget again."""
    max_attempts: int | None = None
    """Resubmissions of one call in one outage; None leaves it to the budget."""
    base_s: float = 0.5
    factor: float = 1.6
    cap_s: float = 15.0
    jitter: Literal["full", "none"] = "full"
    launch_deadline_s: float | None = None
    """Seconds from `adopt` to the end of the launch method; None for no deadline: a cluster that scales up may
    wait long for its nodes."""

    def __post_init__(self) -> None:
        def check(field: str, holds: bool, what: str) -> None:
            if not holds:
                raise ValueError(f"RetryPolicy: {field} must be {what}, not {getattr(self, field)!r}")

        check("budget_s", is_finite(self.budget_s) and self.budget_s >= 0, "a number of seconds, 0 or more")
        check(
            "max_attempts",
            self.max_attempts is None or (is_whole(self.max_attempts) and self.max_attempts >= 0),
            "None or a whole number, 0 or more",
        )
        check("base_s", is_finite(self.base_s) and self.base_s > 0, "a number of seconds above 0")
        check("factor", is_finite(self.factor) and self.factor >= 1, "a number, 1 or more")
        check("cap_s", is_finite(self.cap_s) and self.cap_s >= self.base_s, "a number of seconds, base_s or more")
        check("jitter", self.jitter in ("full", "none"), '"full" or "none"')
        check(
            "launch_deadline_s",
            self.launch_deadline_s is None or (is_finite(self.launch_deadline_s) and self.launch_deadline_s > 0),
            "None or a number of seconds above 0",
        )

    def pause_s(self, attempt: int) -> float:
        """Seconds to wait before resubmission number `attempt`, which counts from 1."""
        # In logarithms, since the power of a large attempt overflows.
        grown = math.log(self.base_s) + (attempt - 1) * math.log(self.factor)
        longest = self.cap_s if grown >= math.log(self.cap_s) else min(self.cap_s, math.exp(grown))
        return longest if self.jitter == "none" else random.uniform(min(FLOOR_S, longest), longest)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RestartCap:
    """How many restarts of one engine are allowed within any `within_s` seconds.

    Raises ValueError for values that make no sense; the message names the field.
    """

    restarts: int = 3
    within_s: float = 3600.0

    def __post_init__(self) -> None:
        if not (is_whole(self.restarts) and self.restarts >= 0):
            raise ValueError(f"RestartCap: restarts must be a whole number, 0 or more, not {self.restarts!r}")
        if not (is_finite(self.within_s) and self.within_s > 0):
            raise ValueError(f"RestartCap: within_s must be a number of seconds above 0, not {self.within_s!r}")

    def allows_in_s(self, restarted_at: Sequence[float], now: float) -> float:
        """Seconds until one more restart is allowed: 0 when it is by now, infinity when none ever is.

        `restarted_at` are the monotonic times of the restarts so far, oldest first; the newest `restarts` suffice.
        """
        if len(restarted_at) < self.restarts:
            return 0.0
        return math.inf if self.restarts == 0 else max(0.0, restarted_at[-self.restarts] + self.within_s - now)


def is_finite(value: object) -> bool:
    """Whether it is a number, and a finite one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclasses.dataclass(slots=True)
class Outage:
    """A time in which an engine, or one call to it, got no answer: from the first failure until one comes."""

    since: float
    """Monotonic."""
    pauses: int = 0
    """How many times the calls of the engine have paused together before they were submitted again."""

    def exhausted(self, policy: RetryPolicy, attempts: int, now: float) -> bool:
        """Whether one more resubmission, after `attempts` of them in this outage, is out of bounds."""
        if policy.max_attempts is not None and attempts >= policy.max_attempts:
            return True
        return now - self.since >= policy.budget_s

    def next_pause_s(self, policy: RetryPolicy) -> float:
        """Seconds to pause now; each pause of an outage may be longer than the last."""
        self.pauses += 1
        return policy.pause_s(self.pauses)

    def in_budget(self, policy: RetryPolicy, at: float, now: float) -> float:
        """When to resubmit, if that is to be `at`: in time to use the last of the budget."""
        return min(at, max(now, self.since + policy.budget_s))

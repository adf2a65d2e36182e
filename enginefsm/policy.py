"""The bounds: how long and how often calls are submitted again, and how often an engine is replaced.

This module reads no clock. The caller passes the monotonic time in.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Literal

# The shortest pause before a resubmission. Full jitter alone may draw 0, and that would overload an ill node.
FLOOR_S = 0.05


def check_seconds(what: str, value: object, *, above: float | None = None, least: float = 0.0) -> None:
    """Raise ValueError unless `value` is a finite number of seconds: `least` or more, or more than `above` if given."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and (value >= least if above is None else value > above):  # type: ignore[operator]
        return
    bound = f"{least:g} or more" if above is None else f"more than {above:g}"
    raise ValueError(f"{what} must be a number of seconds, {bound}, not {value!r}")


def check_whole(what: str, value: object, *, least: int) -> None:
    """Raise ValueError unless `value` is a whole number, `least` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{what} must be a whole number, {least} or more, not {value!r}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """The bounds within which calls to an unavailable engine are submitted again.

    The pause before the n-th resubmission is drawn evenly between `FLOOR_S` and `base_s * factor**(n-1)`, capped at
    `cap_s`. This is "full jitter" as Marc Brooker describes it in "Exponential Backoff And Jitter", AWS Architecture
    Blog, 2015. With `jitter="none"` the pause is the upper end itself.

    Raises ValueError for a value that makes no sense. The message names the field.
    """

    budget_s: float = 120.0
    """Seconds for which one outage may last. An answer ends the outage, and the next one has the whole budget."""
    max_attempts: int | None = None
    """How many times one call is submitted again in one outage. With None the budget alone decides."""
    base_s: float = 0.5
    factor: float = 1.6
    cap_s: float = 15.0
    jitter: Literal["full", "none"] = "full"
    launch_deadline_s: float | None = None
    """Seconds from `adopt` to the end of the launch method. The default is no deadline, because a cluster that scales
    up may wait long for its nodes."""

    def __post_init__(self) -> None:
        check_seconds("RetryPolicy: budget_s", self.budget_s)
        if self.max_attempts is not None:
            check_whole("RetryPolicy: max_attempts", self.max_attempts, least=0)
        check_seconds("RetryPolicy: base_s", self.base_s, above=0)
        check_seconds("RetryPolicy: cap_s", self.cap_s, least=self.base_s)
        if (
            not isinstance(self.factor, (int, float))
            or isinstance(self.factor, bool)
            or not 1 <= self.factor < math.inf
        ):
            raise ValueError(f"RetryPolicy: factor must be a number, 1 or more, not {self.factor!r}")
        if self.jitter not in ("full", "none"):
            raise ValueError(f'RetryPolicy: jitter must be "full" or "none", not {self.jitter!r}')
        if self.launch_deadline_s is not None:
            check_seconds("RetryPolicy: launch_deadline_s", self.launch_deadline_s, above=0)

    def pause_s(self, attempt: int) -> float:
        """Return the pause before resubmission number `attempt`, which counts from 1."""
        # The logarithms avoid the overflow of the power for a large `attempt`.
        grown = math.log(self.base_s) + (attempt - 1) * math.log(self.factor)
        longest = self.cap_s if grown >= math.log(self.cap_s) else min(self.cap_s, math.exp(grown))
        return longest if self.jitter == "none" else random.uniform(min(FLOOR_S, longest), longest)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RestartCap:
    """How many restarts of one engine are allowed within any `within_s` seconds.

    Raises ValueError for a value that makes no sense. The message names the field.
    """

    restarts: int = 3
    within_s: float = 3600.0

    def __post_init__(self) -> None:
        check_whole("RestartCap: restarts", self.restarts, least=0)
        check_seconds("RestartCap: within_s", self.within_s, above=0)

    def allows_in_s(self, restarted_at: Sequence[float], now: float) -> float:
        """Return the seconds until one more restart is allowed: 0 if it is allowed now, infinity if it never is.

        `restarted_at` holds the monotonic times of the restarts so far, oldest first. The newest `restarts` are enough.
        """
        if len(restarted_at) < self.restarts:
            return 0.0
        return math.inf if self.restarts == 0 else max(0.0, restarted_at[-self.restarts] + self.within_s - now)

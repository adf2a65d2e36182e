"""The exceptions of enginefsm. Those that a wait raises are also the Ray exceptions that callers catch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from enginefsm.fsm.incarnations import Incarnation
from enginefsm.policy import RestartCap


class RetryExhaustedError(ActorUnavailableError):
    """The monitor could not reach an engine within the bounds. If a call failed, `__cause__` is Ray's last error.

    From then on the monitor treats the engine as dead, whatever its actor does.
    """

    def __init__(self, message: str, actor_id: str) -> None:
        # Ray's constructor takes the binary id, and builds a message of its own.
        super(ActorUnavailableError, self).__init__(actor_id=actor_id, error_msg=message)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.error_msg, self.actor_id), {"__notes__": getattr(self, "__notes__", [])}


class LaunchDeadlineError(GetTimeoutError):
    """Engines did not end their launch method within the policy's `launch_deadline_s`. The message names each."""


class UnsupportedRayError(ImportError):
    """This Ray lacks a name that enginefsm reads. The message tells both, and the releases that are tested."""


class ActorRestartedError(ActorDiedError):
    """Ray restarted the actor of an engine. The old process took with it what the launch method had set up."""

    def __init__(self, message: str, actor_id: str) -> None:
        super(ActorDiedError, self).__init__(actor_id=actor_id, error_msg=message)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.error_msg, self.actor_id), {"__notes__": getattr(self, "__notes__", [])}


class RestartCapError(RuntimeError):
    """An engine was replaced as often as the monitor's `RestartCap` allows, so `adopt` refused another actor."""

    def __init__(self, engine: str, history: Sequence[Incarnation], cap: RestartCap, allowed_in_s: float) -> None:
        self.engine = engine
        """The name of the engine."""
        self.history = tuple(history)
        """What became of each incarnation, oldest first."""
        self.cap = cap
        self.allowed_in_s = allowed_in_s
        """Seconds until the cap allows one more restart. Infinity if it never does."""
        super().__init__(engine, history, cap, allowed_in_s)

    def __str__(self) -> str:
        ends = ", ".join(f"#{one.incarnation} {one.reason}" for one in self.history)
        when = "" if math.isinf(self.allowed_in_s) else f"; one more is allowed in {self.allowed_in_s:.0f} s"
        return (
            f"engine {self.engine!r} was not adopted: restart_cap allows {self.cap.restarts} restarts within "
            f"{self.cap.within_s:g} s{when}. Its incarnations ended by: {ends}. Find out why it does not stay up, and "
            f"go on without it. Kill the actor that was not adopted. Call may_restart({self.engine!r}) before you "
            f"create one."
        )

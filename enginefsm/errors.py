"""The exceptions of enginefsm's own. Those that a wait raises are also the Ray exceptions that callers catch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from enginefsm.fsm.incarnations import Incarnation
from enginefsm.policy import RestartCap


class RetryExhaustedError(ActorUnavailableError):
    """An engine could not be reached within the bounds. If a call failed, `__cause__` is Ray's last error.

    From here on the engine is dead to the monitor, whatever its actor does.
    """

    def __init__(self, message: str, actor_id: str) -> None:
        # Ray's own constructor would make a message of its own from the binary id.
        super(ActorUnavailableError, self).__init__(actor_id=actor_id, error_msg=message)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.error_msg, self.actor_id), {"__notes__": getattr(self, "__notes__", [])}


class LaunchDeadlineError(GetTimeoutError):
    """Engines had not ended their launch method by the policy's `launch_deadline_s`. The message names each of them."""


class UnsupportedRayError(ImportError):
    """This Ray lacks something that enginefsm reads of it. The message names both, and the releases that are tested."""


class ActorRestartedError(ActorDiedError):
    """Ray restarted the actor under an engine. What the launch method had set up went with the old process."""

    def __init__(self, message: str, actor_id: str) -> None:
        super(ActorDiedError, self).__init__(actor_id=actor_id, error_msg=message)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.error_msg, self.actor_id), {"__notes__": getattr(self, "__notes__", [])}


class RestartCapError(RuntimeError):
    """An engine has been replaced as often as the monitor's `RestartCap` allows, and was not adopted again."""

    def __init__(self, engine: str, history: Sequence[Incarnation], cap: RestartCap, allowed_in_s: float) -> None:
        self.engine = engine
        """The name of the engine."""
        self.history = tuple(history)
        """What became of each incarnation, oldest first."""
        self.cap = cap
        self.allowed_in_s = allowed_in_s
        """Seconds until the cap allows one more restart, or infinity."""
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

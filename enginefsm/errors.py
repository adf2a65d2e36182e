"""What the library raises of its own. Each is also the Ray exception that callers already catch."""

from __future__ import annotations

from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError


class RetryExhaustedError(ActorUnavailableError):
    """An engine could not be reached within the policy's bounds; its `__cause__` is Ray's last error.

    The engine is dead to the monitor from here on, whatever its actor does.
    """

    def __init__(self, message: str, actor_id: str) -> None:
        # Ray's own constructor words a message of its own around the binary id.
        super(ActorUnavailableError, self).__init__(actor_id=actor_id, error_msg=message)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.error_msg, self.actor_id), {"__notes__": getattr(self, "__notes__", [])}


class LaunchDeadlineError(GetTimeoutError):
    """Engines had not ended their launch method by the policy's `launch_deadline_s`; it names each of them."""


class ActorRestartedError(ActorDiedError):
    """Ray restarted the actor under an engine: what its launch method had set up is gone with the old process."""

    def __init__(self, message: str, actor_id: str) -> None:
        super(ActorDiedError, self).__init__(actor_id=actor_id, error_msg=message)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.error_msg, self.actor_id), {"__notes__": getattr(self, "__notes__", [])}

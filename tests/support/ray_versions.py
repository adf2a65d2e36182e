"""Where the Ray versions that enginefsm supports differ for tests: each difference has a name here, and only here."""

from __future__ import annotations

import ray

RAY = tuple(int(part) for part in ray.__version__.split(".")[:2])
"""Ray's version, major and minor."""

CALLS_RAY_SHUTDOWN = RAY >= (2, 50)
"""Whether Ray calls the `__ray_shutdown__` of an actor that ends in good order."""

EXCEPTIONS_CAME = {
    "UnserializableException": (2, 50),
    "AuthenticationError": (2, 52),
    "ActorAlreadyExistsError": (2, 53),
    "ActorHandleNotFoundError": (2, 54),
    "RayDirectTransportError": (2, 54),
    "StreamingGeneratorReplayInconsistentError": (2, 57),
}
"""The first Ray that has an exception class, for classes that Ray 2.47 lacks."""

EXCEPTIONS_WENT = {
    "ObjectReconstructionFailedLineageEvictedError": (2, 54),
    "ObjectReconstructionFailedMaxAttemptsExceededError": (2, 54),
}
"""The first Ray that lacks an exception class, for classes that Ray 2.47 has."""


def has_exception(name: str) -> bool:
    """Return whether this Ray defines the exception class `name`, which some supported Ray defines."""
    return EXCEPTIONS_CAME.get(name, RAY) <= RAY < EXCEPTIONS_WENT.get(name, (3, 0))

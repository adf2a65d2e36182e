"""Ray's gRPC keepalive, which finds a link between two hosts that has gone silent.

Ray's gRPC client asks an idle connection for a sign of life every 300 s. A link that drops packets without a word for
25 s while an engine launches can then delay the result by minutes. With the two variables below the same fault costs
seconds. docs/silent-links.md has the figures, `tests/benchmarks/silent_link.py` measures them.

The variables count in the process that makes the calls. Ray reads them when it is imported, and again in `ray.init`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray._raylet import Config  # type: ignore[attr-defined]  # a Cython class

logger = logging.getLogger("enginefsm")

PING_EVERY_S = 10.0
"""How long a connection may be idle before Ray's gRPC client asks it for a sign of life."""
ANSWER_WITHIN_S = 10.0
"""How long the client waits for that sign before it breaks the connection."""

VARIABLES: Mapping[str, str] = {
    "RAY_grpc_client_keepalive_time_ms": f"{PING_EVERY_S * 1000:.0f}",
    "RAY_grpc_client_keepalive_timeout_ms": f"{ANSWER_WITHIN_S * 1000:.0f}",
}

_lock = threading.Lock()
_warned = False


def runtime_env(base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a Ray `runtime_env` that turns on Ray's gRPC keepalive, added to `base`.

    Give it to the actor that awaits the engines (`.options(runtime_env=...)`), or to the whole job
    (`ray.init(runtime_env=...)`). Variables that `base` sets already keep their values.

    A `runtime_env` does not reach the driver. A driver that awaits engines sets the same variables in its own
    environment before `ray.init`: `os.environ.update(enginefsm.runtime_env()["env_vars"])`.

    Raises:
        TypeError: `base` or its `env_vars` is not a mapping.
    """
    given = {} if base is None else base
    if not isinstance(given, Mapping) or not isinstance(given.get("env_vars") or {}, Mapping):
        raise TypeError(f"runtime_env() takes a runtime_env, a mapping whose env_vars is a mapping, not {base!r}")
    return {**given, "env_vars": {**VARIABLES, **(given.get("env_vars") or {})}}


NEVER_S = -1.0


def silent_link_s() -> float:
    """Return how soon this process's Ray notices a silent link, in seconds; `NEVER_S` (-1) if its keepalive is off."""
    time_ms, timeout_ms = Config.grpc_client_keepalive_time_ms(), Config.grpc_client_keepalive_timeout_ms()
    # Ray turns the keepalive on for a time above 0 only.
    return float(time_ms + timeout_ms) / 1000 if time_ms > 0 else NEVER_S


def is_soon(silent_link_s: float) -> bool:
    """Return whether a silent link is noticed within the times of `VARIABLES`."""
    return 0 <= silent_link_s <= PING_EVERY_S + ANSWER_WITHIN_S


def finds_silent_links() -> bool:
    """Return whether this process's Ray breaks a silent connection within the times of `VARIABLES`.

    The answer may change in `ray.init`, which reads the variables again.
    """
    return is_soon(silent_link_s())


def would_warn() -> bool:
    """Return whether `warn_of_silent_links` still has something to say in this process."""
    return not (_warned or finds_silent_links())


def warn_of_silent_links(nodes: Iterable[str | None]) -> None:
    """Log one line in this process's life if an engine is on another node and a silent link would go unnoticed.

    Args:
        nodes: The ids (hex) of the nodes that engines are on, None for an engine that has no node yet.
    """
    global _warned
    if not would_warn():
        return
    known = {node for node in nodes if node is not None}
    if not known or known == {ray.get_runtime_context().get_node_id()}:
        return
    with _lock:
        if _warned:
            return
        _warned = True
    logger.warning(
        "Engines run on other nodes, and Ray %s that the link to them is silent. "
        "Set %s before ray.init, or give this actor runtime_env=enginefsm.runtime_env(). See docs/silent-links.md",
        "never notices" if silent_link_s() == NEVER_S else f"may need {silent_link_s():g} s to notice",
        " and ".join(f"{name}={value}" for name, value in VARIABLES.items()),
    )

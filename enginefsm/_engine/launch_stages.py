"""Asks Ray for the launch stages of engines. A stage tells people what a slow launch is waiting for.

Stages move no engine. A thread of its own asks Ray about all launching engines at once. The GCS may be frozen or gone,
and neither a caller nor its event loop may wait for it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable

from enginefsm._engine.managed import ManagedEngine
from enginefsm._ray import control_plane, keepalive
from enginefsm._ray import ends as _ends
from enginefsm._ray.control_plane import Creation
from enginefsm.fsm.states import EngineState, LaunchStage

EVERY_S = 5.0
"""How often the exporters have Ray asked, in seconds."""
FRESH_S = 1.0
"""For a message, Ray is asked if its last answer is older than this many seconds."""
ANSWER_S = 1.0
"""How long Ray may take to answer, in seconds. If it does not answer, nobody asks it again within `EVERY_S`."""


class LaunchStages:
    """Tells each launching engine of `engines()` which stage it has reached. Thread-safe."""

    def __init__(self, engines: Callable[[], Iterable[ManagedEngine]]) -> None:
        self._engines = engines
        self._lock = threading.Lock()  # guards all fields below
        self._asking: threading.Thread | None = None
        self._asked_at = -math.inf
        self._answered = True

    def look(self, wait_s: float, *, fresh_s: float = FRESH_S) -> None:
        """Ask Ray, unless it was asked within `fresh_s`, and wait for its answer for at most `wait_s` seconds."""
        with self._lock:
            asking = self._asking
            if asking is None or not asking.is_alive():
                now = time.monotonic()
                if now - self._asked_at < (fresh_s if self._answered else EVERY_S):
                    return
                launching = [engine for engine in self._engines() if engine.state is EngineState.LAUNCHING]
                if not launching:
                    return
                asking = threading.Thread(target=self._ask, args=(launching,), name="enginefsm-stages", daemon=True)
                try:
                    asking.start()
                except RuntimeError:  # the interpreter is ending or has too many threads, and stages may stay unknown
                    return
                self._asking, self._asked_at = asking, now
        asking.join(wait_s)

    def _ask(self, launching: list[ManagedEngine]) -> None:
        with _ends.calling_ray():
            creations = control_plane.creations([engine.handle for engine in launching], ANSWER_S)
            self._answered = creations is not None
            found = {engine: (creations or {}).get(engine.actor_id) for engine in launching}
            keepalive.warn_of_silent_links(creation.node_id for creation in found.values() if creation is not None)
        for engine, creation in found.items():
            engine.reached(None if creation is None else _stage(engine, creation))


def _stage(engine: ManagedEngine, creation: Creation) -> LaunchStage | None:
    match creation.state:
        case "DEPENDENCIES_UNREADY":
            return LaunchStage.WAITING_FOR_ARGUMENTS
        case "PENDING_CREATION":
            return LaunchStage.CONSTRUCTING if creation.has_worker else LaunchStage.WAITING_FOR_RESOURCES
        case "ALIVE":
            return LaunchStage.INIT_RUNNING if engine.launch_is_out else LaunchStage.CONSTRUCTED
    return None

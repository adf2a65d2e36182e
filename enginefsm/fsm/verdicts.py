"""When an engine that fails its checks is given up, and when that verdict is held.

Pure: no Ray, no threads of its own, no Prometheus. Whoever asks passes the monotonic time in.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Hashable
from enum import StrEnum

from enginefsm.fsm.states import Reason

LEAST_MASS = 2
"""When more than half of the engines, and at least so many, are unavailable at once, what they have in common is to be
suspected: the observer, the network, the control plane. Engines do not die together."""

CAP_SHARE = 0.25
CAP_WINDOW_S = 600.0
"""At most this share of the engines, but always one, is given up in so long. A replacement takes minutes to load; a
monitor that is wrong for a reason that nobody thought of must not empty the fleet meanwhile."""


class Check(StrEnum):
    """What one check found of an actor."""

    ANSWERED = "answered"
    FAILED = "failed"
    """Its probe raised, or gave something false."""
    SILENT = "silent"
    BUSY = "busy"
    """Silent, while a call that was made before the probe is out: that says nothing."""
    UNAVAILABLE = "unavailable"
    DEAD = "dead"
    LOST = "lost"
    """Ray lost or refused the probe, on this side."""


class ServerAnswer(StrEnum):
    """What an engine's server answered to the last HTTP request of the watch."""

    SERVES = "serves"
    UNWELL = "unwell"
    """The server answers, but not with 200. SGLang answers 503 after 20 s while its scheduler is held, as in a weight
    update or a pause of generation. The server's process lives; nothing else is certain."""
    FAILS = "fails"
    """The server refuses or closes the connection, or does not speak HTTP."""
    UNKNOWN = "unknown"
    """The server is silent, or this host cannot reach it."""
    NOT_ASKED = "not_asked"


class Decision(StrEnum):
    """What becomes of a verdict that is due."""

    GIVEN = "given"
    WAITS = "waits"
    """Not every other engine of the same watch has been heard since the trouble began: it may be everybody's."""
    MASS_OUTAGE = "mass_outage"
    """Held while most engines are unavailable."""
    KILL_CAP = "kill_cap"
    """Held while too many have been given up lately."""


HELD = (Decision.MASS_OUTAGE, Decision.KILL_CAP)


class FailureCount:
    """The failures in a row of one actor. Not thread-safe."""

    __slots__ = ("_told", "_told_since", "cause", "count", "counted", "since")

    def __init__(self) -> None:
        self.count = 0
        """Those in a row that count."""
        self._told = 0
        self._told_since: float | None = None
        self.since: float | None = None
        """When the first in the row came; None when the last check went well."""
        self.cause: Reason | None = None
        """Why the last check failed."""
        self.counted = True
        """Whether the last failure counts."""

    def add(self, cause: Reason, now: float, *, counts: bool, told: bool = False) -> None:
        """A check failed. One that does not count says only that the outage goes on.

        `told` says that somebody said so, the actor or its server: it was not concluded from silence.
        """
        if self.since is None:
            self.since = now
        self.cause, self.counted = cause, counts
        self.count += counts
        if told:
            self._tell(now)

    def confirm(self, cause: Reason, now: float) -> None:
        """The last failure that counts, a silence, was told after all."""
        self.cause = cause
        if self._told < self.count:
            self._tell(now)

    def forgive_stop(self, stopped_s: float) -> None:
        """This process was stopped for so long, which may be why nothing was heard: what was told stays."""
        self.count, self.since, self.counted = self._told, self._told_since, True
        if self.since is None:
            self.cause = None
        else:  # the time of the stop is no part of the outage
            self.since = self._told_since = self.since + stopped_s

    def _tell(self, now: float) -> None:
        self._told += 1
        if self._told_since is None:
            self._told_since = now

    def is_due(self, threshold: int, budget_s: float, now: float) -> bool:
        """Whether the bounds are spent: the threshold, or, while failures do not count, the budget of the outage."""
        if self.since is None:
            return False
        return self.count >= threshold if self.counted else now - self.since >= budget_s


class _Actor:
    __slots__ = ("group", "heard_at", "living", "unavailable", "watch")

    def __init__(self, group: Hashable, watch: Hashable) -> None:
        self.group = group
        self.watch = watch
        self.living = self.unavailable = False
        self.heard_at = float("-inf")


class VerdictLimits:
    """What holds verdicts that are due, of all the engines that one monitor watches. Thread-safe.

    An engine is a group of actors, mostly of one.
    """

    def __init__(self) -> None:
        self.outages_ended = 0
        """How many mass outages there were. When one has ended, failures are counted anew."""
        self._lock = threading.Lock()
        self._actors: dict[Hashable, _Actor] = {}
        self._given_at: collections.deque[float] = collections.deque()
        self._held: dict[Hashable, Decision] = {}
        self._in_outage = False
        self._messages: list[str] = []

    def add(self, actor: Hashable, group: Hashable, watch: Hashable = None) -> None:
        """Have an actor watched, by one watch of several; it counts for an engine at work once `update` says so."""
        with self._lock:
            self._actors[actor] = _Actor(group, watch)

    def remove(self, actor: Hashable) -> None:
        """Have an actor watched no more."""
        with self._lock:
            known = self._actors.pop(actor, None)
            if known is not None:
                self._held.pop(known.group, None)
            self._check_mass_outage()

    def update(
        self, actor: Hashable, *, living: bool, unavailable: bool = False, heard_at: float | None = None
    ) -> None:
        """Whether an actor is launched and not dead, whether it is unavailable, and when a check of it ended."""
        with self._lock:
            known = self._actors.get(actor)
            if known is None:
                return
            if heard_at is not None:
                known.heard_at = heard_at
            if (known.living, known.unavailable) == (living, unavailable):
                return
            known.living, known.unavailable = living, unavailable
            self._check_mass_outage()

    def decide(self, group: Hashable, name: str, since: float, now: float) -> Decision:
        """What becomes of the verdict on an engine, whose trouble began at `since`. GIVEN is counted as given."""
        with self._lock:
            decision = self._decide(group, since, now)
            if decision in HELD:
                if decision is Decision.KILL_CAP and decision not in self._held.values():
                    self._messages.append(
                        f"the verdict on engine {name} is held: {len(self._given_at)} of {self._watched()} watched "
                        f"engines were given up within {CAP_WINDOW_S:g} s, which is the most; look at what ails them"
                    )
                self._held[group] = decision
            else:
                self._held.pop(group, None)
            return decision

    def clear(self, group: Hashable) -> None:
        """No verdict on this engine is due any more."""
        with self._lock:
            self._held.pop(group, None)

    def held(self) -> dict[Decision, int]:
        """How many verdicts are held, by why."""
        with self._lock:
            counts = collections.Counter(self._held.values())
        return {why: counts[why] for why in HELD}

    def _decide(self, group: Hashable, since: float, now: float) -> Decision:
        if self._in_outage:
            return Decision.MASS_OUTAGE
        watches = {one.watch for one in self._actors.values() if one.group == group}
        others = (one for one in self._actors.values() if one.watch in watches and one.group != group)
        if any(one.living and one.heard_at < since for one in others):
            return Decision.WAITS
        while self._given_at and now - self._given_at[0] >= CAP_WINDOW_S:
            self._given_at.popleft()
        if len(self._given_at) >= max(1, int(self._watched() * CAP_SHARE)):
            return Decision.KILL_CAP
        self._given_at.append(now)
        return Decision.GIVEN

    def _watched(self) -> int:
        return len({one.group for one in self._actors.values()})

    def messages(self) -> list[str]:
        """What is to be told since the last call: a line whenever verdicts begin, or cease, to be held."""
        with self._lock:
            messages, self._messages = self._messages, []
            return messages

    def _check_mass_outage(self) -> None:
        """Whether a mass outage has begun or ended."""
        living = {one.group for one in self._actors.values() if one.living}
        lost = {one.group for one in self._actors.values() if one.living and one.unavailable}
        is_mass = len(lost) >= LEAST_MASS and 2 * len(lost) > len(living)
        if is_mass == self._in_outage:
            return
        self._in_outage = is_mass
        if is_mass:
            self._messages.append(
                f"{len(lost)} of {len(living)} watched engines are unavailable at once: the network, this process or "
                f"the control plane is suspected, and no engine is given up until most can be reached again"
            )
            return
        self.outages_ended += 1
        held = [group for group, why in self._held.items() if why is Decision.MASS_OUTAGE]
        for group in held:
            del self._held[group]
        self._messages.append(
            f"{len(lost)} of {len(living)} watched engines are unavailable, no more than half: verdicts are given "
            f"again ({len(held)} had been held), and failures are counted anew"
        )

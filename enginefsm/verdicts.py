"""When an engine that fails its checks is given up, and when that verdict is held.

Pure: no Ray, no threads of its own, no Prometheus. Whoever asks passes the monotonic time in.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Hashable
from enum import StrEnum

from enginefsm.states import Reason

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


class Ruling(StrEnum):
    """What becomes of a verdict that is due."""

    GIVEN = "given"
    WAITS = "waits"
    """Not every other engine of the same watch has been heard since the trouble began: it may be everybody's."""
    MASS_OUTAGE = "mass_outage"
    """Held while most engines are unavailable."""
    KILL_CAP = "kill_cap"
    """Held while too many have been given up lately."""


HELD = (Ruling.MASS_OUTAGE, Ruling.KILL_CAP)


class Course:
    """How the checks of one actor go: its failures in a row. Not thread-safe."""

    __slots__ = ("cause", "counted", "failures", "since")

    def __init__(self) -> None:
        self.failures = 0
        """Those in a row that count."""
        self.since: float | None = None
        """When the first in the row came; None when the last check went well."""
        self.cause: Reason | None = None
        """Why the last check failed."""
        self.counted = True
        """Whether the last failure counts."""

    def failed(self, cause: Reason, now: float, *, counts: bool) -> None:
        """A check failed. One that does not count says only that the outage goes on."""
        if self.since is None:
            self.since = now
        self.cause, self.counted = cause, counts
        self.failures += counts

    def is_due(self, threshold: int, budget_s: float, now: float) -> bool:
        """Whether the bounds are spent: the threshold, or, while failures do not count, the budget of the outage."""
        if self.since is None:
            return False
        return self.failures >= threshold if self.counted else now - self.since >= budget_s


class _Standing:
    __slots__ = ("group", "heard_at", "living", "unavailable", "watch")

    def __init__(self, group: Hashable, watch: Hashable) -> None:
        self.group = group
        self.watch = watch
        self.living = self.unavailable = False
        self.heard_at = float("-inf")


class Court:
    """Rules on verdicts that are due, of all the engines that one monitor watches. Thread-safe.

    An engine is a group of actors, mostly of one.
    """

    def __init__(self) -> None:
        self.outages_ended = 0
        """How many mass outages there were. When one has ended, failures are counted anew."""
        self._lock = threading.Lock()
        self._standings: dict[Hashable, _Standing] = {}
        self._given_at: collections.deque[float] = collections.deque()
        self._held: dict[Hashable, Ruling] = {}
        self._in_outage = False
        self._news: list[str] = []

    def enter(self, actor: Hashable, group: Hashable, watch: Hashable = None) -> None:
        """Have an actor watched, by one watch of several; it counts for an engine at work once `see` says so."""
        with self._lock:
            self._standings[actor] = _Standing(group, watch)

    def leave(self, actor: Hashable) -> None:
        """Have an actor watched no more."""
        with self._lock:
            standing = self._standings.pop(actor, None)
            if standing is not None:
                self._held.pop(standing.group, None)
            self._look()

    def see(self, actor: Hashable, *, living: bool, unavailable: bool = False, heard_at: float | None = None) -> None:
        """Whether an actor is launched and not dead, whether it is unavailable, and when a check of it ended."""
        with self._lock:
            standing = self._standings.get(actor)
            if standing is None:
                return
            if heard_at is not None:
                standing.heard_at = heard_at
            if (standing.living, standing.unavailable) == (living, unavailable):
                return
            standing.living, standing.unavailable = living, unavailable
            self._look()

    def rule(self, group: Hashable, name: str, since: float, now: float) -> Ruling:
        """What becomes of the verdict on an engine, whose trouble began at `since`. GIVEN is counted as given."""
        with self._lock:
            ruling = self._rule(group, since, now)
            if ruling in HELD:
                if ruling is Ruling.KILL_CAP and ruling not in self._held.values():
                    self._news.append(
                        f"the verdict on engine {name} is held: {len(self._given_at)} of {self._watched()} watched "
                        f"engines were given up within {CAP_WINDOW_S:g} s, which is the most; look at what ails them"
                    )
                self._held[group] = ruling
            else:
                self._held.pop(group, None)
            return ruling

    def drop(self, group: Hashable) -> None:
        """No verdict on this engine is due any more."""
        with self._lock:
            self._held.pop(group, None)

    def held(self) -> dict[Ruling, int]:
        """How many verdicts are held, by why."""
        with self._lock:
            counts = collections.Counter(self._held.values())
        return {why: counts[why] for why in HELD}

    def _rule(self, group: Hashable, since: float, now: float) -> Ruling:
        if self._in_outage:
            return Ruling.MASS_OUTAGE
        watches = {one.watch for one in self._standings.values() if one.group == group}
        others = (one for one in self._standings.values() if one.watch in watches and one.group != group)
        if any(one.living and one.heard_at < since for one in others):
            return Ruling.WAITS
        while self._given_at and now - self._given_at[0] >= CAP_WINDOW_S:
            self._given_at.popleft()
        if len(self._given_at) >= max(1, int(self._watched() * CAP_SHARE)):
            return Ruling.KILL_CAP
        self._given_at.append(now)
        return Ruling.GIVEN

    def _watched(self) -> int:
        return len({one.group for one in self._standings.values()})

    def news(self) -> list[str]:
        """What is to be told since the last call: a line whenever verdicts begin, or cease, to be held."""
        with self._lock:
            news, self._news = self._news, []
            return news

    def _look(self) -> None:
        """Whether a mass outage has begun or ended."""
        living = {one.group for one in self._standings.values() if one.living}
        lost = {one.group for one in self._standings.values() if one.living and one.unavailable}
        is_mass = len(lost) >= LEAST_MASS and 2 * len(lost) > len(living)
        if is_mass == self._in_outage:
            return
        self._in_outage = is_mass
        if is_mass:
            self._news.append(
                f"{len(lost)} of {len(living)} watched engines are unavailable at once: the network, this process or "
                f"the control plane is suspected, and no engine is given up until most can be reached again"
            )
            return
        self.outages_ended += 1
        held = [group for group, why in self._held.items() if why is Ruling.MASS_OUTAGE]
        for group in held:
            del self._held[group]
        self._news.append(
            f"{len(lost)} of {len(living)} watched engines are unavailable, no more than half: verdicts are given "
            f"again ({len(held)} had been held), and failures are counted anew"
        )

"""How a health check becomes a verdict. Pure: callers pass the monotonic time in.

A health check takes three steps:

1. `HealthCheck` holds what one check saw: the finding on the actor, and the answer of its server.
2. `Failures.after` returns the actor's failures in a row after that check.
3. `VerdictLimits.decide` says what happens to a verdict whose failures are due: it is given, it waits, or it is held.

These transitions do not exist, on purpose:

- A broken connection never counts towards the threshold. The method may run on in a healthy process, so only the
  policy's budget ends such an outage.
- Silence does not count while the server answers, because the server's process lives.
- Silence behind an earlier call is no failure. A sync actor runs one method at a time and cannot answer.
- An answer does not end an outage while the server fails, and a server that has not answered yet decides nothing.
- No number of failures ends an engine while most engines are unavailable at once. Engines do not die together.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Hashable, Mapping
from enum import StrEnum
from typing import NamedTuple

from enginefsm.fsm.outcomes import FATAL, Outcome
from enginefsm.fsm.states import Reason

LEAST_MASS = 2
"""When more than half of the engines, and at least so many, are unavailable at once, what they have in common is to be
suspected: the observer, the network, the control plane. Engines do not die together."""

CAP_SHARE = 0.25
CAP_WINDOW_S = 600.0
"""At most this share of the engines, but always one, is given up in so long. A replacement takes minutes to load; a
monitor that is wrong for a reason that nobody thought of must not empty the fleet meanwhile."""


class Finding(StrEnum):
    """What one health check found about an actor."""

    ANSWERED = "answered"
    FAILED = "failed"
    """The probe raised, or returned a falsy value."""
    SILENT = "silent"
    BUSY = "busy"
    """The actor is silent, but it may still run a call that was made before the probe."""
    UNAVAILABLE = "unavailable"
    DEAD = "dead"
    LOST = "lost"
    """Ray lost or refused the probe on the caller's side."""


def finding_of(outcome: Outcome) -> Finding:
    """Return what the outcome of a probe says about the actor."""
    return Finding.DEAD if outcome in FATAL else _FINDINGS.get(outcome, Finding.LOST)


_FINDINGS = {
    Outcome.SUCCEEDED: Finding.ANSWERED,
    Outcome.METHOD_FAILED: Finding.FAILED,
    Outcome.ACTOR_UNAVAILABLE: Finding.UNAVAILABLE,
}


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


class Failure(NamedTuple):
    """A health check that failed."""

    cause: Reason
    counts: bool
    """Whether the failure counts towards the threshold. Otherwise it only says that the outage goes on."""
    told: bool
    """Whether the actor or its server reported it. Otherwise the watch concluded it from silence or a break."""


class HealthCheck(NamedTuple):
    """What one health check saw."""

    finding: Finding
    server: ServerAnswer = ServerAnswer.NOT_ASKED
    """The last answer of the server, if it is this actor's."""
    server_is_asked: bool = False
    """Whether the server was asked again and has not answered yet."""
    silence_counted: bool = False
    """Whether the silence of this probe has counted as a failure already."""

    @property
    def server_objects(self) -> bool:
        """Return whether the last answer of the server was a bad one."""
        return self.server in (ServerAnswer.UNWELL, ServerAnswer.FAILS)

    @property
    def is_well(self) -> bool:
        """Return whether the actor answered and its server does not object."""
        return self.finding is Finding.ANSWERED and not self.server_objects

    @property
    def failure(self) -> Failure | None:
        """Return how the check failed; None if it did not fail, or says nothing."""
        match self.finding:
            case Finding.FAILED:
                return Failure(Reason.PROBE_FAILED, counts=True, told=True)
            case Finding.UNAVAILABLE:
                return Failure(Reason.ACTOR_UNAVAILABLE, counts=False, told=False)
            case Finding.SILENT:
                lives = self.server in (ServerAnswer.SERVES, ServerAnswer.UNWELL)
                gone = self.server is ServerAnswer.FAILS and not self.server_is_asked
                return Failure(Reason.PROBE_TIMEOUT, counts=not lives, told=gone)
            case Finding.ANSWERED if self.server_objects and not self.server_is_asked:
                return Failure(Reason.PROBE_FAILED, counts=True, told=True)
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class Failures:
    """The failures in a row of one actor."""

    count: int = 0
    """How many of them count towards the threshold."""
    told: int = 0
    """How many of these the actor or its server reported."""
    since: float | None = None
    """When the first one came; None if the last check went well."""
    told_since: float | None = None
    cause: Reason | None = None
    """Why the last check failed."""
    counted: bool = True
    """Whether the last failure counts."""
    breaks: int = 0
    """How many checks in a row found the connection broken."""

    def after(self, check: HealthCheck, now: float) -> Failures:
        """Return the failures in a row after one more health check."""
        failure = check.failure
        if failure is None:
            return Failures() if check.is_well else self
        adds, tells = int(failure.counts), int(failure.told)
        if check.finding is Finding.FAILED and check.silence_counted:
            # The answer confirms the failure that the silence of the same probe was.
            adds, tells = 0, int(self.told < self.count)
        return Failures(
            count=self.count + adds,
            told=self.told + tells,
            since=now if self.since is None else self.since,
            told_since=now if tells and self.told_since is None else self.told_since,
            cause=failure.cause,
            counted=failure.counts,
            breaks=self.breaks + 1 if check.finding is Finding.UNAVAILABLE else 0,
        )

    def forgive_stop(self, stopped_s: float) -> Failures:
        """Return what is left after this process was stopped for `stopped_s`: only the failures that were reported.

        The time of the stop is no part of the outage.
        """
        if self.told_since is None:
            return Failures(breaks=self.breaks)
        since = self.told_since + stopped_s
        return dataclasses.replace(self, count=self.told, since=since, told_since=since, counted=True)

    def is_due(self, threshold: int, budget_s: float, now: float) -> bool:
        """Return whether the bounds are spent: the threshold, or the budget if the last failure does not count."""
        if self.since is None:
            return False
        return self.count >= threshold if self.counted else now - self.since >= budget_s


class VerdictHeld(NamedTuple):
    """A verdict on an engine is due and begins to be held."""

    engine: str
    labels: Mapping[str, str]
    incarnation: int
    why: Decision
    at_s: float
    """When: seconds since the epoch."""


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

    def why_held(self, group: Hashable) -> Decision | None:
        """Return why the verdict on this engine is held; None if it is not."""
        with self._lock:
            return self._held.get(group)

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

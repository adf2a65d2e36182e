"""The history of each engine, put together from events."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from enginefsm.cli.report.reading import EventJson
from enginefsm.fsm.states import EngineState, Reason


class Span(NamedTuple):
    """A time in one state. Times are seconds since the epoch."""

    state: str
    reason: str
    """The reason of the state; empty if the log does not say it."""
    start_s: float
    end_s: float
    ended: bool
    """False when the log ends first."""


class Mark(NamedTuple):
    """A call that failed, or that was submitted again."""

    at_s: float
    method: str
    outcome: str
    attempt: int
    """0 for the first submission."""
    took_s: float
    fault: bool
    probe: bool

    @property
    def kind(self) -> str:
        """What the page draws: `fault` for a first submission, `failed` or `answered` for a later one."""
        if not self.attempt:
            return "fault"
        return "failed" if self.fault else "answered"


@dataclasses.dataclass(slots=True)
class Life:
    """One incarnation of an engine."""

    engine: str
    incarnation: int
    labels: Mapping[str, str]
    steps: list[EventJson] = dataclasses.field(default_factory=list)
    marks: list[Mark] = dataclasses.field(default_factory=list)
    spans: list[Span] = dataclasses.field(default_factory=list)

    @property
    def title(self) -> str:
        """Return the engine's name, with the incarnation if it is not the first."""
        return self.engine if self.incarnation == 1 else f"{self.engine} #{self.incarnation}"

    @property
    def launched_s(self) -> float:
        """Return when its first known state began, in seconds since the epoch."""
        first = self.steps[0]
        return float(first["at_s"]) - max(0.0, float(first["spent_s"]))

    @property
    def state(self) -> str:
        """Return the last state; `released` after a release; empty if the log has only calls of it."""
        if not self.steps:
            return ""
        return "released" if self.reason == Reason.RELEASED else str(self.steps[-1]["to"])

    @property
    def reason(self) -> str:
        """Return the reason of that state."""
        return str(self.steps[-1]["reason"]) if self.steps else ""

    @property
    def ready_after_s(self) -> float | None:
        """Return the seconds from its launch until it was first ready; None if it never was."""
        return next((float(step["age_s"]) for step in self.steps if step["first_ready"]), None)

    @property
    def died(self) -> bool:
        """Return whether it is dead and was not released."""
        return self.state == EngineState.DEAD

    @property
    def unavailable_s(self) -> float:
        """Return how long it was unavailable in total, in seconds."""
        return sum(span.end_s - span.start_s for span in self.spans if span.state == EngineState.UNAVAILABLE)

    @property
    def faults(self) -> int:
        """Return the number of calls that failed."""
        return sum(mark.fault for mark in self.marks)

    @property
    def reawaits(self) -> int:
        """Return the number of repeated submissions."""
        return sum(mark.attempt > 0 for mark in self.marks)

    @property
    def is_smooth(self) -> bool:
        """Return whether it has had no fault so far."""
        return not self.marks and not self.died and not self.unavailable_s


@dataclasses.dataclass(slots=True)
class Manager:
    """One monitor, and its engines."""

    manager: str
    about: EventJson = dataclasses.field(default_factory=dict)
    """The manager's `begin` event."""
    ended_s: float | None = None
    """When it ended in good order; None if it did not."""
    dropped: int = 0
    lives: dict[tuple[str, int], Life] = dataclasses.field(default_factory=dict)
    seen: set[int] = dataclasses.field(default_factory=set)
    first_s: float = float("inf")
    last_s: float = float("-inf")

    def engines(self) -> dict[str, list[Life]]:
        """Return the incarnations of each engine, in their order."""
        by_name: dict[str, list[Life]] = defaultdict(list)
        for life in sorted(self.lives.values(), key=lambda life: life.incarnation):
            by_name[life.engine].append(life)
        return by_name


@dataclasses.dataclass(slots=True)
class Run:
    """One run and its managers, in the order in which they began."""

    run: str
    managers: list[Manager]

    @property
    def lives(self) -> list[Life]:
        """Return each incarnation of each engine."""
        return [life for manager in self.managers for life in manager.lives.values()]

    @property
    def start_s(self) -> float:
        """Return when the first launch began, in seconds since the epoch."""
        return min(manager.first_s for manager in self.managers)

    @property
    def end_s(self) -> float:
        """Return the time of the last event, in seconds since the epoch."""
        return max(manager.last_s for manager in self.managers)


class History:
    """Collects events; those of several managers may come in any order."""

    def __init__(self) -> None:
        self._managers: dict[tuple[str, str], Manager] = {}

    def add(self, event: EventJson) -> None:
        """Take an event in. An event that comes twice counts once."""
        manager = self._managers.setdefault((event["run"], event["manager"]), Manager(event["manager"]))
        kind = event["kind"]
        if kind == "begin":
            manager.about = event
            return
        if kind == "dropped":
            manager.dropped += event["events"]
            return
        manager.last_s = max(manager.last_s, event["at_s"])
        if kind == "end":
            manager.ended_s = event["at_s"]
            return
        if event["seq"] in manager.seen:
            return
        manager.seen.add(event["seq"])
        before_s = event["took_s"] if kind == "outcome" else event["spent_s"]
        manager.first_s = min(manager.first_s, event["at_s"] - max(0.0, before_s))
        key = event["engine"], event["incarnation"]
        life = manager.lives.get(key)
        if life is None:
            life = manager.lives[key] = Life(*key, event["labels"])
        if kind == "transition":
            life.steps.append(event)
        else:
            life.marks.append(
                Mark(
                    event["at_s"], event["method"], event["outcome"], event["attempt"], event["took_s"], event["fault"],
                    event["probe"],
                )
            )  # fmt: skip

    def runs(self) -> list[Run]:
        """Return each run that has engines, sorted by name."""
        by_run: dict[str, list[Manager]] = defaultdict(list)
        for (run, _), manager in self._managers.items():
            if manager.lives:
                by_run[run].append(manager)
        for managers in by_run.values():
            managers.sort(key=lambda manager: manager.first_s)
            for manager in managers:
                for life in manager.lives.values():
                    life.steps.sort(key=lambda step: int(step["seq"]))
                    life.marks.sort()
                for lives in manager.engines().values():
                    for life, successor in itertools.zip_longest(lives, lives[1:]):
                        until_s = successor.launched_s if successor is not None and successor.steps else manager.last_s
                        life.spans = _spans(life.steps, until_s)
        return [Run(run, managers) for run, managers in sorted(by_run.items())]


def _spans(steps: list[EventJson], until_s: float) -> list[Span]:
    """Return the times in each state. If the log lacks a step, the next step tells when its state began."""
    spans: list[Span] = []
    for before, step in zip([None, *steps], steps, strict=False):
        if step["from"] is None:
            continue
        known = before is not None and before["to"] == step["from"]
        start_s = before["at_s"] if known and before is not None else step["at_s"] - max(0.0, step["spent_s"])
        reason = str(before["reason"]) if known and before is not None else ""
        spans.append(Span(step["from"], reason, min(start_s, step["at_s"]), step["at_s"], ended=True))
    if steps and steps[-1]["reason"] != Reason.RELEASED:
        last = steps[-1]
        spans.append(Span(last["to"], last["reason"], last["at_s"], max(last["at_s"], until_s), ended=False))
    return spans

"""The state machine of one engine: its states, its edges, and the record that is driven along them.

Pure: no Ray, no threads, no Prometheus. The caller passes the time in and holds the engine's lock.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from transitions import Machine


class EngineState(StrEnum):
    """What the monitor believes of an engine."""

    LAUNCHING = "launching"
    """Adopted, and its launch method has not ended."""
    READY = "ready"
    """Its launch method succeeded and it answers."""
    UNAVAILABLE = "unavailable"
    """It could not be reached last time. Its calls are submitted again."""
    DEAD = "dead"
    """Gone, or given up. A replacement is a new incarnation of the same name."""


class Reason(StrEnum):
    """Why an engine moved. The set is closed, and each reason is a trigger of the machine."""

    ADOPTED = "adopted"
    INIT_SUCCEEDED = "init_succeeded"
    ACTOR_UNAVAILABLE = "actor_unavailable"
    PROBE_TIMEOUT = "probe_timeout"
    PROBE_FAILED = "probe_failed"
    ACTOR_REACHABLE = "actor_reachable"
    RECOVERED = "recovered"
    ACTOR_DIED = "actor_died"
    CONSTRUCTOR_FAILED = "constructor_failed"
    INIT_FAILED = "init_failed"
    PREEMPTED = "preempted"
    OUT_OF_MEMORY = "out_of_memory"
    UNSCHEDULABLE = "unschedulable"
    RUNTIME_ENV_FAILED = "runtime_env_failed"
    RETRY_EXHAUSTED = "retry_exhausted"
    HEALTH_CHECKS_FAILED = "health_checks_failed"
    LAUNCH_DEADLINE = "launch_deadline"
    RELEASED = "released"


class LaunchStage(StrEnum):
    """How far an engine's actor is while the engine launches."""

    WAITING_FOR_ARGUMENTS = "waiting for arguments"
    """The arguments of its constructor are still being made."""
    WAITING_FOR_RESOURCES = "waiting for resources"
    """No node has the resources free that it needs, or a node is starting its process."""
    CONSTRUCTING = "constructing"
    """Its constructor runs."""
    CONSTRUCTED = "constructed"
    """The actor is there. As far as the monitor knows, its launch method has not been called."""
    INIT_RUNNING = "init running"
    """The actor is there, and its launch method was called, whatever its name is."""


def why(reason: str, stage: str | None) -> str:
    """Return why an engine is where it is, for people: the reason, and how far its launch is if that is known."""
    if stage is None:
        return reason
    return stage if reason == Reason.ADOPTED else f"{reason}: {stage}"


GIVEN_UP = (Reason.RETRY_EXHAUSTED, Reason.HEALTH_CHECKS_FAILED, Reason.LAUNCH_DEADLINE)
"""The verdicts that are the monitor's own: bounds were spent. The actor may be alive."""

DETAIL_CHARS = 300


def one_line(text: object) -> str:
    """Return a text as one line of at most `DETAIL_CHARS` characters."""
    line = " ".join(str(text)[: 4 * DETAIL_CHARS].split())
    return line if len(line) <= DETAIL_CHARS else f"{line[: DETAIL_CHARS - 1]}…"


STATES = {state.value: state for state in EngineState}
"""Each state by its text. This is several times as fast as `EngineState(text)`."""

_LIVE = (EngineState.LAUNCHING, EngineState.READY, EngineState.UNAVAILABLE)

# What each reason does: from which states, to which. These edges do not exist, on purpose: no reason leaves DEAD, only
# RECOVERED makes an unavailable engine ready, and no launch deadline ends a ready engine. ADOPTED has no edge, because
# a record begins with it.
EDGES: Mapping[Reason, tuple[tuple[EngineState, ...], EngineState]] = {
    Reason.INIT_SUCCEEDED: ((EngineState.LAUNCHING,), EngineState.READY),
    Reason.ACTOR_UNAVAILABLE: ((EngineState.LAUNCHING, EngineState.READY), EngineState.UNAVAILABLE),
    Reason.PROBE_TIMEOUT: ((EngineState.LAUNCHING, EngineState.READY), EngineState.UNAVAILABLE),
    Reason.PROBE_FAILED: ((EngineState.LAUNCHING, EngineState.READY), EngineState.UNAVAILABLE),
    Reason.ACTOR_REACHABLE: ((EngineState.UNAVAILABLE,), EngineState.LAUNCHING),
    Reason.RECOVERED: ((EngineState.UNAVAILABLE,), EngineState.READY),
    Reason.ACTOR_DIED: (_LIVE, EngineState.DEAD),
    Reason.CONSTRUCTOR_FAILED: (_LIVE, EngineState.DEAD),
    Reason.INIT_FAILED: (_LIVE, EngineState.DEAD),
    Reason.PREEMPTED: (_LIVE, EngineState.DEAD),
    Reason.OUT_OF_MEMORY: (_LIVE, EngineState.DEAD),
    Reason.UNSCHEDULABLE: (_LIVE, EngineState.DEAD),
    Reason.RUNTIME_ENV_FAILED: (_LIVE, EngineState.DEAD),
    Reason.RETRY_EXHAUSTED: (_LIVE, EngineState.DEAD),
    Reason.HEALTH_CHECKS_FAILED: (_LIVE, EngineState.DEAD),
    Reason.LAUNCH_DEADLINE: ((EngineState.LAUNCHING, EngineState.UNAVAILABLE), EngineState.DEAD),
    Reason.RELEASED: (_LIVE, EngineState.DEAD),
}

# One machine drives every record. Records are not registered as its models: that costs 3.4 kB each, a slotted
# record under 1 kB.
MACHINE = Machine(
    model=None,
    states=[state.value for state in EngineState],
    initial=EngineState.LAUNCHING.value,
    transitions=[
        {"trigger": reason.value, "source": [state.value for state in sources], "dest": dest.value}
        for reason, (sources, dest) in EDGES.items()
    ],
    auto_transitions=False,
    name="enginefsm",
)

# The machine library tells of every callback that it did not have to call. What happens to engines is told by the
# monitor, in one line a step. The filter drops this machine's lines alone; others of the process keep theirs.
logging.getLogger("transitions.core").addFilter(
    lambda line: not (isinstance(line.args, tuple) and line.args[:1] == (MACHINE.name,))
)


class Transition(NamedTuple):
    """One step of one engine, as listeners see it."""

    engine: str
    labels: Mapping[str, str]
    incarnation: int
    from_state: EngineState | None
    """None for the first step, the adoption."""
    to_state: EngineState
    reason: Reason
    spent_s: float
    """How long the engine had been in `from_state`."""
    age_s: float
    """How long ago the engine was adopted."""
    at_s: float
    """When it moved, in seconds since the epoch."""
    first_ready: bool
    """Whether the engine is ready for the first time."""
    replaced_after_s: float | None = None
    """How long ago the engine died that this one replaces. Set with `first_ready`, and None if it replaces none."""
    detail: str = ""
    """What happened, in one bounded line: the text of the exception, say."""


class EngineRecord:
    """The state of one incarnation of one engine. Not thread-safe: its owner holds a lock around it."""

    __slots__ = (
        "adopted_at",
        "adopted_epoch_s",
        "detail",
        "ever_ready",
        "incarnation",
        "labels",
        "name",
        "out_since",
        "ready_epoch_s",
        "reason",
        "since",
        "since_epoch_s",
        "spent",
        "state",
        "succeeded",
    )

    def __init__(
        self,
        name: str,
        labels: Mapping[str, str],
        incarnation: int,
        now: float,
        epoch_s: float,
        out_since: float | None = None,
        detail: str = "",
    ) -> None:
        self.name = name
        self.labels = labels
        self.incarnation = incarnation
        self.state: str = EngineState.LAUNCHING.value
        self.reason = Reason.ADOPTED
        self.detail = one_line(detail)
        self.succeeded = False  # whether the launch method has
        self.ever_ready = False
        self.adopted_at = now
        self.adopted_epoch_s = epoch_s
        self.ready_epoch_s: float | None = None  # the first time
        self.out_since = out_since  # when the engine died that this one replaces, if it replaces one; monotonic
        self.since = now
        self.since_epoch_s = epoch_s
        self.spent: dict[EngineState, float] = {}

    def first_step(self) -> Transition:
        """Return the step with which the record began."""
        return Transition(
            self.name, self.labels, self.incarnation, None, EngineState.LAUNCHING, Reason.ADOPTED, 0.0, 0.0,
            self.since_epoch_s, first_ready=False, detail=self.detail,
        )  # fmt: skip

    def move(self, reason: Reason, now: float, epoch_s: float, detail: str = "") -> Transition | None:
        """Take the edge that `reason` names and return the step, or return None if this state has no such edge.

        A dead engine stays dead. An unavailable engine does not become unavailable twice. `now` is monotonic.
        `detail` says what happened.
        """
        left = STATES[self.state]
        event = MACHINE.events[reason]
        if left not in event.transitions:
            return None
        event.trigger(self)
        reached = STATES[self.state]
        spent_s = now - self.since
        self.spent[left] = self.spent.get(left, 0.0) + spent_s
        self.reason, self.detail, self.since, self.since_epoch_s = reason, one_line(detail), now, epoch_s
        first_ready = reached is EngineState.READY and not self.ever_ready
        replaced_after_s = None
        if first_ready:
            self.ever_ready, self.ready_epoch_s = True, epoch_s
            replaced_after_s = None if self.out_since is None else now - self.out_since
        return Transition(
            self.name, self.labels, self.incarnation, left, reached, reason, spent_s, now - self.adopted_at, epoch_s,
            first_ready, replaced_after_s, self.detail,
        )  # fmt: skip

    def time_in_states(self, now: float) -> dict[EngineState, float]:
        """Return the seconds spent in each state so far, the present one included, in the order of their entry."""
        present = STATES[self.state]
        return self.spent | {present: self.spent.get(present, 0.0) + now - self.since}


def diagram() -> str:
    """Return the machine as a Mermaid state diagram, drawn from the machine itself.

    Each arrow is an edge with its reasons. The edges from every live state are one arrow from their frame.
    """
    live = {source for event in MACHINE.events.values() for source in event.transitions}
    inner: dict[tuple[str, str], list[str]] = {}
    outer: dict[tuple[str, str], list[str]] = {}
    for trigger, event in MACHINE.events.items():
        for source, [edge] in event.transitions.items():
            arrow = ("live" if event.transitions.keys() == live else source, str(edge.dest))
            reasons = (inner if edge.dest in live else outer).setdefault(arrow, [])
            if trigger not in reasons:
                reasons.append(trigger)
    return "\n".join(
        [
            "stateDiagram-v2",
            "    state live {",
            f"        [*] --> {MACHINE.initial}: {Reason.ADOPTED.value}",
            *(f"        {source} --> {dest}: {', '.join(reasons)}" for (source, dest), reasons in inner.items()),
            "    }",
            *(f"    {source} --> {dest}: {'<br/>'.join(reasons)}" for (source, dest), reasons in outer.items()),
            *(f"    {dest} --> [*]" for dest in dict.fromkeys(dest for _, dest in outer)),
        ]
    )

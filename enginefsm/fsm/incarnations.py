"""The incarnations of one engine name: what became of each, and since when the name has been without an engine.

Pure: whoever adopts and releases passes the times in and holds the lock. A name is *out* from the death of its engine
until an engine of that name is ready again; what is adopted meanwhile is a restart. A ready engine that was released
ended in good order: its successor is no restart.
"""

from __future__ import annotations

from typing import NamedTuple

from enginefsm.fsm.states import EngineRecord, EngineState, Reason
from enginefsm.policy import RestartCap

INCARNATIONS_KEPT = 16
"""Of each name, the present one included."""


class Incarnation(NamedTuple):
    """What became of one actor under an engine's name. Points in time are in seconds since the epoch."""

    incarnation: int
    actor_id: str
    reason: Reason | None
    """Why it died; `released` only if it was alive until then. None while it lives."""
    adopted_s: float
    """When it was adopted."""
    ready_s: float | None
    """When it was ready for the first time; None if it has never been."""
    dead_s: float | None
    """When it died, or was released alive; None while it lives."""

    @staticmethod
    def of(record: EngineRecord, actor_id: str) -> Incarnation:
        """As the record has it."""
        dead = record.state == EngineState.DEAD
        return Incarnation(
            record.incarnation, actor_id, record.reason if dead else None, record.adopted_epoch_s,
            record.ready_epoch_s, record.since_epoch_s if dead else None,
        )  # fmt: skip


class Lineage(NamedTuple):
    """What is kept of a name's earlier incarnations. Immutable, since the engine that follows shares it."""

    past: tuple[Incarnation, ...] = ()
    """Oldest first; the newest `INCARNATIONS_KEPT`."""
    out_since: float | None = None
    """Since when the name is out, on the monotonic clock; None when it is not."""
    restarted_at: tuple[float, ...] = ()
    """When its newest restarts were, on the monotonic clock, oldest first; as many as the cap counts."""

    @property
    def next_incarnation(self) -> int:
        """The number of the one that follows."""
        return self.past[-1].incarnation + 1 if self.past else 1

    def ended(self, record: EngineRecord, actor_id: str) -> Lineage:
        """With the one that has ended now, by death or release."""
        out_since = None if record.ever_ready else self.out_since
        if out_since is None and record.reason is not Reason.RELEASED:
            out_since = record.since
        past = (*self.past, Incarnation.of(record, actor_id))[-INCARNATIONS_KEPT:]
        return Lineage(past, out_since, self.restarted_at)

    def restarted(self, now: float, cap: RestartCap | None) -> Lineage:
        """With one more adopted: if the name is out, that is a restart."""
        if self.out_since is None or cap is None or cap.restarts == 0:
            return self
        return self._replace(restarted_at=(*self.restarted_at, now)[-cap.restarts :])


FIRST = Lineage()
"""What the first engine of a name has before it."""

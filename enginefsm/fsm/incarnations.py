"""The incarnations of one engine name: what became of each, and since when the name has been without an engine.

Pure: the caller passes the times in and holds the lock. A name is *out* from the death of its engine until an engine of
that name is ready again. An engine that is adopted meanwhile is a restart. If a ready engine was released, it ended in
good order, and its successor is no restart.
"""

from __future__ import annotations

from typing import NamedTuple

from enginefsm.fsm.states import EngineRecord, EngineState, Reason
from enginefsm.policy import RestartCap

INCARNATIONS_KEPT = 16
"""How many incarnations of a name are kept, the present one included."""


class Incarnation(NamedTuple):
    """What became of one actor under an engine's name. Points in time are in seconds since the epoch."""

    incarnation: int
    actor_id: str
    reason: Reason | None
    """Why it died, or `released` if it was alive until then. None while it lives."""
    adopted_s: float
    """When it was adopted."""
    ready_s: float | None
    """When it was ready for the first time, or None."""
    dead_s: float | None
    """When it died or was released alive. None while it lives."""

    @staticmethod
    def of(record: EngineRecord, actor_id: str) -> Incarnation:
        """Return what the record says."""
        dead = record.state == EngineState.DEAD
        return Incarnation(
            record.incarnation, actor_id, record.reason if dead else None, record.adopted_epoch_s,
            record.ready_epoch_s, record.since_epoch_s if dead else None,
        )  # fmt: skip


class Lineage(NamedTuple):
    """The earlier incarnations of a name. Immutable, because the engine that follows shares it."""

    past: tuple[Incarnation, ...] = ()
    """The newest `INCARNATIONS_KEPT`, oldest first."""
    out_since: float | None = None
    """Since when the name is out, on the monotonic clock, or None."""
    restarted_at: tuple[float, ...] = ()
    """When its newest restarts were, on the monotonic clock, oldest first. As many as the cap counts."""

    @property
    def next_incarnation(self) -> int:
        """The number of the next incarnation."""
        return self.past[-1].incarnation + 1 if self.past else 1

    def ended(self, record: EngineRecord, actor_id: str) -> Lineage:
        """Return the lineage with one incarnation more, which has died or was released."""
        out_since = None if record.ever_ready else self.out_since
        if out_since is None and record.reason is not Reason.RELEASED:
            out_since = record.since
        past = (*self.past, Incarnation.of(record, actor_id))[-INCARNATIONS_KEPT:]
        return Lineage(past, out_since, self.restarted_at)

    def restarted(self, now: float, cap: RestartCap | None) -> Lineage:
        """Return the lineage after one more adoption, which is a restart if the name is out."""
        if self.out_since is None or cap is None or cap.restarts == 0:
            return self
        return self._replace(restarted_at=(*self.restarted_at, now)[-cap.restarts :])


FIRST = Lineage()
"""The lineage of the first engine of a name."""

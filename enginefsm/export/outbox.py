"""The outboxes between a monitor and its exporters. Each exporter has a bounded queue and a thread that sends.

The monitor's thread only appends to the queue. The exporter's thread sends the queued events in batches. If the
exporter does not take a batch, the thread pauses and sends it again. `flush` waits for that, with a bound.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from enginefsm._engine.launch_stages import LaunchStages
from enginefsm._engine.managed import ManagedEngine
from enginefsm.events import Event, HealthChecked, WatchBegan
from enginefsm.fsm.states import EngineState, Reason, Transition
from enginefsm.metrics.collector import FleetMetrics

logger = logging.getLogger("enginefsm.export")

FLUSH_S = 1.8
"""How long a flush waits for all exporters together, and `delivered` for all listeners together, in seconds."""
MOST_WAITING = 20_000
"""How many events may wait for an exporter. If more come, the outbox drops the oldest."""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 15.0
BROKEN_AFTER = 5
"""After so many failures in a row, a flush waits for one attempt only."""


class NotYetError(Exception):
    """An exporter could not pass on a batch yet, and nothing failed. The outbox tries again and counts no failure."""


class Fleet(Protocol):
    """The monitor, as exporters see it."""

    @property
    def run(self) -> str: ...  # noqa: D102
    @property
    def metrics(self) -> FleetMetrics: ...  # noqa: D102
    @property
    def stages(self) -> LaunchStages: ...  # noqa: D102
    def engines(self) -> list[ManagedEngine]: ...  # noqa: D102
    def engine(self, name: str) -> ManagedEngine | None: ...  # noqa: D102


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """The events for an exporter to pass on. If the exporter does not take a batch, the next batch holds it as well."""

    run: str
    manager: str
    """The id of the monitor: a UUID in hex."""
    started_s: float
    """When the monitor began to export, in seconds since the epoch."""
    seq: int
    """The number of the batch. Each attempt has a higher number than all attempts before it."""
    events: Sequence[tuple[int, Event]]
    """The events with their numbers, oldest first. An event keeps its number in every batch."""
    dropped: int
    """How many events were dropped since the last batch that the exporter took."""
    terminal: bool
    """Whether the events include an engine's end. Then `send` returns only once they outlive the process."""
    stopped_s: float
    """When the monitor ended in good order, in seconds since the epoch. 0 if it has not ended so."""


class Exporter(Protocol):
    """Takes batches somewhere. One thread uses it, for one monitor. After `close` another monitor may use it."""

    sink: str
    """The exporter's name in the metrics of exporters."""
    batch_s: float
    """How long events gather before they are sent, in seconds. Terminal events go at once."""
    heartbeat_s: float
    """How many seconds after the last batch that arrived a batch without events is sent."""

    def send(self, fleet: Fleet, batch: Batch) -> None:
        """Pass a batch on, and return when it has arrived. If it did not arrive, raise an exception that says why.

        This should take about a second at most, because the end of the process waits for it only for a short time.
        """

    def close(self) -> None:
        """Release what the exporter holds open. The outbox sends nothing afterwards."""


def is_terminal(event: Event) -> bool:
    """Return whether the event is an engine's end for a reason other than release."""
    return isinstance(event, Transition) and event.to_state is EngineState.DEAD and event.reason is not Reason.RELEASED


class Outbox:
    """One exporter's queue and thread. Call it with an event to queue the event. One thread may call it at a time."""

    def __init__(self, exporter: Exporter, fleet: Fleet, manager: str, started_s: float) -> None:
        self.__name__ = exporter.sink
        self._exporter = exporter
        self._fleet = fleet
        self._manager = manager
        self._started_s = started_s
        self._queue: collections.deque[tuple[int, Event]] = collections.deque()
        self._put = 0  # events so far; only the monitor's thread writes it, after it has queued the event
        self._last_terminal = 0
        self._dropped_queued = 0  # only the monitor's thread writes it
        self._wake = threading.Event()
        self._attempted = threading.Condition()  # guards the three below
        self._taken = 0
        self._attempts = 0
        self._failures = 0  # in a row
        self._close_by: float | None = None
        # Only the outbox's thread uses these.
        self._pending: collections.deque[tuple[int, Event]] = collections.deque()
        self._dropped_pending = 0
        self._dropped_told = 0
        self._seq = 0
        fleet.metrics.expect_exporter(exporter.sink)
        self._thread = threading.Thread(target=self._work, name=f"enginefsm-export-{exporter.sink}", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        """Queue an event. Health checks would fill the queue, so they are left out: exporters send them as counts."""
        if isinstance(event, HealthChecked | WatchBegan):
            return
        if len(self._queue) >= MOST_WAITING:
            try:
                self._queue.popleft()
            except IndexError:  # the outbox's thread has taken all of them since
                pass
            else:
                self._dropped_queued += 1
                self._fleet.metrics.event_dropped(self._exporter.sink)
        number = self._put + 1
        self._queue.append((number, event))
        self._put = number
        if is_terminal(event):
            self._last_terminal = number
            self._wake.set()

    def begin_flush(self, *, terminal_only: bool) -> Callable[[float], bool]:
        """Make the thread send the queued events at once, and return a function that waits for that.

        The function waits until a monotonic time, and returns whether the exporter took all of them.
        """
        upto = self._last_terminal if terminal_only else self._put
        attempts = self._attempts
        if self._taken < upto:
            self._wake.set()

        def settled() -> bool:
            return self._taken >= upto or (self._failures >= BROKEN_AFTER and self._attempts > attempts)

        def wait(until: float) -> bool:
            with self._attempted:
                self._attempted.wait_for(settled, max(0.0, until - time.monotonic()))
            return self._taken >= upto

        return wait

    def begin_close(self, by: float) -> None:
        """Make the thread send a last batch until `by` (monotonic), and then end."""
        self._close_by = by
        self._wake.set()

    def end_close(self) -> None:
        """Wait until the thread ends or its time is up. It is a daemon, so it never keeps the process alive."""
        self._thread.join(max(0.0, (self._close_by or 0.0) - time.monotonic()))

    def _work(self) -> None:
        exporter, pause_s, heartbeat_at = self._exporter, 0.0, 0.0
        while True:
            self._wake.wait(pause_s)
            self._wake.clear()
            close_by = self._close_by
            upto = self._put
            self._gather()
            pause_s = exporter.batch_s
            now = time.monotonic()
            if self._pending or close_by is not None or now >= heartbeat_at:
                if self._attempt(upto):
                    heartbeat_at = now + exporter.heartbeat_s
                    if close_by is not None:
                        break
                else:
                    pause_s = min(FIRST_PAUSE_S * 2 ** min(max(self._failures - 1, 0), 30), LONGEST_PAUSE_S)
            if close_by is not None:
                left_s = close_by - time.monotonic()
                if left_s <= 0:
                    break
                pause_s = min(pause_s, left_s)
        try:
            exporter.close()
        except Exception:  # an exporter may be the user's code, and no event is lost here
            logger.exception("export to %s: could not be closed", exporter.sink)

    def _gather(self) -> None:
        while self._queue:
            self._pending.append(self._queue.popleft())
        while len(self._pending) > MOST_WAITING:
            self._pending.popleft()
            self._dropped_pending += 1
            self._fleet.metrics.event_dropped(self._exporter.sink)

    def _attempt(self, upto: int) -> bool:
        """Send the pending events, which go up to number `upto`, and return whether the exporter took them.

        If it did not, they stay pending.
        """
        self._seq += 1
        dropped = self._dropped_queued + self._dropped_pending
        batch = Batch(
            self._fleet.run, self._manager, self._started_s, self._seq, tuple(self._pending),
            dropped - self._dropped_told, any(is_terminal(event) for _, event in self._pending),
            self._fleet.metrics.stopped_at_s,
        )  # fmt: skip
        failure: Exception | None = None
        try:
            self._exporter.send(self._fleet, batch)
        except Exception as exception:  # noqa: BLE001  no exporter may end a bringup; `_tell` counts and logs it
            failure = exception
        else:
            self._pending.clear()
            self._dropped_told = dropped
        self._tell(failure)
        with self._attempted:
            self._attempts += 1
            if failure is None:
                self._taken, self._failures = upto, 0
            elif not isinstance(failure, NotYetError):
                self._failures += 1
            self._attempted.notify_all()
        return failure is None

    def _tell(self, failure: Exception | None) -> None:
        sink = self._exporter.sink
        if failure is None:
            if self._failures:
                logger.info("export to %s works again, after %d failures", sink, self._failures)
        elif isinstance(failure, NotYetError):
            logger.debug("export to %s waits: %s", sink, failure)
        else:
            self._fleet.metrics.exporter_failed(sink)
            level = logging.DEBUG if self._failures else logging.WARNING
            logger.log(level, "export to %s fails and is tried again: %s", sink, describe(failure))


class Exports:
    """The exporters of one monitor. They live from the monitor's first engine to its end."""

    def __init__(self, exporters: Iterable[Exporter], fleet: Fleet) -> None:
        self.manager = uuid.uuid4().hex
        """The id under which this monitor exports."""
        self._pid = os.getpid()
        started_s = time.time()
        self.outboxes = [Outbox(exporter, fleet, self.manager, started_s) for exporter in exporters]

    def flush(self, timeout_s: float, *, terminal_only: bool = False) -> bool:
        """Wait until the exporters took all events so far, for `timeout_s` at most. Return whether they did.

        With `terminal_only`, wait only for the ends of engines. If none is queued, do not wait.
        """
        until = time.monotonic() + timeout_s
        waits = [outbox.begin_flush(terminal_only=terminal_only) for outbox in self.outboxes]
        taken = [wait(until) for wait in waits]
        return all(taken)

    def close(self, timeout_s: float) -> None:
        """Send the remaining events, for `timeout_s` at most, and end the threads."""
        if os.getpid() != self._pid:  # a fork has none of the threads
            return
        by = time.monotonic() + timeout_s
        for outbox in self.outboxes:
            outbox.begin_close(by)
        for outbox in self.outboxes:
            outbox.end_close()


def describe(failure: BaseException) -> str:
    """Return the failure as one line."""
    text = str(failure).strip()
    return f"{type(failure).__name__}: {text.splitlines()[0]}" if text else type(failure).__name__

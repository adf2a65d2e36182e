"""Writes the monitor's events to a log of JSON lines, which `enginefsm report` reads.

The log is UTF-8 text with one JSON object a line. Every line has these fields:

    kind      the kind of line; readers skip lines of an unknown kind
    run       the run
    manager   the id of the monitor, a UUID in hex; several monitors may write to one file
    at_s      the time of the event, in seconds since the epoch

Each kind adds fields:

    begin     The monitor began: host, pid, version (of enginefsm), ray_version, format (1).
    transition  An engine moved: seq, engine, labels (all that adopt() was given), incarnation, actor_id (null if the
              engine was gone when the line was written), from (null for the first), to, reason, spent_s (in `from`),
              age_s (since its launch), first_ready, terminal (whether it is dead for a reason other than release).
    outcome   A call failed or was submitted again: seq, engine, labels, incarnation, method, outcome, attempt (0 for
              the first submission, else the number of the resubmission), took_s, probe, fault (whether the actor
              could not be reached, died or failed). A call that is answered the first time has no line.
    dropped   Events are missing before the next line of this manager: events (how many).
    end       The monitor ended in good order.

`seq` numbers the events of a monitor in their order, with gaps. After a failed write a line may come twice. Two lines
with the same manager and seq are the same event. After a crash during a write, the broken text stands on a line of its
own. Readers skip it, and skip empty lines, which may follow it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from enginefsm.events import CallOutcome
from enginefsm.export.outbox import Batch, Fleet, is_terminal
from enginefsm.fsm.outcomes import Outcome
from enginefsm.fsm.states import Transition
from enginefsm.metrics.collector import versions

FORMAT = 1


class EventLog:
    """Appends a line to `path` for each transition, and for each call that failed or was submitted again.

    It writes lines within half a second. It writes the line of an engine's end at once and syncs it to the disk. The
    docstring of `enginefsm.export.jsonl` describes the format. The new file is readable by all, and is never
    truncated. If somebody moves or deletes the file, the next line begins a new one.
    """

    sink = "jsonl"
    batch_s = 0.5
    heartbeat_s = 3600.0  # a batch without events writes nothing

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._file: int | None = None
        self._began = False
        self._ended = False

    def send(self, fleet: Fleet, batch: Batch) -> None:
        """Append the batch's lines. Raise OSError if they cannot be written."""
        about = {"run": batch.run, "manager": batch.manager}
        lines: list[dict[str, Any]] = []
        if not self._began:
            ours, rays = versions()
            lines.append(
                {"kind": "begin", **about, "at_s": batch.started_s, "host": socket.gethostname(), "pid": os.getpid(),
                 "version": ours, "ray_version": rays, "format": FORMAT}
            )  # fmt: skip
        if batch.dropped:
            lines.append({"kind": "dropped", **about, "at_s": time.time(), "events": batch.dropped})
        for seq, event in batch.events:
            if isinstance(event, Transition):
                lines.append({"kind": "transition", **about, **_transition(fleet, event), "seq": seq})
            elif isinstance(event, CallOutcome) and (event.attempt or event.outcome is not Outcome.SUCCEEDED):
                lines.append({"kind": "outcome", **about, **_outcome(event), "seq": seq})
        if batch.stopped_s and not self._ended:
            lines.append({"kind": "end", **about, "at_s": batch.stopped_s})
        self._append(lines, to_disk=batch.terminal)
        self._began = True
        self._ended = self._ended or bool(batch.stopped_s)

    def close(self) -> None:
        """Close the file."""
        self._close_file()
        self._began = self._ended = False

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, lines: list[dict[str, Any]], *, to_disk: bool) -> None:
        if not lines:
            return
        text = b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)
        try:
            if self._file is not None and not self._is_in_place(self._file):
                self._close_file()
            if self._file is None:
                self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
                text = self._line_break() + text
            while text:
                text = text[os.write(self._file, text) :]
            if to_disk:
                os.fsync(self._file)
        except OSError:
            self._close_file()
            raise

    def _is_in_place(self, file: int) -> bool:
        """Return whether the open file is still the one at the path. Log rotation moves or deletes it."""
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _line_break(self) -> bytes:
        """Return a newline if the file ends in a broken line, else nothing."""
        assert self._file is not None
        size = os.fstat(self._file).st_size
        return b"\n" if size and os.pread(self._file, 1, size - 1) != b"\n" else b""


def _transition(fleet: Fleet, step: Transition) -> dict[str, Any]:
    engine = fleet.engine(step.engine)
    return {
        "at_s": step.at_s,
        "engine": step.engine,
        "labels": dict(step.labels),
        "incarnation": step.incarnation,
        "actor_id": engine.actor_id if engine is not None and engine.incarnation == step.incarnation else None,
        "from": step.from_state,
        "to": step.to_state,
        "reason": step.reason,
        "spent_s": step.spent_s,
        "age_s": step.age_s,
        "first_ready": step.first_ready,
        "terminal": is_terminal(step),
    }


def _outcome(event: CallOutcome) -> dict[str, Any]:
    return {
        "at_s": event.at_s,
        "engine": event.engine,
        "labels": dict(event.labels),
        "incarnation": event.incarnation,
        "method": event.method,
        "outcome": event.outcome,
        "attempt": event.attempt,
        "took_s": event.took_s,
        "probe": event.probe,
        "fault": event.outcome is not Outcome.SUCCEEDED,
    }

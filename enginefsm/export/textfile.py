"""The monitor's metrics in a file, as node_exporter's textfile collector reads it (`*.prom`)."""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import generate_latest

from enginefsm.export._files import write_atomically
from enginefsm.export.outbox import Batch, Fleet


class Textfile:
    """Writes all metrics to `path` every few seconds, and at once when an engine ends.

    The file is replaced as a whole: a reader never sees half of it. It stays when the process ends, so that what was
    last known can still be read; the heartbeat in it says when that was. Two monitors cannot share a file.
    """

    sink = "textfile"
    batch_s = 5.0
    heartbeat_s = 15.0

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def send(self, fleet: Fleet, batch: Batch) -> None:  # noqa: ARG002  the metrics hold all of it
        """Write the file; raises OSError when it cannot be written."""
        write_atomically(self._path, generate_latest(fleet.metrics.registry))

    def close(self) -> None:
        """Do nothing: the file stays."""

"""Writes the monitor's metrics to a file (`*.prom`) for node_exporter's textfile collector."""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import generate_latest

from enginefsm.export._files import write_atomically
from enginefsm.export.outbox import Batch, Fleet


class Textfile:
    """Writes all metrics to `path` every few seconds, and at once when an engine ends.

    Each write replaces the whole file, so a reader never sees a part of it. The file stays when the process ends, and
    keeps the last metrics. The heartbeat in it says how old they are. Two monitors cannot share a file.
    """

    sink = "textfile"
    batch_s = 5.0
    heartbeat_s = 15.0

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def send(self, fleet: Fleet, batch: Batch) -> None:  # noqa: ARG002  the metrics hold all of the batch
        """Write the file. Raise OSError if it cannot be written."""
        write_atomically(self._path, generate_latest(fleet.metrics.registry))

    def close(self) -> None:
        """Do nothing. The file stays."""

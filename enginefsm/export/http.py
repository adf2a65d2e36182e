"""Serves the monitor's metrics from the monitor's own process."""

from __future__ import annotations

from enginefsm.export.outbox import Batch, Fleet
from enginefsm.metrics.collector import MetricsServer


class Http:
    """Serves the monitor's metrics at `http://addr:port/metrics` while the process lives.

    Prometheus sees the end of a failed bringup only if it scrapes before the process ends. The hub, the push gateway
    and the textfile keep the metrics longer. If the address is in use, the exporter tries again.
    """

    sink = "http"
    batch_s = 5.0
    heartbeat_s = 60.0

    def __init__(self, port: int, addr: str = "127.0.0.1") -> None:
        self._port = port
        self._addr = addr
        self._server: MetricsServer | None = None

    @property
    def port(self) -> int | None:
        """The port that it serves on, or None while it does not serve."""
        return None if self._server is None else self._server.port

    def send(self, fleet: Fleet, batch: Batch) -> None:  # noqa: ARG002  the server reads the metrics itself
        """Begin to serve. Raise OSError if the address cannot be bound."""
        if self._server is None:
            self._server = fleet.metrics.serve(self._port, self._addr)

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.close()
            self._server = None

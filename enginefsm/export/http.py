"""The monitor's metrics, served by its own process."""

from __future__ import annotations

from enginefsm.export.outbox import Batch, Fleet
from enginefsm.metrics.collector import MetricsServer


class Http:
    """Serves the monitor's metrics at `http://addr:port/metrics`, for as long as the process lives.

    Prometheus sees the end of a failed bringup only if it happens to scrape before the process is gone: for that there
    are the hub, the push gateway and the textfile. An address that is in use is tried again.
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
        """The port that it serves on; None while it does not."""
        return None if self._server is None else self._server.port

    def send(self, fleet: Fleet, batch: Batch) -> None:  # noqa: ARG002  what is served is asked of the metrics
        """Begin to serve; raises OSError when the address cannot be bound."""
        if self._server is None:
            self._server = fleet.metrics.serve(self._port, self._addr)

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.close()
            self._server = None

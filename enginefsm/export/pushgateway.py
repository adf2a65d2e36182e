"""Pushes the monitor's metrics to a Prometheus Pushgateway."""

from __future__ import annotations

import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence

from prometheus_client import push_to_gateway

from enginefsm.export.outbox import Batch, Fleet

TIMEOUT_S = 1.5


class PushGateway:
    """Pushes all metrics every few seconds, and at once when an engine ends. It uses no proxy.

    Each push replaces the gateway's group `job="enginefsm", run=<run>`. So a run that is started again leaves no old
    series behind. Monitors of one run overwrite each other's metrics, so use the hub for them. The group stays when
    the process ends.

    Args:
        url: The gateway's URL, as `http://127.0.0.1:9091`.
        timeout_s: The timeout in seconds, for the connection and for each answer of the gateway.

    Raises ValueError unless `url` is an http or https URL with a host.
    """

    sink = "push"
    batch_s = 5.0
    heartbeat_s = 15.0

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"a push gateway's URL is like http://127.0.0.1:9091, not {url!r}")
        self._url = url
        self._timeout_s = timeout_s

    def send(self, fleet: Fleet, batch: Batch) -> None:
        """Push the metrics. Raise OSError, as urllib does, if the gateway cannot be reached or refuses."""
        push_to_gateway(
            self._url, job="enginefsm", grouping_key={"run": batch.run}, registry=fleet.metrics.registry,
            timeout=self._timeout_s, handler=_ask_directly,
        )  # fmt: skip

    def close(self) -> None:
        """Do nothing. The pushed metrics stay in the gateway."""


def _ask_directly(
    url: str, method: str, timeout: float | None, headers: Sequence[tuple[str, str]], data: bytes
) -> Callable[[], None]:
    """Return a request for `push_to_gateway` that ignores the environment's proxies: they cannot reach the cluster."""

    def ask() -> None:
        request = urllib.request.Request(url, data, dict(headers), method=method)  # noqa: S310  http or https, as checked
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout):
            pass  # an error status raises HTTPError

    return ask

"""The monitor's metrics, pushed to a Prometheus Pushgateway."""

from __future__ import annotations

import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence

from prometheus_client import push_to_gateway

from enginefsm.export.outbox import Batch, Fleet

TIMEOUT_S = 1.5


class PushGateway:
    """Pushes all metrics every few seconds, and at once when an engine ends. No proxy is asked.

    They replace the group `job="enginefsm", run=<run>` of the gateway, so a run that is started again leaves no old
    series behind, and monitors of one run that push side by side take turns: use the hub for those. The group stays
    when the process ends.

    Args:
        url: The gateway's, as `http://127.0.0.1:9091`.
        timeout_s: For the connection and each answer of the gateway, in seconds.

    Raises ValueError when `url` is not http or https, with a host.
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
        """Push; raises OSError (urllib's errors are such) when the gateway cannot be reached, or refuses."""
        push_to_gateway(
            self._url, job="enginefsm", grouping_key={"run": batch.run}, registry=fleet.metrics.registry,
            timeout=self._timeout_s, handler=_ask_directly,
        )  # fmt: skip

    def close(self) -> None:
        """Do nothing: what was pushed stays."""


def _ask_directly(
    url: str, method: str, timeout: float | None, headers: Sequence[tuple[str, str]], data: bytes
) -> Callable[[], None]:
    """A handler for `push_to_gateway` that passes the environment's proxies by: they know nothing of the cluster."""

    def ask() -> None:
        request = urllib.request.Request(url, data, dict(headers), method=method)  # noqa: S310  http or https, as checked
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout):
            pass  # what is not well raises HTTPError

    return ask

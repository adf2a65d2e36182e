"""Exporters carry a monitor's metrics and events to places that outlive the monitor.

Pass exporters to `EngineMonitor(export=...)` or `enginefsm.configure(export=...)`, or name them in the environment:

    ENGINEFSM_EXPORT=hub,textfile:/var/lib/node_exporter/enginefsm.prom,jsonl:/logs/events.jsonl

    hub                     the hub of the Ray cluster (see `enginefsm.export.hub`); the default
    textfile:PATH           a file for node_exporter
    push:URL                a Prometheus Pushgateway
    jsonl:PATH              a log of events (the format: `enginefsm.export.jsonl`)
    http:[ADDR:]PORT        an HTTP server in this process; ADDR is 127.0.0.1 by default
    none                    no exporter

In a path, `%p` stands for the process id.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from enginefsm.export.http import Http
from enginefsm.export.hub import Hub, HubSettings, read_fleet
from enginefsm.export.jsonl import EventLog
from enginefsm.export.outbox import FLUSH_S, Batch, Exporter, Exports, Fleet
from enginefsm.export.pushgateway import PushGateway
from enginefsm.export.textfile import Textfile

__all__ = [
    "FLUSH_S",
    "Batch",
    "EventLog",
    "Exporter",
    "Exports",
    "Fleet",
    "Http",
    "Hub",
    "HubSettings",
    "PushGateway",
    "Textfile",
    "from_environment",
    "read_fleet",
]

VARIABLE = "ENGINEFSM_EXPORT"
_KINDS = "hub, textfile:PATH, push:URL, jsonl:PATH, http:[ADDR:]PORT, or none"


def from_environment(environ: Mapping[str, str] = os.environ) -> list[Exporter]:
    """Return the exporters that `ENGINEFSM_EXPORT` names. If it is unset or empty, return the hub alone.

    Raises ValueError if this variable, or one of the hub's, cannot be understood.
    """
    text = environ.get(VARIABLE, "").strip() or "hub"
    if text == "none":
        return []
    try:
        return [_exporter(word.strip(), environ) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{VARIABLE}={text!r}: {error}") from None


def _exporter(word: str, environ: Mapping[str, str]) -> Exporter:
    kind, _, value = word.partition(":")
    if kind == "hub" and not value:
        return Hub(HubSettings.from_environment(environ))
    if kind in ("textfile", "jsonl"):
        if not value:
            raise ValueError(f"{kind} needs a path, as {kind}:/path/to/file")
        path = value.replace("%p", str(os.getpid()))
        return Textfile(path) if kind == "textfile" else EventLog(path)
    if kind == "push":
        return PushGateway(value)
    if kind == "http":
        addr, _, port = value.rpartition(":")
        if not port.isdecimal() or int(port) > 65535:
            raise ValueError(f"http needs a port, as http:9400 or http:127.0.0.1:9400, not {word!r}")
        return Http(int(port), addr.strip("[]") or "127.0.0.1")
    raise ValueError(f"there is no exporter {word!r}; there are {_KINDS}, separated by commas")

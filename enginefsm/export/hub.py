"""The hub and its exporter. The hub is a detached, named Ray actor, and outlives the bringups whose metrics it serves.

The hub answers these GET requests over HTTP:
    /metrics        the metrics of `enginefsm.export.fleet`, in Prometheus's text format
    /api/v1/fleet   the same without counts, as JSON; ?run=NAME selects one run
    /-/healthy      status 200 and a line of text

If the client sends `Accept-Encoding: gzip`, as Prometheus does, the hub compresses its answer to about a twentieth.

Each cluster has one hub per namespace, on the head node if Ray can place it there. The first batch starts the hub. If
the hub dies, the next batch starts it again, and each monitor sends it everything again. The hub ends itself some time
after the last heartbeat.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import http.server
import json
import logging
import os
import platform
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import ray
from prometheus_client.exposition import gzip_accepted
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from enginefsm._engine.launch_stages import EVERY_S
from enginefsm._ray import control_plane, handles, keepalive, this_process
from enginefsm._ray import ends as _ends
from enginefsm.export._files import write_atomically
from enginefsm.export.fleet import PROTOCOL, Answer, FleetTable, Report, counts, row
from enginefsm.export.outbox import Batch, Fleet, NotYetError
from enginefsm.fsm.states import LaunchStage
from enginefsm.metrics.collector import versions

logger = logging.getLogger("enginefsm.export")

NAME = "enginefsm-hub"
NAMESPACE = "enginefsm"
FILE_SD_NAME = "enginefsm_service_discovery.json"
SEND_TIMEOUT_S = 1.0
STAGES_S = 0.3
"""How long a report waits for Ray to say how far launches are."""
START_TIMEOUT_S = 20.0
"""How long a hub may take to start. A longer start counts as a failure."""
GCS_ANSWERS_S = 2.0
BIND_AGAIN_S = 5.0
IDLE_CONNECTION_S = 120.0
TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
COMPRESSED_FROM = 1000
"""In bytes. The hub sends a shorter answer uncompressed."""
COMPRESSION = 1
"""The level of gzip. A higher level takes three times as long and saves a tenth more."""


@dataclasses.dataclass(frozen=True, slots=True)
class HubSettings:
    """The settings with which a hub is started. A hub that runs already keeps its own."""

    addr: str = "127.0.0.1"
    """The address that it listens on."""
    port: int = 0
    """The port that it listens on. With 0 it takes a free one."""
    file_sd: str | None = None
    """The file, on the hub's node, in which Prometheus finds the hub (`file_sd_configs`).

    With None it is `enginefsm_service_discovery.json` in Ray's temporary directory, beside Ray's own file. With ""
    the hub writes no file."""
    linger_s: float = 1800.0
    """How many seconds after the last heartbeat of any monitor the hub ends."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"the hub's port is from 0 to 65535, not {self.port}")
        if not self.linger_s > 0:
            raise ValueError(f"the hub's linger_s is above 0, not {self.linger_s}")

    @staticmethod
    def from_environment(environ: Mapping[str, str] = os.environ) -> HubSettings:
        """Return the settings from `ENGINEFSM_HUB_ADDR`, `_PORT`, `_FILE_SD` and `_LINGER_S`.

        Raises ValueError for a bad value. The message names the variable.
        """
        settings: dict[str, Any] = {}
        for field, kind in (("addr", str), ("port", int), ("file_sd", str), ("linger_s", float)):
            variable = f"ENGINEFSM_HUB_{field.upper()}"
            text = environ.get(variable)
            if text is None:
                continue
            try:
                settings[field] = kind(text)
            except ValueError:
                raise ValueError(f"{variable}={text!r} is not a number") from None
        try:
            return HubSettings(**settings)
        except ValueError as error:
            raise ValueError(f"ENGINEFSM_HUB_PORT, ENGINEFSM_HUB_LINGER_S: {error}") from None


class Hub:
    """Reports to the hub, and starts it if there is none.

    Args:
        settings: The settings to start the hub with. By default they come from the environment.
        namespace: The Ray namespace of the hub. A cluster has one hub for each namespace.
    """

    sink = "hub"
    batch_s = 0.5
    heartbeat_s = 5.0

    def __init__(self, settings: HubSettings | None = None, namespace: str = NAMESPACE) -> None:
        self._settings = settings or HubSettings.from_environment()
        self._namespace = namespace
        self._hub: ActorHandle[Any] | None = None
        self._unanswered: ObjectRef[Any] | None = None
        self._starting_since: float | None = None
        self._problem: str | None = None  # the hub's, by its last answer
        self._host = socket.gethostname()
        self._stages: _Stages = {}  # as last reported to the hub

    def send(self, fleet: Fleet, batch: Batch) -> None:
        """Report to the hub and wait for its answer, for a second at most. Raise if no answer came."""
        with _ends.calling_ray():
            self._send(fleet, batch)

    def _send(self, fleet: Fleet, batch: Batch) -> None:
        if not ray.is_initialized():  # else the call would make Ray start a cluster of its own
            raise ConnectionError("this process is not connected to Ray any more")
        if self._unanswered is not None:  # one report at a time, so that reports do not pile up in a frozen hub
            self._answer(self._unanswered)
        answer = self._report(fleet, batch, full=batch.seq == 1 or batch.dropped > 0)
        if not answer["known"]:
            answer = self._report(fleet, batch, full=True)
        problem, told = answer["problem"], self._problem
        self._problem = problem
        if problem is not None:
            fleet.metrics.exporter_failed(self.sink)
            if problem != told:
                logger.warning("export to hub: it has what was sent, but %s", problem)

    def close(self) -> None:
        """Drop the handle of the hub. The hub goes on."""
        self._hub = self._unanswered = self._starting_since = self._problem = None
        self._stages = {}

    def _report(self, fleet: Fleet, batch: Batch, *, full: bool) -> Answer:
        if self._hub is None:
            self._starting_since = time.monotonic()
            self._hub = start(self._settings, self._namespace)
        if not (batch.terminal or batch.stopped_s):  # an end is reported without this delay
            fleet.stages.look(STAGES_S, fresh_s=EVERY_S)
        stages = {e.name: (e.incarnation, e.stage) for e in fleet.engines() if e.stage is not None}
        moved_on = (name for name, _ in stages.items() ^ self._stages.items())
        report = _report(fleet, batch, self._host, None if full else moved_on)
        answer = self._answer(self._hub.accept.remote(report))
        self._stages = stages
        return answer

    def _answer(self, ref: ObjectRef[Any]) -> Answer:
        self._unanswered = ref
        try:
            answer = cast(Answer, ray.get(ref, timeout=SEND_TIMEOUT_S))
        except GetTimeoutError:
            if self._starting_since is not None and time.monotonic() - self._starting_since < START_TIMEOUT_S:
                raise NotYetError("the hub is starting") from None
            raise TimeoutError(f"the hub has not answered for {SEND_TIMEOUT_S:g} s") from None
        except RayActorError:
            self._hub = None  # the next attempt finds or starts a hub
            self._unanswered = None
            raise
        except Exception:
            self._unanswered = None
            raise
        self._unanswered = self._starting_since = None
        return answer


_Stages = dict[str, tuple[int, LaunchStage]]
"""The incarnation and the launch stage of each launching engine, by name."""


def _report(fleet: Fleet, batch: Batch, host: str, moved_on: Iterable[str] | None) -> Report:
    """Return the report on the engines in the batch's events and in `moved_on`. If that is None, report all engines."""
    if moved_on is None:
        engines, gone = fleet.engines(), []
    else:
        names = dict.fromkeys([*(event.engine for _, event in batch.events), *moved_on])
        found = {name: fleet.engine(name) for name in names}
        engines = [engine for engine in found.values() if engine is not None]
        gone = [name for name, engine in found.items() if engine is None]
    ours, rays = versions()
    job = "" if this_process.actor_instance() is None else ray.get_runtime_context().get_job_id()
    return {
        "protocol": PROTOCOL,
        "run": batch.run,
        "manager": batch.manager,
        "seq": batch.seq,
        "full": moved_on is None,
        "rows": [
            {**row(engine.snapshot()), "max_task_retries": handles.max_task_retries(engine.handle)}
            for engine in engines
        ],
        "gone": gone,
        "counts": counts(fleet.metrics.collect_counts()),
        "held": {why.value: held for why, held in fleet.metrics.verdicts_held().items()},
        "job": job,
        "actor": this_process.actor_id(),
        "started_s": batch.started_s,
        "heartbeat_s": time.time(),
        "stopped_s": batch.stopped_s,
        "host": host,
        "pid": os.getpid(),
        "version": ours,
        "ray_version": rays,
        "python": platform.python_version(),
        "silent_link_s": keepalive.silent_link_s(),
    }


def start(settings: HubSettings | None = None, namespace: str = NAMESPACE) -> ActorHandle[Any]:
    """Return the cluster's hub, and start it if there is none. Ray must be initialized."""
    settings = settings or HubSettings.from_environment()
    head = control_plane.head_node_id()
    actor: Any = ray.remote(HubActor)
    hub: ActorHandle[Any] = actor.options(
        name=NAME,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_concurrency=16,
        # A hub that Ray restarted would know nothing, and the next batch starts a new one anyway.
        max_restarts=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(head, soft=True) if head else None,
    ).remote(dataclasses.asdict(settings))
    return hub


def find(namespace: str = NAMESPACE) -> ActorHandle[Any] | None:
    """Return the cluster's hub, or None if there is none. Ray must be initialized."""
    try:
        return ray.get_actor(NAME, namespace)
    except ValueError:
        return None


def read_fleet(run: str | None = None, *, timeout_s: float = 10.0, namespace: str = NAMESPACE) -> dict[str, Any] | None:
    """Return the JSON of the cluster's hub (see `enginefsm.export.fleet`), read through Ray, or None without a hub.

    Raises `ray.exceptions.GetTimeoutError` if the hub does not answer within `timeout_s` seconds, and RayActorError if
    the hub is gone.
    """
    hub = find(namespace)
    return None if hub is None else cast("dict[str, Any]", ray.get(hub.fleet.remote(run), timeout=timeout_s))


class HubActor:
    """The hub's actor. It uses threads and no asyncio, so that no report waits for another."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = HubSettings(**settings)
        self._table = FleetTable(time.monotonic, time.time)
        self._started_s = time.time()
        self._server: _Server | None = None
        self._problem: str | None = None
        self._ip = ray.util.get_node_ip_address()
        file_sd = self._settings.file_sd
        if file_sd is None:
            file_sd = str(Path(this_process.temp_dir()) / FILE_SD_NAME)
        self._file_sd = Path(file_sd) if file_sd else None
        self._entry = b""
        self._self = ray.get_runtime_context().current_actor
        self._listen()
        threading.Thread(target=self._keep, name="enginefsm-hub", daemon=True).start()

    def accept(self, report: Report) -> Answer:
        """Take in a manager's report."""
        return {"known": self._table.accept(report), "problem": self._problem}

    def fleet(self, run: str | None = None) -> dict[str, Any]:
        """Return the object that /api/v1/fleet serves as JSON."""
        return self._table.as_json(run) | {"hub": self._about()}

    def address(self) -> str | None:
        """Return the URL that the hub serves at, or None while it cannot serve."""
        return None if self._server is None else f"http://{self._target()}"

    def _about(self) -> dict[str, Any]:
        return {
            "address": self.address(),
            "problem": self._problem,
            "started_s": self._started_s,
            "pid": os.getpid(),
            "node_ip": self._ip,
            "linger_s": self._settings.linger_s,
            "file_sd": "" if self._file_sd is None else str(self._file_sd),
            "enginefsm": version("enginefsm"),
        }

    def _target(self) -> str:
        assert self._server is not None
        addr = self._settings.addr
        addr = self._ip if addr in ("0.0.0.0", "::", "") else addr  # noqa: S104  compared, not bound
        return f"[{addr}]:{self._server.server_port}" if ":" in addr else f"{addr}:{self._server.server_port}"

    def _listen(self) -> None:
        """Begin to serve, and write the address to the file for Prometheus.

        If that fails, keep the problem. Every answer to a report tells it, and `_keep` tries again.
        """
        addr, port = self._settings.addr, self._settings.port
        try:
            if self._server is None:
                self._server = _Server(addr, port, self)
                threading.Thread(target=self._server.serve_forever, name="enginefsm-hub-http", daemon=True).start()
        except OSError as error:
            advice = ""
            if error.errno == errno.EADDRINUSE:
                advice = "; set ENGINEFSM_HUB_PORT to another port, or to 0 for a free one"
            self._set_problem(f"the hub cannot listen on {addr}:{port}: {error.strerror or error}{advice}")
            return
        try:
            if self._file_sd is not None:
                entry = [{"targets": [self._target()], "labels": {"job": "enginefsm"}}]
                self._entry = json.dumps(entry).encode() + b"\n"
                write_atomically(self._file_sd, self._entry)
        except OSError as error:
            self._set_problem(
                f"the hub cannot write its address, {self._target()}, for Prometheus into {self._file_sd}: "
                f"{error.strerror or error}; set ENGINEFSM_HUB_FILE_SD to a file in a directory that it may write to"
            )
            return
        self._set_problem(None)

    def _set_problem(self, problem: str | None) -> None:
        if problem != self._problem and problem is not None:
            logger.error("%s", problem)
        self._problem = problem

    def _keep(self) -> None:
        """Retry what failed, and forget old managers. End the hub when no manager has reported for `linger_s`."""
        linger_s = self._settings.linger_s
        while self._table.silent_for_s() < linger_s:
            time.sleep(min(BIND_AGAIN_S, max(0.01, linger_s - self._table.silent_for_s())))
            if self._problem is not None:
                self._listen()
            if self._table.silent("job"):
                self._table.end("job", _answer(control_plane.ended_jobs))
            if actors := self._table.silent("actor"):
                self._table.end("actor", _answer(control_plane.actors_ended_in_good_order, actors, GCS_ANSWERS_S))
            self._table.forget(linger_s)
        self._end()

    def _end(self) -> None:
        logger.info("no monitor has been heard of for %g s: the hub ends", self._settings.linger_s)
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        if self._file_sd is not None:
            with contextlib.suppress(OSError):
                if self._file_sd.read_bytes() == self._entry:  # else another hub has written it since
                    self._file_sd.unlink()
        ray.kill(self._self)


def _answer(question: Callable[..., dict[str, float]], *args: Any) -> dict[str, float]:
    """Return what Ray answers, or nothing if it cannot be asked now."""
    try:
        return question(*args)
    except Exception:  # Ray raises various errors if the GCS is away; the next turn asks again
        logger.debug("Ray does not answer %s", question.__name__, exc_info=True)
        return {}


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, addr: str, port: int, hub: HubActor) -> None:
        self.hub = hub
        self.address_family = socket.AF_INET6 if ":" in addr else socket.AF_INET
        super().__init__((addr, port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own method looks up the host's name, which may take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.socket.getsockname()[:2]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_CONNECTION_S
    server: _Server

    def do_GET(self) -> None:
        hub = self.server.hub
        url = urllib.parse.urlsplit(self.path)
        if url.path == "/metrics":
            self._send(200, TEXT_FORMAT, hub._table.text())
        elif url.path == "/api/v1/fleet":
            run = urllib.parse.parse_qs(url.query, keep_blank_values=True).get("run", [None])[0]
            self._send(200, "application/json", json.dumps(hub.fleet(run)).encode())
        elif url.path == "/-/healthy":
            self._send(200, "text/plain; charset=utf-8", b"the enginefsm hub is healthy\n")
        else:
            self._send(404, "text/plain; charset=utf-8", b"there are /metrics, /api/v1/fleet and /-/healthy\n")

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Vary", "Accept-Encoding")
        if len(body) >= COMPRESSED_FROM and gzip_accepted(self.headers.get("Accept-Encoding", "")):
            body = gzip.compress(body, COMPRESSION, mtime=0)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  named by http.server
        logger.debug("hub: " + format, *args)

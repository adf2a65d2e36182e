"""Finds the hub and reads its JSON (see `enginefsm.export.fleet`), within bounds.

Over HTTP where the hub's address is known and can be reached: given, or left by the hub on this machine in Prometheus's
file. Otherwise through Ray, in a child process: connecting to a cluster that does not answer takes Ray minutes, and
ends the process.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from enginefsm.export.hub import FILE_SD_NAME, NAME, NAMESPACE

HTTP_TIMEOUT_S = 5.0
PORT_TIMEOUT_S = 5.0
CLUSTER_TIMEOUT_S = 30.0
"""For the connection to Ray, and for each answer through it. It takes two seconds where the machine is idle."""
_MOST_BYTES = 256 * 2**20
_CHILD = Path(__file__).parents[1] / "children" / "hub_reader.py"

FleetJson = dict[str, Any]


class NothingToSeeError(Exception):
    """There is no cluster, no hub or no such run, or it does not answer; the message says which, in one line."""


def checked_run(fleet: FleetJson, run: str | None) -> FleetJson:
    """Give the fleet; raises NothingToSeeError when there is no run in it, or not the one that was asked for."""
    if fleet["runs"]:
        return fleet
    if run is None:
        raise NothingToSeeError("the hub knows of no run yet")
    raise NothingToSeeError(f"the hub knows of no run {run!r}: see enginefsm status for those that it knows")


class HubReader:
    """Reads the hub's JSON as often as asked. To be closed.

    Args:
        address: The Ray cluster's, as `ray.init` takes it, or the hub's own as `http://host:port`; None for what
            `RAY_ADDRESS` says, or else the one on this machine.
        namespace: The Ray namespace of the hub.
        environ: Where `RAY_ADDRESS` and `ENGINEFSM_HUB_FILE_SD` are looked up.
        timeout_s: For the connection to Ray, and for each answer through it.
    """

    def __init__(
        self,
        address: str | None = None,
        namespace: str = NAMESPACE,
        environ: Mapping[str, str] = os.environ,
        timeout_s: float = CLUSTER_TIMEOUT_S,
    ) -> None:
        self._namespace = namespace
        self._timeout_s = timeout_s
        self._url: str | None = None
        self._only_url = address is not None and "://" in address and not address.startswith("ray://")
        self._started_s: float | None = None  # of the hub at the URL; None if any will do
        self._ray: _ThroughRay | None = None
        if self._only_url:
            assert address is not None
            self._url = _checked_url(address)
            return
        from_environment = environ.get("RAY_ADDRESS", "")
        if address is None and from_environment and "://" not in from_environment.removeprefix("ray://"):
            address = from_environment  # with http:// it is the dashboard's, for `ray job`
        self._cluster = address or "auto"
        if address is None:
            self._url = _address_left_in(
                Path(environ.get("ENGINEFSM_HUB_FILE_SD") or Path(tempfile.gettempdir()) / "ray" / FILE_SD_NAME)
            )

    def read(self, run: str | None = None) -> FleetJson:
        """Give what the hub knows now, of one run if it is named; raises NothingToSeeError."""
        if self._url is not None:
            try:
                fleet = _get(self._url, run)
                if self._started_s in (None, fleet["hub"]["started_s"]):
                    self._close_ray()
                    return fleet
            except NothingToSeeError:
                if self._only_url:
                    raise
            self._url = None  # not from here, or not any more
        if self._ray is None:
            self._ray = _ThroughRay(self._cluster, self._namespace, self._timeout_s)
        try:
            fleet = self._ray.read(run)
        except NothingToSeeError:
            self._close_ray()
            raise
        if self._started_s != fleet["hub"]["started_s"]:  # the first time: it may be reached from here
            self._url, self._started_s = fleet["hub"]["address"], fleet["hub"]["started_s"]
        return fleet

    def close(self) -> None:
        """Let go of the cluster."""
        self._close_ray()

    def _close_ray(self) -> None:
        if self._ray is not None:
            self._ray.close()
            self._ray = None


class _ThroughRay:
    """The child process, connected to the cluster."""

    def __init__(self, cluster: str, namespace: str, timeout_s: float) -> None:
        self._cluster = "of this machine" if cluster == "auto" else f"at {cluster}"
        self._timeout_s = timeout_s
        _check_port(cluster)
        self._said: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self._child = subprocess.Popen(
            [sys.executable, _CHILD, cluster, NAME, namespace],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, bufsize=0,
            start_new_session=True,  # a Ctrl-C is for this process
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},  # it outdoes "auto"
        )  # fmt: skip
        self._unread = b""
        try:
            answer = self._answer()
            if "no_cluster" in answer:
                if cluster == "auto":
                    raise NothingToSeeError(
                        "no Ray cluster runs on this machine: name one with --address HOST:PORT, or its hub's "
                        "address, http://HOST:PORT"
                    )
                raise NothingToSeeError(f"cannot connect to the Ray cluster {self._cluster}: {answer['no_cluster']}")
        except BaseException:
            self.close()
            raise

    def read(self, run: str | None) -> FleetJson:
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is told below
            self._child.stdin.write(json.dumps(run).encode() + b"\n")
        answer = self._answer()
        if "fleet" in answer:
            return _checked(answer["fleet"], f"the hub of the Ray cluster {self._cluster}")
        if "no_hub" in answer:
            raise NothingToSeeError(
                f"the Ray cluster {self._cluster} has no hub of enginefsm: no monitor has exported to it yet, or the "
                f"last one has been silent for long"
            )
        raise NothingToSeeError(f"the hub of the Ray cluster {self._cluster} does not answer: {answer['no_answer']}")

    def close(self) -> None:
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout, self._said):
            assert pipe is not None
            pipe.close()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        until = time.monotonic() + self._timeout_s
        while b"\n" not in self._unread:
            left_s = until - time.monotonic()
            if left_s <= 0 or not select.select([self._child.stdout], [], [], left_s)[0]:
                raise NothingToSeeError(
                    f"the Ray cluster {self._cluster} has not answered within {self._timeout_s:g} s"
                )
            read = self._child.stdout.read(1 << 20)
            if not read:
                raise NothingToSeeError(f"cannot connect to the Ray cluster {self._cluster}: {self._last_words()}")
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"Ray ended with exit code {self._child.wait()}"


def _check_port(cluster: str) -> None:
    """Whether anyone listens there: Ray itself takes minutes to say so."""
    try:
        parts = urllib.parse.urlsplit(cluster if "://" in cluster else f"//{cluster}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise NothingToSeeError(f"--address: {cluster!r} is no address: {error}") from None
    if host is None or port is None:  # auto, local, or what Ray knows by itself
        if cluster == "auto":
            return
        raise NothingToSeeError(
            f"--address: {cluster!r} is not HOST:PORT of a Ray cluster, nor http://HOST:PORT of a hub"
        )
    try:
        socket.create_connection((host, port), timeout=PORT_TIMEOUT_S).close()
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise NothingToSeeError(f"there is no Ray cluster at {cluster}: {why}") from None


def _checked_url(address: str) -> str:
    try:
        parts = urllib.parse.urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise NothingToSeeError(f"--address: {address!r} is no address: {error}") from None
    if parts.scheme != "http" or not host:
        raise NothingToSeeError(f"--address: a hub's address is like http://127.0.0.1:9400, not {address!r}")
    return f"http://{parts.netloc}"


def _address_left_in(file_sd: Path) -> str | None:
    """The hub's address in the file that it writes for Prometheus; None if there is none to be had."""
    try:
        (entry,) = json.loads(file_sd.read_bytes())
        (target,) = entry["targets"]
        return _checked_url(f"http://{target}")
    except (OSError, ValueError, TypeError, KeyError, NothingToSeeError):
        return None


def _get(url: str, run: str | None) -> FleetJson:
    query = "" if run is None else f"?{urllib.parse.urlencode({'run': run})}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows nothing of this cluster
    try:
        with direct.open(f"{url}/api/v1/fleet{query}", timeout=HTTP_TIMEOUT_S) as answer:
            content = json.loads(answer.read(_MOST_BYTES))
    except urllib.error.HTTPError as error:
        raise NothingToSeeError(f"what answers at {url} is not a hub of enginefsm: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        why = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
        raise NothingToSeeError(f"no hub answers at {url}: {why}") from None
    except ValueError:
        raise NothingToSeeError(f"what answers at {url} is not a hub of enginefsm: it gives no JSON") from None
    return _checked(content, f"what answers at {url}")


def _checked(content: Any, who: str) -> FleetJson:
    if not (
        isinstance(content, dict) and isinstance(content.get("runs"), list) and isinstance(content.get("hub"), dict)
    ):
        raise NothingToSeeError(f"{who} is not a hub of enginefsm")
    if content.get("version") != 1:
        raise NothingToSeeError(
            f"{who} is of another version of enginefsm: its JSON is version {content.get('version')}"
        )
    return content

"""Finds the hub and reads its JSON (see `enginefsm.export.fleet`), within bounds.

The reader uses HTTP if it knows the hub's address and can reach it. It knows an address that the user gave, and the
address in the file that the hub writes for Prometheus on this machine. Otherwise it asks through Ray, in a child.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enginefsm.cli.child import Child, EndedError, NoAnswerError
from enginefsm.export.hub import FILE_SD_NAME, NAME, NAMESPACE

HTTP_TIMEOUT_S = 5.0
PORT_TIMEOUT_S = 5.0
CLUSTER_TIMEOUT_S = 30.0
"""For the connection to Ray, and for each answer through it. It takes two seconds on an idle machine."""
_MOST_BYTES = 256 * 2**20

FleetJson = dict[str, Any]


class NothingToSeeError(Exception):
    """There is no cluster, no hub or no such run, or it does not answer. The message says which, in one line."""


def checked_run(fleet: FleetJson, run: str | None) -> FleetJson:
    """Return the fleet. Raise NothingToSeeError if it has no run, or not the run that the user asked for."""
    if fleet["runs"]:
        return fleet
    if run is None:
        raise NothingToSeeError("the hub knows of no run yet")
    raise NothingToSeeError(f"the hub knows of no run {run!r}: enginefsm status lists the runs that it knows")


class HubReader:
    """Reads the hub's JSON as often as asked. Close it after use.

    Args:
        address: The address of the Ray cluster, as `ray.init` takes it, or of the hub, as `http://host:port`. None
            takes `RAY_ADDRESS`, or else the cluster on this machine.
        namespace: The Ray namespace of the hub.
        environ: The environment to look up `RAY_ADDRESS` and `ENGINEFSM_HUB_FILE_SD` in.
        timeout_s: The bound for the connection to Ray, and for each answer through it.
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
        self._only_url = is_hub_address(address)
        self._started_s: float | None = None  # of the hub at the URL; None accepts any hub
        self._ray: _ThroughRay | None = None
        if self._only_url:
            assert address is not None
            self._url = _checked_url(address)
            return
        self._cluster = cluster_address(address, environ)
        if address is None and self._cluster == "auto":
            self._url = address_left_in(file_sd(environ))

    def read(self, run: str | None = None) -> FleetJson:
        """Return what the hub knows now, of one run if `run` names it. Raise NothingToSeeError if it cannot be had."""
        if self._url is not None:
            try:
                fleet = get_fleet(self._url, run)
                if self._started_s in (None, fleet["hub"]["started_s"]):
                    self._close_ray()
                    return fleet
            except NothingToSeeError:
                if self._only_url:
                    raise
            self._url = None  # this process cannot reach the hub there
        if self._ray is None:
            self._ray = _ThroughRay(self._cluster, self._namespace, self._timeout_s)
        try:
            fleet = self._ray.read(run)
        except NothingToSeeError:
            self._close_ray()
            raise
        if self._started_s != fleet["hub"]["started_s"]:  # try this hub's own address once
            self._url, self._started_s = fleet["hub"]["address"], fleet["hub"]["started_s"]
        return fleet

    def close(self) -> None:
        """Disconnect from the cluster."""
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
        check_port(cluster)
        self._child = Child("hub_reader.py", cluster, NAME, namespace, timeout_s=timeout_s)
        try:
            answer = self._answer()
            if "no_cluster" in answer:
                if cluster == "auto":
                    raise NothingToSeeError(
                        "no Ray cluster runs on this machine: name one with --address HOST:PORT, or its hub with "
                        "--address http://HOST:PORT"
                    )
                raise NothingToSeeError(f"cannot connect to the Ray cluster {self._cluster}: {answer['no_cluster']}")
        except BaseException:
            self.close()
            raise

    def read(self, run: str | None) -> FleetJson:
        self._child.tell(run)
        answer = self._answer()
        if "fleet" in answer:
            return _checked(answer["fleet"], f"the hub of the Ray cluster {self._cluster}")
        if "no_hub" in answer:
            raise NothingToSeeError(
                f"the Ray cluster {self._cluster} has no hub of enginefsm: no monitor has exported to a hub yet, or "
                f"the hub has ended because all monitors were silent for long"
            )
        raise NothingToSeeError(f"the hub of the Ray cluster {self._cluster} does not answer: {answer['no_answer']}")

    def close(self) -> None:
        self._child.close()

    def _answer(self) -> dict[str, Any]:
        try:
            return self._child.answer()
        except NoAnswerError:
            raise NothingToSeeError(
                f"the Ray cluster {self._cluster} has not answered within {self._timeout_s:g} s"
            ) from None
        except EndedError as error:
            raise NothingToSeeError(f"cannot connect to the Ray cluster {self._cluster}: {error}") from None


def is_hub_address(address: str | None) -> bool:
    """Return whether `address` is a hub's, `http://host:port`, and not a cluster's."""
    return address is not None and "://" in address and not address.startswith("ray://")


def cluster_address(address: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """Return the address of the cluster: `address`, or `RAY_ADDRESS`, or `auto` for the one on this machine."""
    if address is not None:
        return address
    from_environment = environ.get("RAY_ADDRESS", "")
    # `ray job` takes an http:// address in the same variable: the dashboard's.
    return from_environment if "://" not in from_environment.removeprefix("ray://") and from_environment else "auto"


def check_port(cluster: str) -> None:
    """Raise NothingToSeeError if nothing listens at the address. Ray itself takes minutes to say so."""
    try:
        parts = urllib.parse.urlsplit(cluster if "://" in cluster else f"//{cluster}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise NothingToSeeError(f"--address: {cluster!r} is no address: {error}") from None
    if host is None or port is None:  # auto, local, or a name that Ray alone understands
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


def file_sd(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the path of the file in which a hub on this machine leaves its address for Prometheus."""
    return Path(environ.get("ENGINEFSM_HUB_FILE_SD") or Path(tempfile.gettempdir()) / "ray" / FILE_SD_NAME)


def address_left_in(path: Path) -> str | None:
    """Return the hub's address in the file that it writes for Prometheus, or None if the file has no address."""
    try:
        (entry,) = json.loads(path.read_bytes())
        (target,) = entry["targets"]
        return _checked_url(f"http://{target}")
    except (OSError, ValueError, TypeError, KeyError, NothingToSeeError):
        return None


def get_fleet(url: str, run: str | None = None) -> FleetJson:
    """Return the JSON of the hub at `url`. Raise NothingToSeeError if it cannot be had."""
    query = "" if run is None else f"?{urllib.parse.urlencode({'run': run})}"
    try:
        content = json.loads(get(url, f"/api/v1/fleet{query}"))
    except ValueError:
        raise NothingToSeeError(f"what answers at {url} is not a hub of enginefsm: it gives no JSON") from None
    return _checked(content, f"what answers at {url}")


def get(url: str, path: str) -> bytes:
    """Return what the hub at `url` serves at `path`. Raise NothingToSeeError if it does not answer well."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this cluster
    try:
        with direct.open(f"{url}{path}", timeout=HTTP_TIMEOUT_S) as answer:
            content: bytes = answer.read(_MOST_BYTES)
            return content
    except urllib.error.HTTPError as error:
        raise NothingToSeeError(f"what answers at {url} is not a hub of enginefsm: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        why = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
        raise NothingToSeeError(f"no hub answers at {url}: {why}") from None


def _checked_url(address: str) -> str:
    try:
        parts = urllib.parse.urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise NothingToSeeError(f"--address: {address!r} is no address: {error}") from None
    if parts.scheme != "http" or not host:
        raise NothingToSeeError(f"--address: a hub's address is like http://127.0.0.1:9400, not {address!r}")
    return f"http://{parts.netloc}"


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

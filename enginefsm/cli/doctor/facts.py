"""What the doctor has seen. A part that it could not see is None, and a text beside it says why."""

from __future__ import annotations

import dataclasses
from typing import Any

FleetJson = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Here:
    """This process and its host."""

    host: str
    python: str
    ray: str
    enginefsm: str
    silent_link_s: float
    """Within how many seconds the Ray of this process notices that a link is silent."""
    task_max_retries: str | None
    """`RAY_TASK_MAX_RETRIES` of this process."""


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A node, as the control plane knows it."""

    ip: str
    host: str
    alive: bool
    head: bool


@dataclasses.dataclass(frozen=True, slots=True)
class HubActor:
    """The hub's actor, as the control plane knows it."""

    ip: str
    pid: int


@dataclasses.dataclass(frozen=True, slots=True)
class Cluster:
    """The cluster, as its control plane knows it."""

    address: str
    ray: str | None
    """The version of Ray that the head node runs."""
    python: str | None
    nodes: tuple[Node, ...]
    hub: HubActor | None

    @property
    def alive(self) -> int:
        """The number of nodes that are alive."""
        return sum(node.alive for node in self.nodes)


@dataclasses.dataclass(frozen=True, slots=True)
class Hub:
    """The hub, as it answers itself."""

    fleet: FleetJson
    """Its JSON."""
    asked_s: float
    """When the question left, in seconds since the epoch."""
    answered_s: float
    """When the answer came."""
    at: str | None = None
    """The URL at which it was asked; None if it was asked through Ray."""

    @property
    def address(self) -> str | None:
        """The URL that it serves at."""
        address: str | None = self.fleet["hub"].get("address")
        return address

    @property
    def managers(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The run and the manager, for each manager that is alive."""
        return [
            (run, manager) for run in self.fleet["runs"] for manager in run["managers"] if manager["state"] == "alive"
        ]


@dataclasses.dataclass(frozen=True, slots=True)
class FileSd:
    """The file in which Prometheus finds the hub."""

    path: str
    exists: bool
    url: str | None
    """The address in it; None if it holds none that can be read."""


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """All that the doctor has seen."""

    here: Here
    cluster: Cluster | None = None
    cluster_problem: str = ""
    hub: Hub | None = None
    hub_problem: str = ""
    metrics: str | None = None
    """What the hub serves at /metrics."""
    metrics_problem: str = ""
    file_sd: FileSd | None = None
    """None if the hub is on another host, or if it writes none."""
    own_group: bool | None = None
    """Whether the hub's actor leads a process group of its own; None if the actor is on another host."""

    @property
    def hub_host(self) -> str | None:
        """The name of the host that the hub is on, if the control plane knows it."""
        if self.cluster is None:
            return None
        ip = self.cluster.hub.ip if self.cluster.hub is not None else None
        if ip is None and self.hub is not None:
            ip = self.hub.fleet["hub"].get("node_ip")
        return next((node.host for node in self.cluster.nodes if node.ip == ip), None)

    @property
    def can_join(self) -> bool:
        """Whether the cluster accepts a driver with the Ray and the Python of this process."""
        if self.cluster is None:
            return False
        theirs = (self.cluster.ray or self.here.ray, self.cluster.python or self.here.python)
        return theirs == (self.here.ray, self.here.python)

    @property
    def hub_is_here(self) -> bool:
        """Whether the hub is on this host."""
        return self.hub_host == self.here.host

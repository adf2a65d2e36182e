"""Collects the facts. Each look is bounded; none starts a process of Ray or registers a driver, but one.

That one is `status`'s look through Ray, as a driver. The doctor takes it only if the control plane says that a hub runs
and no address leads to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import socket
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray

from enginefsm._ray import keepalive
from enginefsm.cli.child import Child, EndedError, NoAnswerError
from enginefsm.cli.doctor.facts import Cluster, Facts, FileSd, Here, Hub, HubActor, Node
from enginefsm.cli.status import finding
from enginefsm.cli.status.finding import HubReader, NothingToSeeError
from enginefsm.export.hub import NAME, NAMESPACE

CLUSTER_TIMEOUT_S = 20.0


def look(address: str | None, environ: Mapping[str, str] = os.environ) -> Facts:
    """Return what there is to see from this process, of the cluster or the hub at `address`."""
    facts = Facts(_here(environ))
    if not finding.is_hub_address(address):
        facts = _look_at_cluster(facts, finding.cluster_address(address, environ))
    facts = _look_at_hub(facts, address, environ)
    return _look_beside_hub(facts, environ)


def _here(environ: Mapping[str, str]) -> Here:
    return Here(
        host=socket.gethostname(),
        python=platform.python_version(),
        ray=ray.__version__,
        enginefsm=version("enginefsm"),
        silent_link_s=keepalive.silent_link_s(),
        task_max_retries=environ.get("RAY_TASK_MAX_RETRIES"),
    )


def _look_at_cluster(facts: Facts, address: str) -> Facts:
    try:
        return dataclasses.replace(facts, cluster=_cluster(address))
    except NothingToSeeError as error:
        return dataclasses.replace(facts, cluster_problem=str(error))


def _cluster(address: str) -> Cluster:
    finding.check_port(address)
    with contextlib.closing(Child("cluster_reader.py", address, NAME, NAMESPACE, timeout_s=CLUSTER_TIMEOUT_S)) as child:
        tried = "on this machine" if address == "auto" else f"at {address}"
        try:
            answer = child.answer()
            if "trying" in answer:
                tried = f"at {answer['trying']}"
                finding.check_port(answer["trying"])
                answer = child.answer()
        except NoAnswerError:
            raise NothingToSeeError(f"the cluster {tried} has not answered within {CLUSTER_TIMEOUT_S:g} s") from None
        except EndedError as error:
            raise NothingToSeeError(f"cannot ask the cluster {tried}: {error}") from None
    if "no_cluster" in answer:
        raise NothingToSeeError(f"no cluster answers {tried}: {answer['no_cluster']}")
    found: dict[str, Any] = answer["cluster"]
    hub = found["hub"]
    return Cluster(
        address=found["address"],
        ray=found["ray"],
        python=found["python"],
        nodes=tuple(Node(**node) for node in found["nodes"]),
        hub=None if hub is None else HubActor(hub["ip"], hub["pid"]),
    )


def _look_at_hub(facts: Facts, address: str | None, environ: Mapping[str, str]) -> Facts:
    if finding.is_hub_address(address):
        assert address is not None
        url: str | None = address.rstrip("/")
    elif address is not None and facts.cluster is None:
        url = None  # the hub of the file may be another cluster's
    else:
        url = finding.address_left_in(finding.file_sd(environ))
    problem = ""
    if url is not None:
        try:
            hub = _ask(url)
            if _is_of(facts.cluster, hub):
                return dataclasses.replace(facts, hub=hub)
        except NothingToSeeError as error:
            problem = str(error)
    cluster = facts.cluster
    if cluster is None or cluster.hub is None:
        return dataclasses.replace(facts, hub_problem=problem)
    if not facts.can_join:
        return dataclasses.replace(
            facts, hub_problem="not asked: a cluster refuses a process with another Ray or Python"
        )
    try:
        with contextlib.closing(HubReader(cluster.address)) as reader:
            asked_s = time.time()
            fleet = reader.read()
    except NothingToSeeError as error:
        return dataclasses.replace(facts, hub_problem=str(error))
    # The wait for Ray's connection is no part of the answer's time.
    answered_s = time.time()
    hub = Hub(fleet, asked_s, answered_s)
    if hub.address is not None:
        with contextlib.suppress(NothingToSeeError):  # the check of the address says so
            hub = _ask(hub.address)
    return dataclasses.replace(facts, hub=hub)


def _ask(url: str) -> Hub:
    asked_s = time.time()
    fleet = finding.get_fleet(url)
    return Hub(fleet, asked_s, time.time(), url)


def _is_of(cluster: Cluster | None, hub: Hub) -> bool:
    """Return whether the hub is the cluster's. A file may lead to a hub of another cluster on the same machine."""
    if cluster is None:
        return True
    about = hub.fleet["hub"]
    return cluster.hub is not None and (about.get("node_ip"), about.get("pid")) == (cluster.hub.ip, cluster.hub.pid)


def _look_beside_hub(facts: Facts, environ: Mapping[str, str]) -> Facts:
    if facts.hub is not None and facts.hub.address is not None:
        try:
            text = finding.get(facts.hub.address, "/metrics").decode("utf-8", "replace")
            facts = dataclasses.replace(facts, metrics=text)
        except NothingToSeeError as error:
            facts = dataclasses.replace(facts, metrics_problem=str(error))
    if facts.hub is None or not facts.hub_is_here:
        return facts
    path = facts.hub.fleet["hub"].get("file_sd", str(finding.file_sd(environ)))
    found = FileSd(path, Path(path).exists(), finding.address_left_in(Path(path))) if path else None
    own_group = None
    with contextlib.suppress(OSError):
        pid = facts.hub.fleet["hub"]["pid"]
        own_group = os.getpgid(pid) == pid
    return dataclasses.replace(facts, file_sd=found, own_group=own_group)

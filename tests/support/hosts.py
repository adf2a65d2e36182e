"""Two hosts on one machine, each a network namespace, with a link between them that can fall silent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from support.clusters import WORKERS_PATH
from support.engines import wait_until

DEVICE = "wire"  # the name of the link's end in either namespace
NOBODY = "02:00:00:00:00:99"  # an Ethernet address that no host has
PORT = 6379


class Host:
    """One network namespace."""

    def __init__(self, namespace: str, address: str) -> None:
        self.namespace, self.address = namespace, address

    def ip(self, *command: str) -> None:
        _ip("-n", self.namespace, *command)

    def start(self, command: list[str], **options) -> subprocess.Popen:
        """Start a process on this host, in the environment of its Ray. It ends with the host at the latest."""
        options.setdefault("env", _environment())
        return subprocess.Popen(["ip", "netns", "exec", self.namespace, *command], **options)

    def pids(self) -> list[int]:
        listed = _ip("netns", "pids", self.namespace)
        return [int(pid) for pid in listed.split()]

    def kill_all(self) -> None:
        """Kill every process of this host, those included that start meanwhile."""

        def killed() -> bool:
            pids = self.pids()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        wait_until(killed, what=f"the end of all processes of {self.namespace}")


class Hosts:
    """Two hosts and the link between them."""

    def __init__(self, here: Host, there: Host) -> None:
        self.here, self.there = here, there

    def silence(self) -> None:
        """Have the link drop every packet, in both directions. Neither host is told."""
        for host, peer in self._ends():
            host.ip("neigh", "replace", peer.address, "lladdr", NOBODY, "dev", DEVICE, "nud", "permanent")

    def restore(self) -> None:
        """Have the link carry packets again."""
        for host, peer in self._ends():
            host.ip("neigh", "del", peer.address, "dev", DEVICE)

    def _ends(self) -> tuple[tuple[Host, Host], tuple[Host, Host]]:
        return (self.here, self.there), (self.there, self.here)


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Give two hosts with a link between them. At the end their processes are killed and the hosts removed."""
    name = f"enginefsm-{os.getpid()}-{uuid4().hex[:6]}"
    hosts = Hosts(Host(f"{name}-a", "10.203.77.1"), Host(f"{name}-b", "10.203.77.2"))
    with contextlib.ExitStack() as stack:
        for host in (hosts.here, hosts.there):
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "delete", host.namespace)
            stack.callback(host.kill_all)
        ends = [(host.namespace, DEVICE) for host in (hosts.here, hosts.there)]
        (near, _), (far, _) = ends
        _ip("link", "add", "name", DEVICE, "netns", near, "type", "veth", "peer", "name", DEVICE, "netns", far)
        for host in (hosts.here, hosts.there):
            host.ip("link", "set", "lo", "up")
            host.ip("address", "add", f"{host.address}/24", "dev", DEVICE)
            host.ip("link", "set", DEVICE, "up")
        yield hosts


@contextlib.contextmanager
def ray_on(hosts: Hosts, python: str) -> Iterator[str]:
    """Run a Ray of two nodes, the head on `here`; give its address. Its nodes have the resources `here` and `there`."""
    address = f"{hosts.here.address}:{PORT}"
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as directory:
        environment = {**_environment(), "RAY_TMPDIR": directory}
        common = ["--num-cpus=2", "--num-gpus=0", "--block", "--log-style=record", "--log-color=false"]
        ray = [python, "-m", "ray.scripts.scripts", "start"]
        for host, role, resource in (
            (hosts.here, ["--head", f"--port={PORT}", "--include-dashboard=false"], '{"here": 100}'),
            (hosts.there, [f"--address={address}"], '{"there": 100}'),
        ):
            log = Path(directory) / f"{host.namespace}.log"
            host.start(
                [*ray, *role, f"--node-ip-address={host.address}", f"--resources={resource}", *common],
                env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            wait_until(lambda log=log: "Ray runtime started" in log.read_text(), 180, f"Ray on {host.namespace}")
        try:
            yield address
        finally:
            hosts.here.kill_all()
            hosts.there.kill_all()


def _ip(*command: str) -> str:
    done = subprocess.run(["ip", *command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _environment() -> dict[str, str]:
    """Give what Ray and its drivers run with, and nothing that is for the clusters of other tests."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join((str(Path(__file__).parents[2]), WORKERS_PATH))
    return {**inherited, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": path}

"""For how long enginefsm keeps an event loop from running: with 256 engines without Ray, then with real ones.

tests/support/stalls.py makes the former scenes. For the latter a task asks the loop to wake it every millisecond.
The figure of each phase is the longest time by which it woke later. Cuts are real, and a real hub is frozen. Bare Ray
does the same first: what it costs the loop is not enginefsm's.

Run: python tests/benchmarks/stalls.py [--engines 32] [--uvloop]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from pathlib import Path

import psutil
import ray

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.clusters import local_ray
from support.stalls import ENGINES, FrozenHub, Turns, given_up, measured, recovered

import enginefsm
from enginefsm.export.hub import NAME, NAMESPACE, Hub, HubSettings
from enginefsm.rehearsal import chaos

BOUND_S = 0.020
RAYS = (
    "nothing at all",
    "bare Ray: submit, a turn of the loop each",
    "bare Ray: asyncio.gather(*refs)",
    "submit, a turn of the loop each",
    "bare Ray: await 200 MB",
    "await 200 MB",  # it is unpickled under the interpreter's lock, whoever asks for it
)


def without_ray(new_loop):
    """The longest lag of each scene."""
    for together in (True, False):
        way = "gather" if together else "await each"
        hub = FrozenHub()
        patient = enginefsm.EngineMonitor(policy=enginefsm.RetryPolicy(cap_s=0.5))
        impatient = enginefsm.EngineMonitor(policy=enginefsm.RetryPolicy(max_attempts=0), export=[hub])
        for name, scene in (
            ("adopted, cut off, recovered", recovered(patient, together)),
            ("given up, hub frozen", given_up(impatient, together)),
        ):
            turns = Turns()
            measured(scene, new_loop, turns)
            times = f"lag {turns.lag_s * 1e3:6.1f} ms, CPU of a turn {turns.longest_s * 1e3:6.1f} ms"
            print(f"{ENGINES} engines without Ray, {way:11} {name:30} {times}", flush=True)
        hub.thawed.set()


class Engine:
    """Its init takes a while."""

    async def init(self, seconds):
        await asyncio.sleep(seconds)
        return os.getpid()

    async def big(self, size):
        return bytes(size)


class Lag:
    """Watches the running loop."""

    def __init__(self):
        self.longest_s = 0.0

    async def watch(self):
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            self.longest_s = max(self.longest_s, time.perf_counter() - began - 0.001)


class Phases:
    """The longest lag of each phase."""

    def __init__(self, lag):
        self.lag = lag
        self.longest_s = {}

    @contextlib.contextmanager
    def __call__(self, name):
        self.lag.longest_s, began = 0.0, time.perf_counter()
        yield
        self.longest_s[name] = max(self.longest_s.get(name, 0.0), self.lag.longest_s)
        print(f"{name:58} {self.lag.longest_s * 1e3:8.1f} ms of {time.perf_counter() - began:6.2f} s", flush=True)


def connections_to(pids):
    """This process's sockets whose other end is one of those processes."""
    theirs = {tuple(c.laddr) for pid in pids for c in psutil.Process(pid).net_connections("tcp") if c.raddr}
    return [c.fd for c in psutil.Process().net_connections("tcp") if c.raddr and tuple(c.raddr) in theirs]


def cut_all(descriptors):
    """All at once, as when a switch goes."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as one:
            one.shutdown(socket.SHUT_RDWR)


async def submit(make, among):
    """One call after another, as the loop allows: what a submission costs is Ray's."""
    calls = []
    for one in among:
        calls.append(make(one))
        await asyncio.sleep(0)
    return calls


async def measure(actors, monitor):
    lag = Lag()
    watching = asyncio.create_task(lag.watch())
    phase = Phases(lag)
    with phase("nothing at all"):
        await asyncio.sleep(1)
    with phase("bare Ray: submit, a turn of the loop each"):
        refs = await submit(lambda actor: actor.init.remote(1), actors)
    with phase("bare Ray: asyncio.gather(*refs)"):
        pids = await asyncio.gather(*refs)
    with phase("adopt, in one piece"):
        engines = [monitor.adopt(actor, name=f"{n}", model="m") for n, actor in enumerate(actors)]
        await asyncio.sleep(0.01)
    with phase("submit, a turn of the loop each"):
        calls = await submit(lambda engine: engine.init.remote(1), engines)
    with phase("gather"):
        await monitor.gather(*calls)
    with phase("asyncio.gather of calls that are done"):
        await asyncio.gather(*calls)
    with phase("gather with a timeout that passes"):
        calls = await submit(lambda engine: engine.init.remote(1.5), engines)
        with contextlib.suppress(ray.exceptions.GetTimeoutError):
            await monitor.gather(*calls, timeout=0.2)
    with phase("asyncio.gather(*calls)"):
        await asyncio.gather(*calls)
    descriptors = await asyncio.to_thread(connections_to, pids)
    print(f"{len(descriptors)} connections to cut")
    for name, wait in (("gather", monitor.gather), ("asyncio.gather", lambda calls: asyncio.gather(*calls))):
        calls = await submit(lambda engine: engine.init.remote(3), engines)
        with phase(f"{name} while all are cut off at once, and recover"):
            waiting = asyncio.ensure_future(wait(calls))
            await asyncio.sleep(0.3)
            await asyncio.to_thread(cut_all, descriptors)
            await waiting
        print(f"    submitted again: {sum(call.attempt > 0 for call in calls)}")
        descriptors = await asyncio.to_thread(connections_to, pids)
    with phase("bare Ray: await 200 MB"):
        await actors[0].big.remote(200_000_000)
    with phase("await 200 MB"):
        await engines[0].big.remote(200_000_000)
    hub = ray.get_actor(NAME, NAMESPACE)
    hub_pid = await hub.__ray_call__.remote(lambda _: __import__("os").getpid())
    monitor.policy = enginefsm.RetryPolicy(max_attempts=0)
    calls = await submit(lambda engine: engine.init.remote(5), engines)
    with chaos.freeze(hub_pid, for_s=30), phase("asyncio.gather(*calls) while all are given up, the hub frozen"):
        waiting = asyncio.gather(*calls, return_exceptions=True)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(cut_all, descriptors)
        errors = await waiting
    print(f"    given up: {sum(isinstance(error, enginefsm.RetryExhaustedError) for error in errors)}")
    watching.cancel()
    return phase.longest_s


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=32)
    parser.add_argument("--uvloop", action="store_true")
    arguments = parser.parse_args()
    new_loop = asyncio.new_event_loop
    if arguments.uvloop:
        import uvloop

        new_loop = uvloop.new_event_loop
    logging.getLogger("enginefsm").addHandler(logging.NullHandler())
    without_ray(new_loop)
    with local_ray():
        cls = ray.remote(enginefsm.monitored(Engine)).options(num_cpus=0)
        actors = []
        for begin in range(0, arguments.engines, 16):
            actors += [cls.remote() for _ in range(begin, min(begin + 16, arguments.engines))]
            ray.get([actor.__ray_ready__.remote() for actor in actors])
        print(f"{len(actors)} engines, Python {sys.version.split()[0]}, Ray {ray.__version__}")
        monitor = enginefsm.EngineMonitor(
            run="stalls", policy=enginefsm.RetryPolicy(cap_s=2), export=[Hub(HubSettings(file_sd="", linger_s=10))]
        )
        with asyncio.Runner(loop_factory=new_loop) as runner:
            longest = runner.run(measure(actors, monitor))
        monitor.close()
    ours = {name: longest_s for name, longest_s in longest.items() if name not in RAYS}
    worst = max(ours, key=ours.get)
    print(f"longest: {ours[worst] * 1e3:.1f} ms ({worst}); the bound is {BOUND_S * 1e3:.0f} ms")


if __name__ == "__main__":
    main()

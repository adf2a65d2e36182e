"""What the health monitor costs the process that it is in: CPU, stalls of that process's event loop, and its rhythm.

Run: python tests/benchmarks/probes.py [--engines 256] [--interval 10] [--seconds 40]

Each engine is an actor in a process of its own, about 50 MB. Where they are too many, fewer at a shorter interval are
as many probes.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import ray

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.clusters import local_ray
from support.servers import answers, free_port

import enginefsm

SERVER = Path(enginefsm.__file__).parent / "children" / "standin_server.py"
TICK_S = 0.005


@ray.remote(num_cpus=0)
class Engine:
    """It is well, and remembers when it was asked."""

    def __init__(self, url):
        self.base = url
        self.asked = []

    def init(self):
        return True

    def health_generate(self, timeout):
        self.asked.append(time.time())
        return True

    def url(self):
        return self.base

    def times(self):
        asked, self.asked = self.asked, []
        return asked


def serve():
    """A server that is always well; its process, and its base URL."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(SERVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    settings = {"host": "127.0.0.1", "port": port, "import_s": 0, "load_s": 0, "exit_code": None}
    process.stdin.write(json.dumps(settings).encode())
    process.stdin.close()
    while not answers(f"http://127.0.0.1:{port}/health"):
        time.sleep(0.1)
    return process, f"http://127.0.0.1:{port}"


async def ticks(seconds):
    """How late an event loop was, at each of its ticks, in seconds."""
    late = []
    until = time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        await asyncio.sleep(TICK_S)
        late.append(time.perf_counter() - began - TICK_S)
    return sorted(late)


def own_cpu_s(process):
    """CPU seconds of the health monitor's own thread so far: what is not Ray's."""
    own = {thread.native_id for thread in threading.enumerate() if thread.name == "enginefsm-health"}
    return sum(one.user_time + one.system_time for one in process.threads() if one.id in own)


def measure(what, seconds):
    """One line: the CPU of this process as share of one core, and how late its event loop was."""
    me = psutil.Process()
    own, before, began = own_cpu_s(me), sum(me.cpu_times()[:2]), time.perf_counter()
    time.sleep(seconds)
    share = (sum(me.cpu_times()[:2]) - before) / (time.perf_counter() - began)
    own_share = (own_cpu_s(me) - own) / seconds
    late = asyncio.run(ticks(seconds))
    over = sum(one > 0.02 for one in late)
    most, nearly_most = 1000 * late[-1], 1000 * late[int(len(late) * 0.99)]
    print(f"{what:36} {100 * share:9.2f} {100 * own_share:9.2f} {nearly_most:12.1f} {most:9.1f} {over:8}")
    return share


def rhythm(times, interval_s, bins=20):
    """How even the probes of a fleet are: the fullest of the bins of an interval against the mean of them."""
    first = min(times) + interval_s
    filled = collections.Counter(int((at - first) / interval_s * bins) for at in times if at >= first)
    whole = [filled[number] for number in range(max(filled))]
    print(f"probes in a {bins}th of an interval: {sum(whole) / len(whole):.1f} on average, {max(whole)} at most")


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=256)
    parser.add_argument("--interval", type=float, default=10)
    parser.add_argument("--seconds", type=float, default=40)
    given = parser.parse_args()
    server, url = serve()
    try:
        with local_ray():
            monitor = enginefsm.EngineMonitor(run="probes")
            actors = [Engine.remote(url) for _ in range(given.engines)]
            engines = [monitor.adopt(actor, name=f"engine-{number}") for number, actor in enumerate(actors)]
            monitor.get([engine.init.remote() for engine in engines])
            print(f"{given.engines} engines, one probe each {given.interval:g} s; bounds: 5 % over idle, 20 ms\n")
            print(f"{'':36} {'CPU, %':>9} {'own, %':>9} {'late 99%, ms':>12} {'most, ms':>9} {'> 20 ms':>8}")
            idle = measure("nothing watched", given.seconds / 2)
            for what, settings in (("probes", {}), ("probes, and the servers asked", {"address": "url"})):
                health = monitor.watch(engines, interval_s=given.interval, **settings)
                time.sleep(given.interval)
                ray.get([actor.times.remote() for actor in actors])
                share = measure(what, given.seconds)
                print(f"{'  over idle, % of one core':36} {100 * (share - idle):9.2f}")
                health.stop()
            rhythm(
                [at for times in ray.get([actor.times.remote() for actor in actors]) for at in times], given.interval
            )
            dead = sum(engine.fsm.state is not enginefsm.EngineState.READY for engine in engines)
            print(f"engines that are not ready: {dead}")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()

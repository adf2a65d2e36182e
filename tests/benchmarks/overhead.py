"""What enginefsm costs against bare Ray, in one run, by turns.

Run: python tests/benchmarks/overhead.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import psutil
import ray
from ray.exceptions import ActorDiedError

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.clusters import local_ray

import enginefsm
from enginefsm import Outcome
from enginefsm._engine.managed import ManagedEngine
from enginefsm.fsm.states import EngineRecord, Reason

BRINGUP = 64
CALLS = 2000


@ray.remote(num_cpus=0)
class Engine:
    """Its init sleeps; it answers."""

    def pid(self):
        return os.getpid()

    def init(self, seconds):
        time.sleep(seconds)

    def answer(self):
        return 1


def cpu_s(pids):
    """CPU seconds of this process, and of the actors."""
    mine = sum(psutil.Process().cpu_times()[:2])
    return mine, sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def timed(act, pids=()):
    """Wall seconds, own CPU seconds and the actors' CPU seconds of `act()`."""
    before, began = cpu_s(pids), time.perf_counter()
    act()
    wall = time.perf_counter() - began
    after = cpu_s(pids)
    return wall, after[0] - before[0], after[1] - before[1]


def by_turns(rounds, bare, ours, pids=()):
    """Run both `rounds` times, the first of each not counted; the medians of both."""
    runs = [(timed(bare, pids), timed(ours, pids)) for _ in range(rounds + 1)][1:]
    return [[statistics.median(run[side][what] for run in runs) for what in range(3)] for side in range(2)]


def row(what, bare, ours, bound):
    """One line of the table."""
    ratio = f"{ours / bare:.2f}" if bare else ""
    print(f"{what:52} {bare:10.4f} {ours:10.4f} {ratio:>7}  {bound}")


def healthy_bringup(actors, engines, rounds, get):
    """64 engines that take two seconds each."""
    bare, ours = by_turns(
        rounds,
        lambda: ray.get([actor.init.remote(2) for actor in actors]),
        lambda: get([engine.init.remote(2) for engine in engines]),
    )
    row(f"{BRINGUP} engines, init of 2 s: wall, s", bare[0], ours[0], "1.05 at most")


def calls_in_flight(actors, engines, rounds, get):
    """2,000 calls, all submitted before the first is awaited: spread over the engines, and to one."""
    pids = ray.get([actor.pid.remote() for actor in actors])
    for among in (len(actors), 1):
        each = CALLS // among
        bare, ours = by_turns(
            rounds,
            lambda among=among, each=each: ray.get([a.answer.remote() for a in actors[:among] for _ in range(each)]),
            lambda among=among, each=each: get([e.answer.remote() for e in engines[:among] for _ in range(each)]),
            pids[:among],
        )
        row(f"{CALLS} calls to {among} actors: CPU of the caller, s", bare[1], ours[1], "2 at most")
        row(f"{CALLS} calls to {among} actors: CPU of the actors, s", bare[2], ours[2], "")
        row(f"{CALLS} calls to {among} actors: wall, s", bare[0], ours[0], "")


def death(rounds, monitor):
    """From SIGKILL to the exception."""

    def killed(wait, call):
        took = []
        for number in range(rounds):
            actor = Engine.remote()
            pid = ray.get(actor.pid.remote())
            pending = call(actor, number)
            killed_at = []

            def kill(pid=pid, killed_at=killed_at):
                killed_at.append(time.perf_counter())
                os.kill(pid, signal.SIGKILL)

            threading.Timer(0.5, kill).start()
            try:
                wait(pending)
            except ActorDiedError:
                took.append(time.perf_counter() - killed_at[0])
        return statistics.median(took)

    bare = killed(ray.get, lambda actor, _: actor.init.remote(60))
    ours = killed(monitor.get, lambda actor, number: monitor.adopt(actor, name=f"doomed-{number}").init.remote(60))
    row("SIGKILL to the exception, median, s", bare, ours, "bare + 0.010")


def memory(handle):
    """Bytes that one engine adds to a monitor: what adopt() allocates, its actor's handle apart."""
    monitor = enginefsm.EngineMonitor(run="memory")
    count = 1000
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept = []
    for number in range(count):
        record = EngineRecord(f"engine-{number}", {"model": "m", "worker_type": "regular"}, 1, 0.0, 0.0)
        engine = ManagedEngine(handle, record, "init", None, lambda step: None)
        monitor._registry._engines[f"{number:032x}"] = monitor._registry._by_name[record.name] = enginefsm.Engine(
            engine
        )
        engine.observe(Outcome.ACTOR_UNAVAILABLE, launches=True, submitted_at=0.0)
        engine.observe(Outcome.SUCCEEDED, launches=True, submitted_at=time.monotonic())
        kept.append(engine)
    took = (tracemalloc.get_traced_memory()[0] - before) / count
    tracemalloc.stop()
    print(f"{'memory in the monitor, an engine, bytes':52} {'':10} {took:10.0f} {'':>7}  4096 at most")


def transition(handle):
    """One transition with its metrics, microseconds: the best of several batches, since neighbours slow some."""
    monitor = enginefsm.EngineMonitor(run="transition")
    monitor._delivery.listeners = [monitor.metrics]  # the log line apart: its cost is the handler's
    record = EngineRecord("engine", {"model": "m", "worker_type": "regular"}, 1, 0.0, 0.0)
    engine = ManagedEngine(handle, record, "init", None, monitor._delivery.put)
    engine.step(Reason.INIT_SUCCEEDED)
    batches = []
    for _ in range(20):
        began = time.perf_counter()
        for reason in (Reason.ACTOR_UNAVAILABLE, Reason.RECOVERED) * 500:
            engine.step(reason)
            monitor._delivery.deliver()
        batches.append((time.perf_counter() - began) / 1000 * 1e6)
    print(f"{'one transition, metrics included, microseconds':52} {'':10} {min(batches):10.1f} {'':>7}  25 at most")


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"{'':52} {'bare Ray':>10} {'enginefsm':>10} {'ratio':>7}  bound")
    with local_ray():
        monitor = enginefsm.EngineMonitor(run="overhead")
        actors = [Engine.remote() for _ in range(BRINGUP)]
        engines = [monitor.adopt(actor, name=f"engine-{number}") for number, actor in enumerate(actors)]
        ray.get([actor.pid.remote() for actor in actors])
        healthy_bringup(actors, engines, rounds, monitor.get)
        calls_in_flight(actors, engines, rounds, monitor.get)
        death(rounds, monitor)
        memory(actors[0])
        transition(actors[0])


if __name__ == "__main__":
    main()

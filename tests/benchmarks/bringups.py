"""Bringups under random cuts: how many come up, how often init ran, and how soon after init the engine is ready.

Run: python tests/benchmarks/bringups.py [--bringups 50] [--engines 4] [--cuts 2] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from pathlib import Path

import ray

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.clusters import local_ray

import enginefsm
from enginefsm import EngineState
from enginefsm.rehearsal import chaos


class Engine:
    """Its init sleeps."""

    def __init__(self):
        self.inits = 0
        self.ended_at_s = 0.0

    def pid(self):
        import os

        return os.getpid()

    def init(self, seconds):
        self.inits += 1
        time.sleep(seconds)
        self.ended_at_s = time.time()

    def told(self):
        return self.inits, self.ended_at_s


def bring_up(number, engines, cuts, rng):
    """One bringup; gives (came up, times init ran of each, cuts made, lags of the engines that were cut)."""
    reported = {}  # engine: when Ray last told of a break
    ready = {}

    def listen(event):
        if isinstance(event, enginefsm.CallOutcome) and event.outcome is enginefsm.Outcome.ACTOR_UNAVAILABLE:
            reported[event.engine] = time.time()
        elif isinstance(event, enginefsm.Transition) and event.to_state is EngineState.READY:
            ready[event.engine] = event.at_s

    monitor = enginefsm.EngineMonitor(run=f"bringup-{number}", listeners=[listen])
    actors = [ray.remote(num_cpus=0)(Engine).remote() for _ in range(engines)]
    pids = ray.get([actor.pid.remote() for actor in actors])
    adopted = [monitor.adopt(actor, name=f"engine-{i}") for i, actor in enumerate(actors)]
    init_s = [rng.uniform(1, 4) for _ in actors]
    moments = [(rng.uniform(0, init_s[i]), pid) for i, pid in enumerate(pids) for _ in range(cuts)]
    made = []
    timers = [threading.Timer(after_s, lambda pid=pid: made.append(chaos.cut(pid))) for after_s, pid in moments]
    calls = [engine.init.remote(seconds) for engine, seconds in zip(adopted, init_s, strict=True)]
    for timer in timers:
        timer.start()
    try:
        monitor.get(calls, timeout=120)
        came_up = True
    except Exception as error:  # noqa: BLE001  the figure of the benchmark is how often this happens
        print(f"bringup {number}: {type(error).__name__}: {error}")
        came_up = False
    for timer in timers:
        timer.join()
    told = [monitor.get(engine.told.remote(), timeout=60) for engine in adopted]
    lags = [
        ready[engine.fsm.name] - max(ended_at_s, reported[engine.fsm.name])
        for engine, (_, ended_at_s) in zip(adopted, told, strict=True)
        if engine.fsm.name in reported and engine.fsm.name in ready
    ]
    for actor in actors:
        ray.kill(actor)
    return came_up, [inits for inits, _ in told], sum(bool(cut) for cut in made), lags


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bringups", type=int, default=50)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--cuts", type=int, default=2, help="an engine")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    rng = random.Random(chosen.seed)
    up, inits, cuts, lags = 0, [], 0, []
    with local_ray():
        for number in range(chosen.bringups):
            came_up, ran, made, late = bring_up(number, chosen.engines, chosen.cuts, rng)
            up += came_up
            inits += ran
            cuts += made
            lags += late
            print(f"\r{number + 1} of {chosen.bringups}, {up} came up", end="", flush=True)
    print()
    print(f"{'bringups that came up':50} {up} of {chosen.bringups}")
    print(f"{'cuts that met a connection':50} {cuts}")
    print(f"{'engines whose init ran more than once':50} {sum(ran != 1 for ran in inits)} of {len(inits)}")
    if lags:
        print(f"{'engines that were cut':50} {len(lags)}")
        text = "ready after the later of init's end, Ray's report"
        print(f"{text:50} median {statistics.median(lags):.3f} s, highest {max(lags):.3f} s")
    return 0 if up == chosen.bringups and all(ran == 1 for ran in inits) else 1


if __name__ == "__main__":
    sys.exit(main())

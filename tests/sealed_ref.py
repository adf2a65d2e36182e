"""See it: a reference that failed with ActorUnavailableError stays failed, while the actor and its method go on.

Run: python tests/sealed_ref.py   (about 15 s)
"""

from __future__ import annotations

import os
import threading
import time

import ray
from ray.exceptions import ActorUnavailableError
from support.clusters import local_ray

import enginefsm
from enginefsm.rehearsal import chaos


@ray.remote(num_cpus=0)
class Engine:
    """Its init takes five seconds."""

    inits = 0

    def pid(self):
        return os.getpid()

    def init(self):
        self.inits += 1
        time.sleep(5)
        return f"launched, init ran {self.inits} time(s)"


def say(what, wait, one):
    """Print what waiting for `one` gives, and when."""
    try:
        gave = wait(one)
    except ActorUnavailableError as error:
        gave = type(error).__name__
    print(f"{time.monotonic() - began:5.1f} s  {what:40} {gave}", flush=True)


with local_ray():
    plain, adopted = Engine.remote(), Engine.remote()
    pids = ray.get([plain.pid.remote(), adopted.pid.remote()])
    engine = enginefsm.adopt(adopted, name="engine")
    began = time.monotonic()
    ref, call = plain.init.remote(), engine.init.remote()
    for pid in pids:
        threading.Timer(1, chaos.cut, [pid]).start()
    for _ in range(3):
        say("ray.get(ref)", ray.get, ref)
    say("enginefsm.get(call), cut off as well", enginefsm.get, call)
    say("ray.get(ref), long after init ended", ray.get, ref)
    say("a fresh call of the same actor", ray.get, plain.pid.remote())

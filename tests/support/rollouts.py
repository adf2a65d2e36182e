"""A RolloutManager of the tests' on a real Ray, seen from the driver: its faults, its waits and what it tells."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

import psutil
import ray

import enginefsm
from enginefsm.rehearsal import chaos
from support.engines import wait_until
from support.processes import below
from support.rollout_manager import Args, RolloutManager, Trainer

STEP_S = 240.0
"""For a step of a manager's to begin: a real SGLang starts before some."""


class Rollout:
    """One manager, adopted by this process as train.py's driver adopts it."""

    def __init__(self, directory, hold=(), **args):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.before = {}  # of each step that is held: how often it had begun, and been held
        for step, ranks in hold:
            self.hold(step, ranks)
        self.args = Args(directory=str(directory), **args)
        self.threads = ThreadPoolExecutor()
        self.actors = self.args.nodes_per_engine * (self.args.rollout_num_engines + self.args.num_encoders)
        self.pg = ray.util.placement_group([{"CPU": 0.01}] * self.actors) if self.actors else None
        self.hops = []  # the states of the manager, as this process sees it
        policy = enginefsm.RetryPolicy(budget_s=60, cap_s=2)
        self.monitor = enginefsm.EngineMonitor(run="slime", policy=policy, listeners=[self._listen])
        indices = list(range(self.actors))
        handle = ray.remote(RolloutManager).options(num_cpus=0.01).remote(self.args, (self.pg, indices, indices))
        self.manager = self.monitor.adopt(handle, name="rollout_manager", launch="__ray_ready__")
        self.ready = self.call("__ray_ready__")

    def _listen(self, event):
        if isinstance(event, enginefsm.Transition):
            self.hops.append(str(event.to_state))

    def call(self, method, *args, **kwargs):
        """Call the manager as train.py does, in the background: gives a future."""
        return self.threads.submit(self.monitor.get, getattr(self.manager, method).remote(*args, **kwargs))

    def ask(self, method, *args, **kwargs):
        """Call the manager, and wait."""
        return self.call(method, *args, **kwargs).result(120)

    def path(self, name):
        return self.directory / name

    @property
    def manager_pid(self):
        return int(wait_until(lambda: self.path("manager.pid").exists() and self.path("manager.pid").read_text()))

    def begun(self, step, rank):
        """The pids of the actors in which a step of an engine has begun, one each time."""
        path = self.path(f"{step}.{rank}")
        return [int(pid) for pid in path.read_text().splitlines()] if path.exists() else []

    def held(self, step, rank):
        """The same of those that had to stay in it."""
        return self.begun(f"held.{step}", rank)

    def pid(self, rank):
        """The newest actor of that rank."""
        return self.wait_for(lambda: self.begun("constructor", rank), f"actor {rank}")[-1]

    def hold(self, step, ranks):
        """Engines of these ranks that begin `step` stay in it until they are let go."""
        for rank in ranks:
            self.before.setdefault((step, rank), (len(self.begun(step, rank)), len(self.held(step, rank))))
            self.path(f"hold.{step}.{rank}").touch()

    def let_go(self, step, ranks):
        for rank in ranks:
            del self.before[step, rank]
            self.path(f"hold.{step}.{rank}").unlink()

    def wait_for(self, condition, what):
        """Wait for what goes on in the manager; its end, with an error, is raised instead."""

        def holds():
            if self.ready.done():
                self.ready.result()
            return condition()

        return wait_until(holds, timeout_s=STEP_S, what=what)

    def cut(self, pid, peer=None):
        """Break the connection between an actor and the manager; there must be one."""
        wait_until(lambda: chaos.cut(pid, self.manager_pid if peer is None else peer), what="a connection to cut")

    def steps(self, of="steps"):
        """(engine, incarnation, from, to, reason) of each transition in the manager, or elsewhere."""
        path = self.path(of)
        return [tuple(line.split()) for line in path.read_text().splitlines()] if path.exists() else []

    def times(self, state, rank, of="steps"):
        """How often the engines of that rank came to a state."""
        return sum(name.endswith(f"/{rank}") and to == state for name, _, _, to, _ in self.steps(of))

    def cut_during(self, step, ranks, start=None, waiter="manager", freeze_s=None):
        """Break each engine's connection while it is waited for in `step`, and see that noticed where it is waited for.

        `start` begins the wait, and gives a future of it, and the step begins once; without it, the step comes by
        itself, and may be held already. With `freeze_s`, the actors are frozen for so long instead.
        """
        told = {"manager": "steps", "trainer": "trainer.steps"}[waiter]
        peer = int(self.path(f"{waiter}.pid").read_text()) if start else None
        self.hold(step, ranks)
        before = {rank: (*self.before[step, rank], self.times("unavailable", rank, told)) for rank in ranks}
        waiting = start() if start else None
        for rank, (_, held, _) in before.items():
            self.wait_for(lambda r=rank, n=held: len(self.held(step, r)) > n, f"{step} of {rank}")
            if freeze_s is None:
                self.cut(self.pid(rank), peer)
            else:
                chaos.freeze(self.pid(rank), freeze_s)
        for rank, (_, _, lost) in before.items() if freeze_s is None else ():
            self.wait_for(
                lambda r=rank, n=lost: self.times("unavailable", r, told) > n, f"the loss of {rank} in {step}"
            )
        self.let_go(step, ranks)
        result = waiting.result(120) if waiting else None
        for rank, (begun, _, _) in before.items() if waiting else ():
            assert len(self.begun(step, rank)) == begun + 1, f"{step} of {rank} ran more than once"
        return result

    def cut_off_the_driver(self):
        """The manager hop: the driver's connection to the manager breaks while the manager waits for an engine."""
        before, lost = len(self.begun("check_weights", 0)), self.hops.count("unavailable")
        self.hold("check_weights", [0])
        checked = self.call("check_weights", "snapshot")
        self.wait_for(lambda: len(self.begun("check_weights", 0)) > before, "the wait")
        self.cut(self.manager_pid, os.getpid())
        self.wait_for(lambda: self.hops.count("unavailable") > lost, "the notice of the cut")
        self.let_go("check_weights", [0])
        result = checked.result(120)
        assert len(self.begun("check_weights", 0)) == before + 1
        return result

    def replace_cut_off(self, rank, killed):
        """Recover an engine that `killed` ended, each wait of the recovery cut off."""
        before = len(self.begun("constructor", rank))
        killed()
        self.wait_for_free(rank)
        waits = ["ports", "init", "offload", "onload"]
        for step in waits:
            self.hold(step, [rank])
        recovered = self.call("recover_updatable_engines")
        self.wait_for(lambda: len(self.begun("constructor", rank)) > before, "the replacement")
        for step in waits:
            self.cut_during(step, [rank])
        recovered.result(120)
        assert len(self.begun("constructor", rank)) == before + 1

    def server_pid(self, rank):
        """The server below an engine's actor."""
        keeper, *_ = psutil.Process(self.pid(rank)).children()
        server, *_ = keeper.children()
        return server.pid

    def places(self):
        """What the manager has at each place: an engine's name, incarnation and state, or None."""
        return [one and (one["name"], one["incarnation"], one["state"]) for one in self.ask("told")]

    def wait_for_free(self, *ranks):
        """Until the places of these ranks are free, and no other; the router then lists none of their servers."""
        wanted = [rank in ranks for rank in range(self.actors)]
        self.wait_for(lambda: [place is None for place in self.places()] == wanted, f"the end of engines {ranks}")

    def trainer(self):
        trainer = ray.remote(Trainer).options(num_cpus=0.01).remote(str(self.directory))
        ray.get(trainer.set_rollout_manager.remote(self.manager))
        return trainer

    def processes(self):
        """The manager, its router and engines, and all that is below them."""
        tops = []
        for pid in (self.manager_pid, *(self.pid(rank) for rank in range(self.actors or self.args.num_external))):
            with contextlib.suppress(psutil.NoSuchProcess):
                tops.append(psutil.Process(pid))
        return [*tops, *(child for top in tops for child in below(top))]

    def close(self):
        for rank in range(self.actors or self.args.num_external):
            for pid in set(self.begun("constructor", rank)):
                with contextlib.suppress(chaos.NotAnEngineError):
                    chaos.freeze(pid).thaw()
        ray.kill(self.manager.handle)  # its engines are its children: Ray ends them
        if self.pg is not None:
            ray.util.remove_placement_group(self.pg)
        self.threads.shutdown(wait=True, cancel_futures=True)

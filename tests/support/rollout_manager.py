"""A RolloutManager in slime's shape, with enginefsm embedded as docs/slime.md says.

Its constructor starts a router and engines through a start function that gives servers and pending handles; it
offloads, onloads, recovers and disposes as slime's does. What is left out is what waits for no engine.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import enginefsm
import enginefsm.embed.slime
from enginefsm._engine.proxy import managed
from enginefsm.rehearsal.children import keeper
from support import slime_engines

ROUTER = """
import json, sys
from sglang_router.router import Router
from sglang_router.router_args import RouterArgs
Router.from_args(RouterArgs(**json.load(sys.stdin))).start()
"""


@dataclasses.dataclass
class Args:
    """What slime reads from the command line, as far as it is of use here, and what a test wants."""

    directory: str
    engine: str = "StandIn"  # a class of slime_engines
    server: dict = dataclasses.field(default_factory=dict)  # its keyword arguments
    rollout_num_engines: int = 2
    num_encoders: int = 0
    num_external: int = 0
    nodes_per_engine: int = 1
    num_gpus_per_node: int = 1
    use_fault_tolerance: bool = False
    rollout_health_check_interval: float = 0.5
    rollout_health_check_timeout: float = 2.0
    rollout_health_check_first_wait: float = 0.0
    budget_s: float = 60.0


@dataclasses.dataclass
class ServerGroup:
    args: Args
    pg: Any  # (placement_group, reordered_bundle_indices, reordered_gpu_ids)
    all_engines: list
    num_gpus_per_engine: int
    num_new_engines: int = 0
    worker_type: str = "regular"
    rank_offset: int = 0
    gpu_offset: int = 0
    needs_offload: bool = True
    model_path: str | None = None
    router_ip: str | None = None
    router_port: int | None = None

    @property
    def nodes_per_engine(self):
        return max(1, self.num_gpus_per_engine // self.args.num_gpus_per_node)

    @property
    def engines(self):
        return self.all_engines[:: self.nodes_per_engine]

    def start_engines(self, port_cursors=None):
        """Create actors, allocate ports, call init; gives the pending handles."""
        pg, bundles, _ = self.pg
        for i in range(len(self.all_engines)):
            if self.all_engines[i] is None:
                self.all_engines[i] = make_engine(
                    self.args, self.rank_offset + i, self.worker_type, pg, bundles[self.gpu_offset + i]
                )
        rollout_engines = enginefsm.embed.slime.adopt_group(self)
        self.num_new_engines = len(rollout_engines)
        if self.num_new_engines == 0:
            return [], port_cursors
        addr_and_ports, port_cursors = allocate_addr_and_ports(rollout_engines, port_cursors)
        init_handles = [
            engine.init.remote(**addr_and_ports[rank], router_ip=self.router_ip, router_port=self.router_port)
            for rank, engine in rollout_engines
        ]
        return init_handles, port_cursors

    def offload(self):
        if not self.needs_offload:
            return []
        return [engine.release_memory_occupation.remote() for engine in self.engines if engine is not None]

    def onload(self, tags=None):
        if not self.needs_offload:
            return []
        return [engine.resume_memory_occupation.remote(tags=tags) for engine in self.engines if engine is not None]


@dataclasses.dataclass
class RolloutServer:
    server_groups: list
    router_ip: str
    router_port: int

    @property
    def engines(self):
        return [engine for group in self.server_groups for engine in group.engines]

    def recover(self):
        dead_per_group = [[i for i, e in enumerate(g.all_engines) if e is None] for g in self.server_groups]
        all_handles, port_cursors = [], {}
        for group in self.server_groups:
            handles, port_cursors = group.start_engines(port_cursors)
            all_handles.extend(handles)
        if all_handles:
            enginefsm.get(all_handles)
        new_engines = []
        for group, dead in zip(self.server_groups, dead_per_group, strict=True):
            assert group.num_new_engines == len(dead)
            if group.needs_offload:
                new_engines.extend(group.all_engines[i] for i in dead)
        if new_engines:
            enginefsm.get([engine.release_memory_occupation.remote() for engine in new_engines])
            enginefsm.get([engine.resume_memory_occupation.remote(tags=["weights"]) for engine in new_engines])

    def offload(self):
        handles = [handle for group in self.server_groups for handle in group.offload()]
        return enginefsm.get(handles) if handles else []

    def onload(self, tags=None):
        handles = [handle for group in self.server_groups for handle in group.onload(tags)]
        return enginefsm.get(handles) if handles else []


@dataclasses.dataclass
class ExternalRolloutServer:
    engines: list
    router_ip: str
    router_port: int
    server_groups: list = dataclasses.field(default_factory=list)

    def recover(self):
        pass

    def offload(self):
        return []

    def onload(self, tags=None):
        return []


def make_engine(args, rank, worker_type, pg=None, bundle=-1):
    cls = ray.remote(getattr(slime_engines, args.engine))
    options = {"num_cpus": 0.01}
    if pg is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            placement_group=pg, placement_group_capture_child_tasks=True, placement_group_bundle_index=bundle
        )
    node_rank = rank % args.nodes_per_engine
    return cls.options(**options).remote(args.directory, rank, worker_type, node_rank, **args.server)


def allocate_addr_and_ports(rollout_engines, port_cursors):
    start_port = max(port_cursors.values()) if port_cursors else random.randint(15000, 25000)
    addr_and_ports = {}
    for rank, engine in rollout_engines:

        def port(consecutive=1, engine=engine):
            nonlocal start_port
            _, found = enginefsm.get(
                engine._get_current_node_ip_and_free_port.remote(start_port=start_port, consecutive=consecutive)
            )
            start_port = found + consecutive
            return found

        host, _ = enginefsm.get(engine._get_current_node_ip_and_free_port.remote())
        addr_and_ports[rank] = {
            "host": host,
            "port": port(),
            "nccl_port": port(),
            "dist_init_addr": f"{host}:{port(4)}",
        }
    return addr_and_ports, {0: start_port}


def start_router(directory):
    """The real sglang-router, below this process: its keeper ends it with whoever started it."""
    (port, metrics_port) = slime_engines.free_ports(2)
    command = [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), sys.executable, "-c", ROUTER]
    with open(Path(directory) / "router.log", "ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log)
    settings = {
        "host": "127.0.0.1", "port": port, "prometheus_host": "127.0.0.1", "prometheus_port": metrics_port,
        "policy": "round_robin", "disable_circuit_breaker": True, "disable_health_check": True, "log_level": "warn",
    }  # fmt: skip
    process.stdin.write(json.dumps(settings).encode() + b"\n")
    process.stdin.flush()
    slime_engines.wait_until_served(f"http://127.0.0.1:{port}/workers", process)
    return process, "127.0.0.1", port


def start_rollout_servers(args, pg):
    """Start a router and engines; gives the router's process, the servers and the pending handles of init."""
    process, router_ip, router_port = start_router(args.directory)
    if args.num_external:
        engines, handles = [], []
        for rank in range(args.num_external):
            engine = make_engine(args, rank, "regular")
            engine = enginefsm.adopt(engine, name=f"default/regular/{rank}", model="default", worker_type="regular")
            engines.append(engine)
            (port,) = slime_engines.free_ports(1)
            ports = {"host": "127.0.0.1", "port": port, "nccl_port": None, "dist_init_addr": f"127.0.0.1:{port}"}
            handles.append(engine.init.remote(**ports, router_ip=router_ip, router_port=router_port))
        return process, {"default": ExternalRolloutServer(engines, router_ip, router_port)}, handles

    groups, pending, port_cursors, offset = [], [], {}, 0
    for worker_type, number in (("encoder", args.num_encoders), ("regular", args.rollout_num_engines)):
        if not number:
            continue
        actors = number * args.nodes_per_engine
        group = ServerGroup(
            args=args,
            pg=pg,
            all_engines=[None] * actors,
            num_gpus_per_engine=args.nodes_per_engine * args.num_gpus_per_node,
            worker_type=worker_type,
            rank_offset=offset,
            gpu_offset=offset,
            model_path="/models/tiny",
            router_ip=router_ip,
            router_port=router_port,
        )
        offset += actors
        handles, port_cursors = group.start_engines(port_cursors)
        if worker_type == "encoder":
            enginefsm.get(handles)
            urls = enginefsm.get([engine.get_url.remote() for engine in group.engines])
            assert all(urls)
        else:
            pending.extend(handles)
        groups.append(group)
    return process, {"default": RolloutServer(groups, router_ip, router_port)}, pending


class StepLog:
    """Writes each transition to a file of the test's."""

    def __init__(self, directory, name):
        self.path = Path(directory) / name

    def __call__(self, event):
        if isinstance(event, enginefsm.Transition):
            words = (event.engine, event.incarnation, event.from_state, event.to_state, event.reason)
            with self.path.open("a") as steps:
                steps.write(" ".join(str(word) for word in words) + "\n")


class RolloutManager:
    """For `ray.remote`; the tests add methods that say what has become of it."""

    def __init__(self, args, pg):
        self.args = args
        self.router = None
        (Path(args.directory) / "manager.pid").write_text(str(os.getpid()))
        enginefsm.configure(
            run="slime",
            policy=enginefsm.RetryPolicy(budget_s=args.budget_s, cap_s=2),
            listeners=[StepLog(args.directory, "steps")],
            export=[],
        )
        self.router, self.servers, rollout_init_handles = start_rollout_servers(args, pg)
        if rollout_init_handles:
            enginefsm.get(rollout_init_handles)
        self.rollout_engine_lock = ray.remote(Lock).options(num_cpus=0.01).remote()
        self._health_monitors = []
        if args.use_fault_tolerance:
            for server in self.servers.values():
                for group in server.server_groups:
                    monitor = enginefsm.embed.slime.RolloutHealthMonitor(group, args)
                    monitor.start()
                    self._health_monitors.append(monitor)

    @property
    def server(self):
        return next(iter(self.servers.values()))

    @property
    def rollout_engines(self):
        return [engine for server in self.servers.values() for engine in server.engines]

    def generate(self, rollout_id, prompts=4):
        """Tokens through the router; gives how many came for each prompt."""
        self.health_monitoring_resume()
        url = f"http://{self.server.router_ip}:{self.server.router_port}/generate"
        body = {"text": f"rollout {rollout_id}", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
        return [slime_engines.ask(url, body)["meta_info"]["completion_tokens"] for _ in range(prompts)]

    def offload(self):
        self.health_monitoring_pause()
        for server in self.servers.values():
            server.offload()

    def onload(self, tags=None):
        for server in self.servers.values():
            server.onload(tags)

    def recover_updatable_engines(self):
        self.health_monitoring_pause()
        self.server.recover()

    def health_monitoring_pause(self):
        for monitor in self._health_monitors:
            monitor.pause()

    def health_monitoring_resume(self):
        for monitor in self._health_monitors:
            monitor.resume()

    def check_weights(self, action):
        return enginefsm.get([engine.check_weights.remote(action=action) for engine in self.rollout_engines])

    def get_urls(self):
        return enginefsm.get([engine.get_url.remote() for engine in self.rollout_engines if engine is not None])

    def get_updatable_engines_and_lock(self):
        return self.rollout_engines, self.rollout_engine_lock

    def dispose(self):
        for monitor in self._health_monitors:
            monitor.stop()
        enginefsm.get([engine.shutdown.remote() for engine in self.rollout_engines if engine is not None])

    # What the tests ask of it.

    def told(self):
        """Of each place: the engine's name, incarnation, state, labels and actor."""
        return [
            engine
            and {
                "name": engine.fsm.name,
                "incarnation": engine.fsm.incarnation,
                "state": str(engine.fsm.state),
                "labels": dict(engine.fsm.labels),
                "actor_id": managed(engine).actor_id,
            }
            for server in self.servers.values()
            for engine in (
                [e for group in server.server_groups for e in group.all_engines]
                if server.server_groups
                else server.engines
            )
        ]

    def router_lists(self):
        """The servers that the router lists."""
        listed = slime_engines.ask(f"http://{self.server.router_ip}:{self.server.router_port}/workers")["workers"]
        return sorted(worker["url"] for worker in listed)


class Lock:
    """What keeps two trainers from updating weights at once, as slime has it."""

    def __init__(self):
        self.is_held = False

    def acquire(self):
        was_held, self.is_held = self.is_held, True
        return not was_held

    def release(self):
        assert self.is_held
        self.is_held = False


class Trainer:
    """A trainer's process: it has the engines from the manager, as plain handles, and updates their weights."""

    def __init__(self, directory):
        (Path(directory) / "trainer.pid").write_text(str(os.getpid()))
        policy = enginefsm.RetryPolicy(budget_s=60, cap_s=2)
        enginefsm.configure(run="slime", policy=policy, listeners=[StepLog(directory, "trainer.steps")], export=[])

    def set_rollout_manager(self, rollout_manager):
        self.rollout_manager = enginefsm.adopt(rollout_manager, name="rollout_manager", launch="__ray_ready__")

    def update_weights(self, model_path, weight_version):
        rollout_engines, lock = enginefsm.get(self.rollout_manager.get_updatable_engines_and_lock.remote())
        lock = enginefsm.adopt(lock, name="rollout_engine_lock", launch="__ray_ready__")
        engines = enginefsm.embed.slime.adopt_engines(rollout_engines)
        while not enginefsm.get(lock.acquire.remote()):
            time.sleep(0.1)
        enginefsm.get([engine.pause_generation.remote() for engine in engines])
        enginefsm.get([engine.flush_cache.remote() for engine in engines])
        enginefsm.get([engine.update_weights_from_disk.remote(model_path, weight_version) for engine in engines])
        enginefsm.get([engine.continue_generation.remote() for engine in engines])
        enginefsm.get(lock.release.remote())
        return len(engines)

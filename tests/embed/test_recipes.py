"""How other frameworks start and use engines, with the lines that change. Each is cut off, on a real Ray: nothing is
lost, and nothing runs twice.

The shapes are those of miles and verl as of 2026, and two more that jobs have. None of their code is here.
"""

from __future__ import annotations

import asyncio
import os
import queue
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorUnavailableError
from ray.util import ActorPool
from support.engines import wait_on_loop_until, wait_until

import enginefsm
from enginefsm import EngineState, RetryPolicy
from enginefsm.rehearsal import chaos


class Engine:
    """What it is asked leaves a line in `ran`; it answers once the file `gate` is there."""

    def __init__(self, directory):
        self.directory = Path(directory)
        (self.directory / "pid").write_text(str(os.getpid()))

    def ran(self, what):
        with (self.directory / "ran").open("a") as ran:
            ran.write(f"{what}\n")

    def gate(self):
        return (self.directory / "gate").exists()


class SyncEngine(Engine):
    def init(self, port):
        self.ran("init")
        wait_until(self.gate)
        return port

    def generate(self, prompt):
        self.ran(prompt)
        wait_until(self.gate)
        return prompt.upper()

    def release_memory_occupation(self, tags=None):
        self.ran("offload")
        wait_until(self.gate)


class AsyncServer(Engine):
    async def get_master_address(self):
        return "127.0.0.1", 29500

    async def launch_server(self, master_address, master_port):
        self.ran(f"launch with {master_address}:{master_port}")
        await wait_on_loop_until(self.gate)

    async def generate(self, prompt):
        self.ran(prompt)
        await wait_on_loop_until(self.gate)
        return prompt.upper()


class Shop:
    """Starts actors, cuts them off, and knows what they ran."""

    def __init__(self, directory):
        self.directory = directory
        self.actors = []

    def start(self, cls):
        directory = self.directory / f"{len(self.actors)}"
        directory.mkdir()
        self.actors.append(ray.remote(cls).options(num_cpus=0).remote(str(directory)))
        return self.actors[-1]

    def ran(self, number):
        path = self.directory / f"{number}" / "ran"
        return path.read_text().splitlines() if path.exists() else []

    def cut_once_all_run(self, lines):
        """Cut every actor off once it has begun so many things; open the gates when Ray has told of all breaks."""
        for number in range(len(self.actors)):
            wait_until(lambda number=number: len(self.ran(number)) >= lines, what="the beginning")
            pid = int((self.directory / f"{number}" / "pid").read_text())
            wait_until(lambda pid=pid: chaos.cut(pid), what="a connection to cut")
        engines = enginefsm.default_monitor().engines()
        wait_until(lambda: all(engine.fsm.state is EngineState.UNAVAILABLE for engine in engines), what="the outage")
        self.open()

    def open(self):
        for number in range(len(self.actors)):
            (self.directory / f"{number}" / "gate").touch()

    def close(self):
        for number in range(len(self.actors)):
            (self.directory / f"{number}" / "gate").unlink(missing_ok=True)


@pytest.fixture
def shop(cluster, tmp_path):
    enginefsm.configure(run="recipes", policy=RetryPolicy(cap_s=1), export=[])
    shop = Shop(tmp_path)
    yield shop
    for engine in enginefsm.default_monitor().engines():
        enginefsm.release(engine)
    for actor in shop.actors:
        ray.kill(actor)
    enginefsm.configure(export=[])


@pytest.fixture
def background():
    with ThreadPoolExecutor() as threads:
        yield threads


# --- miles: sync handles, awaited by ray.get when servers start and by asyncio.gather afterwards ---


class ServerEngine:
    """Holds one engine. miles checks the type of what it holds by pydantic."""

    def mark_allocated_uninitialized(self, actor_handle):
        assert isinstance(actor_handle, enginefsm.Engine)  # was: ray.actor.ActorHandle
        self.actor_handle = actor_handle


class MilesGroup:
    def __init__(self, shop, worker_type="regular"):
        self.shop = shop
        self.worker_type = worker_type
        self.all_engines = []

    def start_engines(self, n):
        for rank in range(n):
            rollout_engine = self.shop.start(SyncEngine)
            # Added:
            rollout_engine = enginefsm.adopt(rollout_engine, name=f"{self.worker_type}/{rank}")
            self.all_engines.append(ServerEngine())
            self.all_engines[-1].mark_allocated_uninitialized(rollout_engine)
        return [engine.actor_handle.init.remote(port=30000 + rank) for rank, engine in enumerate(self.all_engines)]

    async def offload(self):
        await asyncio.gather(*[engine.actor_handle.release_memory_occupation.remote() for engine in self.all_engines])

    def stop_engines(self):
        for engine in self.all_engines:
            ray.kill(engine.actor_handle.handle)  # was: ray.kill(engine.actor_handle)
            enginefsm.release(engine.actor_handle)  # added


def test_miles(shop, background):
    group = MilesGroup(shop)
    handles = group.start_engines(2)
    cutting = background.submit(shop.cut_once_all_run, 1)
    assert enginefsm.get(handles) == [30000, 30001]  # was: ray.get(handles)
    cutting.result()

    shop.close()
    cutting = background.submit(shop.cut_once_all_run, 2)
    asyncio.run(group.offload())
    cutting.result()
    assert [shop.ran(number) for number in range(2)] == [["init", "offload"]] * 2

    group.stop_engines()
    assert enginefsm.default_monitor().engines() == []


# --- verl: asyncio actors, launched by asyncio.gather, asked by many awaits at once ---


class VerlReplica:
    def __init__(self, shop):
        self.shop = shop
        self.server_class = enginefsm.monitored(AsyncServer)  # was: ray.remote(AsyncServer)

    async def launch_servers(self, nnodes):
        self.servers = []
        for node_rank in range(nnodes):
            handle = self.shop.start(self.server_class)
            # was: self.servers.append(handle)
            name = f"sglang_server_0_{node_rank}"
            self.servers.append(enginefsm.adopt(handle, name=name, launch="launch_server"))
        address, port = await self.servers[0].get_master_address.remote()
        await asyncio.gather(
            *[server.launch_server.remote(master_address=address, master_port=port) for server in self.servers]
        )

    async def generate(self, prompt):
        return await self.servers[zlib.crc32(prompt.encode()) % len(self.servers)].generate.remote(prompt)


def test_verl(shop, background):
    replica = VerlReplica(shop)

    async def run():
        cutting = background.submit(cut_launch)
        await replica.launch_servers(2)
        cutting.result()
        shop.close()
        prompts = [f"prompt {number}" for number in range(16)]
        cutting = background.submit(shop.cut_once_all_run, 2)
        answers = await asyncio.gather(*[replica.generate(prompt) for prompt in prompts])
        cutting.result()
        return prompts, answers

    def cut_launch():
        wait_until(lambda: len(shop.actors) == 2)
        shop.cut_once_all_run(1)

    prompts, answers = asyncio.run(run())
    assert answers == [prompt.upper() for prompt in prompts]
    ran = [shop.ran(number) for number in range(2)]
    assert [each[0] for each in ran] == ["launch with 127.0.0.1:29500"] * 2
    assert sorted(line for each in ran for line in each[1:]) == sorted(prompts)


# --- actors that their constructor makes ready, wrapped, with async methods that await references ---


class WrappedEngine:
    def __init__(self, handle, number):
        # was: self.inference_engine_actor = handle
        self.inference_engine_actor = enginefsm.adopt(handle, name=f"engine-{number}", launch="__ray_ready__")

    async def generate(self, prompt):
        return await self.inference_engine_actor.generate.remote(prompt)


def test_wrapped_actors_that_their_constructor_makes_ready(shop, background):
    cls = enginefsm.monitored(AsyncServer)  # was: AsyncServer
    wrapped = [WrappedEngine(shop.start(cls), number) for number in range(2)]
    # was: ray.get([engine.inference_engine_actor.__ray_ready__.remote() for engine in wrapped])
    enginefsm.get([engine.inference_engine_actor.__ray_ready__.remote() for engine in wrapped])
    assert {engine.fsm.state for engine in enginefsm.default_monitor().engines()} == {EngineState.READY}

    async def generate():
        return await asyncio.gather(*[engine.generate(f"to {number}") for number, engine in enumerate(wrapped)])

    cutting = background.submit(shop.cut_once_all_run, 1)
    assert asyncio.run(generate()) == ["TO 0", "TO 1"]
    cutting.result()
    assert [shop.ran(number) for number in range(2)] == [["to 0"], ["to 1"]]


# --- a pool of engines that their constructor makes ready; calls of all, and the first to be done first ---


def batch_engine_call(engines, method_name, *args):
    calls = [getattr(engine, method_name).remote(*args) for engine in engines]
    return enginefsm.get(calls)  # was: ray.get(calls)


async def as_they_end(engines, prompts):
    """Was: `ready, pending = ray.wait(pending, num_returns=1)`, and `ray.get(ready)`."""
    calls = [engines[number % len(engines)].generate.remote(prompt) for number, prompt in enumerate(prompts)]
    return [await each for each in asyncio.as_completed(calls)]


def test_a_batch_of_calls_to_all_engines_and_the_first_to_be_done_first(shop, background):
    handles = [shop.start(SyncEngine) for _ in range(2)]
    engines = [enginefsm.adopt(each, name=f"{n}", launch="__ray_ready__") for n, each in enumerate(handles)]
    assert batch_engine_call(engines, "__ray_ready__") == [True, True]

    cutting = background.submit(shop.cut_once_all_run, 1)
    answers = asyncio.run(as_they_end(engines, ["a", "b", "c", "d"]))
    cutting.result()
    assert sorted(answers) == ["A", "B", "C", "D"]
    assert [shop.ran(number) for number in range(2)] == [["a", "c"], ["b", "d"]]


def pool_map(engines, prompts):
    """In place of `ray.util.ActorPool(handles).map(...)`, whose references cannot recover."""
    idle = queue.SimpleQueue()
    for engine in engines:
        idle.put(engine)

    def one(prompt):
        engine = idle.get()
        try:
            return enginefsm.get(engine.generate.remote(prompt))
        finally:
            idle.put(engine)

    with ThreadPoolExecutor(len(engines)) as threads:
        return list(threads.map(one, prompts))


def test_a_pool_of_actors(shop, background):
    handles = [shop.start(SyncEngine) for _ in range(2)]
    engines = [enginefsm.adopt(each, name=f"{n}", launch="__ray_ready__") for n, each in enumerate(handles)]
    enginefsm.get([engine.__ray_ready__.remote() for engine in engines])
    prompts = [f"p{number}" for number in range(6)]

    cutting = background.submit(shop.cut_once_all_run, 1)
    assert pool_map(engines, prompts) == [prompt.upper() for prompt in prompts]
    cutting.result()
    assert sorted(shop.ran(0) + shop.ran(1)) == prompts


def test_ray_s_own_pool_loses_what_was_cut_off_though_its_engine_does_it(shop):
    engine = enginefsm.adopt(shop.start(SyncEngine), name="one", launch="__ray_ready__")
    enginefsm.get(engine.__ray_ready__.remote())
    pool = ActorPool([engine])
    pool.submit(lambda engine, prompt: engine.generate.remote(prompt).ref, "lost")
    wait_until(lambda: shop.ran(0))
    wait_until(lambda: chaos.cut(int((shop.directory / "0" / "pid").read_text())), what="a connection to cut")
    with pytest.raises(ActorUnavailableError):
        pool.get_next()
    shop.open()
    assert enginefsm.get(engine.generate.remote("kept")) == "KEPT"
    assert shop.ran(0) == ["lost", "kept"]

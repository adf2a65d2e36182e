"""Real SGLang engines in Ray actors, cut off while their servers load, come up and generate. No stand-ins."""

from __future__ import annotations

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import ray
from engines import wait_until

import enginefsm
from enginefsm import EngineState, Reason, chaos
from enginefsm.sglang import CPU_ENV, SGLangEngine, cpu_server_args
from enginefsm.tiny_model import make_tiny_model

LAUNCHING, READY, UNAVAILABLE, DEAD = EngineState


def generate(url):
    """Tokens from the server itself, past the actor."""
    body = {"text": "the quick brown fox", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return json.load(answer)


def servers_of(pid):
    """The processes below an actor that hold a model server."""
    return [child for child in psutil.Process(pid).children(recursive=True) if "sglang" in " ".join(child.cmdline())]


@pytest.mark.timeout(600)
def test_sglang_engines_cut_off_while_they_load_come_up_and_generate(cluster, tmp_path):
    model = make_tiny_model(tmp_path / "model")
    steps = []
    monitor = enginefsm.EngineMonitor("sglang", listeners=[lambda event: steps.append(event)])
    actors = [
        ray.remote(num_cpus=0)(SGLangEngine).remote(cpu_server_args(model), env=CPU_ENV, log_dir=tmp_path)
        for _ in range(2)
    ]
    engines = [
        monitor.adopt(actor, name=f"default/regular/{rank}", model="tiny", rank=rank)
        for rank, actor in enumerate(actors)
    ]
    pids = ray.get([actor.__ray_call__.remote(lambda _: __import__("os").getpid()) for actor in actors])
    with ThreadPoolExecutor() as threads:
        launch = threads.submit(monitor.get, [engine.init.remote() for engine in engines])
        for pid, engine in zip(pids, engines, strict=True):
            wait_until(lambda pid=pid: servers_of(pid), what="the start of a server")
            assert engine.state is LAUNCHING
            assert chaos.cut(pid)
        urls = launch.result(500)
    assert len(set(urls)) == 2
    for url in urls:
        assert generate(url)["meta_info"]["completion_tokens"] == 8
    answers = monitor.get([engine.generate.remote("hello", {"max_new_tokens": 4}) for engine in engines])
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [4, 4]
    for engine in engines:
        assert [
            (step.to_state, step.reason)
            for step in steps
            if isinstance(step, enginefsm.Transition) and step.engine == engine.name
        ] == [
            (LAUNCHING, Reason.LAUNCHED),
            (UNAVAILABLE, Reason.ACTOR_UNAVAILABLE),
            (READY, Reason.RECOVERED),
        ]
    monitor.get([engine.shutdown.remote() for engine in engines])
    for pid, actor in zip(pids, actors, strict=True):
        assert servers_of(pid) == []
        ray.kill(actor)

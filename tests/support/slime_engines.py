"""Engines with the methods that slime's have, over enginefsm's servers: real SGLang ones, and stand-ins.

What slime's own class does beyond a server's life stands here: its addresses and ports, the router, offload and onload,
the checks of weights. Each method leaves a line in a file of the test's directory, and is held while a file there
says so: files pass while connections do not.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import socket
import urllib.request
from pathlib import Path

from enginefsm.rehearsal.sglang import SGLangEngine
from enginefsm.rehearsal.standin import StandInEngine
from support.engines import wait_until

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(url, body=None, method=None, timeout_s=60):
    """The JSON of an HTTP answer, with no proxy between; an error status raises."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with _direct.open(request, timeout=timeout_s) as answer:
        content = answer.read()
    try:
        return json.loads(content)
    except ValueError:
        return content.decode()


def note(step):
    """Leave a line that `step` has begun, and stay while a file says so, which leaves a line more."""
    directory, rank = Path(os.environ["ENGINE_DIRECTORY"]), os.environ["ENGINE_RANK"]
    for file in (f"{step}.{rank}", f"held.{step}.{rank}"):
        with (directory / file).open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        if not (directory / f"hold.{step}.{rank}").exists():
            return
    wait_until(lambda: not (directory / f"hold.{step}.{rank}").exists(), what=f"the end of the hold of {step}")


class SlimeMethods:
    """The methods of slime's engine class."""

    def __init__(self, directory, rank, worker_type, node_rank=0, **server):
        super().__init__(**server)
        os.environ["ENGINE_DIRECTORY"], os.environ["ENGINE_RANK"] = str(directory), str(rank)
        self.worker_type = worker_type
        self.node_rank = node_rank
        self.router = None
        note("constructor")

    @staticmethod
    def _get_current_node_ip_and_free_port(start_port=10000, consecutive=1):
        note("ports")
        for port in range(start_port, 60000):
            if all(_is_free(port + i) for i in range(consecutive)):
                return "127.0.0.1", port
        raise RuntimeError("no free port")

    def init(self, dist_init_addr, port, nccl_port, host=None, router_ip=None, router_port=None):
        note("init")
        if self.node_rank != 0:
            return
        super().init(port, host)
        if self.worker_type != "encoder":
            self.router = f"http://{router_ip}:{router_port}/workers"
            ask(self.router, {"url": self.url(), "worker_type": self.worker_type})
            wait_until(lambda: self.url() in [worker["url"] for worker in ask(self.router)["workers"]])

    def get_url(self):
        note("get_url")
        return self.url()

    def health_generate(self, timeout=5.0):
        note("health_generate")
        if self.node_rank == 0:
            ask(f"{self.url()}/health_generate", timeout_s=timeout)
        return True

    def flush_cache(self):
        self._request("flush_cache")

    def release_memory_occupation(self):
        note("offload")
        self.flush_cache()
        return self._request("release_memory_occupation")

    def resume_memory_occupation(self, tags=None):
        note("onload")
        return self._request("resume_memory_occupation", {"tags": tags})

    def check_weights(self, action):
        note("check_weights")
        return self._request("weights_checker", {"action": action})

    def pause_generation(self):
        note("pause_generation")
        return self._request("pause_generation")

    def update_weights_from_disk(self, model_path, weight_version=None):
        note("update_weights")
        return self._request("update_weights_from_disk", {"model_path": model_path, "weight_version": weight_version})

    def continue_generation(self):
        note("continue_generation")
        return self._request("continue_generation")

    def shutdown(self):
        note("shutdown")
        if self.router is not None:
            listed = ask(self.router)["workers"]
            for worker in listed:
                if worker["url"] == self.url():
                    ask(f"{self.router}/{worker['id']}", method="DELETE")
        super().shutdown()


class StandIn(SlimeMethods, StandInEngine):
    """Without a model: a request says what was asked, and that is all."""

    def _request(self, endpoint, payload=None):
        return [endpoint, payload]


class Real(SlimeMethods, SGLangEngine):
    """SGLang on a CPU.

    It takes the same requests as on a GPU, but for one: `weights_checker` compares on CUDA alone (it takes snapshots).
    Without SGLang's memory saver, which needs CUDA, to release memory is to flush the cache and to say so.
    """

    def _request(self, endpoint, payload=None):
        return ask(f"{self.url()}/{endpoint}", payload or {}, "POST")


def free_ports(number):
    """Ports that nobody has just now, and that the kernel gives nobody by itself."""
    return list(itertools.islice(filter(_is_free, random.sample(range(26000, 32000), 1000)), number))


def wait_until_served(url, process):
    """Wait until the server below `process` answers at `url`."""

    def served():
        assert process.poll() is None, f"the server for {url} exited"
        try:
            ask(url, timeout_s=5)
        except OSError:
            return False
        return True

    wait_until(served, what=url)


def _is_free(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True

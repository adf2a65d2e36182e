"""A manager on one host that brings up engines on another; run as a program, it is the driver of that job.

It prints a JSON line for each step: the test that started it makes the link silent between them.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError

import enginefsm
from enginefsm._ray import keepalive
from support.engines import wait_until
from support.hosts import Hosts

LOAD_S = 10.0  # the launch ends while the link is silent
GIVE_UP_S = 500.0


class LoadingEngine:
    def __init__(self, begun: Path) -> None:
        self.runs = 0
        self.begun = begun

    def init(self) -> int:
        self.runs += 1
        self.begun.touch()
        time.sleep(LOAD_S)
        return self.runs

    def launches(self) -> int:
        return self.runs


class Manager:
    """Begins the launch of an engine that it has adopted, and of one that it awaits with bare Ray."""

    def begin(self) -> bool:
        self.logged: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.logged.append(record.getMessage())
        logging.getLogger("enginefsm").addHandler(handler)
        self.monitor = enginefsm.EngineMonitor(policy=enginefsm.RetryPolicy(budget_s=120))
        engine_class = ray.remote(LoadingEngine).options(resources={"there": 1}, num_cpus=0)
        marks = [Path(tempfile.mkdtemp()) / "begun" for _ in range(2)]  # the hosts share their files
        self.handle, bare = (engine_class.remote(mark) for mark in marks)
        ray.get([self.handle.launches.remote(), bare.launches.remote()])
        self.call = self.monitor.adopt(self.handle, name="engine-0").init.remote()
        self.bare = bare.init.remote()
        wait_until(lambda: all(mark.exists() for mark in marks), what="the beginning of both launches")
        return keepalive.finds_silent_links()

    def finish(self) -> dict[str, object]:
        """Wait for both; give when the adopted engine's result came, and how the bare wait ended."""
        given = self.monitor.get(self.call, timeout=GIVE_UP_S)
        ready_at = time.time()
        try:
            bare = "up" if ray.get(self.bare, timeout=GIVE_UP_S) else "down"
        except (ActorUnavailableError, GetTimeoutError) as error:
            bare = type(error).__name__
        launches = ray.get(self.handle.launches.remote())
        self.monitor.close()
        return {"given": given, "launches": launches, "ready_at": ready_at, "bare": bare, "logged": self.logged}


def bring_up(hosts: Hosts, address: str, *, with_keepalive: bool, silent_s: float) -> Iterator[dict]:
    """Run the job on the near host; give what each step says. The link is silent for a time while engines load."""
    command = [sys.executable, "-m", "support.silent_link", address, "keepalive" if with_keepalive else "plain"]
    driver = hosts.here.start(command, stdout=subprocess.PIPE, text=True)
    yield _said(driver)
    if silent_s:
        hosts.silence()
        time.sleep(silent_s)
        hosts.restore()
    restored_at = time.time()
    said = _said(driver)
    yield {**said, "late_s": said["ready_at"] - restored_at}
    driver.wait()


def _said(driver: subprocess.Popen) -> dict:
    line = driver.stdout.readline()
    assert line, f"the driver ended with {driver.wait()}"
    return json.loads(line)


def main(address: str, settings: str) -> None:
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    runtime_env = enginefsm.runtime_env() if settings == "keepalive" else {}
    manager = ray.remote(Manager).options(resources={"here": 1}, num_cpus=0, runtime_env=runtime_env).remote()
    print(json.dumps({"manager_has_keepalive": ray.get(manager.begin.remote())}), flush=True)
    print(json.dumps(ray.get(manager.finish.remote())), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])

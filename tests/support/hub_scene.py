"""Monitors that export to the hub of a real cluster, with engines that come up and die."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorDiedError

from enginefsm import EngineMonitor
from enginefsm.export import Hub, HubSettings, hub
from support.engines import Engine, wait_until


class Scene:
    """Monitors that export to the cluster's own hub."""

    def __init__(self, tmp_path):
        self.tmp_path = tmp_path
        self.file_sd = tmp_path / "hub.json"
        self.monitors = []
        self.directories = {}

    @property
    def address(self):
        return ray.get_runtime_context().gcs_address

    def monitor(self, run, port=0):
        settings = HubSettings(port=port, file_sd=str(self.file_sd))
        self.monitors.append(EngineMonitor(run=run, export=[Hub(settings)]))
        return self.monitors[-1]

    def launch(self, monitor, name, **labels):
        directory = self.tmp_path / f"{len(list(self.tmp_path.iterdir()))}"
        directory.mkdir()
        self.directories[name] = directory
        (directory / "gate").touch()
        engine = monitor.adopt(ray.remote(num_cpus=0)(Engine).remote(str(directory)), name=name, **labels)
        monitor.get(engine.init.remote())
        return engine

    def kill(self, monitor, engine):
        call = engine.hold.remote()
        wait_until((self.directories[engine.fsm.name] / "held").exists, what="the call")
        ray.kill(engine.handle)
        with pytest.raises(ActorDiedError):
            monitor.get(call)

    def url(self):
        found = hub.find()  # kept: an ActorMethod of Ray 2.47 does not keep its handle
        return ray.get(found.address.remote())

    def close(self):
        for monitor in self.monitors:
            for engine in monitor.engines():
                ray.kill(engine.handle)
            monitor.close()
        if hub.find() is not None:
            self.kill_hub()

    def kill_hub(self):
        killed = hub.find()
        pid = ray.get(killed.fleet.remote())["hub"]["pid"]
        ray.kill(killed)  # a heartbeat may have another one started at once
        wait_until(lambda: hub.find() != killed and not Path(f"/proc/{pid}").exists(), what="the hub's end")

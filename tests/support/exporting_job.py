"""A job in a process of its own: it adopts one engine, exports to the hub, says so, and goes on until its input ends.

Arguments: the cluster's address, the run's name, the hub's file for Prometheus, a directory for the engine, its
max_task_retries, and a textfile to export to as well ("" for none).
"""

import sys
from pathlib import Path

import ray

from enginefsm import EngineMonitor
from enginefsm.export import Hub, HubSettings, Textfile
from support.engines import Engine


def main(address, run, file_sd, directory, max_task_retries, textfile):
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    exporters = [Hub(HubSettings(file_sd=file_sd))] + ([Textfile(textfile)] if textfile else [])
    monitor = EngineMonitor(run=run, export=exporters)
    (Path(directory) / "gate").touch()
    actor = ray.remote(num_cpus=0, max_restarts=int(max_task_retries), max_task_retries=int(max_task_retries))(Engine)
    engine = monitor.adopt(actor.remote(directory), name="engine-0")
    monitor.get(engine.init.remote())
    monitor.flush(timeout_s=30)
    print("exported", flush=True)
    sys.stdin.read()
    monitor.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

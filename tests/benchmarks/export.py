"""What exporting costs: on the caller's thread, at a scrape of the hub, and between a death and its exception.

Run: python tests/benchmarks/export.py
"""

from __future__ import annotations

import gzip
import logging
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import ray

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import local_ray
from support.bare_handles import bare_handle
from support.engines import Engine, wait_until

import enginefsm
from enginefsm import EngineMonitor
from enginefsm._engine.proxy import managed
from enginefsm.export import EventLog, Hub, HubSettings, PushGateway, Textfile, read_fleet
from enginefsm.fsm.states import Reason

ROUNDS = 1000
ROUTE = (Reason.ACTOR_UNAVAILABLE, Reason.ACTOR_REACHABLE)


def row(what, value, unit, bound=""):
    """One line of the table."""
    print(f"{what:88} {value:10.2f} {unit:3} {bound}", flush=True)


def fleet(monitor, size):
    """Engines named as slime names them."""
    return [
        monitor.adopt(bare_handle(), name=f"default/regular/{n}", model="GLM-4.6-FP8", worker_type="regular",
                      node=f"10.0.{n // 256}.{n % 256}")
        for n in range(size)
    ]  # fmt: skip


def transitions(directory):
    """The caller's CPU a transition, without and with exporters, by turns."""
    kinds = {
        "no exporter": (),
        "the hub": (Hub(),),
        "the hub, a textfile, an event log, a gateway that refuses": (
            Hub(), Textfile(directory / "t.prom"), EventLog(directory / "e.jsonl"), PushGateway("http://127.0.0.1:1"),
        ),
    }  # fmt: skip
    monitors = {what: EngineMonitor(run=what, export=exporters) for what, exporters in kinds.items()}
    engines = {what: fleet(monitor, 8) for what, monitor in monitors.items()}
    took = {what: [] for what in kinds}
    for monitor in monitors.values():
        monitor.flush(timeout_s=10)
    for turn in range(ROUNDS):
        for what, monitor in monitors.items():
            engine = engines[what][turn % 8]
            for reason in ROUTE:
                began = time.thread_time_ns()
                managed(engine).step(reason)
                monitor._delivery.deliver()
                took[what].append((time.thread_time_ns() - began) / 1000)
        if turn % 20 == 0:  # others' batches are sent meanwhile, as in life
            time.sleep(0.05)
    for what, monitor in monitors.items():
        row(f"a transition with {what}: caller's CPU, median", statistics.median(took[what]), "us", "50 with the hub")
        row("    99th percentile", statistics.quantiles(took[what], n=100)[98], "us")
        monitor.close()


def scraped(url, encoding="gzip"):
    """Milliseconds and bytes of a scrape, the answer read to its end; compressed, as Prometheus asks for it."""
    began = time.perf_counter()
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept-Encoding": encoding})) as answer:
        text = answer.read()
    return (time.perf_counter() - began) * 1000, text


def scrapes(size, bound):
    """A hub that has so many engines: as they are, and each scrape after a change."""
    settings = HubSettings(file_sd="")
    namespace = f"scrapes-{size}"
    monitor = EngineMonitor(run="glm-rl", export=[Hub(settings, namespace)])
    engines = fleet(monitor, size)
    began = time.perf_counter()
    assert monitor.flush(timeout_s=60)
    row(f"{size} engines: full state reported and acknowledged", (time.perf_counter() - began) * 1000, "ms")
    url = read_fleet("nobody", namespace=namespace)["hub"]["address"]
    changed = []
    for turn in range(10):
        managed(engines[turn]).step(Reason.INIT_SUCCEEDED)
        monitor._delivery.deliver()
        assert monitor.flush(timeout_s=30)
        took, sent = scraped(url + "/metrics")
        changed.append(took)
    row(f"{size} engines: scrape after a change, median", statistics.median(changed), "ms", bound)
    row("    slowest of 10", max(changed), "ms", bound)
    row("    nothing changed, median", statistics.median(scraped(url + "/metrics")[0] for _ in range(10)), "ms", bound)
    took = statistics.median(scraped(url + "/metrics", "identity")[0] for _ in range(10))
    row("    nothing changed, not compressed, median", took, "ms", bound)
    row("    metrics text", len(gzip.decompress(sent)) / 1e6, "MB", "8")
    row("    the same, as sent", len(sent) / 1e6, "MB")
    row("    JSON of the fleet", statistics.median(scraped(url + "/api/v1/fleet")[0] for _ in range(5)), "ms")

    # Off the event path: what a report waits for while the hub is scraped without a pause.
    stop = threading.Event()

    def scrape():
        while not stop.is_set():
            scraped(url + "/metrics")

    waits = []
    scraper = threading.Thread(target=scrape)
    for scraping in (False, True):
        if scraping:
            scraper.start()
        waits.clear()
        for turn in range(20, 40):
            managed(engines[turn]).step(Reason.INIT_SUCCEEDED if not scraping else Reason.ACTOR_UNAVAILABLE)
            monitor._delivery.deliver()
            began = time.perf_counter()
            assert monitor.flush(timeout_s=30)
            waits.append((time.perf_counter() - began) * 1000)
        when = " while it is scraped without a pause" if scraping else ""
        row(f"    a transition acknowledged{when}, median", statistics.median(waits), "ms")
    stop.set()
    scraper.join()
    monitor.close()
    ray.kill(ray.get_actor("enginefsm-hub", namespace))


def ends(directory):
    """From an engine's death to the exception, beyond what a monitor without exporters takes."""
    for what, exporters in (("no exporter", ()), ("the hub", (Hub(),)), ("a frozen hub", (Hub(),))):
        took = []
        for turn in range(3 if "frozen" in what else 8):
            place = directory / f"{what}-{turn}"
            place.mkdir()
            monitor = EngineMonitor(run=f"ends of {what}", export=[type(one)() for one in exporters])
            engine = monitor.adopt(ray.remote(num_cpus=0)(Engine).remote(str(place)), name="e")
            (place / "gate").touch()
            monitor.get(engine.init.remote())
            assert monitor.flush(timeout_s=20)
            held = engine.hold.remote()
            wait_until((place / "held").exists)
            hub_pid = read_fleet()["hub"]["pid"] if exporters else 0
            if "frozen" in what:
                os.kill(hub_pid, signal.SIGSTOP)
            died = []
            monitor.add_listener(lambda event, died=died: died.append(time.perf_counter()))
            ray.kill(engine.handle)
            try:
                monitor.get(held)
            except ray.exceptions.ActorDiedError:
                took.append((time.perf_counter() - died[0]) * 1000)
            if "frozen" in what:
                os.kill(hub_pid, signal.SIGCONT)
            monitor.close()
        bound = {"the hub": "50", "a frozen hub": "2100"}.get(what, "")
        row(f"from death to exception with {what}, median", statistics.median(took), "ms", bound)
        row("    slowest", max(took), "ms", bound)


def main():
    """Print the table."""
    logging.getLogger("enginefsm").setLevel(logging.CRITICAL)
    root = str(Path(enginefsm.__file__).parents[1])
    here = str(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory() as directory, local_ray(PYTHONPATH=f"{root}:{here}"):
        transitions(Path(directory))
        scrapes(1_000, "50")
        scrapes(10_000, "250")
        ends(Path(directory))


if __name__ == "__main__":
    main()

"""The hub on a real Ray: it has the end before the exception leaves, outlives managers, comes again, and ends."""

from __future__ import annotations

import atexit
import contextlib
import gzip
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import ray
from prometheus_client import generate_latest
from ray.exceptions import ActorDiedError
from support.bare_handles import bare_handle
from support.clusters import WITH_ENGINEFSM
from support.engines import Engine, SlowToConstruct, kill, wait_until
from support.exports import adopt, errors_of, move, samples, value, without_times
from support.ray_versions import CALLS_RAY_SHUTDOWN
from support.stopwatch import Stopwatch

import enginefsm
from enginefsm import EngineMonitor, EngineState, LaunchDeadlineError, Reason, RetryPolicy, export
from enginefsm._engine.proxy import managed
from enginefsm._ray import control_plane
from enginefsm.cli.status.words import changes, lines
from enginefsm.export import Hub, HubSettings, PushGateway, hub, read_fleet
from enginefsm.monitor import ExportedFleet

TESTS = Path(__file__).parents[1]
numbers = itertools.count()


@pytest.fixture
def workers_import(clusters):
    """Ray whose workers have this enginefsm, and the tests' modules."""
    clusters.use(PYTHONPATH=WITH_ENGINEFSM)


class Namespace:
    """A place for one hub."""

    def __init__(self, tmp_path):
        self.name = f"hub-test-{next(numbers)}"
        self.file_sd = tmp_path / "enginefsm.json"
        self.settings = HubSettings(file_sd=str(self.file_sd))
        self.monitors = []

    def exporter(self, **settings):
        return Hub(HubSettings(**{"file_sd": str(self.file_sd), **settings}), self.name)

    def monitor(self, run="glm", policy=None, **settings):
        self.monitors.append(EngineMonitor(run=run, policy=policy, export=[self.exporter(**settings)]))
        return self.monitors[-1]

    def json(self, run=None):
        return read_fleet(run, namespace=self.name)

    def pid(self):
        return self.json()["hub"]["pid"]

    def url(self):
        return self.json()["hub"]["address"]

    def get(self, path="/metrics"):
        with urllib.request.urlopen(self.url() + path, timeout=10) as answer:
            return answer.read().decode()

    def close(self):
        for monitor in self.monitors:
            monitor.close()
        handle = hub.find(self.name)
        if handle is not None:
            ray.kill(handle)


@pytest.fixture
def place(workers_import, tmp_path):
    made = Namespace(tmp_path)
    yield made
    made.close()


def launch(monitor, directory, name="engine-0", *, ready=True):
    directory = directory / name
    directory.mkdir()
    engine = monitor.adopt(
        ray.remote(num_cpus=0)(Engine).remote(str(directory)), name=name, model="tiny", worker_type="regular", node="n1"
    )
    if ready:
        (directory / "gate").touch()
        assert monitor.get(engine.init.remote()) == "launched"
    return engine, directory


def hold(engine, directory):
    """A call that runs until its actor is gone."""
    call = engine.hold.remote()
    wait_until((directory / "held").exists, what="the call")
    return call


def test_the_hub_knows_who_died_and_why_before_the_exception_leaves(place, tmp_path, patience):
    monitor = place.monitor("glm-rl")
    engine, directory = launch(monitor, tmp_path)
    assert monitor.flush(timeout_s=30)
    assert place.json()["runs"][0]["engines"][0]["state"] == "ready"
    call = hold(engine, directory)
    ray.kill(engine.handle)
    with pytest.raises(ActorDiedError):
        monitor.get(call)
    (run,) = place.json("glm-rl")["runs"]
    assert (run["run"], run["state"], run["phases"]) == ("glm-rl", "alive", {"tiny": "succeeded"})
    (told,) = run["engines"]
    assert (told["engine"], told["state"], told["reason"]) == ("engine-0", "dead", "actor_died")
    assert (told["node"], told["actor_id"]) == ("n1", managed(engine).actor_id)
    assert told["manager"] == run["managers"][0]["manager"]
    assert told["spent_s"]["ready"] > 0
    assert value(place.get(), "enginefsm_engine_state", run="glm-rl", engine="engine-0", state="dead") == 1
    assert value(place.get(), "enginefsm_transitions_total", from_state="ready", reason="actor_died") == 1


def test_exhaustion_is_on_the_hub_before_the_exception_leaves_and_after_its_manager_is_gone(place, tmp_path):
    @ray.remote(num_cpus=0)
    class Manager:
        def bring_up(self):
            enginefsm.monitor.FLUSH_S = 60.0  # as `patience` does
            self.monitor = place_monitor()
            engine, _ = launch(self.monitor, tmp_path, ready=False)
            assert self.monitor.flush(timeout_s=30), "the hub is up, however long that took"
            try:
                self.monitor.get(engine.init.remote())
            except LaunchDeadlineError:
                os._exit(1)

    def place_monitor():
        return EngineMonitor(run="glm", policy=RetryPolicy(launch_deadline_s=4), export=[Hub(settings, namespace)])

    settings, namespace = place.settings, place.name
    manager = Manager.remote()
    with pytest.raises(ActorDiedError):
        ray.get(manager.bring_up.remote())
    text = place.get()
    who = {"run": "glm", "engine": "engine-0", "reason": "launch_deadline"}
    assert value(text, "enginefsm_retry_exhausted_timestamp_seconds", **who) == pytest.approx(time.time(), abs=60)
    assert value(text, "enginefsm_retry_exhausted_total", reason="launch_deadline") == 1
    assert value(text, "enginefsm_bringup_phase", phase="failed") == 1
    assert value(text, "enginefsm_monitor_stopped_timestamp_seconds") == 0, "it did not end in good order"


def test_the_hub_s_text_is_that_of_the_manager_s_own_registry(place):
    monitor = place.monitor()
    move(monitor, adopt(monitor, "one"), Reason.INIT_SUCCEEDED, Reason.ACTOR_UNAVAILABLE, Reason.RECOVERED)
    move(monitor, adopt(monitor, "two", model="other", node="n"), Reason.ACTOR_UNAVAILABLE, Reason.RETRY_EXHAUSTED)
    assert monitor.flush(timeout_s=30)
    own = generate_latest(monitor.metrics.registry).decode()
    text = place.get()
    assert without_times(text) == without_times(own)
    heartbeat = value(text, "enginefsm_monitor_heartbeat_timestamp_seconds")
    assert heartbeat <= time.time()
    monitor.close(timeout_s=60)
    stopped = value(place.get(), "enginefsm_monitor_stopped_timestamp_seconds")
    assert stopped == pytest.approx(time.time(), abs=60)
    assert place.json()["runs"][0]["state"] == "stopped"


def test_the_hub_answers_what_it_has_and_nothing_else(place):
    monitor = place.monitor("a run/with+odd&name")
    adopt(monitor)
    assert monitor.flush(timeout_s=30)
    assert place.get("/-/healthy") == "the enginefsm hub is healthy\n"
    assert [run["run"] for run in json.loads(place.get("/api/v1/fleet?run=a%20run%2Fwith%2Bodd%26name"))["runs"]] == [
        "a run/with+odd&name"
    ]
    assert json.loads(place.get("/api/v1/fleet?run=none"))["runs"] == []
    with pytest.raises(urllib.error.HTTPError, match="404"):
        place.get("/etc/passwd")
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(place.url() + "/metrics", data=b"x")
    assert place.url().startswith("http://127.0.0.1:")


def test_the_hub_compresses_what_it_serves_for_those_who_ask_for_that(place):
    monitor = place.monitor()
    for number in range(50):
        adopt(monitor, f"engine-{number}")
    assert monitor.flush(timeout_s=30)
    monitor.close(timeout_s=60)
    plain = place.get().encode()
    request = urllib.request.Request(place.url() + "/metrics", headers={"Accept-Encoding": "deflate, gzip;q=0.8"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert (answer.headers["Content-Encoding"], answer.headers["Vary"]) == ("gzip", "Accept-Encoding")
        sent = answer.read()
    assert gzip.decompress(sent) == plain
    assert len(sent) < len(plain) / 5


def test_prometheus_finds_the_hub_by_its_file_which_goes_when_the_hub_ends_by_itself(place):
    exporter = place.exporter(linger_s=4.0)
    exporter.batch_s = exporter.heartbeat_s = 0.2  # it does not end while it is looked at
    monitor = EngineMonitor(run="glm", export=[exporter])
    place.monitors.append(monitor)
    adopt(monitor)
    wait_until(place.file_sd.exists, what="the file")
    assert monitor.flush(timeout_s=30)
    (entry,) = json.loads(place.file_sd.read_text())
    assert entry["labels"] == {"job": "enginefsm"}
    text = urllib.request.urlopen(f"http://{entry['targets'][0]}/metrics").read().decode()
    assert value(text, "enginefsm_engine_info", engine="one") == 1
    assert place.file_sd.stat().st_mode & 0o777 == 0o644
    monitor.close(timeout_s=60)
    wait_until(lambda: hub.find(place.name) is None, what="the hub's end")
    assert not place.file_sd.exists()
    assert place.json() is None


def test_a_hub_that_was_killed_is_started_again_by_the_next_batch_and_told_everything(place):
    monitor = place.monitor()
    engines = [adopt(monitor, f"engine-{number}") for number in range(5)]
    move(monitor, engines[0], Reason.INIT_SUCCEEDED)
    assert monitor.flush(timeout_s=30)
    before = place.pid()
    os.kill(before, signal.SIGKILL)
    move(monitor, engines[1], Reason.INIT_SUCCEEDED)
    assert monitor.flush(timeout_s=60)
    assert place.pid() != before
    run = place.json()["runs"][0]
    assert run["counts"] == {"launching": 3, "ready": 2, "unavailable": 0, "dead": 0}
    own = generate_latest(monitor.metrics.registry).decode()
    assert without_times(place.get()) == without_times(own)


def test_a_hub_that_was_killed_has_the_end_that_comes_next_once_it_is_up_again(place, tmp_path):
    monitor = place.monitor()
    engine, directory = launch(monitor, tmp_path)
    assert monitor.flush(timeout_s=30)
    call = hold(engine, directory)
    since_death = time_from_its_death(monitor)
    os.kill(place.pid(), signal.SIGKILL)
    ray.kill(engine.handle)
    with pytest.raises(ActorDiedError):
        monitor.get(call)
    assert since_death() < 2.1
    assert monitor.flush(timeout_s=60)
    assert place.json()["runs"][0]["counts"]["dead"] == 1


def time_from_its_death(monitor):
    """Gives what says how many seconds have passed since the monitor took an engine for dead."""
    stopwatch = Stopwatch()

    def listen(event):
        if getattr(event, "to_state", None) is EngineState.DEAD:
            stopwatch.start()

    def passed_s():
        stopwatch.stop()
        return stopwatch.s

    monitor.add_listener(listen)
    return passed_s


@contextlib.contextmanager
def frozen(pid):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_frozen_hub_keeps_an_exception_for_two_seconds_at_most_and_replaces_it_never(place, tmp_path):
    monitor = place.monitor()
    engine, directory = launch(monitor, tmp_path)
    assert monitor.flush(timeout_s=30)
    call = hold(engine, directory)
    since_death = time_from_its_death(monitor)
    with frozen(place.pid()):
        ray.kill(engine.handle)
        with pytest.raises(ActorDiedError) as raised:
            monitor.get(call)
        assert since_death() < 2.1
    assert "engine 'engine-0'" in raised.value.__notes__[0]
    assert monitor.flush(timeout_s=60), "it is told once it goes on"
    assert place.json()["runs"][0]["engines"][0]["state"] == "dead"
    assert errors_of(monitor, "hub") >= 1


def test_all_exporters_together_keep_an_exception_for_two_seconds_at_most(place, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as never_answers:
        gateway = PushGateway(f"http://127.0.0.1:{never_answers.getsockname()[1]}")
        exporters = [
            place.exporter(),
            gateway,
            export.EventLog(tmp_path / "nowhere" / "log"),
            export.Textfile("/proc/x"),
        ]
        monitor = EngineMonitor(run="glm", export=exporters)
        place.monitors.append(monitor)
        engine, directory = launch(monitor, tmp_path)
        call = hold(engine, directory)
        wait_until(place.json, what="the hub")
        since_death = time_from_its_death(monitor)
        with frozen(place.pid()):
            ray.kill(engine.handle)
            with pytest.raises(ActorDiedError):
                monitor.get(call)
            assert since_death() < 2.1


def test_a_hub_that_cannot_listen_says_why_keeps_what_it_is_told_and_serves_when_it_can(place, caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monitor = place.monitor(port=port)
        engine = adopt(monitor)
        assert monitor.flush(timeout_s=30), "what is sent is acknowledged"
        known = place.json()
        assert known["hub"]["address"] is None
        assert known["hub"]["problem"] == (
            f"the hub cannot listen on 127.0.0.1:{port}: Address already in use; set ENGINEFSM_HUB_PORT to another "
            f"port, or to 0 for a free one"
        )
        assert known["hub"]["problem"] in caplog.text
        assert errors_of(monitor, "hub") >= 1
        move(monitor, engine, Reason.INIT_SUCCEEDED)
    wait_until(lambda: place.json()["hub"]["problem"] is None, what="the port")
    assert place.url() == f"http://127.0.0.1:{port}"
    assert monitor.flush(timeout_s=30)
    assert value(place.get(), "enginefsm_engine_state", state="ready") == 1


def test_a_file_for_prometheus_that_cannot_be_written_is_told_and_the_hub_serves(place, tmp_path):
    missing = tmp_path / "not there" / "enginefsm.json"
    monitor = place.monitor(file_sd=str(missing))
    adopt(monitor)
    assert monitor.flush(timeout_s=30)
    about = place.json()["hub"]
    assert "set ENGINEFSM_HUB_FILE_SD to a file in a directory that it may write to" in about["problem"]
    assert "No such file or directory" in about["problem"]
    assert value(place.get(), "enginefsm_engine_info") == 1


class Sender:
    """A manager of many: an actor that moves its engines as fast as it can, and says how often."""

    ENGINES, STEPS, UNACKNOWLEDGED = 5, 200, 7

    def __init__(self, number, settings, namespace):
        self.number = number
        self.monitor = EngineMonitor(run="glm", export=[Hub(settings, namespace)])
        self.engines = [adopt(self.monitor, f"engine-{number}-{n}", node=f"n{n}") for n in range(self.ENGINES)]
        assert self.monitor.flush(timeout_s=60)

    def run(self, die_at=None, told=None):
        for step in range(self.STEPS):
            for engine in self.engines:
                move(self.monitor, engine, Reason.ACTOR_UNAVAILABLE, Reason.ACTOR_REACHABLE)
            if step % 20 == 0:
                assert self.monitor.flush(timeout_s=60)
            if step == die_at:
                Path(told).write_text(str(step - self.UNACKNOWLEDGED + 1))
                os.kill(os.getpid(), signal.SIGKILL)
        move(self.monitor, self.engines[0], Reason.INIT_SUCCEEDED)
        assert self.monitor.flush(timeout_s=60)


def test_of_twenty_managers_that_send_at_once_nothing_is_lost_or_counted_twice_though_one_dies(place, tmp_path):
    # Five processes of up to five managers: twenty would be more than two processors can do at once.
    @ray.remote(num_cpus=0, max_concurrency=5)
    class Senders:
        def __init__(self, first, count, settings, namespace):
            self.senders = [Sender(first + n, settings, namespace) for n in range(count)]

        def run(self, n, *args):
            self.senders[n].run(*args)

    told = tmp_path / "told"
    groups = [Senders.remote(5 * n, 5, place.settings, place.name) for n in range(3)]
    groups += [Senders.remote(15, 4, place.settings, place.name)]
    doomed = Senders.remote(19, 1, place.settings, place.name)
    runs = [group.run.remote(n) for group, count in zip(groups, (5, 5, 5, 4), strict=True) for n in range(count)]
    with pytest.raises(ActorDiedError):
        ray.get(doomed.run.remote(0, 100 + Sender.UNACKNOWLEDGED, str(told)))
    ray.get(runs)
    text = place.get()
    least = 19 * Sender.ENGINES * Sender.STEPS + Sender.ENGINES * int(told.read_text())
    turns = value(text, "enginefsm_unavailable_duration_seconds_count")
    assert least <= turns <= least + Sender.ENGINES * Sender.UNACKNOWLEDGED, "what was acknowledged, and no more"
    counted = {
        reason: sum(
            one
            for (name, labels), one in samples(text).items()
            if name == "enginefsm_transitions_total" and dict(labels)["reason"] == reason
        )
        for reason in ("adopted", "actor_unavailable", "actor_reachable", "init_succeeded")
    }
    assert counted == {
        "adopted": 20 * Sender.ENGINES, "actor_unavailable": turns, "actor_reachable": turns, "init_succeeded": 19,
    }  # fmt: skip
    assert value(text, "enginefsm_engines_expected") == 20 * Sender.ENGINES
    run = place.json()["runs"][0]
    assert len({engine["engine"] for engine in run["engines"]}) == len(run["engines"]) == 20 * Sender.ENGINES
    assert run["counts"] == {"launching": 20 * Sender.ENGINES - 19, "ready": 19, "unavailable": 0, "dead": 0}
    assert len(run["managers"]) == 20


def test_a_report_sent_again_changes_nothing(place):
    monitor = place.monitor()
    engine = adopt(monitor)
    move(monitor, engine, Reason.ACTOR_UNAVAILABLE, Reason.ACTOR_REACHABLE)
    assert monitor.flush(timeout_s=30)
    monitor.close(timeout_s=60)
    before = samples(place.get())
    handle = hub.find(place.name)
    exports = export.Exports([], monitor)
    batch = export.Batch("glm", exports.manager, time.time(), 7, (), 0, False, 0.0)
    report = hub._report(ExportedFleet(monitor), batch, "host", None)
    assert ray.get(handle.accept.remote(report))["known"]
    once = samples(place.get())
    assert once[_unavailable()] == 2 * before[_unavailable()], "another manager, with the same counts"
    for again in (report, {**report, "seq": 3}):
        assert ray.get(handle.accept.remote(again)) == {"known": True, "problem": None}
        assert samples(place.get()) == once


def _unavailable():
    labels = {
        "run": "glm", "model": "tiny", "worker_type": "regular", "from_state": "launching", "to_state": "unavailable",
        "reason": "actor_unavailable",
    }  # fmt: skip
    return "enginefsm_transitions_total", tuple(sorted(labels.items()))


def test_inside_ray_the_process_s_monitor_exports_to_the_hub_by_default(workers_import, tmp_path, monkeypatch):
    monkeypatch.delenv("ENGINEFSM_EXPORT", raising=False)
    monkeypatch.setenv("ENGINEFSM_HUB_FILE_SD", str(tmp_path / "sd.json"))
    monitor = enginefsm.configure(run="by default")
    try:
        assert hub.find() is None, "not before the first engine"
        enginefsm.adopt(bare_handle(), name="one")
        assert monitor.flush(timeout_s=30)
        assert read_fleet()["runs"][0]["run"] == "by default"
        assert json.loads((tmp_path / "sd.json").read_text())
    finally:
        monitor.close()
        handle = hub.find()
        if handle is not None:
            ray.kill(handle)
        enginefsm.configure(export=())


class Leaver:
    def leave(self):
        ray.actor.exit_actor()


class ManagerInAnActor(Leaver):
    """With a cleanup of its own, and the atexit handler of a library."""

    def __init__(self, settings, namespace, log):
        self.log = Path(log)
        atexit.register(self.note, "exit handlers ran")
        self.monitor = EngineMonitor(run="glm", export=[Hub(settings, namespace)])
        adopt(self.monitor)

    def note(self, text):
        with self.log.open("a") as log:
            log.write(f"{text}\n")

    def up(self):
        return self.monitor.flush(timeout_s=30)


class ManagerWithACleanup(ManagerInAnActor):
    def __ray_shutdown__(self):
        self.note(f"cleanup ran, closed: {self.monitor.closed}")


def leave(actor):
    actor.leave.remote()


def terminate(actor):
    actor.__ray_terminate__.remote()


@pytest.mark.parametrize("cls", [ManagerInAnActor, ManagerWithACleanup])
@pytest.mark.parametrize("end", [leave, terminate], ids=lambda end: end.__name__)
def test_an_actor_that_ray_lets_end_is_a_good_end_and_all_else_that_ends_with_it_still_runs(cls, end, place, tmp_path):
    log = tmp_path / "log"
    actor = ray.remote(num_cpus=0)(cls).remote(place.settings, place.name, str(log))
    assert ray.get(actor.up.remote())
    end(actor)
    wait_until(lambda: place.json()["runs"][0]["state"] == "stopped", what="the end")
    wait_until(lambda: log.exists() and "exit handlers ran" in log.read_text(), what="the exit handlers")
    cleans_up = cls is ManagerWithACleanup and CALLS_RAY_SHUTDOWN
    assert ("cleanup ran, closed: True" in log.read_text()) is cleans_up


def test_a_manager_whose_actor_nobody_holds_any_more_ended_in_good_order(place, tmp_path):
    actor = ray.remote(num_cpus=0)(ManagerInAnActor).remote(place.settings, place.name, str(tmp_path / "log"))
    assert ray.get(actor.up.remote())
    del actor
    wait_until(lambda: place.json()["runs"][0]["state"] == "stopped", what="the end")


def test_a_manager_whose_actor_is_killed_did_not_end_in_good_order(place, tmp_path):
    actor = ray.remote(num_cpus=0)(ManagerInAnActor).remote(place.settings, place.name, str(tmp_path / "log"))
    assert ray.get(actor.up.remote())
    kill(actor)
    assert value(place.get(), "enginefsm_monitor_stopped_timestamp_seconds") == 0
    assert ray.get_runtime_context().get_job_id() not in control_plane.ended_jobs(), "its job goes on"


def test_a_text_that_is_no_actor_id_hides_no_actor_that_ended_in_good_order(workers_import):
    actor = ray.remote(num_cpus=0)(Leaver).remote()
    ray.get(actor.__ray_ready__.remote())
    actor_id = actor._actor_id.hex()
    actor.leave.remote()

    def ended():
        return control_plane.actors_ended_in_good_order({"aabb", "not hex", actor_id}, 10)

    assert wait_until(ended, what="the end").keys() == {actor_id}


def test_ray_says_which_jobs_have_ended_and_when(workers_import):
    code = (
        "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, _node_ip_address='127.0.0.1');"
        "print('job', ray.get_runtime_context().get_job_id())"
    )
    command = [sys.executable, "-c", code, ray.get_runtime_context().gcs_address]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    job = output.split()[-1]
    ended = wait_until(lambda: control_plane.ended_jobs().get(job), what="the job's end")
    assert ended == pytest.approx(time.time(), abs=60)


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
import ray
import conftest, enginefsm
from support.bare_handles import bare_handle
from enginefsm._engine.proxy import managed
from enginefsm.export import Hub, HubSettings, hub, read_fleet

start, in_start = hub.start, []

def slow_start(*settings):
    in_start.append(settings)
    time.sleep({start_s})
    try:
        return start(*settings)
    finally:
        in_start.clear()

hub.start = slow_start
with conftest.local_ray(PYTHONPATH={path!r}):
    monitor = enginefsm.EngineMonitor(run="glm", export=[Hub(HubSettings(file_sd=""))])
    engine = monitor.adopt(bare_handle(), name="one")
    if {freeze}:
        assert monitor.flush(timeout_s=120)
        os.kill(read_fleet()["hub"]["pid"], signal.SIGSTOP)
        managed(engine).step(enginefsm.Reason.INIT_SUCCEEDED)
    time.sleep({pause_s})
    if not {by_exit}:
        ray.shutdown()
        assert monitor.closed
        assert not in_start, "a thread may be in a call of Ray"
        Path({done!r}).touch()
    else:
        Path({done!r}).touch()
        sys.exit(3)
sys.exit(3)
"""


ENDS = {
    "shut down at once": {"freeze": False, "pause_s": 0, "start_s": 0, "by_exit": False},
    "shut down while the hub starts": {"freeze": False, "pause_s": 0.05, "start_s": 0, "by_exit": False},
    "shut down, the hub starts slowly": {"freeze": False, "pause_s": 0.5, "start_s": 4, "by_exit": False},
    "shut down, hub frozen": {"freeze": True, "pause_s": 1, "start_s": 0, "by_exit": False},
    "exit, hub frozen": {"freeze": True, "pause_s": 1, "start_s": 0, "by_exit": True},
}


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """A process for each of `ENDS`, side by side, each with a cluster of its own; and the file that it leaves."""
    path = WITH_ENGINEFSM
    started = {}
    for name, case in ENDS.items():
        done = tmp_path_factory.mktemp("ending") / "done"
        code = SCRIPT.format(here=str(TESTS), path=path, done=str(done), **case)
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started[name] = process, done
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.ray
@pytest.mark.parametrize("name", ENDS)
def test_neither_ray_s_shutdown_nor_the_process_s_end_is_harmed_by_a_hub_that_starts_or_hangs(name, ending):
    # Ray ends the process of a thread that calls it while it is shut down, with another exit code.
    process, done = ending[name]
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 3, output
    assert done.exists(), output


def test_the_hub_and_status_follow_a_launch_by_its_stages(place, tmp_path):
    monitor = place.monitor("staged")
    engines = [
        monitor.adopt(
            ray.remote(**{"num_cpus": 0, **options})(SlowToConstruct).remote(str(tmp_path)), name=f"e{number}"
        )
        for number, options in enumerate([{"resources": {"nowhere": 1}}, {}])
    ]
    calls = [engine.init.remote() for engine in engines]

    def wait_for(*stages):
        def told():
            fleet = read_fleet(namespace=place.name)
            return fleet and [one["stage"] for run in fleet["runs"] for one in run["engines"]] == [*stages] and fleet

        return wait_until(told, what=str(stages))

    before = wait_for("waiting for resources", "constructing")
    assert any(re.match(r" +e0 +launching .* waiting for resources", line) for line in lines(before))
    (tmp_path / "constructor_gate").touch()
    after = wait_for("waiting for resources", "init running")
    assert list(changes(before, after)) == ["staged  e1: launching (init running)"]
    (tmp_path / "gate").touch()
    monitor.get(calls[1])
    wait_for("waiting for resources", None)
    for engine in engines:
        ray.kill(engine.handle)


def test_the_hub_tells_of_earlier_incarnations(place, tmp_path):
    monitor = place.monitor("replaced")
    first, _ = launch(monitor, tmp_path, ready=False)
    kill(first.handle)
    with pytest.raises(ActorDiedError):
        monitor.get(first.init.remote())
    (tmp_path / "again").mkdir()
    second, _ = launch(monitor, tmp_path / "again", ready=False)
    assert monitor.flush(timeout_s=30)
    (engine,) = place.json()["runs"][0]["engines"]
    assert engine["incarnation"] == 2
    (past,) = engine["past"]
    dead_s = past.pop("dead_s")
    assert past == {
        "incarnation": 1, "actor_id": managed(first).actor_id, "reason": "actor_died",
        "adopted_s": pytest.approx(dead_s, abs=60), "ready_s": None,
    }  # fmt: skip
    ray.kill(second.handle)


def test_scrapes_and_reports_do_not_wait_for_one_another(place):
    monitor = place.monitor()
    engines = [adopt(monitor, f"default/regular/{number}", node=f"n{number}") for number in range(1000)]
    assert monitor.flush(timeout_s=60)
    url = place.url()
    over = threading.Event()
    texts = []

    def keep_scraping():
        while not over.is_set():
            with urllib.request.urlopen(f"{url}/metrics") as answer:
                texts.append(answer.read())

    scraper = threading.Thread(target=keep_scraping)
    scraper.start()
    try:
        for engine in engines[:50]:
            move(monitor, engine, Reason.INIT_SUCCEEDED)
            assert monitor.flush(timeout_s=30)
    finally:
        over.set()
        scraper.join()
    assert len(texts) > 5
    for text in (texts[0], texts[len(texts) // 2], texts[-1]):
        assert text.count(b"\nenginefsm_engine_info{") == 1000
        assert text.endswith(b"\n")


def test_after_ray_s_shutdown_the_process_s_monitor_begins_anew(clusters, tmp_path, monkeypatch):
    path = WITH_ENGINEFSM
    monkeypatch.setenv("ENGINEFSM_EXPORT", "hub")
    monkeypatch.setenv("ENGINEFSM_HUB_FILE_SD", str(tmp_path / "sd.json"))
    enginefsm.configure(run="twice")
    try:
        for _ in range(2):
            clusters.use(PYTHONPATH=path)
            engine = enginefsm.adopt(bare_handle(), name="one")
            assert engine.fsm.incarnation == 1
            assert enginefsm.default_monitor().flush(timeout_s=30)
            (run,) = read_fleet()["runs"]
            assert (run["run"], len(run["engines"])) == ("twice", 1)
            clusters.close()
            assert enginefsm.default_monitor().closed
    finally:
        enginefsm.configure(export=())

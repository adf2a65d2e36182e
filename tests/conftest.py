"""Real Ray clusters on loopback, one for each kind of setting, and engines on them under a monitor that is watched."""

from __future__ import annotations

import os

# As enginefsm.runtime_env() sets them. Ray reads them when it is imported.
os.environ.update(RAY_grpc_client_keepalive_time_ms="10000", RAY_grpc_client_keepalive_timeout_ms="10000")

import contextlib
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
import ray
from support.clusters import local_ray
from support.engines import Engine, held_within, wait_until
from support.ways import GET

import enginefsm
from enginefsm.rehearsal import chaos

# How long an example takes says nothing where a machine has other things to do.
hypothesis.settings.register_profile(
    "busy", hypothesis.settings.default, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")

RAY_TELLS_WITHIN_S = 5.0  # of a connection that broke: a second, and a busy machine's time

# A shell ignores Ctrl-C for what it starts in the background, this run and all that it starts among them.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Each of these fixtures starts Ray or real servers. A test that starts them itself has the mark written at it.
FIXTURES_OF_RAY = {"clusters", "real", "router", "start", "two_nodes"}


def pytest_collection_modifyitems(items):
    for item in items:
        if FIXTURES_OF_RAY.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ray)


class Clusters:
    """At most one cluster at a time, kept while tests ask for the same settings."""

    def __init__(self):
        self.settings = None
        self.stack = contextlib.ExitStack()

    def use(self, **settings):
        if settings != self.settings or not ray.is_initialized():
            self.stack.close()
            self.stack.enter_context(local_ray(**settings))
            self.settings = settings

    def close(self):
        self.stack.close()
        self.settings = None


@pytest.fixture(scope="session")
def clusters():
    kept = Clusters()
    yield kept
    kept.close()


@pytest.fixture(scope="module")
def nothing_else_below_this_process(clusters):
    """For tests that look at all processes that they have started: none is a cluster's."""
    clusters.close()


@pytest.fixture
def cluster(clusters):
    """Ray as it comes."""
    clusters.use()


class Fleet:
    """Engines of a test, and what their monitor told."""

    def __init__(self, directory, policy):
        self.directory = directory
        self.events = []
        self.came = threading.Condition()
        self.monitor = enginefsm.EngineMonitor(run="test", policy=policy, listeners=[self.listen])
        self.threads = ThreadPoolExecutor()
        self.actors = []
        self.engine_class = Engine

    def listen(self, event):
        with self.came:
            self.events.append(event)
            self.came.notify_all()

    def launch(self, cls=None, name=None, adopt=None, **options):
        return self._adopt(*self._start(cls, **options), name, **(adopt or {}))

    def launch_begun(self, *classes):
        """An engine of each class, adopted when the constructors of all have begun: their deadlines run from there."""
        started = [self._start(cls) for cls in classes]
        for _, directory in started:
            wait_until((directory / "pid").exists, what="the actor's start")
        return [self._adopt(actor, directory) for actor, directory in started]

    def _start(self, cls=None, **options):
        directory = self.directory / f"{len(self.actors)}"
        directory.mkdir()
        cls = enginefsm.monitored(cls or self.engine_class)
        self.actors.append(ray.remote(**{"num_cpus": 0, **options})(cls).remote(str(directory)))
        return self.actors[-1], directory

    def _adopt(self, actor, directory, name=None, **options):
        name = name or f"engine-{self.actors.index(actor)}"
        return Rig(self.monitor.adopt(actor, name=name, model="tiny", worker_type="regular", **options), directory)

    def in_background(self, calls, timeout=None):
        return self.threads.submit(self.monitor.get, calls, timeout=timeout)

    def steps(self, engine):
        """(from, to, reason) of each transition of one incarnation."""
        return [
            (step.from_state, step.to_state, step.reason)
            for step in self.events
            if isinstance(step, enginefsm.Transition)
            and (step.engine, step.incarnation) == (engine.fsm.name, engine.fsm.incarnation)
        ]

    def outcomes(self, engine):
        return [e for e in self.events if isinstance(e, enginefsm.CallOutcome) and e.engine == engine.fsm.name]

    def wait_for(self, condition, timeout_s=60.0):
        with self.came:
            assert self.came.wait_for(condition, timeout_s), f"not in {timeout_s} s; steps: {self.events}"

    def wait_for_state(self, engine, state, times=1):
        self.wait_for(lambda: sum(to is state for _, to, _ in self.steps(engine)) >= times)

    def wait_for_attempts(self, engine, attempts):
        """Until so many submissions, the first one included, have had their outcome."""
        self.wait_for(lambda: len(self.outcomes(engine)) >= attempts)

    def metric(self, name, **labels):
        return self.monitor.metrics.registry.get_sample_value(name, {"run": "test", **labels})

    def close(self):
        for actor in self.actors:
            ray.kill(actor)
        self.threads.shutdown(wait=True, cancel_futures=True)


class Rig:
    """One engine, and the files by which it is driven."""

    def __init__(self, engine, directory):
        self.engine = engine
        self.directory = directory

    @property
    def pid(self):
        return int(wait_until(lambda: self.read("pid"), what="the actor's start"))

    def read(self, name):
        path = self.directory / name
        return path.read_text() if path.exists() else ""

    def wait_for(self, name):
        wait_until((self.directory / name).exists, what=name)

    def open(self, name="gate"):
        (self.directory / name).touch()

    def times_init_began(self):
        return len(self.read("begun").splitlines())

    def cut(self):
        """Break the connection between the actor and this process; there must be one."""
        return wait_until(lambda: chaos.cut(self.pid), what="a connection to cut")

    def cut_until(self, noticed):
        """Break the connection, and again if need be, until that is noticed.

        For a call that may not be on the connection yet: it would be sent over the next one, and nothing be lost.
        """
        wait_until(lambda: self.cut() and held_within(RAY_TELLS_WITHIN_S, noticed), what="the notice of a cut")


@pytest.fixture
def policy():
    """Pauses short enough for tests, a budget long enough for any of them."""
    return enginefsm.RetryPolicy(budget_s=60, cap_s=2)


@pytest.fixture(autouse=True)
def process_monitor_of_its_own(monkeypatch):
    """What a test that failed has left to the process's monitor fails no other."""
    monkeypatch.setattr(enginefsm, "_monitor", None)


@pytest.fixture
def patience(monkeypatch):
    """Exporters and listeners are given as long as a busy machine takes, for tests of anything but that bound."""
    monkeypatch.setattr("enginefsm.monitor.FLUSH_S", 60.0)


@pytest.fixture
def make_fleet(tmp_path, policy):
    """For a test that has chosen its cluster: `make_fleet()` gives its fleet."""
    made = []

    def make(policy=policy):
        made.append(Fleet(tmp_path, policy))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()


@pytest.fixture
def way(request):
    """How the fleet waits for its engines; `support.ways.also` gives others."""
    return getattr(request, "param", GET)


@pytest.fixture
def fleet(cluster, make_fleet, way):
    """Engines on Ray as it comes."""
    fleet = make_fleet()
    with way.used_by(fleet):
        yield fleet

"""Real Ray clusters on loopback, one for each kind of setting, and engines on them under a monitor that is watched."""

from __future__ import annotations

import contextlib
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from clusters import local_ray
from engines import Engine, wait_until

import enginefsm
from enginefsm import chaos

# A shell ignores Ctrl-C for what it starts in the background, this run and all that it starts among them.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
        self.monitor = enginefsm.EngineMonitor("test", policy, listeners=[self.listen])
        self.threads = ThreadPoolExecutor()
        self.launched = []

    def listen(self, event):
        with self.came:
            self.events.append(event)
            self.came.notify_all()

    def launch(self, cls=Engine, name=None, adopt=None, **options):
        name = name or f"engine-{len(self.launched)}"
        directory = self.directory / f"{len(self.launched)}"
        directory.mkdir()
        actor = ray.remote(**{"num_cpus": 0, **options})(cls).remote(str(directory))
        engine = self.monitor.adopt(actor, name=name, model="tiny", worker_type="regular", **(adopt or {}))
        self.launched.append(engine)
        return Rig(engine, directory)

    def in_background(self, calls, timeout=None):
        return self.threads.submit(self.monitor.get, calls, timeout)

    def steps(self, engine):
        """(from, to, reason) of each transition of one incarnation."""
        return [
            (step.from_state, step.to_state, step.reason)
            for step in self.events
            if isinstance(step, enginefsm.Transition)
            and (step.engine, step.incarnation) == (engine.name, engine.incarnation)
        ]

    def outcomes(self, engine):
        return [e for e in self.events if isinstance(e, enginefsm.CallOutcome) and e.engine == engine.name]

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
        for engine in self.launched:
            ray.kill(engine.handle)
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


@pytest.fixture
def policy():
    """Pauses short enough for tests, a budget long enough for any of them."""
    return enginefsm.RetryPolicy(budget_s=60, cap_s=2)


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
def fleet(cluster, make_fleet):
    """Engines on Ray as it comes."""
    return make_fleet()

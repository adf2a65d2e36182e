"""A fleet without Ray: real records of engines, driven by hand, behind the real metrics, served over real HTTP."""

from __future__ import annotations

import contextlib
import json
import time

from enginefsm.events import CallOutcome
from enginefsm.metrics import FleetMetrics
from enginefsm.outcomes import Outcome
from enginefsm.states import EngineRecord, EngineState, Reason


class StandIn:
    """What the metrics read of an engine."""

    def __init__(self, name, labels, incarnation, launched_s_ago):
        self.record = EngineRecord(
            name, labels, incarnation, time.monotonic() - launched_s_ago, time.time() - launched_s_ago
        )
        self.actor_id = f"{name}-{incarnation}"

    name = property(lambda self: self.record.name)
    labels = property(lambda self: self.record.labels)
    state = property(lambda self: EngineState(self.record.state))
    state_since = property(lambda self: self.record.since_epoch_s)
    reason = property(lambda self: self.record.reason)
    incarnation = property(lambda self: self.record.incarnation)
    ever_ready = property(lambda self: self.record.ever_ready)


class StandInFleet:
    """Engines of one run. What happens to them happens `s_ago`: the tests need not wait for time to pass."""

    def __init__(self, run):
        self.run = run
        self.engines = {}
        self.held = {}
        self.metrics = FleetMetrics(run, lambda: list(self.engines.values()), lambda: self.held)

    def launch(self, name, *, s_ago=0.0, incarnation=1, model="tiny", worker_type="regular", **labels):
        labels = {"model": model, "worker_type": worker_type, **labels}
        engine = StandIn(name, labels, incarnation, s_ago)
        self.engines[name] = engine
        self.metrics(engine.record.first_step())
        self.metrics.expect_calls(labels, "init")

    def step(self, name, reason, *, s_ago=0.0):
        step = self.engines[name].record.move(reason, time.monotonic() - s_ago, time.time() - s_ago)
        assert step is not None, f"{reason} does not move {name} from {self.engines[name].state}"
        self.metrics(step)

    def answer(self, name, outcome, *, attempt=0, probe=False, took_s=1.0, method="init"):
        labels = self.engines[name].labels
        self.metrics(CallOutcome(name, labels, method, outcome, attempt, took_s, probe, 1, time.time()))

    def release(self, name):
        self.step(name, Reason.RELEASED)
        del self.engines[name]

    def bring_up(self, name, *, took_s, **labels):
        """An engine that launches without a fault."""
        self.launch(name, s_ago=took_s, **labels)
        self.step(name, Reason.INIT_SUCCEEDED)
        self.answer(name, Outcome.SUCCEEDED, took_s=took_s)

    @contextlib.contextmanager
    def served(self, directory):
        """Serve the metrics, and say where in a file_sd entry in `directory`; they end when the context does."""
        server = self.metrics.serve(0, "127.0.0.1")
        entry = directory / f"{self.run}.json"
        entry.write_text(json.dumps([{"targets": [f"127.0.0.1:{server.port}"], "labels": {}}]))
        try:
            yield
        finally:
            server.close()


def every_metric():
    """The families of metrics that a monitor may export, each with a sample, by name."""
    fleet = StandInFleet("run")
    fleet.metrics.expect_exporter("hub")
    fleet.launch("e0", s_ago=9, node="n1")
    fleet.step("e0", Reason.ACTOR_UNAVAILABLE, s_ago=8)
    fleet.answer("e0", Outcome.ACTOR_UNAVAILABLE)
    fleet.answer("e0", Outcome.ACTOR_UNAVAILABLE, attempt=1, probe=True)
    fleet.step("e0", Reason.RETRY_EXHAUSTED)
    fleet.metrics.expect_checks({})
    return {family.name: family for family in fleet.metrics.registry.collect()}

"""A fleet without engines: real records of them, driven by hand, behind the real metrics and the real exporters."""

from __future__ import annotations

import contextlib
import json
import time

from enginefsm._engine.launch_stages import LaunchStages
from enginefsm._engine.managed import EngineSnapshot
from enginefsm.events import CallOutcome, HealthChecked, WatchBegan
from enginefsm.export import Exports
from enginefsm.fsm.outcomes import Outcome
from enginefsm.fsm.states import EngineRecord, EngineState, Reason
from enginefsm.metrics.collector import FleetMetrics
from support.bare_handles import bare_handle


class StandIn:
    """What metrics and exporters ask of an engine."""

    stage = None  # Ray is not asked: there is no actor

    def __init__(self, name, labels, incarnation, launched_s_ago, out_s_ago):
        self.handle = bare_handle()
        out_since = None if out_s_ago is None else time.monotonic() - out_s_ago
        self.record = EngineRecord(
            name, labels, incarnation, time.monotonic() - launched_s_ago, time.time() - launched_s_ago, out_since
        )

    def snapshot(self):
        one = self.record
        return EngineSnapshot(
            one.name, one.labels, one.incarnation, f"{one.name}-{one.incarnation}", EngineState(one.state), one.reason,
            one.since_epoch_s, dict(one.spent), one.ever_ready, stage=None, past=(),
        )  # fmt: skip


class StandInFleet:
    """Engines of one run. What happens to them happens `s_ago`: the tests need not wait for time to pass."""

    def __init__(self, run, exporters=()):
        self.run = run
        self.held = {}
        self._engines = {}
        self.metrics = FleetMetrics(run, self.engines, lambda: self.held)
        self._exports = Exports(exporters, self)

    @property
    def stages(self):
        return LaunchStages(list)

    def engines(self):
        return list(self._engines.values())

    def engine(self, name):
        return self._engines.get(name)

    def _tell(self, event):
        for listener in (self.metrics, *self._exports.outboxes):
            listener(event)

    def flush(self):
        assert self._exports.flush(60)

    def launch(self, name, *, s_ago=0.0, incarnation=1, out_s_ago=None, model="tiny", worker_type="regular", **labels):
        """An engine, to replace one that died `out_s_ago` if that is given."""
        labels = {"model": model, "worker_type": worker_type, **labels}
        engine = StandIn(name, labels, incarnation, s_ago, out_s_ago)
        self._engines[name] = engine
        self._tell(engine.record.first_step())
        self.metrics.expect_calls(labels, "init")

    def step(self, name, reason, *, s_ago=0.0):
        record = self._engines[name].record
        step = record.move(reason, time.monotonic() - s_ago, time.time() - s_ago)
        assert step is not None, f"{reason} does not move {name} from {record.state}"
        self._tell(step)

    def answer(self, name, outcome, *, attempt=0, probe=False, took_s=1.0, method="init"):
        labels = self._engines[name].record.labels
        self._tell(CallOutcome(name, labels, method, outcome, attempt, took_s, probe, 1, time.time()))

    def watch(self, name):
        self._tell(WatchBegan(name, self._engines[name].record.labels, 1, time.time()))

    def check(self, name, finding, server):
        labels = self._engines[name].record.labels
        self._tell(HealthChecked(name, labels, 1, finding, server, None, None, time.time()))

    def release(self, name):
        self.step(name, Reason.RELEASED)
        del self._engines[name]

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
    fleet.watch("e0")
    return {family.name: family for family in fleet.metrics.registry.collect()}

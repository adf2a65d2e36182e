"""A bringup with known faults, in a manager that is a Ray actor and exports to the hub, as managers do by default."""

from __future__ import annotations

from enginefsm.export import Hub, hub
from enginefsm.fsm.outcomes import Outcome
from enginefsm.fsm.states import Reason
from enginefsm.fsm.verdicts import Decision, Finding, ServerAnswer
from support.standin_fleet import StandInFleet


def launch_with_faults(glm):
    """Every engine, at its beginning; one is out of reach already."""
    for number in range(8):
        glm.launch(f"e{number}", s_ago=200, node="n1" if number < 4 else "n2")
    for name in ("p0", "d0", "d1"):
        glm.launch(name, s_ago=200, worker_type={"p": "prefill", "d": "decode"}[name[0]], node="n3")
    glm.launch("gone", s_ago=200, out_s_ago=260, node="n3")
    glm.watch("e0")
    glm.step("e5", Reason.ACTOR_UNAVAILABLE, s_ago=150)
    glm.answer("e5", Outcome.ACTOR_UNAVAILABLE)
    glm.answer("e5", Outcome.ACTOR_UNAVAILABLE, attempt=1, probe=True, took_s=0.4)


def let_faults_happen(glm):
    """Launches of 10, 10 and 50 s; an outage of 12 s in a launch of 100 s; every other way for an engine to end.

    One was ready 160 s after the death of the one before it.
    """
    for name, took_s in (("e0", 10), ("e1", 10), ("e2", 50)):
        glm.step(name, Reason.INIT_SUCCEEDED, s_ago=200 - took_s)
        glm.answer(name, Outcome.SUCCEEDED)
    glm.step("e3", Reason.ACTOR_UNAVAILABLE, s_ago=112)
    glm.answer("e3", Outcome.ACTOR_UNAVAILABLE)
    glm.step("e3", Reason.RECOVERED, s_ago=100)
    glm.answer("e3", Outcome.SUCCEEDED, attempt=1)
    # e4 launches on.
    glm.step("e5", Reason.RETRY_EXHAUSTED, s_ago=30)
    glm.step("e6", Reason.ACTOR_DIED, s_ago=20)
    glm.answer("e6", Outcome.ACTOR_DIED)
    glm.step("e7", Reason.ACTOR_UNAVAILABLE, s_ago=45)
    glm.answer("e7", Outcome.ACTOR_UNAVAILABLE)
    glm.step("p0", Reason.OUT_OF_MEMORY, s_ago=20)
    glm.step("d0", Reason.CONSTRUCTOR_FAILED, s_ago=20)
    glm.step("d1", Reason.INIT_FAILED, s_ago=20)
    glm.metrics.exporter_failed("hub")
    glm.metrics.exporter_failed("hub")
    for check, server, times in (("answered", "serves", 5), ("silent", "serves", 3), ("answered", "fails", 2)):
        for _ in range(times):
            glm.check("e0", Finding(check), ServerAnswer(server))
    glm.held = {Decision.KILL_CAP: 2}
    for _ in range(3):
        glm.metrics.event_dropped("hub")
    glm.step("gone", Reason.INIT_SUCCEEDED, s_ago=100)
    glm.answer("gone", Outcome.SUCCEEDED)
    glm.release("gone")


class Manager:
    """Two runs: `glm`, with faults, and `qwen`, that is up before its first scrape."""

    def __init__(self):
        hub.SEND_TIMEOUT_S = 30.0  # a machine that is busy is not to add a failure of its own
        self.glm, self.qwen = StandInFleet("glm", [Hub()]), StandInFleet("qwen", [Hub()])

    def launch(self):
        launch_with_faults(self.glm)
        for name in ("q0", "q1"):
            self.qwen.bring_up(name, took_s=4, node="n9")
        self._flush()

    def fail(self):
        let_faults_happen(self.glm)
        self._flush()

    def _flush(self):
        for fleet in (self.glm, self.qwen):
            fleet.flush()

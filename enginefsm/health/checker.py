"""The checks of a health monitor: what is asked of an actor, and what is made of what it says, or does not say."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import time
from collections.abc import Callable, Sequence

import ray

from enginefsm._engine.managed import ManagedEngine
from enginefsm.fsm.outcomes import FATAL, Outcome
from enginefsm.fsm.states import GIVEN_UP, EngineState, Reason
from enginefsm.fsm.verdicts import Check, Decision, FailureCount, ServerAnswer, VerdictLimits
from enginefsm.health.plain_calls import Method, PlainCall
from enginefsm.health.target import Phase, Phases, Probe, Watched
from enginefsm.metrics.collector import FleetMetrics
from enginefsm.policy import RetryPolicy, check_seconds, check_whole

logger = logging.getLogger("enginefsm")

STALLED_S = 1.0
"""A timer that is so late tells that this process was stopped; silence meanwhile says nothing of engines. Nor does it
for so long afterwards: what came meanwhile is heard then."""
TICK_S = 0.5
"""How often it is looked whether this process was stopped."""
EARLIEST = 0.8
"""The next probe comes after this share of the interval at the earliest, and after the whole of it at the latest."""
BEAT_S = 0.5
"""Probes that are due within so long, or a fifth of a shorter interval, are sent together: each wakes several of Ray's
threads, and to wake them costs more than what they then do."""
AT_ONCE = 0.0
"""When to look again, if at once."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How engines are watched; see `EngineMonitor.watch`. Raises ValueError naming the one that makes no sense."""

    probe: str
    interval_s: float
    timeout_s: float
    failure_threshold: int
    first_wait_s: float
    url: str | None

    def __post_init__(self) -> None:
        check_seconds("watch(): interval_s", self.interval_s, above=0)
        check_seconds("watch(): timeout_s", self.timeout_s, above=0)
        check_seconds("watch(): first_wait_s", self.first_wait_s)
        check_whole("watch(): failure_threshold", self.failure_threshold, least=1)


@dataclasses.dataclass(frozen=True, slots=True)
class Fleet:
    """What a watch uses of the monitor that made it."""

    engine: Callable[[str], ManagedEngine | None]
    """The newest engine of a name."""
    policy: RetryPolicy
    metrics: FleetMetrics
    limits: VerdictLimits
    deliver: Callable[[float], object]
    """Tells listeners; called when engines may have moved. Waits so many seconds for another thread that is at it."""


class Checks:
    """Checks the actors that one health monitor watches, on its event loop.

    Args:
        fleet, settings: What is used of the monitor, and how engines are watched.
        all_watched: The actors.
        phases: Whether checks go on.
        in_loop: Runs a function on the event loop; any thread may call it.
        ends: Given an actor and the engine whose end is its verdict, under the lock of `phases`.
    """

    def __init__(
        self,
        fleet: Fleet,
        settings: Settings,
        all_watched: Sequence[Watched],
        phases: Phases,
        in_loop: Callable[[Callable[[], object]], None],
        ends: Callable[[Watched, ManagedEngine], None],
    ) -> None:
        self._fleet = fleet
        self._limits = fleet.limits
        self._settings = settings
        self._watched = all_watched
        self._phases = phases
        self._in_loop = in_loop
        self._ends = ends
        self._ran_at = time.monotonic()  # when this process was seen to run last

    async def begin(self, watched: Watched, phase: Phase) -> float:
        """After a start, a pause or a resume: give when the first check is due. Everything is counted anew."""
        self._limits.clear(watched.group)
        watched.failures, watched.attempts = FailureCount(), 0
        if watched.group.opinion is not None:
            watched.group.opinion.forget()
        if phase.at is None:
            self._limits.update(watched, living=False)
            while self._phases.is_current(phase):
                await watched.sleep_until(math.inf)
            return AT_ONCE
        self._current_engine(watched)
        first_at = self._on_the_beat(phase.at + random.uniform(0, self._settings.interval_s), earliest=phase.at)
        watched.overdue_at = first_at + self._settings.timeout_s
        watched.phase = phase
        return first_at

    async def check(self, watched: Watched, phase: Phase) -> float:
        """Ask an actor how it is, and take in what it says; give when to look at it again."""
        engine = self._current_engine(watched)
        if engine is None or not ray.is_initialized():  # to call an actor, Ray would start a cluster of its own
            if watched.engine.is_launching and ray.is_initialized():
                self._look_whether_it_lives(watched, watched.engine)
            self._report_if_dead(watched, phase)
            return time.monotonic() + self._pause_s()
        self._counts_anew(watched)
        probe = watched.probe or self._send(watched, engine, phase)
        if watched.opinion is not None:
            watched.opinion.ask()
        while not probe.answer.done() and time.monotonic() < watched.overdue_at and self._phases.is_current(phase):
            await watched.sleep_until(watched.overdue_at)
        if probe.answer.done():
            watched.probe = None
            return await self._judge(watched, engine, probe, phase)
        if self._phases.is_current(phase):
            self._silent(watched, engine, probe, phase)
        return AT_ONCE

    async def _judge(self, watched: Watched, engine: ManagedEngine, probe: Probe, phase: Phase) -> float:
        """Take in what a probe was answered; give when to look at the actor again."""
        outcome = probe.outcome()
        self._fleet.metrics.probed(engine.labels, outcome, time.monotonic() - probe.sent_at)
        if outcome in _NOT_WELL and not (probe.phase == phase and self._phases.is_current(phase)):
            return AT_ONCE  # an engine that was put to sleep, or was about to be, may well refuse
        next_at = max(time.monotonic(), self._on_the_beat(probe.sent_at + self._pause_s()))
        if outcome is Outcome.SUCCEEDED:
            await self._well(watched, engine, probe, phase, next_at)
        elif outcome is Outcome.METHOD_FAILED:
            self._refused(watched, engine, probe, phase)
        elif outcome is Outcome.ACTOR_UNAVAILABLE:
            return self._unavailable(watched, engine, probe, phase)
        else:
            engine.observe(outcome, launches=False, submitted_at=probe.sent_at)
            self._count(watched, Check.DEAD if engine.state is EngineState.DEAD else Check.LOST)
            self._update_limits(watched, engine, heard_at=time.monotonic())
            self._current_engine(watched)
            self._report_if_dead(watched, phase)
        return next_at

    def notice_stop(self) -> None:
        """Notice that this process was stopped, or kept from running: that nothing was heard is held against nobody."""
        now = time.monotonic()
        stopped_s, self._ran_at = now - self._ran_at, now
        if stopped_s >= TICK_S + STALLED_S:
            for watched in self._watched:
                watched.forgive_stop(stopped_s, now + STALLED_S)

    def deliver(self, patience_s: float = 0.0) -> None:
        """Tell listeners of what has moved; wait `patience_s` at most if another thread does so."""
        try:
            self._fleet.deliver(patience_s)
        except BaseException:  # a listener that exits would only end this thread
            logger.exception("a listener has ended the delivery of an event")

    def deliver_and_log(self) -> None:
        """Tell listeners of what has moved, and people of verdicts that are held."""
        self.deliver()
        for line in self._limits.messages():
            logger.warning("%s", line)

    def _current_engine(self, watched: Watched) -> ManagedEngine | None:
        """The engine that has the name now, if it is at work."""
        engine = self._fleet.engine(watched.name)
        if engine is not None and engine is not watched.engine:
            watched.take_over(engine)
            self._fleet.metrics.expect_checks(engine.labels)
            self._limits.clear(watched.group)
        if engine is None or engine is watched.reported or engine.is_launching or engine.state is EngineState.DEAD:
            self._limits.update(watched, living=False)
            return None
        self._update_limits(watched, engine)
        return engine

    def _look_whether_it_lives(self, watched: Watched, engine: ManagedEngine) -> None:
        """Notice the death of an actor whose launch nobody has seen succeed. Nothing else that it says moves it."""
        call = watched.sign_of_life
        if call is None:
            watched.sign_of_life = PlainCall(Method(engine, "__ray_ready__", self._settings.timeout_s))
        elif call.answer.done():
            watched.sign_of_life, outcome = None, call.outcome()
            if outcome in FATAL:
                engine.observe(outcome, launches=False, submitted_at=call.sent_at)

    def _update_limits(self, watched: Watched, engine: ManagedEngine, heard_at: float | None = None) -> None:
        state = engine.state
        self._limits.update(
            watched,
            living=state is not EngineState.DEAD,
            unavailable=state is EngineState.UNAVAILABLE,
            heard_at=heard_at,
        )

    def _send(self, watched: Watched, engine: ManagedEngine, phase: Phase) -> Probe:
        if watched.method is None or watched.method.engine is not engine:
            watched.method = Method(engine, self._settings.probe, self._settings.timeout_s)
        probe = watched.probe = Probe(watched.method, phase, lambda: self._in_loop(watched.wake))
        watched.overdue_at = probe.sent_at + self._settings.timeout_s
        return probe

    def _silent(self, watched: Watched, engine: ManagedEngine, probe: Probe, phase: Phase) -> None:
        """No answer, for the timeout or for one interval more."""
        self.notice_stop()
        now = time.monotonic()
        if now < watched.overdue_at or not ray.is_initialized():
            return
        watched.overdue_at = now + self._pause_s()
        says = watched.group.says
        if says is not ServerAnswer.FAILS and probe.is_behind_a_call():
            self._count(watched, Check.BUSY)
            self._update_limits(watched, engine, heard_at=now)
            return
        self._count(watched, Check.SILENT)
        probe.counted = says not in (ServerAnswer.SERVES, ServerAnswer.UNWELL)  # else its server's process lives
        engine.suspect(Reason.PROBE_TIMEOUT, probe.sent_at)
        watched.failures.add(Reason.PROBE_TIMEOUT, now, counts=probe.counted, told=says is ServerAnswer.FAILS)
        self._give_up_if_due(watched, engine, phase)

    def _refused(self, watched: Watched, engine: ManagedEngine, probe: Probe, phase: Phase) -> None:
        """The actor says that all is not well."""
        watched.attempts, now = 0, time.monotonic()
        self._count(watched, Check.FAILED)
        if probe.counted:
            watched.failures.confirm(Reason.PROBE_FAILED, now)  # for its silence; the answer is not a failure more
        else:
            engine.suspect(Reason.PROBE_FAILED, probe.sent_at)
            watched.failures.add(Reason.PROBE_FAILED, now, counts=True, told=True)
        self._give_up_if_due(watched, engine, phase)

    def _unavailable(self, watched: Watched, engine: ManagedEngine, probe: Probe, phase: Phase) -> float:
        """The connection to the actor broke. It is tried again by the policy; give when."""
        now, policy = time.monotonic(), self._fleet.policy
        self._count(watched, Check.UNAVAILABLE)
        engine.observe(Outcome.ACTOR_UNAVAILABLE, launches=False, submitted_at=probe.sent_at)
        watched.failures.add(Reason.ACTOR_UNAVAILABLE, now, counts=False)
        self._give_up_if_due(watched, engine, phase)
        watched.attempts += 1
        next_at = now + min(policy.pause_s(watched.attempts), self._settings.interval_s)
        ends_at = (watched.failures.since or now) + policy.budget_s
        return min(next_at, ends_at) if now < ends_at else next_at

    async def _well(self, watched: Watched, engine: ManagedEngine, probe: Probe, phase: Phase, next_at: float) -> None:
        """The actor says that all is well. What its server says counts for node 0, whose server it is."""
        opinion, is_current = watched.opinion, self._phases.is_current
        if opinion is None or not opinion.objects:
            self._recovered(watched, engine, probe)
            self.deliver_and_log()
        while opinion is not None and opinion.is_asking and time.monotonic() < next_at and is_current(phase):
            await watched.sleep_until(next_at)
        self._count(watched, Check.ANSWERED)
        if opinion is None or not is_current(phase):
            return
        if opinion.objects and not opinion.is_asking:
            engine.suspect(Reason.PROBE_FAILED, probe.sent_at)
            watched.failures.add(Reason.PROBE_FAILED, time.monotonic(), counts=True, told=True)
            self._give_up_if_due(watched, engine, phase)
        elif not opinion.objects:
            self._recovered(watched, engine, probe)
        else:  # its server failed, and has not answered since
            self._update_limits(watched, engine, heard_at=time.monotonic())

    def _recovered(self, watched: Watched, engine: ManagedEngine, probe: Probe) -> None:
        watched.failures, watched.attempts = FailureCount(), 0
        engine.observe(Outcome.SUCCEEDED, launches=False, submitted_at=probe.sent_at, probed=True)
        if all(member.failures.since is None for member in watched.group.members):
            self._limits.clear(watched.group)
        self._update_limits(watched, engine, heard_at=time.monotonic())

    def _give_up_if_due(self, watched: Watched, engine: ManagedEngine, phase: Phase) -> None:
        """A check has failed: give the engine up, if that is due and nothing holds it."""
        self.notice_stop()
        now = time.monotonic()
        self._update_limits(watched, engine, heard_at=now)
        if self._counts_anew(watched):
            return
        since = watched.failures.since
        is_due = watched.failures.is_due(self._settings.failure_threshold, self._fleet.policy.budget_s, now)
        if since is None or not is_due:
            return
        with self._phases.lock:  # there is no verdict once pause() has returned
            if not self._phases.is_current(phase) or engine.state is not EngineState.UNAVAILABLE:
                return
            if engine is watched.reported:  # it ended with another actor of its group
                return
            if self._limits.decide(watched.group, engine.name, since, now) is not Decision.GIVEN:
                return
            if engine.give_up(*self._end(watched, since, now)):
                self._update_limits(watched, engine)
                self._ends(watched, engine)

    def _end(self, watched: Watched, since: float, now: float) -> tuple[Reason, str]:
        """Return the reason for giving an actor up, and the same in words."""
        failures, server = watched.failures, watched.group.says
        last = f"the last failure: {failures.cause}, the server: {server}"
        if failures.counted:
            return Reason.HEALTH_CHECKS_FAILED, f"{failures.count} health checks in a row failed; {last}"
        return Reason.RETRY_EXHAUSTED, f"the outage has lasted {now - since:.1f} s; {last}"

    def _counts_anew(self, watched: Watched) -> bool:
        """Forget failures from before the end of a mass outage; say whether it did."""
        ended = self._limits.outages_ended
        if watched.outages_ended == ended:
            return False
        watched.outages_ended, watched.failures = ended, FailureCount()
        return True

    def _report_if_dead(self, watched: Watched, phase: Phase) -> None:
        """Tell of an engine that was found dead, by whomever."""
        engine = self._fleet.engine(watched.name)
        if engine is None or engine.state is not EngineState.DEAD or engine.reason is Reason.RELEASED:
            return
        with self._phases.lock:
            if engine is watched.reported or not self._phases.is_current(phase):
                return
            if engine.reason in GIVEN_UP:  # by who awaited its calls: its actor may live, and would be killed
                decision = self._limits.decide(watched.group, engine.name, -math.inf, time.monotonic())
                if decision is not Decision.GIVEN:
                    return
            self._ends(watched, engine)

    def _pause_s(self) -> float:
        return self._settings.interval_s * random.uniform(EARLIEST, 1.0)

    def _on_the_beat(self, at: float, earliest: float = 0.0) -> float:
        """The last beat at which probes are sent that is not after `at`."""
        beat_s = min(BEAT_S, self._settings.interval_s / 5)
        return max(earliest, at // beat_s * beat_s)

    def _count(self, watched: Watched, check: Check) -> None:
        self._fleet.metrics.checked(watched.engine.labels, check, watched.group.says)


_NOT_WELL = (Outcome.METHOD_FAILED, Outcome.ACTOR_UNAVAILABLE)

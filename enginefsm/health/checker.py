"""One health check, from the probe to the verdict: `Checker.check` probes, waits, and asks the pure rules.

`enginefsm.fsm.verdicts` holds the rules. Read `Checker.check` first, then that module.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from enginefsm._engine.managed import ManagedEngine
from enginefsm.events import Event, HealthChecked, WatchBegan
from enginefsm.fsm.outcomes import FATAL, Outcome
from enginefsm.fsm.states import GIVEN_UP, EngineState, Reason
from enginefsm.fsm.verdicts import (
    HELD,
    Decision,
    Failures,
    Finding,
    HealthCheck,
    ServerAnswer,
    VerdictHeld,
    VerdictLimits,
    finding_of,
)
from enginefsm.health.plain_calls import Method, PlainCall
from enginefsm.health.target import Phase, Phases, Probe, Target
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
class WatchContext:
    """What a watch uses of the monitor that made it."""

    engine: Callable[[str], ManagedEngine | None]
    """Returns the newest engine of a name."""
    policy: RetryPolicy
    limits: VerdictLimits
    emit: Callable[[Event], object]
    """Queues an event for listeners."""
    deliver: Callable[[float], object]
    """Tells listeners. Waits so many seconds if another thread does so."""
    deliver_aside: Callable[[], object]
    """Has another thread tell listeners."""
    callback_failed: Callable[[Any], object]
    """Counts a callback that raised."""


def watch_began(engine: ManagedEngine) -> WatchBegan:
    """Return the event that says that a watch begins to check an engine."""
    return WatchBegan(engine.name, engine.labels, engine.incarnation, time.time())


class Checker:
    """Checks the actors of one watch, on the event loop of that watch.

    Args:
        context, settings: What the checker uses of the monitor, and how the watch checks.
        targets: The actors.
        phases: Whether checks go on.
        in_loop: Runs a function on the event loop; any thread may call it.
        ends: Called with an actor and its engine when the verdict is given, under the lock of `phases`.
    """

    def __init__(
        self,
        context: WatchContext,
        settings: Settings,
        targets: Sequence[Target],
        phases: Phases,
        in_loop: Callable[[Callable[[], object]], None],
        ends: Callable[[Target, ManagedEngine], None],
    ) -> None:
        self._context = context
        self._limits = context.limits
        self._settings = settings
        self._targets = targets
        self._phases = phases
        self._in_loop = in_loop
        self._ends = ends
        self._ran_at = time.monotonic()  # when this process was last seen to run

    async def begin(self, target: Target, phase: Phase) -> float:
        """Count anew after a start, a pause or a resume, and return when the first check is due."""
        self._limits.clear(target.group)
        target.failures = Failures()
        if target.group.server_check is not None:
            target.group.server_check.forget()
        if phase.at is None:
            self._limits.update(target, living=False)
            while self._phases.is_current(phase):
                await target.sleep_until(math.inf)
            return AT_ONCE
        self._engine_at_work(target)
        first_at = self._on_the_beat(phase.at + random.uniform(0, self._settings.interval_s), earliest=phase.at)
        target.overdue_at = first_at + self._settings.timeout_s
        target.phase = phase
        return first_at

    async def check(self, target: Target, phase: Phase) -> float:
        """Check one actor, follow what the check saw to its verdict, and return when the next check is due."""
        engine = self._engine_at_work(target)
        if engine is None or not ray.is_initialized():  # to call an actor, Ray would start a cluster of its own
            self._look_for_a_death(target, phase)
            return time.monotonic() + self._pause_s()
        self._count_anew_after_outage(target)
        probe, server = target.probe or self._send(target, engine, phase), target.server_check
        if server is not None:
            server.ask()
        while not probe.answer.done() and time.monotonic() < target.overdue_at and self._phases.is_current(phase):
            await target.sleep_until(target.overdue_at)
        finding = self._finding(target, probe, phase)
        if finding is None:
            return AT_ONCE
        answered_at = time.monotonic()
        next_at = max(answered_at, self._on_the_beat(probe.sent_at + self._pause_s()))
        if finding is Finding.ANSWERED and server is not None:
            if not server.objects:  # the recovery does not wait for the server
                self._take_in(target, engine, probe, HealthCheck(finding))
                self.deliver_and_log()
            while server.is_asking and time.monotonic() < next_at and self._phases.is_current(phase):
                await target.sleep_until(next_at)
        self._tell(target, engine, probe, finding, answered_at)
        if finding is Finding.ANSWERED and server is not None and not self._phases.is_current(phase):
            return AT_ONCE
        check = self._seen(target, probe, finding)
        if finding is Finding.SILENT:
            probe.silence_counted = check.failure is not None and check.failure.counts
        self._take_in(target, engine, probe, check)
        self._decide(target, engine, phase)
        if finding in (Finding.SILENT, Finding.BUSY):
            return AT_ONCE  # the same probe is waited for
        return self._retry_at(target) if finding is Finding.UNAVAILABLE else next_at

    def _finding(self, target: Target, probe: Probe, phase: Phase) -> Finding | None:
        """Return what the check found about the actor; None if nothing was found that counts."""
        is_current = self._phases.is_current(phase)
        if probe.answer.done():
            target.probe = None
            finding = finding_of(probe.outcome())
            if finding in (Finding.FAILED, Finding.UNAVAILABLE) and not (probe.phase == phase and is_current):
                return None  # an engine that was put to sleep, or was about to be, may refuse
            return finding
        self.notice_stop()
        now = time.monotonic()
        if not is_current or now < target.overdue_at or not ray.is_initialized():
            return None
        target.overdue_at = now + self._pause_s()
        is_busy = target.group.says is not ServerAnswer.FAILS and probe.is_behind_a_call()
        return Finding.BUSY if is_busy else Finding.SILENT

    def _seen(self, target: Target, probe: Probe, finding: Finding) -> HealthCheck:
        """Return what the check saw. If the actor answers, the server counts for node 0 alone, whose server it is."""
        server = target.server_check if finding is Finding.ANSWERED else target.group.server_check
        if server is None:
            return HealthCheck(finding, silence_counted=probe.silence_counted)
        return HealthCheck(finding, server.said, server.is_asking, probe.silence_counted)

    def _tell(self, target: Target, engine: ManagedEngine, probe: Probe, finding: Finding, at: float) -> None:
        has_answer = finding not in (Finding.SILENT, Finding.BUSY)
        self._context.emit(
            HealthChecked(
                engine.name, engine.labels, engine.incarnation, finding, target.group.says,
                probe.outcome() if has_answer else None, at - probe.sent_at if has_answer else None, time.time(),
            )
        )  # fmt: skip

    def _take_in(self, target: Target, engine: ManagedEngine, probe: Probe, check: HealthCheck) -> None:
        """Move the engine and count failures after one check."""
        now = time.monotonic()
        if check.is_well:
            engine.observe(Outcome.SUCCEEDED, launches=False, submitted_at=probe.sent_at, probed=True)
        elif check.finding in (Finding.UNAVAILABLE, Finding.DEAD, Finding.LOST):
            engine.observe(probe.outcome(), launches=False, submitted_at=probe.sent_at)
        elif check.failure is not None:
            engine.suspect(check.failure.cause, probe.sent_at)
        target.failures = target.failures.after(check, now)
        if check.is_well and all(member.failures.since is None for member in target.group.members):
            self._limits.clear(target.group)
        if check.failure is not None:
            self.notice_stop()
        self._update_limits(target, engine, heard_at=now)

    def _decide(self, target: Target, engine: ManagedEngine, phase: Phase) -> None:
        """Give the verdict on an actor if it died, or if its failures are due and nothing holds the verdict."""
        self._count_anew_after_outage(target)
        now, failures = time.monotonic(), target.failures
        with self._phases.lock:  # once pause() has returned, no verdict is given
            if engine is target.reported or not self._phases.is_current(phase):
                return  # another actor of its group has ended the engine, or the watch was paused
            if engine.state is EngineState.DEAD:
                is_newest = self._context.engine(target.name) is engine
                # The process of an engine that was given up may live, so that the verdict may be held.
                ends = (
                    is_newest
                    and engine.reason is not Reason.RELEASED
                    and (engine.reason not in GIVEN_UP or self._is_given(target, engine, -math.inf, now))
                )
            else:
                is_due = failures.is_due(self._settings.failure_threshold, self._context.policy.budget_s, now)
                ends = (
                    is_due and failures.since is not None and engine.state is EngineState.UNAVAILABLE
                    and self._is_given(target, engine, failures.since, now)
                    and engine.give_up(*self._end(target, failures.since, now))
                )  # fmt: skip
            if ends:
                self._limits.update(target, living=False)
                self._ends(target, engine)

    def _is_given(self, target: Target, engine: ManagedEngine, since: float, now: float) -> bool:
        """Return whether nothing holds the verdict on an engine whose trouble began at `since`."""
        held = self._limits.why_held(target.group)
        decision = self._limits.decide(target.group, engine.name, since, now)
        if decision in HELD and decision is not held:
            self._context.emit(VerdictHeld(engine.name, engine.labels, engine.incarnation, decision, time.time()))
        return decision is Decision.GIVEN

    def _end(self, target: Target, since: float, now: float) -> tuple[Reason, str]:
        """Return the reason for giving an actor up, and the same in words."""
        failures = target.failures
        last = f"the last failure: {failures.cause}, the server: {target.group.says}"
        if failures.counted:
            return Reason.HEALTH_CHECKS_FAILED, f"{failures.count} health checks in a row failed; {last}"
        return Reason.RETRY_EXHAUSTED, f"the outage has lasted {now - since:.1f} s; {last}"

    def notice_stop(self) -> None:
        """Forgive silence and broken connections if this process was stopped or kept from running."""
        now = time.monotonic()
        stopped_s, self._ran_at = now - self._ran_at, now
        if stopped_s >= TICK_S + STALLED_S:
            for target in self._targets:
                target.forgive_stop(stopped_s, now + STALLED_S)

    def deliver(self, patience_s: float = 0.0) -> None:
        """Tell listeners; wait `patience_s` at most if another thread does so."""
        try:
            self._context.deliver(patience_s)
        except BaseException:  # a listener that exits would only end this thread
            logger.exception("a listener has ended the delivery of an event")

    def deliver_and_log(self) -> None:
        """Have listeners told, and log when a mass outage begins or ends.

        A listener that is slow must not delay the checks: a late tick counts as a stop of this process, and forgives
        silence.
        """
        self._context.deliver_aside()
        for line in self._limits.messages():
            logger.warning("%s", line)

    def _engine_at_work(self, target: Target) -> ManagedEngine | None:
        """Return the engine that has the name now; None if it has not launched, is dead or was reported."""
        engine = self._context.engine(target.name)
        if engine is not None and engine is not target.engine:
            target.take_over(engine)
            self._context.emit(watch_began(engine))
            self._limits.clear(target.group)
        if engine is None or engine is target.reported or engine.is_launching or engine.state is EngineState.DEAD:
            self._limits.update(target, living=False)
            return None
        self._update_limits(target, engine)
        return engine

    def _look_for_a_death(self, target: Target, phase: Phase) -> None:
        """Detect the death of an engine that is not at work. Before its launch, nothing else moves it."""
        engine, call = target.engine, target.sign_of_life
        if engine.is_launching and ray.is_initialized():
            if call is None:
                target.sign_of_life = PlainCall(Method(engine, "__ray_ready__", self._settings.timeout_s))
            elif call.answer.done():
                target.sign_of_life, outcome = None, call.outcome()
                if outcome in FATAL:
                    engine.observe(outcome, launches=False, submitted_at=call.sent_at)
        if engine.state is EngineState.DEAD:
            self._decide(target, engine, phase)

    def _update_limits(self, target: Target, engine: ManagedEngine, heard_at: float | None = None) -> None:
        state = engine.state
        self._limits.update(
            target,
            living=state is not EngineState.DEAD,
            unavailable=state is EngineState.UNAVAILABLE,
            heard_at=heard_at,
        )

    def _send(self, target: Target, engine: ManagedEngine, phase: Phase) -> Probe:
        if target.method is None or target.method.engine is not engine:
            target.method = Method(engine, self._settings.probe, self._settings.timeout_s)
        probe = target.probe = Probe(target.method, phase, lambda: self._in_loop(target.wake))
        target.overdue_at = probe.sent_at + self._settings.timeout_s
        return probe

    def _retry_at(self, target: Target) -> float:
        """Return when to probe again after a broken connection: after the policy's pause, or at the budget's end."""
        now, policy, failures = time.monotonic(), self._context.policy, target.failures
        next_at = now + min(policy.pause_s(max(1, failures.breaks)), self._settings.interval_s)
        ends_at = (now if failures.since is None else failures.since) + policy.budget_s
        return min(next_at, ends_at) if now < ends_at else next_at

    def _count_anew_after_outage(self, target: Target) -> None:
        """Forget the failures that came before the end of a mass outage."""
        ended = self._limits.outages_ended
        if target.outages_ended != ended:
            target.outages_ended, target.failures = ended, Failures()

    def _pause_s(self) -> float:
        return self._settings.interval_s * random.uniform(EARLIEST, 1.0)

    def _on_the_beat(self, at: float, earliest: float = 0.0) -> float:
        """Return the last beat at which probes are sent that is not after `at`."""
        beat_s = min(BEAT_S, self._settings.interval_s / 5)
        return max(earliest, at // beat_s * beat_s)

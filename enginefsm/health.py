"""The health monitor: engines at work are probed, and given up when they have failed for too long.

A probe is a plain call of a method of the actor: it need not run once. All that waits is on an event loop of the
monitor's own thread; answers of Ray's arrive there as callbacks, so that nothing that Ray does can hold it up.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence

import ray

from enginefsm import _ends
from enginefsm.engine import MonitoredEngine
from enginefsm.metrics import FleetMetrics
from enginefsm.outcomes import FATAL, Outcome
from enginefsm.plain_calls import Method, PlainCall
from enginefsm.policy import RetryPolicy, is_finite, is_whole
from enginefsm.serving import Server
from enginefsm.states import GIVEN_UP, EngineState, Reason
from enginefsm.verdicts import Check, Decision, FailureCount, VerdictLimits
from enginefsm.watched import Group, Phase, Probe, Watched

logger = logging.getLogger("enginefsm")

STALLED_S = 1.0
"""A timer that is so late tells that this process was stopped; silence meanwhile says nothing of engines. Nor does it
for so long afterwards: what came meanwhile is heard then."""
TICK_S = 0.5
CALLBACK_S = 60.0
"""When a callback has run for so long, the verdicts that wait for it are logged."""
STOP_S = 5.0
EARLIEST = 0.8
"""The next probe comes after this share of the interval at the earliest, and after the whole of it at the latest."""
BEAT_S = 0.5
"""Probes that are due within so long, or a fifth of a shorter interval, are sent together: each wakes several of Ray's
threads, and to wake them costs more than what they then do."""


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """The end of a watched engine."""

    engine: MonitoredEngine
    """The actor that earned it."""
    engines: tuple[MonitoredEngine, ...]
    """All actors of the engine, that one included, node 0 first."""
    reason: Reason
    by_monitor: bool
    """Whether it was given up, its bounds spent: `engine` may live. Otherwise it is Ray's word, or the engine's own.
    The engine's other actors may live either way: kill them all before you replace them."""
    cause: Reason | None
    """What the last check found: `actor_unavailable`, `probe_timeout` or `probe_failed`; None if that went well."""
    server: Server
    """What its server said last."""


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
        def check(field: str, holds: bool, what: str) -> None:
            if not holds:
                raise ValueError(f"watch(): {field} must be {what}, not {getattr(self, field)!r}")

        for field in ("interval_s", "timeout_s"):
            value = getattr(self, field)
            check(field, is_finite(value) and value > 0, "a number of seconds above 0")
        threshold, wait_s = self.failure_threshold, self.first_wait_s
        check("failure_threshold", is_whole(threshold) and threshold >= 1, "a whole number, 1 or more")
        check("first_wait_s", is_finite(wait_s) and wait_s >= 0, "a number of seconds, 0 or more")


@dataclasses.dataclass(frozen=True, slots=True)
class Fleet:
    """What a watch uses of the monitor that made it."""

    engine: Callable[[str], MonitoredEngine | None]
    """The newest engine of a name."""
    policy: RetryPolicy
    metrics: FleetMetrics
    limits: VerdictLimits
    deliver: Callable[[], object]
    """Tells listeners; called when engines may have moved."""


class HealthMonitor:
    """Watches engines until it is stopped. Made by `EngineMonitor.watch`. Any thread may call what it has."""

    def __init__(
        self,
        fleet: Fleet,
        groups: Sequence[Sequence[MonitoredEngine]],
        settings: Settings,
        on_dead: Callable[[Verdict], object] | None,
    ) -> None:
        self._fleet = fleet
        self._limits = fleet.limits
        self._settings = settings
        self._on_dead = on_dead
        self._groups = [Group(engines, settings.url, settings.timeout_s) for engines in groups]
        self._watched = [one for group in self._groups for one in group.members]
        self._lock = threading.Lock()  # around the phase, and around a verdict and what it rests on
        self._phase = Phase(0, time.monotonic() + settings.first_wait_s)
        self._ran_at = time.monotonic()  # when this process was seen to run last
        self._stopped = False
        self._loop = asyncio.new_event_loop()
        self._verdicts: queue.Queue[Verdict | None] = queue.Queue()
        self._calling: tuple[Verdict, float] | None = None  # what the callback is told, and since when
        self._complained: tuple[Verdict, float] | None = None  # that of which it was said that it takes too long
        self._threads = [
            threading.Thread(target=self._run, name="enginefsm-health", daemon=True),
            threading.Thread(target=self._call_back, name="enginefsm-verdicts", daemon=True),
        ]
        if on_dead is not None:
            fleet.metrics.expect_listener(on_dead)
        for one in self._watched:
            fleet.limits.add(one, one.group, self)
            fleet.metrics.expect_checks(one.engine.labels)
        _ends.tell_before(self._end)
        for thread in self._threads:
            thread.start()

    @property
    def names(self) -> list[str]:
        """The names of the engines that it watches."""
        return [one.name for one in self._watched]

    @property
    def paused(self) -> bool:
        """Whether it is paused."""
        return self._phase.at is None

    @property
    def stopped(self) -> bool:
        """Whether it was stopped."""
        return self._stopped

    def pause(self) -> None:
        """Send no more probes, and give no more verdicts, until `resume`. Returns at once."""
        with self._lock:
            if self._phase.at is not None:
                self._phase = Phase(self._phase.number + 1, None)
        self._in_loop(self._wake_all)

    def resume(self) -> None:
        """Go on, after `first_wait_s`, with every count at 0. Does nothing when it is not paused."""
        with self._lock:
            if self._phase.at is None:
                self._phase = Phase(self._phase.number + 1, time.monotonic() + self._settings.first_wait_s)
        self._in_loop(self._wake_all)

    def stop(self, timeout_s: float = STOP_S) -> None:
        """End for good: afterwards nothing is probed, and no callback begins. Stopping twice does nothing.

        A callback that runs is waited for, `timeout_s` seconds at most; not where it is the one that calls, nor on an
        event loop, which is kept from nothing.
        """
        self._end(timeout_s if asyncio._get_running_loop() is None else 0.0)

    def _end(self, timeout_s: float = STOP_S) -> None:
        with self._lock:
            is_first, self._stopped = not self._stopped, True
        if is_first:
            _ends.forget(self._end)
            self._in_loop(self._wake_all)
            self._verdicts.put(None)
        until = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
        for one in self._watched:
            self._limits.remove(one)

    def _in_loop(self, act: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(act)

    def _wake_all(self) -> None:
        for one in self._watched:
            one.wake()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._watch())
        finally:
            self._loop.close()

    async def _watch(self) -> None:
        self._tick()
        opinions = [group.opinion for group in self._groups if group.opinion is not None]
        asking = [asyncio.ensure_future(opinion.keep_asking()) for opinion in opinions]
        await asyncio.gather(*(self._watch_actor(one) for one in self._watched))
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    def _tick(self) -> None:
        """What is done all the time; before the checks, as timers go before tasks."""
        self._notice_stop()
        self._complain_of_callback()
        self._loop.call_later(TICK_S, self._tick)

    def _notice_stop(self) -> None:
        """Notice that this process was stopped, or kept from running: that nothing was heard is held against nobody."""
        now = time.monotonic()
        stopped_s, self._ran_at = now - self._ran_at, now
        if stopped_s >= TICK_S + STALLED_S:
            for one in self._watched:
                one.forgive_stop(stopped_s, now + STALLED_S)

    async def _watch_actor(self, one: Watched) -> None:
        """Check one actor, until the end."""
        while not self._stopped:
            phase = self._phase
            try:
                next_at = await (self._check(one, phase) if one.phase == phase else self._begin(one, phase))
            except Exception:  # of this library: all others, and this one later, are checked all the same
                logger.exception("the check of engine %s failed", one.name)
                self._limits.update(one, living=False)
                next_at = time.monotonic() + self._settings.interval_s
            self._deliver_and_log()
            while time.monotonic() < next_at and self._is_current(phase):
                await one.sleep_until(next_at)

    def _is_current(self, phase: Phase) -> bool:
        return not self._stopped and self._phase == phase

    def _deliver(self) -> None:
        try:
            self._fleet.deliver()
        except BaseException:  # a listener that exits would only end this thread
            logger.exception("a listener has ended the delivery of an event")

    def _deliver_and_log(self) -> None:
        self._deliver()
        for line in self._limits.messages():
            logger.warning("%s", line)

    async def _begin(self, one: Watched, phase: Phase) -> float:
        """After a start, a pause or a resume: give when the first check is due. Everything is counted anew."""
        self._limits.clear(one.group)
        one.failures, one.attempts = FailureCount(), 0
        if one.group.opinion is not None:
            one.group.opinion.forget()
        if phase.at is None:
            self._limits.update(one, living=False)
            while self._is_current(phase):
                await one.sleep_until(math.inf)
            return 0.0
        self._current_engine(one)
        first_at = self._on_the_beat(phase.at + random.uniform(0, self._settings.interval_s), earliest=phase.at)
        one.overdue_at = first_at + self._settings.timeout_s
        one.phase = phase
        return first_at

    async def _check(self, one: Watched, phase: Phase) -> float:
        """Ask an actor how it is, and take in what it says; give when to look at it again."""
        next_at = time.monotonic() + self._pause_s()
        engine = self._current_engine(one)
        if engine is None or not ray.is_initialized():  # to call an actor, Ray would start a cluster of its own
            if one.engine.is_launching and ray.is_initialized():
                self._look_whether_it_lives(one, one.engine)
            self._report_if_dead(one, phase)
            return next_at
        self._counts_anew(one)
        if one.probe is None:
            one.probe = self._send(one, engine, phase)
            one.overdue_at = one.probe.sent_at + self._settings.timeout_s
        probe = one.probe
        if one.opinion is not None:
            one.opinion.ask()
        while not probe.answer.done() and time.monotonic() < one.overdue_at and self._is_current(phase):
            await one.sleep_until(one.overdue_at)
        if not probe.answer.done():
            if self._is_current(phase):
                self._silent(one, engine, probe, phase)
            return 0.0
        one.probe = None
        outcome = probe.outcome()
        self._fleet.metrics.probed(engine.labels, outcome, time.monotonic() - probe.sent_at)
        if outcome in _NOT_WELL and not (probe.phase == phase and self._is_current(phase)):
            return 0.0  # an engine that was put to sleep, or was about to be, may well refuse
        next_at = max(time.monotonic(), self._on_the_beat(probe.sent_at + self._pause_s()))
        if outcome is Outcome.SUCCEEDED:
            await self._well(one, engine, probe, phase, next_at)
        elif outcome is Outcome.METHOD_FAILED:
            self._refused(one, engine, probe, phase)
        elif outcome is Outcome.ACTOR_UNAVAILABLE:
            return self._unavailable(one, engine, probe, phase)
        else:
            engine.observe(outcome, launches=False, submitted_at=probe.sent_at)
            self._count(one, Check.DEAD if engine.state is EngineState.DEAD else Check.LOST)
            self._update_limits(one, engine, heard_at=time.monotonic())
            self._current_engine(one)
            self._report_if_dead(one, phase)
        return next_at

    def _current_engine(self, one: Watched) -> MonitoredEngine | None:
        """The engine that has the name now, if it is at work."""
        engine = self._fleet.engine(one.name)
        if engine is not None and engine is not one.engine:
            one.take_over(engine)
            self._fleet.metrics.expect_checks(engine.labels)
            self._limits.clear(one.group)
        if engine is None or engine is one.reported or engine.is_launching or engine.state is EngineState.DEAD:
            self._limits.update(one, living=False)
            return None
        self._update_limits(one, engine)
        return engine

    def _look_whether_it_lives(self, one: Watched, engine: MonitoredEngine) -> None:
        """Notice the death of an actor whose launch nobody has seen succeed. Nothing else that it says moves it."""
        call = one.sign_of_life
        if call is None:
            one.sign_of_life = PlainCall(Method(engine, "__ray_ready__", self._settings.timeout_s))
        elif call.answer.done():
            one.sign_of_life, outcome = None, call.outcome()
            if outcome in FATAL:
                engine.observe(outcome, launches=False, submitted_at=call.sent_at)

    def _update_limits(self, one: Watched, engine: MonitoredEngine, heard_at: float | None = None) -> None:
        state = engine.state
        self._limits.update(
            one,
            living=state is not EngineState.DEAD,
            unavailable=state is EngineState.UNAVAILABLE,
            heard_at=heard_at,
        )

    def _send(self, one: Watched, engine: MonitoredEngine, phase: Phase) -> Probe:
        if one.method is None or one.method.engine is not engine:
            one.method = Method(engine, self._settings.probe, self._settings.timeout_s)
        return Probe(one.method, phase, lambda: self._in_loop(one.wake))

    def _silent(self, one: Watched, engine: MonitoredEngine, probe: Probe, phase: Phase) -> None:
        """No answer, for the timeout or for one interval more."""
        self._notice_stop()
        now = time.monotonic()
        if now < one.overdue_at:
            return
        one.overdue_at = now + self._pause_s()
        says = one.group.says
        if says is not Server.FAILS and probe.is_behind_a_call():
            self._count(one, Check.BUSY)
            self._update_limits(one, engine, heard_at=now)
            return
        self._count(one, Check.SILENT)
        probe.counted = says not in (Server.SERVES, Server.UNWELL)  # else its server's process lives
        engine.suspect(Reason.PROBE_TIMEOUT, probe.sent_at)
        one.failures.add(Reason.PROBE_TIMEOUT, now, counts=probe.counted, told=says is Server.FAILS)
        self._give_up_if_due(one, engine, phase)

    def _refused(self, one: Watched, engine: MonitoredEngine, probe: Probe, phase: Phase) -> None:
        """The actor says that all is not well."""
        one.attempts, now = 0, time.monotonic()
        self._count(one, Check.FAILED)
        if probe.counted:
            one.failures.confirm(Reason.PROBE_FAILED, now)  # for its silence; the answer is not a failure more
        else:
            engine.suspect(Reason.PROBE_FAILED, probe.sent_at)
            one.failures.add(Reason.PROBE_FAILED, now, counts=True, told=True)
        self._give_up_if_due(one, engine, phase)

    def _unavailable(self, one: Watched, engine: MonitoredEngine, probe: Probe, phase: Phase) -> float:
        """The connection to the actor broke. It is tried again by the policy; give when."""
        now, policy = time.monotonic(), self._fleet.policy
        self._count(one, Check.UNAVAILABLE)
        engine.observe(Outcome.ACTOR_UNAVAILABLE, launches=False, submitted_at=probe.sent_at)
        one.failures.add(Reason.ACTOR_UNAVAILABLE, now, counts=False)
        self._give_up_if_due(one, engine, phase)
        one.attempts += 1
        next_at = now + min(policy.pause_s(one.attempts), self._settings.interval_s)
        ends_at = (one.failures.since or now) + policy.budget_s
        return min(next_at, ends_at) if now < ends_at else next_at

    async def _well(self, one: Watched, engine: MonitoredEngine, probe: Probe, phase: Phase, next_at: float) -> None:
        """The actor says that all is well. What its server says counts for node 0, whose server it is."""
        opinion = one.opinion
        if opinion is None or not opinion.objects:
            self._recovered(one, engine, probe)
            self._deliver_and_log()
        while opinion is not None and opinion.is_asking and time.monotonic() < next_at and self._is_current(phase):
            await one.sleep_until(next_at)
        self._count(one, Check.ANSWERED)
        if opinion is None or not self._is_current(phase):
            return
        if opinion.objects and not opinion.is_asking:
            engine.suspect(Reason.PROBE_FAILED, probe.sent_at)
            one.failures.add(Reason.PROBE_FAILED, time.monotonic(), counts=True, told=True)
            self._give_up_if_due(one, engine, phase)
        elif not opinion.objects:
            self._recovered(one, engine, probe)
        else:
            self._update_limits(one, engine, heard_at=time.monotonic())  # its server failed, and has not answered since

    def _recovered(self, one: Watched, engine: MonitoredEngine, probe: Probe) -> None:
        one.failures, one.attempts = FailureCount(), 0
        engine.observe(Outcome.SUCCEEDED, launches=False, submitted_at=probe.sent_at, probed=True)
        if all(member.failures.since is None for member in one.group.members):
            self._limits.clear(one.group)
        self._update_limits(one, engine, heard_at=time.monotonic())

    def _give_up_if_due(self, one: Watched, engine: MonitoredEngine, phase: Phase) -> None:
        """A check has failed: give the engine up, if that is due and nothing holds it."""
        self._notice_stop()
        now = time.monotonic()
        self._update_limits(one, engine, heard_at=now)
        if self._counts_anew(one):
            return
        since = one.failures.since
        is_due = one.failures.is_due(self._settings.failure_threshold, self._fleet.policy.budget_s, now)
        if since is None or not is_due:
            return
        with self._lock:  # there is no verdict once pause() has returned
            if not self._is_current(phase) or engine.state is not EngineState.UNAVAILABLE:
                return
            if self._limits.decide(one.group, engine.name, since, now) is Decision.GIVEN and engine.give_up():
                self._update_limits(one, engine)
                self._give_verdict(one, engine)

    def _counts_anew(self, one: Watched) -> bool:
        """Forget failures from before the end of a mass outage; say whether it did."""
        ended = self._limits.outages_ended
        if one.outages_ended == ended:
            return False
        one.outages_ended, one.failures = ended, FailureCount()
        return True

    def _report_if_dead(self, one: Watched, phase: Phase) -> None:
        """Tell of an engine that was found dead, by whomever."""
        engine = self._fleet.engine(one.name)
        if engine is None or engine.state is not EngineState.DEAD or engine.reason is Reason.RELEASED:
            return
        with self._lock:
            if engine is one.reported or not self._is_current(phase):
                return
            if engine.reason in GIVEN_UP:  # by who awaited its calls: its actor may live, and would be killed
                decision = self._limits.decide(one.group, engine.name, -math.inf, time.monotonic())
                if decision is not Decision.GIVEN:
                    return
            self._give_verdict(one, engine)

    def _give_verdict(self, one: Watched, engine: MonitoredEngine) -> None:
        for member in one.group.members:
            # The one that died, though its name may have been given to another by now.
            member.reported = engine if member is one else self._fleet.engine(member.name) or member.engine
        self._limits.clear(one.group)
        engines = tuple(member.reported for member in one.group.members if member.reported is not None)
        by_monitor = engine.reason in GIVEN_UP
        self._verdicts.put(Verdict(engine, engines, engine.reason, by_monitor, one.failures.cause, one.group.says))

    def _call_back(self) -> None:
        """Hand verdicts to the callback, in order."""
        while (verdict := self._verdicts.get()) is not None:
            self._deliver()  # listeners hear of the end first
            if verdict.by_monitor and verdict.cause is not None:
                name, cause, server = verdict.engine.name, verdict.cause, verdict.server
                logger.error("engine %s was given up: %s (its server: %s)", name, cause, server)
            if self._on_dead is None or self._stopped:
                continue
            self._calling = verdict, time.monotonic()
            try:
                self._on_dead(verdict)
            except BaseException:  # an exit, too, would only end this thread, and the next verdict waits
                logger.exception("%r failed on the end of engine %s", self._on_dead, verdict.engine.name)
                self._fleet.metrics.listener_failed(self._on_dead)
            self._calling = None

    def _complain_of_callback(self) -> None:
        """Say once of a callback that blocks that verdicts wait for it."""
        calling = self._calling
        if calling is None or calling is self._complained or time.monotonic() - calling[1] < CALLBACK_S:
            return
        with self._verdicts.mutex:
            waiting = [verdict.engine.name for verdict in self._verdicts.queue if verdict is not None]
        if waiting:
            self._complained = calling
            logger.warning(
                "%r has run for more than %g s on the end of engine %s; the verdicts on these wait for it: %s",
                self._on_dead, CALLBACK_S, calling[0].engine.name, ", ".join(waiting),
            )  # fmt: skip

    def _pause_s(self) -> float:
        return self._settings.interval_s * random.uniform(EARLIEST, 1.0)

    def _on_the_beat(self, at: float, earliest: float = 0.0) -> float:
        """The last beat at which probes are sent that is not after `at`."""
        beat_s = min(BEAT_S, self._settings.interval_s / 5)
        return max(earliest, at // beat_s * beat_s)

    def _count(self, one: Watched, check: Check) -> None:
        self._fleet.metrics.checked(one.engine.labels, check, one.group.says)


_NOT_WELL = (Outcome.METHOD_FAILED, Outcome.ACTOR_UNAVAILABLE)

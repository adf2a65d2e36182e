"""The health monitor: engines at work are probed, and given up when they have failed for too long.

A probe is a plain call of a method of the actor: it need not run once. All that waits is on an event loop of the
monitor's own thread; answers of Ray's arrive there as callbacks, so that nothing that Ray does can hold it up.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from enginefsm._engine.managed import ManagedEngine
from enginefsm._engine.proxy import Engine, proxy
from enginefsm._ray import ends as _ends
from enginefsm.fsm.states import GIVEN_UP, Reason
from enginefsm.fsm.verdicts import ServerAnswer
from enginefsm.health.checker import TICK_S, Checker, Settings, WatchContext, watch_began
from enginefsm.health.target import Phases, Target, TargetGroup

logger = logging.getLogger("enginefsm")

CALLBACK_S = 60.0
"""When a callback has run for so long, the verdicts that wait for it are logged."""
STOP_S = 5.0
LISTENERS_S = 2.0
"""How long a verdict waits for listeners that another thread is telling of the end."""


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """The end of a target engine."""

    engine: Engine
    """The actor that earned it."""
    engines: tuple[Engine, ...]
    """All actors of the engine, that one included, node 0 first."""
    reason: Reason
    by_monitor: bool
    """Whether it was given up, its bounds spent: `engine` may live. Otherwise it is Ray's word, or the engine's own.
    The engine's other actors may live either way: kill them all before you replace them."""
    cause: Reason | None
    """What the last check found: `actor_unavailable`, `probe_timeout` or `probe_failed`; None if that went well."""
    server: ServerAnswer
    """What its server said last."""


class HealthMonitor:
    """Watches engines until it is stopped. Made by `EngineMonitor.watch`. Any thread may call what it has."""

    def __init__(
        self,
        context: WatchContext,
        groups: Sequence[Sequence[ManagedEngine]],
        settings: Settings,
        on_dead: Callable[[Verdict], object] | None,
    ) -> None:
        self._context = context
        self._limits = context.limits
        self._interval_s = settings.interval_s
        self._on_dead = on_dead
        self._groups = [TargetGroup(engines, settings.url, settings.timeout_s) for engines in groups]
        self._targets = [target for group in self._groups for target in group.members]
        self._phases = Phases(settings.first_wait_s)
        self._checker = Checker(context, settings, self._targets, self._phases, self._in_loop, self._give_verdict)
        self._loop = asyncio.new_event_loop()
        self._verdicts: queue.Queue[Verdict | None] = queue.Queue()
        self._calling: tuple[Verdict, float] | None = None  # what the callback is told, and since when
        self._complained: tuple[Verdict, float] | None = None  # that of which it was said that it takes too long
        self._threads = [
            threading.Thread(target=self._run, name="enginefsm-health", daemon=True),
            threading.Thread(target=self._call_back, name="enginefsm-verdicts", daemon=True),
        ]
        for target in self._targets:
            context.limits.add(target, target.group, self)
            context.emit(watch_began(target.engine))
        _ends.tell_before(self._end)
        for thread in self._threads:
            thread.start()

    @property
    def names(self) -> list[str]:
        """The names of the engines that it watches."""
        return [target.name for target in self._targets]

    @property
    def paused(self) -> bool:
        """Whether it is paused."""
        return self._phases.now.at is None

    @property
    def stopped(self) -> bool:
        """Whether it was stopped."""
        return self._phases.ended

    def pause(self) -> None:
        """Send no more probes, and give no more verdicts, until `resume`. Returns at once."""
        self._phases.pause()
        self._in_loop(self._wake_all)

    def resume(self) -> None:
        """Go on, after `first_wait_s`, with every count at 0. Does nothing when it is not paused."""
        self._phases.resume()
        self._in_loop(self._wake_all)

    def stop(self, timeout_s: float = STOP_S) -> None:
        """End for good: afterwards nothing is probed, and no callback begins. Stopping twice does nothing.

        A callback that runs is waited for, `timeout_s` seconds at most; not where it is the one that calls, nor on an
        event loop, which is kept from nothing.
        """
        self._end(timeout_s if asyncio._get_running_loop() is None else 0.0)

    def _end(self, timeout_s: float = STOP_S) -> None:
        if self._phases.end():
            _ends.forget(self._end)
            self._in_loop(self._wake_all)
            self._verdicts.put(None)
        until = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
        for target in self._targets:
            self._limits.remove(target)

    def _in_loop(self, act: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(act)

    def _wake_all(self) -> None:
        for target in self._targets:
            target.wake()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._watch())
        finally:
            self._loop.close()

    async def _watch(self) -> None:
        self._tick()
        server_checks = [group.server_check for group in self._groups if group.server_check is not None]
        asking = [asyncio.ensure_future(server_check.keep_asking()) for server_check in server_checks]
        await asyncio.gather(*(self._watch_actor(target) for target in self._targets))
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    def _tick(self) -> None:
        """What is done all the time; before the checks, as timers go before tasks."""
        self._checker.notice_stop()
        self._complain_of_callback()
        self._loop.call_later(TICK_S, self._tick)

    async def _watch_actor(self, target: Target) -> None:
        """Check one actor, until the end."""
        while not self._phases.ended:
            phase = self._phases.now
            try:
                act = self._checker.check if target.phase == phase else self._checker.begin
                next_at = await act(target, phase)
            except Exception:  # of this library: all others, and this one later, are checked all the same
                logger.exception("the check of engine %s failed", target.name)
                self._limits.update(target, living=False)
                next_at = time.monotonic() + self._interval_s
            self._checker.deliver_and_log()
            while time.monotonic() < next_at and self._phases.is_current(phase):
                await target.sleep_until(next_at)

    def _give_verdict(self, target: Target, engine: ManagedEngine) -> None:
        for member in target.group.members:
            # The one that died, though its name may have been given to another by now.
            member.reported = engine if member is target else self._context.engine(member.name) or member.engine
        self._limits.clear(target.group)
        engines = tuple(proxy(member.reported) for member in target.group.members if member.reported is not None)
        by_monitor = engine.reason in GIVEN_UP
        cause, says = target.failures.cause, target.group.says
        self._verdicts.put(Verdict(proxy(engine), engines, engine.reason, by_monitor, cause, says))

    def _call_back(self) -> None:
        """Hand verdicts to the callback, in order."""
        while (verdict := self._verdicts.get()) is not None:
            self._checker.deliver(LISTENERS_S)  # the callback comes after the listeners
            if self._on_dead is None or self._phases.ended:
                continue
            self._calling = verdict, time.monotonic()
            try:
                self._on_dead(verdict)
            except BaseException:  # an exit, too, would only end this thread, and the next verdict waits
                logger.exception("%r failed on the end of engine %s", self._on_dead, verdict.engine.fsm.name)
                self._context.callback_failed(self._on_dead)
            self._calling = None

    def _complain_of_callback(self) -> None:
        """Say once of a callback that blocks that verdicts wait for it."""
        calling = self._calling
        if calling is None or calling is self._complained or time.monotonic() - calling[1] < CALLBACK_S:
            return
        with self._verdicts.mutex:
            waiting = [verdict.engine.fsm.name for verdict in self._verdicts.queue if verdict is not None]
        if waiting:
            self._complained = calling
            logger.warning(
                "%r has run for more than %g s on the end of engine %s; the verdicts on these wait for it: %s",
                self._on_dead, CALLBACK_S, calling[0].engine.fsm.name, ", ".join(waiting),
            )  # fmt: skip

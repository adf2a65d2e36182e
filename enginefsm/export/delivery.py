"""The queue of events for listeners. A thread that moves an engine queues the event, perhaps under the engine's lock.

Listeners get the events later, in order, outside every lock.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import threading
import time
from collections.abc import Callable, Iterable

from enginefsm._wait.lane import Lane
from enginefsm.events import Event, Listener
from enginefsm.export.outbox import FLUSH_S

logger = logging.getLogger("enginefsm")


class Delivery:
    """Calls listeners, one event at a time. Thread-safe.

    Args:
        listeners: The listeners, in the order in which they are called.
        failed: Called with each listener that raised.
    """

    def __init__(self, listeners: Iterable[Listener], failed: Callable[[Listener], None]) -> None:
        self.listeners = list(listeners)
        """The listeners that are called. The owner may append and remove listeners at any time."""
        self._failed = failed
        self._events: collections.deque[Event] = collections.deque()
        self._deliverer: dict[str, int] = {}  # the thread that calls listeners, if there is one
        self._is_delivering = False
        self._hearing: list[Listener] = []  # the listeners of the event that is being delivered
        self._heard = 0  # how many of them have heard it
        self._delivered = threading.Condition()
        self._lane = Lane("listeners")

    def put(self, event: Event) -> None:
        """Queue an event. This takes no lock, so the caller may hold an engine's lock."""
        self._events.append(event)

    def deliver(self, patience_s: float = 0.0) -> None:
        """Hand the events to the listeners. If another thread does so already, wait for it for `patience_s` at most."""
        me, until = threading.get_ident(), time.monotonic() + patience_s
        while self._events:
            # This is atomic. An interrupt at any point does no harm, because a thread may claim again what it claimed.
            if self._deliverer.setdefault("thread", me) == me:
                if self._is_delivering:
                    return  # a listener moved an engine: the loop that called the listener delivers that event too
                try:
                    self._is_delivering = True
                    self._deliver_all()
                finally:
                    self._is_delivering = False
                    self._deliverer.pop("thread", None)
                    with self._delivered:
                        self._delivered.notify_all()
            else:
                with self._delivered:
                    if not self._delivered.wait_for(self._may_deliver, until - time.monotonic()):
                        return

    def deliver_aside(self) -> None:
        """Hand the events to the listeners on another thread."""
        if self._events:
            self._lane.ask(self._deliver_for_nobody)

    def deliver_here_or_aside(self) -> None:
        """Hand the events to the listeners. On an event loop's thread, let another thread do so in the next turn."""
        loop = asyncio._get_running_loop()
        if loop is None:
            self.deliver()
        else:
            loop.call_soon(self.deliver_aside)

    async def delivered(self) -> None:
        """Wait on an event loop until the listeners have heard every event, for `FLUSH_S` at most."""
        if self._events:
            await self._lane.run(self._deliver_patiently, FLUSH_S)

    def _deliver_patiently(self) -> None:
        self.deliver(FLUSH_S)

    def _deliver_for_nobody(self) -> None:
        try:
            self._deliver_patiently()
        except BaseException:  # even SystemExit would end only the lane's thread
            logger.exception("a listener has ended the delivery of an event")

    def _may_deliver(self) -> bool:
        return not self._events or "thread" not in self._deliverer

    def _deliver_all(self) -> None:
        # The count of listeners that heard the event is kept, so an interrupt in one listener skips no later listener.
        while self._events:
            if self._heard == 0:
                self._hearing = list(self.listeners)
            if self._heard < len(self._hearing):
                self._heard += 1
                self._call(self._hearing[self._heard - 1], self._events[0])
            else:
                self._heard = 0
                self._events.popleft()

    def _call(self, listener: Listener, event: Event) -> None:
        try:
            listener(event)
        except Exception:  # listeners are the user's code, which must not end a bringup
            logger.exception("listener %r failed on an event of engine %s", listener, event.engine)
            self._failed(listener)

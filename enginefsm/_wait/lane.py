"""A thread for work that may take long, so that an event loop does not do it itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
logger = logging.getLogger("enginefsm")

LINGER_S = 5.0
"""How many seconds the thread waits for more work before it ends."""


class Lane:
    """Runs functions for event loops, one after another, on a daemon thread that lives while there is work.

    If a function is asked for again before it began, it runs once for all askers. The event loop's executor does not
    serve here: it may be full of the program's own work, and Python waits for its threads at exit.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()  # guards the two below
        self._asked: dict[Callable[[], Any], list[tuple[asyncio.AbstractEventLoop, asyncio.Future[Any]]]] = {}
        self._is_running = False

    def ask(self, act: Callable[[], Any]) -> None:
        """Call `act` on the thread. Nobody waits for it."""
        with self._changed:
            self._put(act)

    async def run(self, act: Callable[[], T], patience_s: float | None = None) -> T | None:
        """Return or raise the outcome of `act()`. If it takes longer than `patience_s`, return None, and it goes on."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        with self._changed:
            self._put(act).append((loop, answer))
        try:
            await asyncio.wait([answer], timeout=patience_s)
            return answer.result() if answer.done() else None
        finally:
            if not answer.cancel() and not answer.cancelled():
                answer.exception()  # if the asker was cancelled, asyncio would log that nobody read the exception

    def _put(self, act: Callable[[], Any]) -> list[tuple[asyncio.AbstractEventLoop, asyncio.Future[Any]]]:
        if not self._is_running:
            threading.Thread(target=self._work, name=f"enginefsm-{self._name}", daemon=True).start()
            self._is_running = True
        self._changed.notify()
        return self._asked.setdefault(act, [])

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._asked, LINGER_S):
                    self._is_running = False
                    return
                act = next(iter(self._asked))
                answers = self._asked.pop(act)
            value, error = None, None
            try:
                value = act()
            except BaseException as exception:  # noqa: BLE001  even SystemExit goes to the asker
                error = exception
            if error is not None and not answers:
                logger.error("%s failed", act, exc_info=error)
            for loop in {loop for loop, _ in answers}:
                mine = [answer for at, answer in answers if at is loop]
                with contextlib.suppress(RuntimeError):  # the loop has been closed
                    loop.call_soon_threadsafe(_give, mine, value, error)
            del act, answers, value, error  # the waiting thread must not keep them alive


def _give(answers: list[asyncio.Future[Any]], value: Any, error: BaseException | None) -> None:
    for answer in answers:
        if not answer.done():  # else nobody waits for the answer any more
            answer.set_result(value) if error is None else answer.set_exception(error)

"""The second opinion on an engine: what its server says to a plain HTTP request, whatever the actor does."""

from __future__ import annotations

import asyncio
import logging
import socket
import urllib.parse
from collections.abc import Callable

from enginefsm._engine.managed import ManagedEngine
from enginefsm.fsm.outcomes import Outcome
from enginefsm.fsm.verdicts import ServerAnswer
from enginefsm.health.plain_calls import Method, PlainCall

logger = logging.getLogger("enginefsm")


class Address:
    """Where a server's health is asked after: `/health` under its base URL.

    Raises ValueError when the URL is not an `http://` one.
    """

    def __init__(self, url: object) -> None:
        if not isinstance(url, str):
            raise ValueError(f"{url!r} is not the text of a URL")
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{url!r} is not a URL of the form http://host:port")
        self.host, self.port = parts.hostname, parts.port or 80
        self.request = (
            f"GET {parts.path.rstrip('/')}/health HTTP/1.1\r\nHost: {parts.netloc.rpartition('@')[2]}\r\n"
            "Accept: */*\r\nConnection: close\r\n\r\n"
        ).encode()


async def ask(address: Address, timeout_s: float) -> ServerAnswer:
    """Whether the server at `address` serves, after `timeout_s` seconds at most. No proxy is asked."""
    loop, said = asyncio.get_running_loop(), set()
    try:
        async with asyncio.timeout(timeout_s):
            for *_, place in await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM):
                said.add(opinion := await _ask_at(str(place[0]), address))
                if opinion in (ServerAnswer.SERVES, ServerAnswer.UNWELL):
                    return opinion
    except (OSError, UnicodeError):  # a name that is unknown or none, or the timeout, says nothing of the server
        return ServerAnswer.UNKNOWN
    return ServerAnswer.FAILS if said == {ServerAnswer.FAILS} else ServerAnswer.UNKNOWN


async def _ask_at(host: str, address: Address) -> ServerAnswer:
    """What is said at one of the IP addresses that the host has."""
    try:
        reader, writer = await asyncio.open_connection(host, address.port)
        try:
            writer.write(address.request)
            status = await reader.readline()
        finally:
            writer.close()
    except ConnectionError:
        return ServerAnswer.FAILS
    except OSError:  # a route that is missing says nothing of the server
        return ServerAnswer.UNKNOWN
    except ValueError:  # a line without end: this is no HTTP server
        return ServerAnswer.FAILS
    protocol, _, code = status.partition(b" ")
    if not protocol.startswith(b"HTTP/"):
        return ServerAnswer.FAILS
    return ServerAnswer.SERVES if code[:3] == b"200" else ServerAnswer.UNWELL


class ServerCheck:
    """What one engine's server says, asked whenever a check of its node 0 wants it. Used on one event loop.

    Args:
        engine: Gives the actor whose server it is.
        url: The actor's method that gives the server's base URL.
        timeout_s: How long the server may take to answer.
        asked: Called when it was asked.
    """

    def __init__(
        self, engine: Callable[[], ManagedEngine], url: str, timeout_s: float, asked: Callable[[], object]
    ) -> None:
        self._engine = engine
        self._url = url
        self._timeout_s = timeout_s
        self._asked = asked
        self.said = ServerAnswer.UNKNOWN
        """What the server said last."""
        self._times_forgotten = 0
        self.is_asking = False
        self._wanted = asyncio.Event()
        self._of: ManagedEngine | None = None
        """The engine that the three below are of."""
        self._address: Address | None = None
        self._asked_for: PlainCall | None = None
        """The call for the address that is out."""
        self._has_none = False

    @property
    def says(self) -> ServerAnswer:
        """The same, but that it fails is held against it only until it is asked again."""
        return ServerAnswer.UNKNOWN if self.is_asking and self.said is ServerAnswer.FAILS else self.said

    @property
    def objects(self) -> bool:
        """Whether the server said last that all is not well, or is gone."""
        return self.said in (ServerAnswer.UNWELL, ServerAnswer.FAILS)

    def ask(self) -> None:
        """Have the server asked, unless it is being asked."""
        if not self.is_asking:
            self.is_asking = True
            self._wanted.set()

    def forget(self) -> None:
        """Take nothing into account that was said so far, or is said to a question that was asked before."""
        self.said = ServerAnswer.UNKNOWN
        self._times_forgotten += 1

    async def keep_asking(self) -> None:
        """Ask whenever that is wanted, until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            engine, times_forgotten = self._engine(), self._times_forgotten
            try:
                self._learn_address(engine)
                if self._address is not None:
                    said = await ask(self._address, self._timeout_s)
                    still_counts = engine is self._engine() and times_forgotten == self._times_forgotten
                    self.said = said if still_counts else ServerAnswer.UNKNOWN
            except Exception:  # of this library: the checks go on without it
                logger.exception("the server of engine %s could not be asked", engine.name)
                self.said = ServerAnswer.UNKNOWN
            self.is_asking = False
            self._asked()

    def _learn_address(self, engine: ManagedEngine) -> None:
        """Ask the actor for its server's address: once, and again while it does not serve there: it may have moved."""
        if self._of is not engine:
            self._of, self._address, self._asked_for, self._has_none = engine, None, None, False
            self.said = ServerAnswer.UNKNOWN
        if self._asked_for is None:
            if not self._has_none and (self._address is None or self.objects):
                self._asked_for = PlainCall(Method(engine, self._url, self._timeout_s))
            return
        if not self._asked_for.answer.done():
            return
        call, self._asked_for = self._asked_for, None
        outcome = call.outcome()
        if outcome not in (Outcome.SUCCEEDED, Outcome.METHOD_FAILED):
            return  # it did not arrive; the next check asks again
        try:
            self._address = Address(call.answer.result() if outcome is Outcome.SUCCEEDED else call.answer.exception())
        except ValueError as error:
            if self._address is None:
                self._has_none = True
                logger.warning(
                    "the server of engine %s is not asked, its %s() gave none: %s", engine.name, self._url, error
                )

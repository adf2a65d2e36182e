"""The second opinion on an engine: what its server says to a plain HTTP request, whatever the actor does."""

from __future__ import annotations

import asyncio
import urllib.parse
from enum import StrEnum


class Server(StrEnum):
    """Whether an engine's server serves."""

    SERVES = "serves"
    FAILS = "fails"
    """It refuses connections, closes them, or answers anything but 200."""
    UNKNOWN = "unknown"
    """It is silent, or cannot be reached from here."""
    NOT_ASKED = "not_asked"


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


async def ask(address: Address, timeout_s: float) -> Server:
    """Whether the server at `address` serves, after `timeout_s` seconds at most. No proxy is asked."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(address.host, address.port)
            try:
                writer.write(address.request)
                status = await reader.readline()
            finally:
                writer.close()
    except ConnectionError:
        return Server.FAILS
    except OSError:  # a route or a name that is missing says nothing of the server
        return Server.UNKNOWN
    except ValueError:  # a line without end: this is no HTTP server
        return Server.FAILS
    return Server.SERVES if status.split()[1:2] == [b"200"] else Server.FAILS

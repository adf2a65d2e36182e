"""Ways to wait for calls: with `get` or `gather`, for engines that are sync or asyncio actors.

A test of `fleet` waits with `get` for sync engines. `@also(...)` at the test runs it in other ways as well.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import uvloop

from support.engines import AsyncEngine, Engine
from support.loops import Loop


@dataclass(frozen=True)
class Way:
    name: str
    engine_class: type
    new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None

    def __str__(self):
        return self.name

    @contextlib.contextmanager
    def used_by(self, fleet):
        """Let the fleet launch this class of engines, and wait in this way when a test says `fleet.monitor.get`."""
        fleet.engine_class = self.engine_class
        if self.new_loop is None:
            yield
            return
        loop = Loop(self.new_loop)

        def get(calls, *, timeout=None):
            several = isinstance(calls, list)
            values = loop.run(fleet.monitor.gather(*(calls if several else [calls]), timeout=timeout))
            return values if several else values[0]

        fleet.monitor.get = get
        yield
        loop.close()


GET = Way("get", Engine)
GATHER = Way("gather", Engine, asyncio.new_event_loop)
GET_FROM_ASYNC = Way("get from asyncio engines", AsyncEngine)
GATHER_FROM_ASYNC = Way("gather from asyncio engines", AsyncEngine, uvloop.new_event_loop)


def also(*ways):
    """Run a test of `fleet` with `get` for sync engines, and in each of these ways."""
    return pytest.mark.parametrize("way", [GET, *ways], ids=str, indirect=True)

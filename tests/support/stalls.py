"""What an event loop is kept from while many engines are adopted, awaited, cut off and given up; without Ray.

How long the loop's thread works in one turn is measured as its CPU time, which other work on the machine does not
change; what stands still without working (a lock, a listener, a frozen hub) shows as lag.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from unittest import mock

from ray.exceptions import ActorUnavailableError, GetTimeoutError

from support.engines import held_within
from support.standin_engines import adopt, call, in_a_thread

ENGINES = 256


class Turns:
    """Watches the running loop: the longest turn, in CPU seconds of its thread, and the longest lag."""

    def __init__(self):
        self.longest_s = self.lag_s = 0.0
        self.count = 0

    async def __aenter__(self):
        self.task = asyncio.create_task(self.watch())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_):
        await asyncio.sleep(0)
        self.task.cancel()

    async def watch(self):
        while True:
            worked, began = time.thread_time(), time.monotonic()
            await asyncio.sleep(0)
            self.count += 1
            self.longest_s = max(self.longest_s, time.thread_time() - worked)
            self.lag_s = max(self.lag_s, time.monotonic() - began)

    def go_on(self):
        """Return whether the loop takes more turns while the calling thread waits here, which is not the loop's."""
        enough = self.count + 10
        return held_within(30, lambda: self.count >= enough)


class FrozenHub:
    """An exporter that does not come back."""

    sink, batch_s, heartbeat_s = "frozen", 0.5, 5.0

    def __init__(self):
        self.thawed = threading.Event()

    def send(self, fleet, batch):
        self.thawed.wait(60)

    def close(self):
        pass


async def each_alone(calls):
    return await asyncio.gather(*calls, return_exceptions=True)


def gathered(monitor):
    async def gather(calls):
        try:
            return await monitor.gather(*calls)
        except ActorUnavailableError as error:
            return error

    return gather


def measured(scene, new_loop, turns):
    """Return what a scene gives on a loop of its own, while `turns` watches the loop."""

    async def main():
        gc.collect()
        gc.freeze()  # what a test run has piled up is not what is measured
        async with turns:
            return await scene

    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(main())
    finally:
        gc.unfreeze()


async def recovered(monitor, together, engines=ENGINES):
    """Engines are adopted, all cut off at once, awaited by another who gives up, and back; the values."""
    adopt_all, handles = adopt(monitor, [f"engine-{n}" for n in range(engines)])
    await asyncio.sleep(0)
    adopted = adopt_all()
    await asyncio.sleep(0)  # what a submission costs is Ray's for the most part, and is not measured with it
    calls = [call(engine) for engine in adopted]
    await asyncio.sleep(0)
    waiting = asyncio.ensure_future((gathered(monitor) if together else each_alone)(calls))
    await asyncio.sleep(0.1)
    in_a_thread(lambda: [handle.lose() for handle in handles])
    while any(len(handle.out) < 2 for handle in handles):
        await asyncio.sleep(0.01)
    with contextlib.suppress(GetTimeoutError), mock.patch("ray.wait", lambda refs, **_: ([], refs)):
        await monitor.gather(*calls, timeout=0.1)
    in_a_thread(lambda: [handle.answer(n) for n, handle in enumerate(handles)])
    return await waiting


async def given_up(monitor, together, engines=ENGINES):
    """Engines whose bounds are spent at once; the exceptions, and the seconds until all were raised."""
    adopt_all, handles = adopt(monitor, [f"engine-{n}" for n in range(engines)])
    await asyncio.sleep(0)
    adopted = adopt_all()
    await asyncio.sleep(0)
    calls = [call(engine) for engine in adopted]
    await asyncio.sleep(0)
    waiting = asyncio.ensure_future((gathered(monitor) if together else each_alone)(calls))
    await asyncio.sleep(0.1)
    began = time.monotonic()
    in_a_thread(lambda: [handle.lose() for handle in handles])
    given = await waiting
    return [given] if together else given, time.monotonic() - began

"""Engine actors of the tests' own. They import nothing of enginefsm: an engine's environment need not have it.

What an engine waits for, and what it tells, are files in a directory of the test's: they pass while connections do
not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from pathlib import Path

import ray
from ray.exceptions import ActorDiedError


def wait_until(condition, timeout_s=60.0, what="it"):
    """Poll until `condition()` is true; give what it gave."""
    value = held_within(timeout_s, condition)
    assert value, f"{what} did not come true within {timeout_s} s"
    return value


def held_within(timeout_s, condition):
    """Poll until `condition()` is true, so long at most; give what it gave last."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


def kill(actor):
    """Kill an actor, and return once it is dead to this process: a call that is made sooner may still be answered."""
    ray.kill(actor)
    with contextlib.suppress(ActorDiedError):
        while True:
            ray.get(actor.__ray_ready__.remote(), timeout=60)


class Engine:
    """Its `init` begins, waits at a gate, and ends; each beginning leaves a line."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.inits = 0
        (self.directory / "pid").write_text(str(os.getpid()))

    def init(self, error=None, value="launched"):
        self.inits += 1
        with (self.directory / "begun").open("a") as begun:
            begun.write(f"{os.getpid()}\n")
        wait_until((self.directory / "gate").exists, what="the gate of init")
        (self.directory / "ended").touch()
        if error is not None:
            raise RuntimeError(error)
        return value

    def hold(self):
        """Keep the actor busy until the file `let_go` is there."""
        (self.directory / "held").touch()
        wait_until((self.directory / "let_go").exists, what="the release of the actor")

    def note(self, text):
        with (self.directory / "noted").open("a") as noted:
            noted.write(f"{text}\n")

    def init_and_restore(self):
        """An init that puts its own state back, as from a checkpoint."""
        self.__dict__ = dict(self.__dict__)

    def times_init_ran(self):
        return self.inits

    def launched(self):
        return self.inits > 0 and (self.directory / "ended").exists()

    def echo(self, *args, **kwargs):
        return args, kwargs

    def mapping(self, fn=None, code=None, header=None, actor=None, caller=None, number=None):
        return [fn, code, header, actor, caller, number]

    @ray.method(num_returns=2)
    def pair(self):
        return 1, 2

    def count_to(self, n):
        for number in range(n):  # noqa: UP028  a generator of Ray's has to be one, not to delegate to one
            yield number

    def fail(self, text):
        raise ValueError(text)

    def ask(self, peer):
        return ray.get(peer.times_init_ran.remote())

    def kind_of(self, thing):
        return type(thing).__name__

    def remembered(self):
        """How many outcomes enginefsm keeps on this actor."""
        pages = sys.modules["_enginefsm_books_2"].books[id(self)]["callers"].values()
        return sum(len(page["held"]) for page in pages)

    def waiting_again(self):
        """How many submissions wait on this asyncio actor for a method that an earlier one runs."""
        pages = sys.modules["_enginefsm_books_2"].books[id(self)]["callers"].values()
        return sum(len(entry["wakers"]) for page in pages for entry in page["calls"].values())

    def can_import_enginefsm(self):
        try:
            import enginefsm  # noqa: F401
        except ImportError:
            return False
        return True


class SlowToConstruct(Engine):
    """An engine whose constructor waits at a gate."""

    def __init__(self, directory):
        super().__init__(directory)
        wait_until((self.directory / "constructor_gate").exists, what="the gate of the constructor")


class WithoutEnginefsm(Engine):
    """An engine whose interpreter cannot import enginefsm, and has not done so before."""

    def __init__(self, directory):
        super().__init__(directory)
        assert "enginefsm" not in sys.modules
        sys.modules["enginefsm"] = None


class Grouped(Engine):
    """A threaded engine with a concurrency group for health."""

    @ray.method(concurrency_group="health")
    def health(self):
        return "well"


class Asyncio:
    """An asyncio engine."""

    async def init(self):
        return "launched"


async def wait_on_loop_until(condition, timeout_s=60.0):
    """`wait_until` for an event loop."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not come true within {timeout_s} s"
        await asyncio.sleep(0.01)


class AsyncEngine(Engine):
    """The same as an asyncio engine, to be `monitored`: its event loop goes on while `init` and others wait."""

    async def init(self, error=None, value="launched"):
        self.inits += 1
        with (self.directory / "begun").open("a") as begun:
            begun.write(f"{os.getpid()}\n")
        await wait_on_loop_until((self.directory / "gate").exists)
        (self.directory / "ended").touch()
        if error is not None:
            raise RuntimeError(error)
        return value

    async def hold(self):
        (self.directory / "held").touch()
        try:
            await wait_on_loop_until((self.directory / "let_go").exists)
        except asyncio.CancelledError:
            (self.directory / "cancelled").touch()
            raise

    async def ask(self, peer):
        return await peer.times_init_ran.remote()

    async def count_to(self, n):
        for number in range(n):
            yield number

    def thread(self):
        """A sync method."""
        return threading.current_thread().name

    async def thread_of_a_coroutine(self):
        return threading.current_thread().name

    def reference(self, ref):
        """A sync method that gives something which could be awaited."""
        return ref[0]

    async def fail_as_a_loop_that_goes_on(self):
        """Raise what a background loop has passed on, which has that loop's frame in its traceback."""
        passed, beats = asyncio.get_running_loop().create_future(), []

        async def loop():
            try:
                raise ValueError("passed on")
            except ValueError as error:
                passed.set_exception(error)
            while True:
                await asyncio.sleep(0.01)
                beats.append(1)
                self.beats = len(beats)

        self.loop = asyncio.get_running_loop().create_task(loop())
        await passed

    async def beats_on(self):
        before = getattr(self, "beats", 0)
        await asyncio.sleep(0.1)
        return self.beats > before and not self.loop.done()


class AsyncWithoutEnginefsm(AsyncEngine, WithoutEnginefsm):
    """An asyncio engine whose interpreter cannot import enginefsm."""


class GroupedAsync(AsyncEngine):
    """An asyncio engine with a concurrency group, which has a loop of its own."""

    @ray.method(concurrency_group="health")
    async def health(self):
        return threading.current_thread().name


class Doomed:
    """An engine whose constructor fails."""

    def __init__(self):
        raise RuntimeError("no such GPU")

    def init(self):
        return "launched"


class Probed(Engine):
    """An engine that is ill while the file `ill` is there, or `raises`, and slow to say so while `slow` is.

    Each probe leaves its time, and the timeout that it was given, in `probes`; each that is slow a line in `slowed`.
    """

    def well(self, timeout=5.0):
        with (self.directory / "probes").open("a") as probes:
            probes.write(f"{time.monotonic()} {timeout}\n")
        if (self.directory / "slow").exists():
            with (self.directory / "slowed").open("a") as slowed:
                slowed.write("one\n")
            wait_until(lambda: not (self.directory / "slow").exists(), what="the end of slowness")
        if (self.directory / "raises").exists():
            raise RuntimeError("not well")
        return not (self.directory / "ill").exists()

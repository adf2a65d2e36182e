"""Engine actors of the tests' own. They import nothing of enginefsm: an engine's environment need not have it.

What an engine waits for, and what it tells, are files in a directory of the test's: they pass while connections do
not.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import ray


def wait_until(condition, timeout_s=60.0, what="it"):
    """Poll until `condition()` is true; give what it gave."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout_s} s"
        time.sleep(0.01)
    return value


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
        pages = sys.modules["_enginefsm_books_1"].books[id(self)]["callers"].values()
        return sum(page["held"] for page in pages)

    def can_import_enginefsm(self):
        try:
            import enginefsm  # noqa: F401
        except ImportError:
            return False
        return True


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


class Doomed:
    """An engine whose constructor fails."""

    def __init__(self):
        raise RuntimeError("no such GPU")

    def init(self):
        return "launched"


class Probed(Engine):
    """An engine that is ill while the file `ill` is there, or `raises`, and slow to say so while `slow` is.

    Each probe leaves its time, and the timeout that it was given, in `probes`.
    """

    def well(self, timeout=5.0):
        with (self.directory / "probes").open("a") as probes:
            probes.write(f"{time.monotonic()} {timeout}\n")
        wait_until(lambda: not (self.directory / "slow").exists(), what="the end of slowness")
        if (self.directory / "raises").exists():
            raise RuntimeError("not well")
        return not (self.directory / "ill").exists()

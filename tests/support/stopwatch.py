"""Time for the bounds of tests: a machine that stands still, or has no time for this process, is not the library's."""

from __future__ import annotations

import threading

TICK_S = 0.02


class Stopwatch:
    """Counts the time in which this process could run; on a machine with nothing else to do, that is all of it."""

    def __init__(self):
        self._ticks = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)

    def _count(self):
        while not self._over.wait(TICK_S):
            self._ticks += 1

    @property
    def s(self):
        """Seconds so far."""
        return self._ticks * TICK_S

    def start(self):
        """Begin; again, it does nothing."""
        if not self._thread.ident:
            self._thread.start()

    def stop(self):
        """Count no more."""
        self._over.set()
        self._thread.join()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

"""Event loops in threads of their own, to await on from a test's thread."""

from __future__ import annotations

import asyncio
import threading


class Loop:
    """A running event loop; what its exception handler is told is kept, and is an error at the end."""

    def __init__(self, new_loop=asyncio.new_event_loop):
        self.complaints = []
        self.loop = new_loop()
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)  # a test that fails may not close it
        self.thread.start()

    def start(self, awaitable):
        async def awaiting():
            return await awaitable

        return asyncio.run_coroutine_threadsafe(awaiting(), self.loop)

    def run(self, awaitable, timeout_s=120):
        return self.start(awaitable).result(timeout_s)

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        assert self.complaints == []

"""The numbers of one monitor's calls to one actor."""

from __future__ import annotations

import queue
import threading
import uuid
import weakref
from typing import Any, Protocol

import ray
from ray import ObjectRef
from ray.exceptions import ActorUnavailableError, RayTaskError


class Submitted(Protocol):
    """A call, as its ledger knows it."""

    ref: ObjectRef[Any]


class Ledger:
    """The numbers of one monitor's calls to one actor: which are open, and which the actor may forget."""

    __slots__ = ("_caller", "_lock", "_news", "_next", "_open", "_settled", "answered")

    def __init__(self) -> None:
        self.answered = False
        """Whether the actor has answered a call of this caller."""
        self._caller = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._next = 0
        self._open: dict[int, weakref.ref[Submitted]] = {}  # in ascending order, as dicts keep it
        # The garbage collector may settle a call at any moment and on any thread, even one that holds this lock.
        # A SimpleQueue can be put to from there.
        self._settled: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._news: list[int] = []  # settled, and the actor does not know yet

    @property
    def calls(self) -> int:
        """How many calls were made so far."""
        return self._next

    def is_out(self, below: int) -> bool:
        """Return whether the actor may be running one of the first `below` calls."""
        with self._lock:
            self._take_settled()
            known = [call() for number, call in self._open.items() if number < below]
        # A call that was collected meanwhile, or never submitted, keeps the actor from nothing.
        refs = [call.ref for call in known if call is not None and hasattr(call, "ref")]
        # A call that nobody has awaited is open, but it may have ended. This check does not wait.
        return any(not _has_ended(ref) for ref in refs)

    def open(self, call: Submitted) -> int:
        """Return a new number for a call."""
        with self._lock:
            number = self._next
            self._next += 1
            self._open[number] = weakref.ref(call)
            return number

    def settle(self, number: int) -> None:
        """Note that nobody will ask for the outcome of call `number` again. Any thread may call this, at any moment."""
        self._settled.put(number)

    def header(self) -> tuple[str, tuple[int, tuple[int, ...]]]:
        """Return the caller's name and what is settled: all numbers below the first one, and the numbers after it."""
        with self._lock:
            self._take_settled()
            news, self._news = self._news, []
            below = next(iter(self._open), self._next)
            return self._caller, (below, tuple(number for number in news if number > below))

    def _take_settled(self) -> None:
        while not self._settled.empty():
            self._news.append(self._settled.get())
            self._open.pop(self._news[-1], None)


def _has_ended(ref: ObjectRef[Any]) -> bool:
    if not ray.wait([ref], timeout=0, fetch_local=False)[0]:
        return False
    try:
        ray.get(ref, timeout=0)
    except RayTaskError:
        return True  # the method raised, even if its exception is about a peer
    except ActorUnavailableError:
        return False  # the connection broke: the method may run on
    except Exception:  # noqa: BLE001  a value that lies elsewhere, say: the method has ended
        return True
    return True

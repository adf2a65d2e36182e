"""Tells event loops when a reference has its outcome. Ray reports that on a thread of its own."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import Future
from typing import Any, Protocol

from ray import ObjectRef

from enginefsm._wait.wait import Raised


class Taker(Protocol):
    """A waiter for references. Ray's thread calls it, and it must not block that thread."""

    def came(self, ref: ObjectRef[Any], outcome: Any) -> None:
        """Take the outcome of `ref`: a value, or an exception in a `Raised`."""

    def look_again(self, ref: ObjectRef[Any]) -> None:
        """Ask for `ref` again, because its outcome went to another taker. `ref` is complete."""


class _Arrival:
    """One question to Ray, for all takers of one reference. Ray keeps a question until the reference is complete.

    Each taker must get its own copy of the value or exception, as each `ray.get` returns its own. So the outcome goes
    to one taker, and the others ask again.
    """

    __slots__ = ("__weakref__", "_lock", "_takers", "ref")

    def __init__(self, ref: ObjectRef[Any], taker: Taker) -> None:
        self.ref = ref
        self._lock = threading.Lock()
        self._takers: dict[Taker, None] | None = {taker: None}
        ref.future().add_done_callback(self._arrived)

    def tell(self, taker: Taker) -> bool:
        """Add `taker`. Return False if the outcome has come already, because then the taker needs a new arrival."""
        with self._lock:
            if self._takers is None:
                return False
            self._takers[taker] = None
            return True

    def forget(self, taker: Taker) -> None:
        """Remove `taker`."""
        with self._lock:
            if self._takers is not None:
                self._takers.pop(taker, None)

    def _arrived(self, future: Future[Any]) -> None:
        exception = future.exception()
        outcome = future.result() if exception is None else Raised(exception)  # type: ignore[arg-type]
        with self._lock:
            takers, self._takers = list(self._takers or ()), None
        for taker in takers[:1]:
            taker.came(self.ref, outcome)
        for taker in takers[1:]:
            taker.look_again(self.ref)


# The questions that Ray keeps. Two threads that ask at the same time may add two, which costs only one more question.
_arrivals: weakref.WeakValueDictionary[ObjectRef[Any], _Arrival] = weakref.WeakValueDictionary()


def tell(taker: Taker, ref: ObjectRef[Any]) -> None:
    """Tell `taker` the outcome of `ref` when it comes."""
    arrival = _arrivals.get(ref)
    if arrival is None or not arrival.tell(taker):
        _arrivals[ref] = _Arrival(ref, taker)


def forget(taker: Taker, ref: ObjectRef[Any]) -> None:
    """Tell `taker` nothing more about `ref`."""
    arrival = _arrivals.get(ref)
    if arrival is not None:
        arrival.forget(taker)

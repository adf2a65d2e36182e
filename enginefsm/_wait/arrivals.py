"""Tells event loops that a reference has its outcome. Ray says so on a thread of its own."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import Future
from typing import Any, Protocol

from ray import ObjectRef

from enginefsm._wait.wait import Raised


class Taker(Protocol):
    """One who waits for references. It is called on a thread of Ray's, which it must not block."""

    def came(self, ref: ObjectRef[Any], outcome: Any) -> None:
        """Take the outcome of `ref`: a value, or an exception in a `Raised`."""

    def look_again(self, ref: ObjectRef[Any]) -> None:
        """Ask for `ref` again. It is complete, and its outcome went to another taker."""


class _Arrival:
    """One question to Ray, for all who wait for one reference. Ray keeps each question until the reference is complete.

    Each taker gets a value or an exception of its own, as each `ray.get` returns its own. So the outcome goes to one
    taker, and the others are told to ask again.
    """

    __slots__ = ("__weakref__", "_lock", "_takers", "ref")

    def __init__(self, ref: ObjectRef[Any], taker: Taker) -> None:
        self.ref = ref
        self._lock = threading.Lock()
        self._takers: dict[Taker, None] | None = {taker: None}
        ref.future().add_done_callback(self._arrived)

    def tell(self, taker: Taker) -> bool:
        """Tell `taker` as well. Return False if it is too late for that, and another arrival is needed."""
        with self._lock:
            if self._takers is None:
                return False
            self._takers[taker] = None
            return True

    def forget(self, taker: Taker) -> None:
        """Tell `taker` nothing any more."""
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


# The questions that Ray keeps. Two threads that begin at once may each ask, which costs one question more.
_arrivals: weakref.WeakValueDictionary[ObjectRef[Any], _Arrival] = weakref.WeakValueDictionary()


def tell(taker: Taker, ref: ObjectRef[Any]) -> None:
    """Tell `taker` the outcome of `ref` when it comes."""
    arrival = _arrivals.get(ref)
    if arrival is None or not arrival.tell(taker):
        _arrivals[ref] = _Arrival(ref, taker)


def forget(taker: Taker, ref: ObjectRef[Any]) -> None:
    """Tell `taker` nothing of `ref` any more."""
    arrival = _arrivals.get(ref)
    if arrival is not None:
        arrival.forget(taker)

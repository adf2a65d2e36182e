"""The outcome of one reference, told by Ray on a thread of its own, to whoever waits for it without a thread."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import Future
from typing import Any, Protocol

from ray import ObjectRef

from enginefsm._wait.wait import Raised


class Taker(Protocol):
    """Whoever waits. Called on a thread of Ray's, which must not be kept."""

    def came(self, ref: ObjectRef[Any], outcome: Any) -> None:
        """The outcome of `ref`: a value, or an exception in a `Raised`."""

    def look_again(self, ref: ObjectRef[Any]) -> None:
        """The reference is complete, and its outcome went to another taker."""


class _Arrival:
    """One reference, asked of Ray once for all who wait for it: Ray keeps what it was asked until the end.

    Each taker is to have a value, or an exception, of its own, as each `ray.get` gives one: so the outcome goes to one
    of them, and the others are told to look again.
    """

    __slots__ = ("__weakref__", "_lock", "_takers", "ref")

    def __init__(self, ref: ObjectRef[Any], taker: Taker) -> None:
        self.ref = ref
        self._lock = threading.Lock()
        self._takers: dict[Taker, None] | None = {taker: None}
        ref.future().add_done_callback(self._arrived)

    def tell(self, taker: Taker) -> bool:
        """Have `taker` told as well; False when it is too late for that, and another arrival is needed."""
        with self._lock:
            if self._takers is None:
                return False
            self._takers[taker] = None
            return True

    def forget(self, taker: Taker) -> None:
        """The taker waits no longer."""
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


# Those that Ray keeps. Two threads that begin at once may each ask Ray, which costs only that.
_arrivals: weakref.WeakValueDictionary[ObjectRef[Any], _Arrival] = weakref.WeakValueDictionary()


def tell(taker: Taker, ref: ObjectRef[Any]) -> None:
    """Have `taker` told of the outcome of `ref`."""
    arrival = _arrivals.get(ref)
    if arrival is None or not arrival.tell(taker):
        _arrivals[ref] = _Arrival(ref, taker)


def forget(taker: Taker, ref: ObjectRef[Any]) -> None:
    """Have `taker` told of `ref` no more."""
    arrival = _arrivals.get(ref)
    if arrival is not None:
        arrival.forget(taker)

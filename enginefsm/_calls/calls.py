"""Calls to an engine that can be submitted again without running twice.

A call travels through Ray's own `__ray_call__` as `actor_side.run_once`, under a number that the actor remembers with
the outcome. This module submits. It does not decide when to submit again: the wait and the engine do.
"""

from __future__ import annotations

import functools
import pickle
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, NoReturn, Protocol

from ray import ObjectRef, cloudpickle
from ray.actor import ActorHandle, ActorMethod
from ray.exceptions import RayTaskError

from enginefsm._calls import actor_side as _actorside
from enginefsm._calls.arguments import Arguments
from enginefsm._calls.ledger import Ledger
from enginefsm._ray import handles as _ray_handles
from enginefsm.fsm.outages import CallOutage

# The engine's environment may have no enginefsm.
cloudpickle.register_pickle_by_value(_actorside)
_RUN_ONCE = cloudpickle.dumps(_actorside.run_once)
_RUN_ONCE_ON_LOOP = cloudpickle.dumps(_actorside.run_once_on_loop)


class _Enter:
    """`actor_side.enter`, pickled once instead of at every call."""

    _pickled = cloudpickle.dumps(_actorside.enter)

    def __call__(self, *args: Any) -> Any:
        return _actorside.enter(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self._pickled,)


_ENTER = _Enter()

LaunchedIf = str | Callable[[Any], Any]
"""A method of the actor, by name, or a function of the actor instance, that says whether the launch succeeded."""


class Awaiter(Protocol):
    """Awaits calls on an event loop, as a monitor does."""

    async def gather(self, *calls: Any, timeout: float | None = None) -> list[Any]:
        """Return the values of calls, in their order."""
        ...


class Callee(Protocol):
    """The engine, as its calls see it."""

    @property
    def name(self) -> str: ...
    @property
    def is_launching(self) -> bool: ...

    handle: ActorHandle[Any]
    launch: str
    launched_if: LaunchedIf | None
    launch_called: bool
    on_loop: bool
    ledger: Ledger
    awaiter: Awaiter | None


class Awaited:
    """One thing that a wait waits for: submitted once, and again each time the engine was unavailable.

    Several threads may wait for it at once or one after another, so it keeps what must outlive a single wait.

    A submission is out, or the call rests until it is submitted again. `out` is the only place that says which.
    """

    __slots__ = (
        "__weakref__", "_left_at", "_waits", "attempt", "engine", "launches", "lock", "made_at", "method", "out",
        "outage", "ref", "reported", "resubmit_at", "submitted_at",
    )  # fmt: skip

    ref: ObjectRef[Any]
    """The reference of the newest submission, for `ray.wait` and the like. If that submission fails with
    `ActorUnavailableError`, so does the reference, for ever. `enginefsm.get` recovers."""
    submitted_at: float
    """When the newest submission was made, on the monotonic clock."""

    def __init__(self, engine: Callee, method: str, *, launches: bool) -> None:
        self.engine = engine
        self.method = method
        self.launches = launches
        """Whether the outcome says if the engine's launch succeeded."""
        self.lock = threading.Lock()
        """Around a submission, and around an outcome and its consequences."""
        self.made_at = time.monotonic()
        self.attempt = 0
        """How many times it was submitted again."""
        self.reported = -1
        """The newest attempt whose outcome was taken in."""
        self.outage: CallOutage | None = None
        """The call's part of the outage in which it failed last."""
        self.out: ObjectRef[Any] | None = None
        """The reference of the submission that is out, or None while the call rests."""
        self.resubmit_at = 0.0
        """When to submit it again, on the monotonic clock, while it rests."""
        self._waits = 0
        self._left_at: float | None = None

    @property
    def is_probe(self) -> bool:
        """Whether the submission asks if the launch succeeded."""
        return False

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for it."""
        return self._waits > 0

    def take_up(self) -> None:
        """Note that one more wait waits for it. Nothing was tried while nobody did, so that time does not count."""
        with self.lock:
            left_at, self._left_at = self._left_at, None
            self._waits += 1
            if left_at is not None and self.outage is not None:
                self.outage.since += time.monotonic() - left_at

    def leave(self) -> None:
        """Note that a wait ended before it did."""
        with self.lock:
            self._waits -= 1
            if self._waits == 0:
                self._left_at = time.monotonic()

    def rest(self, until: float) -> None:
        """Have it submitted again, but not before `until` (monotonic). The caller holds its lock."""
        self.resubmit_at, self.out = until, None

    def resubmit(self, now: float) -> None:
        """Submit it again, if that is due. Raise what Ray raises if it refuses to submit; then it still rests."""
        with self.lock:
            if self.out is not None or now < self.resubmit_at:
                return  # another wait has submitted it
            self.attempt += 1
            self.submitted_at = now
            self._submit()
            self.out = self.ref

    def settle(self, *, answered: bool) -> None:
        """Note that its outcome has arrived, from the actor (`answered`) or from Ray."""
        raise NotImplementedError

    def _submit(self) -> None:
        """Submit it, and set `ref`."""
        raise NotImplementedError


class Call(Awaited):
    """One call of a method of an engine: what `engine.method.remote(...)` returns, for `enginefsm.get` or `await`.

    It runs at most once in the actor's life, however often it is submitted.
    """

    __slots__ = ("_arguments", "_number", "_options")

    def __init__(self, engine: Callee, method: str, arguments: Arguments, options: dict[str, Any]) -> None:
        super().__init__(engine, method, launches=method == engine.launch)
        self._arguments: Arguments | None = arguments
        self._options = options
        self._number = engine.ledger.open(self)
        self.submitted_at = self.made_at
        if self.launches:
            engine.launch_called = True
        self._submit()
        self.out = self.ref

    def settle(self, *, answered: bool) -> None:
        """Note that its outcome has arrived, from the actor (`answered`) or from Ray. The actor may forget it."""
        if answered:
            self.engine.ledger.answered = True
        self.engine.ledger.settle(self._number)
        self._arguments = None  # it will not be submitted again

    def _submit(self) -> None:
        arguments = self._arguments
        assert arguments is not None, "a settled call is not submitted again"
        caller, settled = self.engine.ledger.header()
        answered = self.engine.ledger.answered
        header = (caller, self._number, self.attempt, answered, settled, self.method, arguments.keywords)
        on_loop, handle = self.engine.on_loop, self.engine.handle
        method = getattr(handle, _ray_handles.CARRIER) if on_loop else handle.__ray_call__
        submit: Callable[..., Any] = method.options(**self._options).remote
        code = None if answered else _RUN_ONCE_ON_LOOP if on_loop else _RUN_ONCE
        # One argument, not three, because Ray pickles each argument by itself.
        carrier = functools.partial(_ENTER, code, header)
        self.ref = submit(carrier, *arguments.values())

    def __del__(self) -> None:
        # A call that nobody holds will not be submitted again.
        if hasattr(self, "_number"):
            self.engine.ledger.settle(self._number)

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait as `EngineMonitor.gather` does, and return the value. Awaiting again returns it again."""
        assert self.engine.awaiter is not None
        [value] = yield from self.engine.awaiter.gather(self).__await__()
        return value

    def __repr__(self) -> str:
        return f"Call({self.engine.name!r}, {self.method!r}, attempt={self.attempt})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} cannot be sent elsewhere: pass enginefsm.get(call), or call.ref as a plain ObjectRef"
        )


class EngineMethod:
    """A method of an engine. `remote(...)` calls it as on the handle, and returns a `Call`.

    Some methods are called as on the handle, and return what the handle returns: generators, and methods with
    `num_returns` other than 1, with an invocation decorator of their own, or with a tensor transport.
    """

    __slots__ = ("_engine", "_method", "_options")

    def __init__(self, engine: Callee, method: ActorMethod, options: Mapping[str, Any]) -> None:
        self._engine = engine
        self._method = method
        self._options = options

    def options(self, **options: Any) -> EngineMethod:
        """Return the method with Ray's per-call options, as `ActorMethod.options` does."""
        self._method.options(**options)  # so that Ray refuses what it would refuse
        return EngineMethod(self._engine, self._method, {**self._options, **options})

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method. Raise TypeError if the arguments do not fit its signature."""
        method, options = self._method, self._options
        if not _ray_handles.is_plain(method, options):
            return method.options(**options).remote(*args, **kwargs)
        handle, name = self._engine.handle, _ray_handles.method_name(method)
        title = f"{_ray_handles.class_name(handle)}.{name}"
        signature = _ray_handles.signature(method)
        if signature is not None:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{title}: {error}") from None
        carrier = {
            "name": title,
            "concurrency_group": _ray_handles.concurrency_group(handle, name),
            # A retry of Ray's own would run the method again in a restarted actor.
            "max_task_retries": 0,
            "retry_exceptions": False,
            **options,
        }
        return Call(self._engine, name, Arguments(args, kwargs), carrier)

    def __call__(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse, as Ray does: a method of an actor is called through `remote`."""
        name = _ray_handles.method_name(self._method)
        raise TypeError(f"Actor methods cannot be called directly: use engine.{name}.remote(...)")

    def __repr__(self) -> str:
        return f"EngineMethod({self._engine.name!r}, {_ray_handles.method_name(self._method)!r})"


def says_restarted(exception: Exception) -> bool:
    """Return whether the actor answered that it is a new process, which knows nothing of the caller's earlier calls."""
    return _cause_says(exception, _actorside.RESTARTED)


def says_dropped(exception: Exception) -> bool:
    """Return whether the actor answered that it no longer has the outcome of the call."""
    return _cause_says(exception, _actorside.DROPPED)


def _cause_says(exception: Exception, text: str) -> bool:
    cause = exception.cause if isinstance(exception, RayTaskError) else None
    return isinstance(cause, RuntimeError) and cause.args[:1] == (text,)
